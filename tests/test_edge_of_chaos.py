"""EdgeOfChaos: the variances it draws, what it says of models it does not fit, depth, and its promise."""

from __future__ import annotations

import importlib
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
from kgraph.errors import InputError, PassError
from kgraph.meanfield import critical_point
from kgraph.passes.base import Workspace
from kgraph.passes.edge_of_chaos import CriticalWeights
from kgraph.systems import resolve_methods

DEEP = json.loads((Path(__file__).parent / "reference" / "isometry.json").read_text())["S4_deep_propagation_c32"]
EXAMPLES = Path(__file__).parents[1] / "examples"


@pytest.fixture
def load(monkeypatch: pytest.MonkeyPatch) -> Any:
    monkeypatch.syspath_prepend(EXAMPLES)
    return importlib.import_module


def mlp(depth: int, width: int, activation: type[nn.Module] = nn.Tanh) -> nn.Sequential:
    return nn.Sequential(
        *[m for _ in range(depth) for m in (nn.Linear(width, width), activation())], nn.Linear(width, 3)
    )


def noise(*shape: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(0))


def sigma_w2(layer: Any) -> float:
    return float(layer.weight.detach().double().square().mean()) * layer.weight[0].numel()


@pytest.mark.parametrize("activation", [nn.Tanh, nn.GELU, nn.SiLU, nn.ELU, nn.ReLU, nn.Hardtanh])
def test_weights_lie_on_the_critical_line(activation: type[nn.Module]) -> None:
    model = mlp(10, 64, activation)
    shaped: Any = kgraph.transform(model, "edge-of-chaos", noise(2, 64))
    point = critical_point(activation(), q=0.1)
    layers = [m for m in shaped.modules() if isinstance(m, nn.Linear)]
    assert sigma_w2(layers[0]) == pytest.approx(0.1, rel=1e-5)
    for layer in layers[1:-1]:
        assert sigma_w2(layer) == pytest.approx(point.sigma_w2, rel=1e-5)
        gram = (layer.weight @ layer.weight.T).detach() / point.sigma_w2
        torch.testing.assert_close(gram, torch.eye(64), rtol=0, atol=1e-5)
    biases = torch.cat([layer.bias.detach() for layer in layers[1:]])
    assert float(biases.square().mean()) == pytest.approx(max(point.sigma_b2, 0), rel=0.25, abs=1e-12)
    for node in shaped.kgraph.after.nodes:
        if node.module and node.op == "linear" and node is not shaped.kgraph.after.nodes[-1]:
            assert node.q == pytest.approx(0.1, rel=0.15)


def test_ledger_and_recipe() -> None:
    shaped: Any = kgraph.transform(mlp(10, 16), EdgeOfChaos(), noise(2, 16))
    ledger = shaped.kgraph.ledger
    assert ledger.counts() == {"re-draw linear": 11} and not ledger.unmet
    assert "q* = 0.1 over 10 nonlinear layers" in ledger.notes[0]
    assert "Adam 0.001" in ledger.notes[1] and "grows with depth" in ledger.notes[1]
    assert ledger.changes[0].why == "delta-orthogonal, it brings q = 1 to q*"
    assert "sigma_w^2 1.17757, sigma_b^2 0.0008323" in ledger.changes[1].after
    assert shaped.kgraph.method == EdgeOfChaos() == resolve_methods("edge-of-chaos")[0]
    assert EdgeOfChaos(remove_norms=True).sets == {"weights", "norms"}


def test_a_given_bias_or_q() -> None:
    shaped: Any = kgraph.transform(mlp(4, 64), EdgeOfChaos(sigma_b=math.sqrt(0.05)), noise(2, 64))
    assert sigma_w2(shaped.get_submodule("2")) == pytest.approx(1.7609546, rel=1e-5)
    shaped = kgraph.transform(mlp(4, 64), EdgeOfChaos(q=0.01), noise(2, 64))
    assert sigma_w2(shaped.get_submodule("2")) == pytest.approx(1.0197108, rel=1e-5)


class Mixed(nn.Module):
    """Two activations, a stride, groups, a transposed convolution, a norm, a layer without bias."""

    def __init__(self) -> None:
        super().__init__()
        self.a = nn.Conv2d(3, 16, 3, stride=2, padding=1)
        self.norm = nn.BatchNorm2d(16)
        self.b = nn.ConvTranspose2d(16, 16, 4, stride=2, padding=1)
        self.c = nn.Conv2d(16, 32, 3, padding=1, groups=4, bias=False)
        self.d = nn.Linear(32 * 64, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = torch.tanh(self.norm(self.a(x)))
        x = nn.functional.gelu(self.b(x))
        return self.d(nn.functional.gelu(self.c(x)).flatten(1))


@pytest.mark.parametrize("law", ["delta-orthogonal", "orthogonal", "gaussian"])
def test_every_kind_of_layer(law: Any) -> None:
    torch.manual_seed(0)
    shaped: Any = kgraph.transform(Mixed(), EdgeOfChaos(q=0.2, distribution=law), noise(2, 3, 8, 8))
    unmet = " ".join(shaped.kgraph.ledger.unmet)
    assert "batch_norm normalize: q there is what they make it" in unmet and "has no bias" in unmet
    tanh, gelu = (critical_point(name, q=0.2).sigma_w2 for name in ("tanh", "gelu_exact"))
    rel = 0.2 if law == "gaussian" else 1e-5
    assert sigma_w2(shaped.c) == pytest.approx(gelu, rel=rel) and sigma_w2(shaped.d) == pytest.approx(gelu, rel=rel)
    per_place = float(shaped.b.weight.detach().square().sum()) / 16 / 4  # over 4 residues of the stride
    assert per_place == pytest.approx(tanh, rel=rel)
    assert torch.isfinite(shaped(noise(2, 3, 8, 8))).all()
    removed: Any = kgraph.transform(Mixed(), EdgeOfChaos(q=0.2, remove_norms=True), noise(2, 3, 8, 8))
    assert "normalize" not in " ".join(removed.kgraph.ledger.unmet)


class Residual(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(8, 8), nn.Linear(8, 8)

    def forward(self, x: Tensor) -> Tensor:
        x = self.a(x)
        return x + self.b(torch.tanh(x))


def test_sums_are_told() -> None:
    shaped: Any = kgraph.transform(Residual(), "edge-of-chaos", noise(2, 8))
    assert any("add join several random tensors" in line for line in shaped.kgraph.ledger.unmet)


def test_borders_are_told() -> None:
    """All taps read the zero padding, the delta tap does not; circular padding has no border."""
    for mode, law, told in (
        ("zeros", "orthogonal", True),
        ("zeros", "delta-orthogonal", False),
        ("circular", "orthogonal", False),
        ("reflect", "orthogonal", False),
    ):
        layers = [m for _ in range(3) for m in (nn.Conv2d(4, 4, 3, padding=1, padding_mode=mode), nn.Tanh())]
        shaped: Any = kgraph.transform(nn.Sequential(*layers), EdgeOfChaos(distribution=law), noise(2, 4, 3, 3))  # type: ignore[arg-type]
        assert any("read zeros at the borders" in line for line in shaped.kgraph.ledger.unmet) is told


def test_no_critical_point_is_an_error_that_says_where_one_is() -> None:
    with pytest.raises(InputError, match=r"smallest q that has one is 45.*EdgeOfChaos\(q=...\)"):
        kgraph.transform(mlp(2, 8, nn.Sigmoid), "edge-of-chaos", noise(2, 8))
    shaped: Any = kgraph.transform(mlp(2, 8, nn.Sigmoid), EdgeOfChaos(q=60.0), noise(2, 8))
    assert torch.isfinite(shaped(noise(2, 8))).all()


def test_options_are_checked() -> None:
    for options in ({"q": 1.0, "sigma_b": 0.1}, {"q": 0.0}, {"sigma_b": -1.0}, {"distribution": "uniform"}):
        with pytest.raises(InputError):
            EdgeOfChaos(**options)  # type: ignore[arg-type]
    with pytest.raises(InputError, match="both set the model's weights"):
        resolve_methods(["edge-of-chaos", "dks"])


def test_a_broken_promise_names_the_layer(monkeypatch: pytest.MonkeyPatch) -> None:
    """Negative control: weights that are not the critical ones must not pass."""
    draw = CriticalWeights._draw

    def wrong(self: CriticalWeights, node: Any, weight: Tensor, gain: float, generator: Any) -> None:
        draw(self, node, weight, 1.1 * gain, generator)

    monkeypatch.setattr(CriticalWeights, "_draw", wrong)
    with pytest.raises(PassError, match=r"CriticalWeights broke its promise.*off the critical line"):
        kgraph.transform(mlp(3, 8), "edge-of-chaos", noise(2, 8))


def test_a_wandering_q_breaks_the_promise(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(
        "kgraph.passes.edge_of_chaos._draw_bias",
        lambda work, layer, generator: bool(work.tensor(layer.node.args[2]).data.fill_(0.5).numel()),
    )
    with pytest.raises(PassError, match=r"q\* = 0.333 is not kept at linear"):
        CriticalWeights().run(Workspace(capture(mlp(3, 8), noise(2, 8))))


def test_seed_and_copy() -> None:
    model = mlp(3, 8)
    before = [p.clone() for p in model.parameters()]
    one, two = (kgraph.transform(model, "edge-of-chaos", noise(2, 8), seed=s) for s in (0, 0))
    other = kgraph.transform(model, "edge-of-chaos", noise(2, 8), seed=1)
    assert all(torch.equal(p, b) for p, b in zip(model.parameters(), before, strict=True))
    assert all(torch.equal(p, q) for p, q in zip(one.parameters(), two.parameters(), strict=True))
    assert not all(torch.equal(p, q) for p, q in zip(one.parameters(), other.parameters(), strict=True))


def test_five_hundred_layers(load: Any) -> None:
    """The 10,000-layer example in short: q and gradients arrive whole; Gaussian weights lose them."""
    example = load("ten_thousand_layers")
    run = example.main(["--quick"])
    assert 0.8 < run.q_ratio < 1.25 and 0.8 < run.gradient_ratio < 1.25
    gaussian = example.measure(500, distribution="gaussian")
    assert gaussian.q_ratio < 0.05 and gaussian.gradient_ratio < 1e-3


def chain(depth: int, law: str, seed: int) -> tuple[float, float]:
    """q and squared gradient norm over ``depth`` layers of 32 channels as the reference takes them: from q* on."""
    point = critical_point("tanh", q=1 / depth)
    g = torch.Generator().manual_seed(seed)
    z = torch.randn(8, 32, generator=g)
    z = first = (z / z.square().mean(1, keepdim=True).sqrt() * point.q**0.5).requires_grad_()
    for _ in range(depth):
        weight = torch.empty(32, 32)
        if law == "orthogonal":
            kgraph.initializers.reinitialize_weight_(weight, gain=point.sigma_w2**0.5, generator=g)
        else:
            weight = torch.randn(32, 32, generator=g) * (point.sigma_w2 / 32) ** 0.5
        z = torch.tanh(z) @ weight.T + torch.randn(32, generator=g) * point.sigma_b2**0.5
    direction = torch.randn(z.shape, generator=g)
    (gradient,) = torch.autograd.grad(z, first, direction)
    q = float(z.detach().square().mean() / first.detach().square().mean())
    return q, float(gradient.square().sum() / direction.square().sum())


def test_deep_propagation_of_the_reference() -> None:
    """Bands of the reference: orthogonal within [.5, 2], Gaussian below .05 and 1e-3 at 1,000 layers."""
    first = DEEP["data"]["first"]
    assert 0.5 < first["deep_orth_L1000_c32"]["qL_over_q0"] < 2
    assert all(0.5 < value < 2 for value in chain(1000, "orthogonal", 0))
    q, gradient = chain(1000, "gaussian", 0)
    assert q < 0.05 and gradient < 1e-3
    rows = [row for rows in DEEP["data"]["orth_more_seeds"].values() for row in rows]
    assert all(0.5 < value < 2 for row in rows for value in row.values())


def test_thousand_layers_example_learns(load: Any, tmp_path: Path) -> None:
    figure = tmp_path / "figures" / "deep.png"
    curves = load("thousand_layer_cnn").main(["--quick", "--figure", str(figure)])
    final = {curve.name: curve.accuracy[-1] for curve in curves}
    assert final["delta-orthogonal"] > 0.6 and final["delta-orthogonal"] > final["Gaussian"] + 0.2
    assert figure.stat().st_size > 1000


def test_phase_diagram_example(load: Any, tmp_path: Path) -> None:
    diagram = load("phase_diagram").main(["--quick", "--figure", str(tmp_path / "phases.png")])
    assert float(diagram.chi_1[0, 0]) < 1 < float(diagram.chi_1[0, -1])


class _Branch(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(32, 32)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.layer(torch.tanh(x))


def test_a_layer_behind_a_sum_keeps_its_q() -> None:
    """The sum's q follows from weights that are drawn here too: that of before would be the wrong one to correct."""
    model = nn.Sequential(nn.Linear(16, 32), *(_Branch() for _ in range(4)), nn.Linear(32, 8))
    shaped = kgraph.transform(model, "edge-of-chaos", torch.randn(2, 16))
    last = [change for change in shaped.kgraph.ledger.changes if change.node.startswith("5 ")]
    assert "sigma_w^2 1," in last[0].after and "joins several tensors" in last[0].why
    rows = {row.name: row for row in shaped.kgraph.after.nodes}
    assert rows["linear_5"].q == pytest.approx(rows[rows["linear_5"].inputs[0]].q)
