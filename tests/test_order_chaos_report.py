"""`kgraph.order_chaos`: r, scaled NTK, constant mode, borders and checkerboards, as text, HTML, data and picture."""

from __future__ import annotations

import json
import math
from typing import Any

import deconvolutional as dc
import pytest
import torch
from deconvolutional import REFERENCE
from torch import nn

import kgraph
from kgraph import NTKChaos
from kgraph.meanfield.order_chaos import activation_moments, balanced, fully_connected
from kgraph.studies.order_chaos.pixels import measure_pixels, period_share

K4 = (4, 2, 1, 0)


def mlp(width: int, depth: int = 4) -> nn.Sequential:
    layers = [m for i in range(depth - 1) for m in (nn.Linear(width if i else 8, width), nn.ReLU())]
    return nn.Sequential(*layers, nn.Linear(width, 3))


@pytest.mark.parametrize(
    ("method", "regime"),
    [(NTKChaos(beta=0.5, form="standardized"), "order"), (NTKChaos(r=1.0), "edge"), (NTKChaos(), "chaos")],
    ids=["order", "edge", "chaos"],
)
def test_regimes(method: NTKChaos, regime: str) -> None:
    model = kgraph.transform(mlp(512), method, torch.randn(2, 8))
    report = kgraph.order_chaos(model)
    relu = activation_moments("relu")
    shift = relu.mean if method.form == "normalized" else 0.0
    expected = method.r or relu.r(method.beta, shift)
    assert report.regime == regime and report.r == pytest.approx(expected, rel=0.02)
    assert [layer.name for layer in report.layers] == ["1", "3", "5"]
    assert [layer.layer for layer in report.layers] == ["2", "4", "6"]
    assert all(layer.q == pytest.approx(1, abs=0.2) for layer in report.layers)


def test_scaled_ntk_is_the_recursion() -> None:
    """Two inputs of cosine .3: the table of the fully connected recursion, to the sampling error of the weights."""
    x = torch.tensor([[1.0, 0.0], [0.3, math.sqrt(1 - 0.09)]]).repeat(1, 4) * math.sqrt(2.0)
    x = x[:, [0, 1, 2, 3, 4, 5, 6, 7]]
    report = kgraph.order_chaos(kgraph.transform(mlp(512), NTKChaos(), x), x)
    expected = float(fully_connected(balanced("relu", "normalized"), 4, 0.3).vartheta[-1])
    low, mean, high = report.spread
    assert low == mean == high == pytest.approx(expected, abs=0.03)
    assert report.constant_share == pytest.approx((1 + mean) / 2, abs=0.01)


def test_deep_order_is_the_constant_mode() -> None:
    shaped = kgraph.transform(mlp(128, 30), NTKChaos(beta=0.5, form="standardized"), torch.randn(2, 8))
    report = kgraph.order_chaos(shaped, inputs=5)
    assert report.constant_share > 0.9 and report.ntk.shape == (5, 5)
    chaos = kgraph.order_chaos(kgraph.transform(mlp(128, 30), NTKChaos(), torch.randn(2, 8)), inputs=5)
    assert chaos.constant_share < 0.25


SHARES = {
    "spectrum2d_relu_std_beta0.1": (3, 2, 4, K4, 4, 0.1),
    "spectrum2d_relu_nrm_beta0.1": (3, 2, 4, K4, 4, 0.1),
    "spectrum1d_L8_relu_std_beta0.1": (8, 1, 1, (2, 2, 0, 0), 1, 0.1),
    "spectrum1d_L8_relu_std_beta0.5": (8, 1, 1, (2, 2, 0, 0), 1, 0.5),
    "spectrum1d_L8_relu_nrm_beta0.1": (8, 1, 1, (2, 2, 0, 0), 1, 0.1),
}


@pytest.mark.parametrize("name", SHARES)
def test_checkerboard_share(name: str) -> None:
    layers, dims, size, taps, parents, beta = SHARES[name]
    model = dc.graph_parametrized(
        dc.decoder(layers, dims, size, taps, ("relu", name.split("relu_")[1][:3])), size, dims
    )
    theta, sigma = dc.kernel_matrices(model, size, dims, beta, parents)
    side = size * 2**layers
    pixels = measure_pixels(theta, sigma, (side,) * dims, 2)
    assert pixels.checkerboard_share == pytest.approx(REFERENCE["dcnn"][name]["period2_trace_share"], rel=1e-9)
    assert pixels.border_ratio == pytest.approx(1, rel=1e-9) and pixels.interior_unevenness == pytest.approx(1)


def test_share_of_extremes() -> None:
    board = torch.outer(*[torch.tensor([1.0, 0.0] * 4).repeat(8).double()] * 2)
    assert period_share(board, (8, 8), 2) == pytest.approx(1)
    assert period_share(torch.eye(64).double(), (8, 8), 2) == pytest.approx(4 / 64)
    assert period_share(torch.eye(49).double(), (7, 7), 3) == pytest.approx(9 / 49)


def generator() -> nn.Sequential:
    return nn.Sequential(
        nn.ConvTranspose2d(16, 96, 4, 1, 0),
        nn.BatchNorm2d(96),
        nn.ReLU(),
        nn.ConvTranspose2d(96, 64, 4, 2, 1),
        nn.BatchNorm2d(64),
        nn.ReLU(),
        nn.ConvTranspose2d(64, 1, 4, 2, 1),
        nn.Tanh(),
    )


@pytest.fixture(scope="module")
def reports() -> dict[str, kgraph.OrderChaosReport]:
    torch.manual_seed(0)
    z, model = torch.randn(4, 16, 1, 1), generator()
    methods = {"uniform": NTKChaos(beta=0.3, form="standardized", graph=False), "graph": NTKChaos()}
    return {kind: kgraph.order_chaos(kgraph.transform(model, m, z), z) for kind, m in methods.items()}


def test_generator(reports: dict[str, kgraph.OrderChaosReport]) -> None:
    uniform, graph = reports["uniform"], reports["graph"]
    assert uniform.pixels is not None and graph.pixels is not None
    assert (uniform.regime, graph.regime) == ("order", "chaos")
    assert uniform.pixels.places == graph.pixels.places == (16, 16) and graph.pixels.period == 2
    assert uniform.pixels.border_ratio < 0.4 and graph.pixels.border_ratio == pytest.approx(1, abs=1e-6)
    assert uniform.pixels.variance_ratio < 0.5 and graph.pixels.variance_ratio == pytest.approx(1, abs=1e-6)
    assert uniform.pixels.checkerboard_share > 5 * graph.pixels.checkerboard_share


def test_views(reports: dict[str, kgraph.OrderChaosReport]) -> None:
    report = reports["uniform"]
    text = str(report)
    assert "GraphModule" not in text and "order" in text and "period 2" in text and "border" in text
    page = report._repr_html_()
    assert page.count("<tr>") == 1 + len(report.layers) == 3
    data = json.loads(json.dumps(report.to_dict()))
    assert data["regime"] == "order" and data["pixels"]["places"] == [16, 16] and len(data["vartheta"]) == 4
    figure = report.plot()
    assert len([axes for axes in figure.axes if axes.get_title()]) == 4


def test_plots_of_lines_and_vectors() -> None:
    line: Any = nn.Sequential(nn.ConvTranspose1d(4, 8, 4, 2, 1), nn.ReLU(), nn.ConvTranspose1d(8, 2, 4, 2, 1))
    report = kgraph.order_chaos(line, torch.randn(3, 4, 4))
    assert report.pixels is not None and report.pixels.places == (16,)
    assert len([axes for axes in report.plot().axes if axes.get_title()]) == 4
    vector = kgraph.order_chaos(mlp(16))
    assert vector.pixels is None and len([axes for axes in vector.plot().axes if axes.get_title()]) == 2


def test_large_images_are_left_out_and_said_to_be() -> None:
    model = nn.Sequential(nn.ConvTranspose2d(2, 4, 4, 2, 1), nn.ReLU(), nn.Conv2d(4, 1, 1))
    report = kgraph.order_chaos(model, torch.randn(2, 2, 40, 40))
    assert report.pixels is None and "6400 pixels are left out" in str(report)


def test_models_without_activation() -> None:
    report = kgraph.order_chaos(nn.Linear(4, 3))
    assert report.regime is None and math.isnan(report.r) and "no activation" in str(report)
