"""The kernel of PReLU: against leaky relu channel by channel, the finite network, and its NTK."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional

import kgraph
from kgraph.canonical import aten
from kgraph.capture import Graph, capture
from kgraph.kernel import DIFF, SAME, Apply, Kernel, Pairs, Product, Sum
from kgraph.maps import pointwise
from kgraph.nonlinear import find_regions
from kgraph.propagate import Propagation, propagate
from kgraph.rules import table

SLOPES = {
    "usual": (0.25, 0.1, 0.4, 0.3),
    "signs": (-1.0, -0.3, 0.0, 1.0),
    "steep": (2.0, -1.5, 0.5, 1.0),
}


class Net(nn.Module):
    """linear, prelu, linear; no biases, q = 1 at the prelu."""

    def __init__(self, slopes: tuple[float, ...], width: int = 16, act: nn.Module | None = None) -> None:
        super().__init__()
        self.enter, self.leave = (nn.Linear(width, width, bias=False) for _ in range(2))
        self.act = act if act is not None else nn.PReLU(len(slopes))
        for layer in (self.enter, self.leave):
            nn.init.orthogonal_(layer.weight)
        if act is None:
            self.act.weight.data = torch.tensor(slopes)

    def forward(self, x: Tensor) -> Tensor:
        return self.leave(self.act(self.enter(x)))


def spread(slopes: tuple[float, ...], width: int = 16) -> tuple[float, ...]:
    """The slopes repeated over all channels."""
    return slopes * (width // len(slopes))


def walked(model: nn.Module, inputs: Any) -> tuple[Graph, Propagation]:
    graph = capture(model, inputs, verify=False)
    return graph, propagate(graph)


def kernel_of(model: nn.Module, inputs: Any, name: str = "prelu") -> Kernel:
    _, result = walked(model, inputs)
    return next(kernel for node, kernel in result.kernels().items() if node.name == name)


def by_channel(slopes: tuple[float, ...], cov: Tensor) -> tuple[Tensor, Tensor, float]:
    """Mean over channels of leaky relu's own closed forms at q = 1: K, Kdot and the mean."""
    one = torch.ones((), dtype=torch.float64)
    exact = [float(torch.tensor(a)) for a in slopes]  # as float32 holds them
    duals = [pointwise("leaky_relu", a).dual(one, one, cov) for a in exact]
    means = [float(pointwise("leaky_relu", a).mean(one)) for a in exact]
    k, slope = (torch.stack([dual[i] for dual in duals]).mean(0) for i in (0, 1))
    return k, slope, sum(means) / len(means)


def test_one_slope_is_leaky_relu() -> None:
    model = Net((0.25,))
    kernel = kernel_of(model, torch.randn(2, 16))
    twin = Net((), act=nn.LeakyReLU(0.25))
    twin.load_state_dict({k: v for k, v in model.state_dict().items() if k != "act.weight"})
    other = kernel_of(twin, torch.randn(2, 16), "leaky_relu")
    assert torch.equal(kernel.merged.cov, other.merged.cov) and torch.equal(kernel.merged.slope, other.merged.slope)
    assert isinstance(kernel.merged.expr, Sum)  # the leaky relu, and the tangent of its slope
    (_, leaky), (_, tangent) = kernel.merged.expr.terms
    assert isinstance(leaky.expr, Apply) and leaky.expr.fn.closed is not None
    assert not tangent.cov.any() and tangent.ntk.any()
    assert kernel.how.name == "exact"


@pytest.mark.parametrize("name", SLOPES)
def test_slopes_of_channels_are_averaged_exactly(name: str) -> None:
    slopes = spread(SLOPES[name])
    part = kernel_of(Net(slopes), torch.randn(2, 16)).merged
    k, slope, mean = by_channel(slopes, Pairs().inputs)
    # rounding of sw2, measured on float32 weights, is the only error: about 1e-8
    assert torch.allclose(part.cov[:, SAME], k, rtol=1e-6, atol=1e-7)
    assert torch.allclose(part.slope[:, SAME], slope, rtol=1e-6, atol=1e-7)
    assert part.mean == pytest.approx(mean, rel=1e-6, abs=1e-7)
    # negative control: the mean slope alone, or the relu, is far off
    for wrong in ((sum(slopes) / len(slopes),), (0.0,)):
        assert not torch.allclose(part.cov[:, SAME], by_channel(wrong, Pairs().inputs)[0], rtol=1e-3)


def test_slopes_along_positions() -> None:
    """Dimension 1 is a position here: two positions meet two slopes, E[a_i a_j] over i != j, and a cosine in R^16."""
    slopes = SLOPES["usual"]
    part = kernel_of(Net(slopes), torch.randn(2, 4, 16)).merged
    cosines, one = torch.linspace(-1, 1, 20_001, dtype=torch.float64), torch.ones((), dtype=torch.float64)
    density = (1 - cosines.square()).pow(13 / 2)
    both = pointwise("relu").dual(one, one, cosines)[0]  # of u and v; of u and -v at the cosines turned about
    up, crossed = float(both @ density / density.sum()), -float(both.flip(0) @ density / density.sum())
    products = [a * b for i, a in enumerate(slopes) for j, b in enumerate(slopes) if i != j]
    mean = sum(slopes) / 4
    expected = up + 2 * mean * crossed + sum(products) / len(products) * up
    assert float(part.cov[Pairs.SELF, DIFF]) == pytest.approx(expected, rel=1e-6)
    assert float(part.q) == pytest.approx(0.5 + sum(a * a for a in slopes) / 4 / 2, rel=1e-6)


def test_channel_groups_meet_their_own_slopes() -> None:
    class Two(Net):
        def forward(self, x: Tensor) -> Tensor:
            return self.act(torch.cat([self.enter(x), 3 * self.leave(x)], 1))

    slopes = (*[0.25] * 16, *spread(SLOPES["signs"]))
    kernel = kernel_of(Two(slopes), torch.randn(2, 16))
    first, second = kernel.parts
    assert float(first.q) == pytest.approx(0.5 + 0.25**2 / 2, rel=1e-6)
    assert float(second.q) == pytest.approx(9 * float(by_channel(slopes[16:], torch.ones(1).double())[0]), rel=1e-6)
    assert isinstance(first.expr, Sum) and isinstance(first.expr.terms[0][1].expr, Apply)
    assert isinstance(second.expr, Sum) and isinstance(second.expr.terms[1][1].expr, Product)


def test_sum_with_its_own_input() -> None:
    """u + phi_a(u) is 2 leaky_relu((1 + a) / 2): the slopes' law is used in joint draws, its error as reported."""

    class Skip(Net):
        def forward(self, x: Tensor) -> Tensor:
            x = self.enter(x)
            return self.leave(x + self.act(x))

    slopes = spread(SLOPES["usual"])
    row = kgraph.analyze(Skip(slopes), torch.randn(2, 16))["add"]
    expected = 4 * by_channel(tuple((1 + a) / 2 for a in slopes), torch.ones(1, dtype=torch.float64))[0]
    assert row.how == "sampled"
    assert row.q == pytest.approx(float(expected), rel=4 * max(float(row.note.removeprefix("+-")), 4096**-0.5))


class Functional(nn.Module):
    """prelu as a function, between convolutions."""

    def __init__(self, width: int = 96) -> None:
        super().__init__()
        self.slopes = nn.Parameter(torch.linspace(-0.5, 0.9, width))
        self.one, self.two = nn.Conv2d(3, width, 3, padding=1), nn.Conv2d(width, width, 1)

    def forward(self, x: Tensor) -> Tensor:
        return functional.prelu(self.two(functional.prelu(self.one(x), self.slopes)), self.slopes[:1])


def deep(slopes: int, width: int = 128) -> nn.Module:
    layers: list[nn.Module] = []
    for _ in range(3):
        layers += [nn.Linear(width, width), nn.PReLU(slopes)]
        layers[-1].weight.data.copy_(torch.linspace(-1.2, 0.8, slopes) if slopes > 1 else torch.tensor([0.3]))
    return nn.Sequential(*layers, nn.Linear(width, width))


MODELS = {
    "one": lambda: (deep(1), torch.randn(2, 128)),
    "channels": lambda: (deep(128), torch.randn(2, 128)),
    "function": lambda: (Functional(), torch.randn(2, 3, 8, 8)),
}


@pytest.mark.parametrize("name", MODELS)
def test_monte_carlo_agrees(name: str) -> None:
    model, inputs = MODELS[name]()
    predicted = kgraph.analyze(model, inputs).analysis
    measured = kgraph.montecarlo(model, inputs, draws=12)
    assert measured.disagreements(predicted) == []
    assert max(node.depth for node in predicted.nodes) == {"one": 3, "channels": 3, "function": 2}[name]


def test_monte_carlo_finds_a_wrong_rule(monkeypatch: pytest.MonkeyPatch) -> None:
    right = table._RULES[aten.prelu.default]
    monkeypatch.setitem(table._RULES, aten.prelu.default, lambda context, x, weight: right(context, x, torch.zeros(1)))
    model, inputs = MODELS["channels"]()
    measured = kgraph.montecarlo(model, inputs, draws=12)
    assert measured.disagreements(kgraph.analyze(model, inputs).analysis)


@pytest.mark.parametrize("slopes", [(0.25,), spread(SLOPES["signs"])], ids=["one", "channels"])
@pytest.mark.parametrize("parametrization", ["standard", "ntk"])
def test_ntk_counts_the_slopes(slopes: tuple[float, ...], parametrization: str) -> None:
    """T = g K + sw2 (Kdot g + own), with g = fan_in or 1; own = E[min(u, 0)^2] = 1/2, or E[a^2] / 2 of unit slopes."""
    square = sum(a * a for a in slopes) / len(slopes)
    gain = 16 if parametrization == "standard" else 1
    k = (1 + square) / 2
    found = kgraph.analyze(Net(slopes), torch.randn(2, 16), parametrization=parametrization).final.ntk
    own = 0.5 if parametrization == "standard" else square / 2
    assert found == pytest.approx(gain * k + k * gain + own, rel=1e-6)


def test_a_slope_that_is_no_parameter_adds_nothing_to_the_ntk() -> None:
    class Fixed(Net):
        def __init__(self) -> None:
            super().__init__((0.25,))
            del self.act
            self.register_buffer("slope", torch.tensor([0.25]))

        def forward(self, x: Tensor) -> Tensor:
            return self.leave(functional.prelu(self.enter(x), self.get_buffer("slope")))

    k = (1 + 0.25**2) / 2
    assert kgraph.analyze(Fixed(), torch.randn(2, 16)).final.ntk == pytest.approx(32 * k, rel=1e-6)


@pytest.mark.parametrize("count", [1, 96])
def test_ntk_is_the_finite_networks(count: int) -> None:
    """Mean over draws of the finite network's own NTK, to 4 standard errors and an O(1/width) term."""
    values, model = [], deep(count, 96) if count > 1 else deep(1, 96)
    x = torch.randn(1, 96, generator=torch.Generator().manual_seed(3))
    x = x / x.square().mean().sqrt()
    predicted = [kgraph.analyze(model, x.repeat(2, 1)).final.ntk]
    for _ in range(12):
        for layer in model.modules():
            if isinstance(layer, nn.Linear):
                layer.reset_parameters()
        rows = [torch.autograd.grad(out, list(model.parameters()), retain_graph=True) for out in model(x)[0][:24]]
        values.append(sum(float(g.square().sum()) for row in rows for g in row) / len(rows))
    measured = torch.tensor(values)
    allowed = 4 * float(measured.std()) / math.sqrt(len(values)) + 4 / 96 * predicted[0]
    assert abs(float(measured.mean()) - predicted[0]) < allowed


def test_the_region_of_unequal_slopes_has_the_averaged_map() -> None:
    slopes = spread(SLOPES["usual"])
    graph, result = walked(Net(slopes), torch.randn(2, 16))
    (region,) = find_regions(graph.module, result.kernels().__contains__)
    one, c = torch.ones((), dtype=torch.float64), torch.tensor([0.0, 0.5, 1.0], dtype=torch.float64)
    value, slope = region.fn.dual(one, one, c)
    k, kdot, mean = by_channel(slopes, c)
    assert torch.allclose(value, k, rtol=1e-9) and torch.allclose(slope, kdot, rtol=1e-9)
    assert float(region.fn.mean(one)) == pytest.approx(mean, rel=1e-9)


def test_random_relu_has_the_mean_slope_and_the_noise_of_its_own() -> None:
    lower, upper = 1 / 8, 1 / 3
    mean, variance = (lower + upper) / 2, (upper - lower) ** 2 / 12
    model = Net((), act=nn.RReLU(lower, upper))
    trained = kernel_of(model.train(), torch.randn(2, 16), "rrelu").merged
    assert float(trained.q) == pytest.approx((1 + mean**2 + variance) / 2, rel=1e-6)
    assert float(trained.cov[Pairs.UNIT, SAME]) == pytest.approx((1 + mean**2) / 2, rel=1e-6)
    row = kgraph.analyze(model, torch.randn(2, 16), mode="eval")["rrelu"]
    assert row.q == pytest.approx((1 + mean**2) / 2, rel=1e-6) and row.how == "exact"
