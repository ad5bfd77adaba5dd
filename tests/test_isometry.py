"""The isometry report: predicted and measured Jacobians, layers, modes, the estimator, and what it refuses."""

from __future__ import annotations

import itertools
import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import kgraph
from kgraph import EdgeOfChaos
from kgraph.capture import capture
from kgraph.errors import InputError
from kgraph.meanfield import chain_jacobian, critical_point
from kgraph.studies.isometry import measured as isometry_measured
from kgraph.studies.isometry.measured import Segment

JACOBIAN = json.loads((Path(__file__).parent / "reference" / "isometry.json").read_text())["S4_jacobian"]["data"]
RTOL = {"orth": 0.15, "gauss": 0.25}


def noise(*shape: int, seed: int = 0) -> Tensor:
    """Inputs with q = 1 at every place."""
    x = torch.randn(*shape, generator=torch.Generator().manual_seed(seed))
    return x / x.square().mean(1, keepdim=True).sqrt()


def mlp(depth: int, width: int) -> nn.Sequential:
    """``depth`` layers between the first pre-activation and the last."""
    return nn.Sequential(*[m for _ in range(depth + 1) for m in (nn.Linear(width, width), nn.Tanh())])


def cnn(depth: int, width: int) -> nn.Sequential:
    layer = lambda: (nn.Conv2d(width, width, 3, padding=1, padding_mode="circular"), nn.Tanh())  # noqa: E731
    return nn.Sequential(*[m for _ in range(depth + 1) for m in layer()])


def report(model: nn.Module, x: Tensor, law: Any, q: float, seed: int = 0) -> kgraph.Isometry:
    return kgraph.isometry(kgraph.transform(model, EdgeOfChaos(q=q, distribution=law), x, seed=seed), x)


CASES = [(key, float(key.split("_q")[1].split("_")[0]), int(key.split("_L")[1])) for key in JACOBIAN]
Q = {0.0625: 1 / 16, 0.0156: 1 / 64, 0.2: 0.2}


@pytest.mark.parametrize(("key", "q", "depth"), CASES, ids=[case[0] for case in CASES])
def test_theory_of_the_reference(key: str, q: float, depth: int) -> None:
    """Exact theory, and the reference's own Monte Carlo inside its band of it."""
    law = "gauss" if key.startswith("gauss") else "orth"
    row = JACOBIAN[key]
    found = chain_jacobian(critical_point("tanh", q=Q[q]), depth, s_1=-1.0 if law == "gauss" else 0.0)
    assert found.variance == pytest.approx(row["sJJ2_theory"], rel=1e-6) and found.mean == 1
    assert row["sJJ2_mc"] == pytest.approx(found.variance, rel=RTOL[law])


@pytest.mark.parametrize(("q", "depth"), [(1 / 16, 16), (1 / 64, 64), (0.2, 16)])
def test_orthogonal_networks_are_isometric(q: float, depth: int) -> None:
    width = 256 if depth == 16 else 128
    found = [report(mlp(depth, width), noise(1, width), "orthogonal", q, seed) for seed in range(3 if q == 0.2 else 1)]
    theory = chain_jacobian(critical_point("tanh", q=q), depth).variance
    measured = [one.measured for one in found if one.measured is not None]
    assert measured[0].how == "exact SVD"
    assert sum(one.variance for one in measured) / len(found) == pytest.approx(theory, rel=RTOL["orth"])
    assert sum(one.mean for one in measured) / len(found) == pytest.approx(1, abs=0.15)
    assert (found[0].predicted_mean, found[0].predicted_variance) == pytest.approx((1, theory), rel=0.02)


@pytest.mark.parametrize("law", ["delta-orthogonal", "orthogonal"])
def test_orthogonal_convolutions_are_isometric(law: str) -> None:
    found = report(cnn(16, 24), noise(1, 24, 4, 4), law, 1 / 16)
    theory = chain_jacobian(critical_point("tanh", q=1 / 16), 16).variance
    assert found.measured is not None and found.measured.shape == (384, 384)
    assert found.measured.variance == pytest.approx(theory, rel=RTOL["orth"])
    assert found.predicted_variance == pytest.approx(theory, rel=0.02)
    assert found.measured.largest < 2 and found.measured.smallest > 0.05


@pytest.mark.parametrize("model", [mlp(16, 256), cnn(16, 24)], ids=["mlp", "cnn"])
def test_negative_control_gaussian_networks_are_not(model: nn.Module) -> None:
    """Relative to the squared mean, which at a finite width wanders: variance L times larger, singular directions.

    So is the file's own (`test_reference_jacobian.py`, which compares every one of its numbers).
    """
    x = noise(1, 256) if isinstance(model[0], nn.Linear) else noise(1, 24, 4, 4)  # type: ignore[index]
    found = report(model, x, "gaussian", 1 / 16)
    assert found.measured is not None and found.measured.smallest < 1e-8 and found.measured.largest > 4
    theory = chain_jacobian(critical_point("tanh", q=1 / 16), 16, s_1=-1.0).variance
    assert found.measured.variance / found.measured.mean**2 == pytest.approx(theory, rel=RTOL["gauss"])
    assert found.predicted_variance / found.predicted_mean**2 == pytest.approx(theory, rel=0.05)


def test_prediction_for_any_widths() -> None:
    """Rectangular layers, relu, Gaussian and orthogonal alike: the weights' own moments enter."""
    torch.manual_seed(0)
    widths = [300, 500, 200, 400]
    layers = [m for a, b in itertools.pairwise(widths) for m in (nn.Linear(a, b), nn.ReLU())]
    for law in ("orthogonal", "gaussian"):
        x = noise(1, 300)
        shaped = kgraph.transform(nn.Sequential(*layers), EdgeOfChaos(q=1.0, distribution=law), x)  # type: ignore[arg-type]
        found = kgraph.isometry(shaped, x, start="input")
        assert found.measured is not None and found.measured.shape == (400, 300)
        assert found.measured.mean == pytest.approx(found.predicted_mean, rel=0.1)
        assert found.measured.variance == pytest.approx(found.predicted_variance, rel=0.15)


def test_strided_grouped_and_transposed_steps_are_predicted() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Conv2d(16, 32, 3, padding=1),
        nn.ReLU(),
        nn.Conv2d(32, 64, 2, stride=2, groups=2),
        nn.ReLU(),
        nn.ConvTranspose2d(64, 32, 2, stride=2),
        nn.ReLU(),
        nn.Flatten(),
        nn.Linear(32 * 16, 60),
    )
    x = noise(1, 16, 4, 4)
    shaped = kgraph.transform(model, EdgeOfChaos(q=1.0), x)
    found = kgraph.isometry(shaped, x, end="output")
    assert found.measured is not None and found.measured.shape == (60, 512)
    assert found.measured.mean == pytest.approx(found.predicted_mean, rel=0.15)
    assert found.measured.variance == pytest.approx(found.predicted_variance, rel=0.35)


def test_probes_agree_with_the_decomposition(monkeypatch: pytest.MonkeyPatch) -> None:
    x = noise(1, 128)
    shaped = kgraph.transform(mlp(8, 128), EdgeOfChaos(q=0.2), x)
    exact = kgraph.isometry(shaped, x).measured
    monkeypatch.setattr(isometry_measured, "MOST_EXACT", 16)
    found = kgraph.isometry(shaped, x, probes=64).measured
    assert exact is not None and found is not None and "64 probes" in found.how and math.isnan(found.smallest)
    assert exact.mean_error == 0 < found.mean_error
    assert abs(found.mean - exact.mean) < 4 * found.mean_error
    assert abs(found.variance - exact.variance) < 4 * found.variance_error
    assert found.largest == pytest.approx(exact.largest, rel=1e-3)


def test_the_segment_is_the_jacobian() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(2, 3, 3, padding=1), nn.Tanh(), nn.Flatten(), nn.Linear(48, 5)).double()
    x = torch.randn(2, 2, 4, 4, dtype=torch.float64)
    graph = capture(model, x)
    nodes = {node.name: node for node in graph.module.graph.nodes}
    first = next(node for node in nodes.values() if node.op == "placeholder")
    segment = Segment(graph, first, nodes["linear"], "eval")
    want = torch.autograd.functional.jacobian(model, x[:1]).reshape(5, 32)
    assert segment.batched
    torch.testing.assert_close(segment.jvp(torch.eye(32).double()).T, want)
    torch.testing.assert_close(segment.vjp(torch.eye(5).double()), want)


def test_layers_and_modes() -> None:
    x = noise(1, 8, 6, 6)
    shaped = kgraph.transform(cnn(4, 8), EdgeOfChaos(q=0.1), x)
    found = kgraph.isometry(shaped, x, measure=False)
    point = critical_point("tanh", q=0.1)
    assert [layer.depth for layer in found.layers] == [1, 2, 3, 4, 5] and found.measured is None
    for layer in found.layers[:-1]:
        assert layer.sigma_w2 == pytest.approx(point.sigma_w2, rel=1e-5) and abs(layer.distance) < 0.01
        assert layer.multipliers == pytest.approx([1.0] * 36)
        assert layer.xi_q == pytest.approx(point.xi_q, rel=0.1) and layer.xi_c > 100
    assert math.isnan(found.layers[-1].chi_1) and not found.layers[-1].multipliers
    plain = kgraph.isometry(cnn(4, 8), x, measure=False)  # PyTorch's own initialization: sw2 = 1/3
    assert plain.worst.distance < -0.5 and plain.layers[0].xi_c < 2
    assert sorted(plain.layers[0].multipliers)[-2] < 0.9


def test_chaotic_layers_have_the_depth_scale_of_their_fixed_point() -> None:
    x = noise(1, 400)
    shaped = kgraph.transform(mlp(8, 400), EdgeOfChaos(q=1.0), x)
    generator = torch.Generator().manual_seed(0)
    for layer in shaped.modules():
        if isinstance(layer, nn.Linear):
            layer.weight.data *= math.sqrt(2 / float(layer.weight.detach().square().mean() * 400))
            layer.bias.data = torch.randn(400, generator=generator) * math.sqrt(0.05)
    found = kgraph.isometry(shaped, x, measure=False).layers[6]
    want = kgraph.mean_field("tanh", found.sigma_w2, found.sigma_b2)
    assert found.chi_1 > 1.02 and found.xi_c == pytest.approx(want.xi_c, rel=0.03) == pytest.approx(25.2, rel=0.2)


class Skip(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.norm = nn.Linear(12, 12), nn.Linear(12, 12), nn.LayerNorm(12)

    def forward(self, x: Tensor) -> Tensor:
        return torch.tanh(self.norm(x + self.b(torch.tanh(self.a(x)))))


def test_what_is_no_chain_is_measured_but_not_predicted() -> None:
    x = noise(2, 12)
    found = kgraph.isometry(Skip(), x, start="input", end="output")
    assert math.isnan(found.predicted_mean) and found.measured is not None and found.measured.mean > 0
    assert any("add" in note and "no step of a chain" in note for note in found.notes)
    quiet = kgraph.isometry(mlp(2, 12), 3 * noise(1, 12))
    assert any("the example input has q = 9" in note for note in quiet.notes)


def test_output_forms() -> None:
    x = noise(1, 16)
    found = report(mlp(30, 16), x, "orthogonal", 1 / 30)
    text = str(found)
    assert "31 nonlinear layers" in text and "exact SVD, 16 x 16" in text and "hidden" in text
    assert "hidden" not in found.text(all_nodes=True) and found._repr_html_().startswith("<pre")
    data = json.loads(json.dumps(found.to_dict()))
    assert len(data["layers"]) == 31 and data["measured"]["how"] == "exact SVD" and "distance" in data["layers"][0]


def test_refused() -> None:
    x, model = noise(1, 8), mlp(2, 8)
    for options, message in (
        ({"start": "nonsense"}, "no node is called 'nonsense'"),
        ({"start": "output", "end": "input"}, "does not depend"),
        ({"probes": 1}, "at least 2"),
    ):
        with pytest.raises(InputError, match=message):
            kgraph.isometry(model, x, **options)  # type: ignore[arg-type]
    with pytest.raises(InputError, match="no layer of Sequential is read by an affine layer"):
        _ = kgraph.isometry(nn.Sequential(nn.Linear(8, 8), nn.Tanh()), x).worst
