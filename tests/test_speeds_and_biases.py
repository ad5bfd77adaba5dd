"""What is trained, and how fast: frozen and computed weights. And biases that are no Gaussians.

The NTK's oracle is autograd on plain networks; that of biases, draws of them.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional

import kgraph
from kgraph.errors import InputError


def autograd_says(build: Callable[[], nn.Module], x: Tensor, draws: int = 24) -> tuple[float, float]:
    """NTK of an input with itself over trainable parameters, mean of a few outputs; with its standard error."""
    found = []
    for seed in range(draws):
        torch.manual_seed(seed)
        model = build()
        trained = [p for p in model.parameters() if p.requires_grad]
        outputs = model(x)[0, :4]
        squares = [g.square().sum() for o in outputs for g in torch.autograd.grad(o, trained, retain_graph=True)]
        found.append(torch.stack(squares).sum() / len(outputs))
    table = torch.stack(found)
    return float(table.mean()), float(table.std()) / math.sqrt(draws)


def unit(*shape: int) -> Tensor:
    x = torch.randn(shape, generator=torch.Generator().manual_seed(9))
    return x / x.square().mean(-1, keepdim=True).sqrt()


class Equalized(nn.Module):
    """Unit normal weights, scaled in forward; biases too."""

    def __init__(self, fan_in: int, out: int, speed: float = 0.1) -> None:
        super().__init__()
        self.weight, self.bias = nn.Parameter(torch.randn(out, fan_in)), nn.Parameter(torch.zeros(out))
        self.gain, self.speed = math.sqrt(2 / fan_in), speed

    def forward(self, x: Tensor) -> Tensor:
        return functional.linear(x, self.weight * self.gain, self.bias * self.speed)


class Standardized(nn.Linear):
    def forward(self, x: Tensor) -> Tensor:
        w = self.weight - self.weight.mean(1, keepdim=True)
        return functional.linear(x, w / w.norm(dim=1, keepdim=True), self.bias)


def frozen(layer: nn.Module) -> nn.Module:
    return layer.requires_grad_(False)


class Random(nn.Module):
    """Random features: the weights are a buffer."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("weight", torch.randn(256, 64) / 8)
        self.out = nn.Linear(256, 64)

    def forward(self, x: Tensor) -> Tensor:
        return self.out(torch.relu(functional.linear(x, self.weight)))


class ByHand(nn.Module):
    """A gain for every channel, halved, and a bias of one number: parameters used entry by entry."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.gain, self.bias = nn.Parameter(torch.full((width,), 3.0)), nn.Parameter(torch.zeros(1))

    def forward(self, x: Tensor) -> Tensor:
        return x * (self.gain / 2) + self.bias


NETWORKS: dict[str, Callable[[], nn.Module]] = {
    "equalized": lambda: nn.Sequential(Equalized(64, 256), nn.ReLU(), Equalized(256, 64)),
    "standardized": lambda: nn.Sequential(Standardized(64, 256), nn.ReLU(), nn.Linear(256, 64)),
    "first layer frozen": lambda: nn.Sequential(frozen(nn.Linear(64, 256)), nn.ReLU(), nn.Linear(256, 64)),
    "last layer frozen": lambda: nn.Sequential(nn.Linear(64, 256), nn.ReLU(), frozen(nn.Linear(256, 64))),
    "norm frozen": lambda: nn.Sequential(nn.Linear(64, 256), frozen(nn.LayerNorm(256)), nn.ReLU(), nn.Linear(256, 64)),
    "buffers": Random,
    "gain and bias by hand": lambda: nn.Sequential(nn.Linear(64, 256), ByHand(256), nn.ReLU(), nn.Linear(256, 64)),
}


@pytest.mark.parametrize("name", NETWORKS)
def test_the_ntk_is_that_of_training(name: str) -> None:
    torch.manual_seed(0)
    row = kgraph.analyze(NETWORKS[name](), torch.randn(2, 64)).final
    value, error = autograd_says(NETWORKS[name], unit(1, 64))
    assert abs(row.ntk - value) <= 4 * error + 0.02 * value, (row.ntk, value, error)


def test_frozen_parameters_count_when_asked() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(64, 256), nn.ReLU(), nn.Linear(256, 64))
    trained = kgraph.analyze(model, torch.randn(2, 64))
    frozen(model[0])
    left = kgraph.analyze(model, torch.randn(2, 64))
    assert left.final.ntk < trained.final.ntk
    assert any("frozen" in note and "0.weight" in note for note in left.analysis.notes)
    counted = kgraph.analyze(model, torch.randn(2, 64), count_frozen=True)
    assert counted.final.ntk == pytest.approx(trained.final.ntk, rel=1e-12)
    with pytest.raises(InputError, match="count_frozen"):
        kgraph.analyze(model, torch.randn(2, 64), count_frozen="yes")  # type: ignore[arg-type]


class Biased(nn.Module):
    """Weights of variance v over the fan-in, uniform biases of variance b."""

    def __init__(self, function: Callable[[Tensor], Tensor], v: float, b: float) -> None:
        super().__init__()
        self.layer, self.function = nn.Linear(64, 4096), function
        nn.init.normal_(self.layer.weight, std=math.sqrt(v / 64))
        nn.init.uniform_(self.layer.bias, -math.sqrt(3 * b), math.sqrt(3 * b))

    def forward(self, x: Tensor) -> Tensor:
        return self.function(self.layer(x))


@pytest.mark.parametrize(("v", "b"), [(0.5, 1.0), (0.1, 2.0), (1.0, 0.6)])
def test_uniform_biases_count_as_they_are(v: float, b: float) -> None:
    """E sin^2(z) = (1 - exp(-2 v) sin(2 s)/(2 s)) / 2 and E sin sin' of unrelated inputs, s = sqrt(3 b)."""
    torch.manual_seed(0)
    row = kgraph.analyze(Biased(torch.sin, v, b), torch.randn(2, 64)).final
    s = math.sqrt(3 * b)
    uniform = math.sin(2 * s) / (2 * s)
    assert row.how == "quadrature"
    assert row.q == pytest.approx((1 - math.exp(-2 * v) * uniform) / 2, rel=0.02)  # the biases at hand are 4096
    assert row.c[0] * row.q == pytest.approx(math.exp(-v) * (1 - uniform) / 2, abs=0.01)


def test_gaussian_biases_of_that_size_differ() -> None:
    """Negative control: the test tells the two laws apart, and Gaussian biases keep the closed form."""
    torch.manual_seed(0)
    model = Biased(torch.sin, 0.5, 1.0)
    uniform = kgraph.analyze(model, torch.randn(2, 64)).final
    nn.init.normal_(model.layer.bias)
    gaussian = kgraph.analyze(model, torch.randn(2, 64)).final
    assert gaussian.how == "exact"
    assert gaussian.q == pytest.approx((1 - math.exp(-2 * 1.5)) / 2, rel=0.02)
    assert abs(uniform.q / gaussian.q - 1) > 0.05


def test_a_small_uniform_bias_keeps_the_closed_form() -> None:
    assert kgraph.analyze(Biased(torch.relu, 1.0, 0.02), torch.randn(2, 64)).final.how == "exact"


def test_scaled_and_shifted_units_keep_their_biases() -> None:
    torch.manual_seed(0)
    inside = kgraph.analyze(Biased(lambda z: torch.sin(3 * z + 0.4), 0.05, 0.2), torch.randn(2, 64)).final
    z = 3 * (math.sqrt(0.05) * torch.randn(2_000_000) + math.sqrt(0.6) * (2 * torch.rand(2_000_000) - 1)) + 0.4
    assert inside.q == pytest.approx(float(torch.sin(z).square().mean()), rel=0.02)


def test_draws_say_that_they_take_biases_for_gaussian() -> None:
    row = kgraph.analyze(Biased(lambda z: torch.softmax(z, -1), 0.2, 1.0), torch.randn(2, 64)).final
    assert row.how == "assumed"
    assert "biases" in row.note


class Positions(nn.Module):
    """Tokens that know their places: a table read at ids that an input gives."""

    def __init__(self) -> None:
        super().__init__()
        self.tokens, self.places, self.out = nn.Embedding(50, 64), nn.Embedding(8, 64), nn.Linear(64, 64, bias=False)

    def forward(self, ids: Tensor, places: Tensor) -> Tensor:
        return self.out(self.tokens(ids) + 3.0 * self.places(places + 1))


def test_a_table_read_at_given_places_has_its_part() -> None:
    """Of 1 (its row) 9 at the table of places, 1 at that of tokens; then the layer's own K."""
    model = Positions()
    report = kgraph.analyze(model, {"ids": torch.arange(8).reshape(2, 4), "places": torch.arange(4).expand(2, 4)})
    total = report["add_1"] if "add_1" in [n.name for n in report.nodes] else report["add"]
    gain = 64 * float(model.out.weight.detach().square().mean())
    assert total.ntk == pytest.approx(10, rel=1e-9)
    assert report.final.ntk == pytest.approx(64 * total.q + gain * 10, rel=1e-5)


class _Passed(torch.autograd.Function):
    """Rounds forwards, and passes gradients through as if it had not."""

    @staticmethod
    def forward(ctx: object, u: Tensor) -> Tensor:
        return torch.round(u)

    @staticmethod
    def backward(ctx: object, *gradients: Tensor) -> Tensor:
        return gradients[0]


class Passed(nn.Module):
    def forward(self, u: Tensor) -> Tensor:
        return _Passed.apply(u)


def test_a_backward_written_by_hand_leaves_no_ntk() -> None:
    model = nn.Sequential(nn.Linear(16, 32), Passed(), nn.Linear(32, 8))
    report = kgraph.analyze(model, torch.randn(2, 16))
    assert math.isnan(report.final.ntk)
    assert any("written by hand" in note for note in report.analysis.notes)
    plain = kgraph.analyze(nn.Sequential(nn.Linear(16, 32), nn.ReLU(), nn.Linear(32, 8)), torch.randn(2, 16))
    assert math.isfinite(plain.final.ntk)


def test_a_gain_in_front_of_a_function_has_the_tangent_that_depends_on_the_field() -> None:
    """d/dg sin(g x) = x cos(g x): E[x^2 cos^2(g x)] = 1/2 + (1/2 - 2 g^2) exp(-2 g^2), not E[x^2] E[cos^2]."""
    g = 0.9

    class Gained(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.gain = nn.Parameter(torch.full((64,), g))

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return torch.sin(x * self.gain)

    found = kgraph.analyze(Gained(), torch.randn(2, 64)).nodes[-1].ntk
    assert found == pytest.approx(0.5 + (0.5 - 2 * g**2) * math.exp(-2 * g**2), rel=1e-8)
    assert abs(found - (1 + math.exp(-2 * g**2)) / 2) > 0.3
