"""order_chaos.json, mc_dcnn and layer_lr: decoders of finite width beside their limits, by public calls.

The file's three seeds have a standard error of their own, spread / sqrt(3). Spreads are those of our draws: .30 of the
mean at a corner of the graph parametrization, which has one parent in every layer and so a chain's fluctuations, .12 in
the bulk. Four standard errors of both are allowed, with Student's factor for a spread estimated from `DRAWS` draws.
"""

from __future__ import annotations

import math
from functools import cache
from typing import Any

import deconvolutional as dc
import pytest
import torch
from deconvolutional import REFERENCE
from scipy import stats
from torch import Tensor, nn

import kgraph

STORED = REFERENCE["mc_dcnn"]
K4 = (4, 2, 1, 0)
WIDTH, SEEDS, DRAWS = 96, 3, 24
SIGMAS = float(stats.t.isf(stats.norm.sf(4), DRAWS - 1))
PIXELS = {"corner": (0, 0), "edge": (0, 16), "bulk": (16, 16), "v0": (16, 17), "v1": (16, 18), "v2": (16, 20)}
"""v0, v1, v2: scaled NTK of the bulk pixel and one whose distance the stride divides that often."""
KINDS = ["uniform", "graph"]
FORMS = ["std", "nrm"]


class Picked(nn.Module):
    """Entries of a network's image as outputs of their own: the mask belongs to the input."""

    def __init__(self, network: nn.Module) -> None:
        super().__init__()
        self.network = network

    def forward(self, x: Tensor, mask: Tensor) -> Tensor:
        return (self.network(x) * mask).flatten(1).sum(1, keepdim=True)


def redraw(model: nn.Module, factors: dict[str, float], generator: torch.Generator) -> None:
    with torch.no_grad():
        for name, p in model.named_parameters():
            p.copy_(torch.randn(p.shape, generator=generator, dtype=p.dtype) * factors[name] ** 0.5)


def scaled_pixels(theta: Tensor) -> dict[str, Tensor]:
    """Of [..., pixels, pixels] in the order of `PIXELS`: the diagonal at the places, cosines with the bulk's."""
    diagonal = theta.diagonal(dim1=-2, dim2=-1)
    cosines = theta[..., 2, :] / (diagonal[..., 2:3] * diagonal).sqrt()
    return {name: (cosines if name.startswith("v") else diagonal)[..., i] for i, name in enumerate(PIXELS)}


@cache
def limits(form: str, kind: str) -> dict[str, float]:
    model: Any = dc.decoder(3, 2, 4, K4, ("relu", form))
    model = dc.graph_parametrized(model, 4, 2) if kind == "graph" else model
    at = torch.tensor([32 * row + column for row, column in PIXELS.values()])
    theta = dc.kernel_matrices(model, 4, 2, 0.1, 4)[0][at][:, at]
    return {name: float(value) for name, value in scaled_pixels(theta).items()}


@cache
def measured(form: str) -> dict[str, dict[str, Tensor]]:
    """Empirical NTK of ``DRAWS`` networks of one output channel: {kind: {place: [draws]}}."""
    model = dc.decoder(3, 2, 4, K4, ("relu", form), channels=WIDTH, outputs=1)
    networks = {"uniform": model, "graph": dc.graph_parametrized(model, 4, 2)}
    factors, generator = dc.variances(model, 0.1, 4), torch.Generator().manual_seed(0)
    masks = torch.zeros(len(PIXELS), 1, 32, 32, dtype=torch.float64)
    for mask, (row, column) in zip(masks, PIXELS.values(), strict=True):
        mask[0, row, column] = 1
    inputs = dc.pixels(4, 2).expand(len(PIXELS), -1, -1, -1), masks
    multipliers = {f"network.{name}": factor for name, factor in factors.items()}
    drawn: dict[str, list[Tensor]] = {kind: [] for kind in KINDS}
    for _ in range(DRAWS):
        redraw(model, factors, generator)
        networks["graph"].load_state_dict(model.state_dict())
        for kind, network in networks.items():
            drawn[kind].append(kgraph.empirical_ntk(Picked(network), inputs, multipliers=multipliers).matrix)
    return {kind: scaled_pixels(torch.stack(thetas)) for kind, thetas in drawn.items()}


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("kind", KINDS)
def test_limits(form: str, kind: str) -> None:
    stored = STORED[f"relu_{form}_{kind}"]["limit"]
    found = limits(form, kind)
    assert {place: found[place] for place in stored} == pytest.approx(stored, rel=1e-10)


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("kind", KINDS)
def test_finite_width(form: str, kind: str) -> None:
    """All of the file's `mc`; over 40 draws none of the 24 was further than 1.9 standard errors of both."""
    stored, found = STORED[f"relu_{form}_{kind}"], measured(form)[kind]
    assert (stored["n"], stored["seeds"]) == (WIDTH, SEEDS)
    for place, values in found.items():
        spread, mean = float(values.std()), float(values.mean())
        assert abs(mean - stored["mc"][place]) < SIGMAS * spread * math.sqrt(1 / SEEDS + 1 / DRAWS), place
        assert abs(mean - limits(form, kind)[place]) < SIGMAS * spread / math.sqrt(DRAWS), place


@pytest.mark.parametrize("form", FORMS)
def test_the_other_parametrization_is_told_apart(form: str) -> None:
    """Negative control: at a corner and an edge uniform weights are many standard errors off the graph's, and back."""
    for kind, other in (KINDS, KINDS[::-1]):
        for place in ("corner", "edge"):
            values = measured(form)[kind][place]
            spread, mean = float(values.std()), float(values.mean())
            wrong = STORED[f"relu_{form}_{other}"]["mc"][place]
            assert abs(mean - wrong) > SIGMAS * spread * math.sqrt(1 / SEEDS + 1 / DRAWS)
            assert abs(mean - limits(form, other)[place]) > SIGMAS * spread / math.sqrt(DRAWS)


def test_output_variances() -> None:
    """fx_rewrite: variance at a corner over the bulk's, 1/35 and 1, before and after the rewrite of one model.

    The file gives neither its width nor its draws: its two ratios are as far from the limits as those of one of our
    networks may be, and ours are within four standard errors of the limits.
    """
    stored = STORED["fx_rewrite"]
    model = dc.decoder(3, 2, 4, K4, channels=48, outputs=48)
    graph, draws = dc.graph_parametrized(model, 4, 2), 24
    generator, factors, x = torch.Generator().manual_seed(0), dc.variances(model, 0.1, 4), dc.pixels(4, 2)
    powers: dict[str, list[Tensor]] = {"before": [], "after": []}
    for _ in range(draws):
        redraw(model, factors, generator)
        graph.load_state_dict(model.state_dict())
        for kind, network in (("before", model), ("after", graph)):
            with torch.no_grad():
                power = network(x)[0].square().mean(0)
            corners = power[[0, 0, -1, -1], [0, -1, 0, -1]].mean()
            powers[kind].append(torch.stack([corners, power[8:-8, 8:-8].mean()]))
    wanted = {"before": REFERENCE["dcnn"]["border2d_relu_uniform_corner_sigma_recursion"], "after": 1.0}
    keys = {"before": "out_var_corner_over_bulk_before", "after": "after"}
    sigmas = float(stats.t.isf(stats.norm.sf(4), draws - 1))
    for kind, rows in powers.items():
        corner, bulk = torch.stack(rows).unbind(1)
        ratio = float(corner.mean() / bulk.mean())
        spread = float((corner - ratio * bulk).std() / bulk.mean())  # of a ratio of means
        assert abs(ratio - wanted[kind]) < sigmas * spread / math.sqrt(draws), kind
        assert abs(stored[keys[kind]] - wanted[kind]) < sigmas * spread, kind
        assert sigmas * spread / math.sqrt(draws) < 0.5 * wanted[kind]  # and that tells them apart


def test_interior_of_one_layer_is_bit_identical() -> None:
    model = dc.decoder(1, 2, 4, K4)
    x = torch.randn(2, 16, 4, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    graph = kgraph.graph_parametrize(model, x)
    graph.load_state_dict(model.state_dict())
    apart = (graph(x) - model(x))[..., 1:-1, 1:-1].detach().abs().max()
    assert float(apart) == STORED["fx_rewrite"]["single_layer_interior_max_diff"]
    assert not torch.equal(graph(x), model(x))


@pytest.mark.parametrize("form", FORMS)
def test_random_mode(form: str) -> None:
    """dcnn, spectrum2d: the Rayleigh quotient of one random mode is one of those of Gaussian modes.

    The file does not give its vector, so all it can be is a sample of a known law: sum_i w_i g_i^2 / sum_i g_i^2.
    """
    stored = REFERENCE["dcnn"][f"spectrum2d_relu_{form}_beta0.1"]["rayleigh_over_meandiag"]
    model = dc.graph_parametrized(dc.decoder(3, 2, 4, K4, ("relu", form)), 4, 2)
    values = torch.linalg.eigvalsh(dc.kernel_matrices(model, 4, 2, 0.1, 4)[0])
    squares = torch.randn(20_000, len(values), generator=torch.Generator().manual_seed(0)).double().square()
    quotients = (squares @ values) / squares.sum(1) / values.mean()
    low, high = (float(quotients.quantile(q)) for q in (1e-4, 1 - 1e-4))
    assert low < stored["random"] < high
    assert high < stored["(-1)^x"] < stored["const"]  # no plane wave is such a mode
