"""Positions of inputs with few channels have cosines that scatter: their averages in closed form."""

from __future__ import annotations

import math
from collections.abc import Callable

import pytest
import torch
from scipy.integrate import quad
from torch import Tensor, nn

import kgraph

WIDTH, SIDE = 64, 4
PLACES = SIDE * SIDE


class Pooled(nn.Module):
    """A cosine network of 1x1 convolutions; E[cos u cos v] = e^-q cosh k of Gaussians of variance q, covariance k."""

    def __init__(self, channels: int, layers: int) -> None:
        super().__init__()
        self.layers = nn.ModuleList(
            constant(nn.Conv2d(WIDTH if i else channels, WIDTH, 1, bias=False)) for i in range(layers)
        )

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.layers:
            x = torch.cos(layer(x))
        return x.mean((2, 3))


def constant(layer: nn.Conv2d) -> nn.Conv2d:
    """sw2 = 1 exactly; signs are shuffled, so that the rows do not sum to 0."""
    fan_in, count = layer.weight[0].numel(), layer.weight.numel()
    signs = torch.tensor([1.0, -1.0]).repeat(count // 2)[
        torch.randperm(count, generator=torch.Generator().manual_seed(0))
    ]
    with torch.no_grad():
        layer.weight.copy_(signs.reshape(layer.weight.shape) / fan_in**0.5)
    return layer


def over_cosines(channels: int, fn: Callable[[float], float]) -> float:
    """E[fn(c)] over cosines in so many dimensions."""
    if channels == 1:
        return (fn(1.0) + fn(-1.0)) / 2

    def density(angle: float) -> float:
        return math.sin(angle) ** (channels - 2)

    whole = quad(density, 0, math.pi)[0]
    return quad(lambda t: fn(math.cos(t)) * density(t), 0, math.pi, epsabs=1e-13)[0] / whole


def pooled_q(channels: int, layers: int) -> float:
    def layer(q: float, k: float) -> float:
        return math.exp(-q) * math.cosh(k)

    def moment(cosine: float) -> float:
        q, k = 1.0, cosine
        for _ in range(layers):
            q, k = layer(q, q), layer(q, k)
        return k

    return (moment(1.0) + (PLACES - 1) * over_cosines(channels, moment)) / PLACES


@pytest.mark.parametrize("layers", [1, 2])
@pytest.mark.parametrize("channels", [1, 2, 3, 4])
def test_averages_over_positions_are_those_over_their_cosines(channels: int, layers: int) -> None:
    """Exact in the first function, and within the Gauss rule's error in the second; cosines of 0 are far off."""
    model = Pooled(channels, layers)
    found = kgraph.analyze(model, torch.randn(2, channels, SIDE, SIDE)).nodes[-1].q
    assert found == pytest.approx(pooled_q(channels, layers), rel=1e-6)
    assert abs(found / pooled_q(10_000, layers) - 1) > 0.004


def test_taps_and_many_channels_scatter_less() -> None:
    """Of 9 taps each meets a pair of its own: the variance of the mean is a ninth, as of 9 times the channels."""
    one, nine = nn.Conv2d(27, WIDTH, 1, bias=False), nn.Conv2d(3, WIDTH, 3, bias=False)

    def q(stem: nn.Conv2d, side: int) -> float:
        model = nn.Sequential(constant(stem), nn.ELU(), nn.AdaptiveAvgPool2d(1))
        return kgraph.analyze(model, torch.randn(2, stem.in_channels, side, side)).nodes[-1].q

    assert q(one, SIDE) == pytest.approx(q(nine, SIDE + 2), rel=1e-3)


class Functions(nn.Module):
    """The mean over positions of a function of the inputs themselves, or of a layer's units."""

    def __init__(self, channels: int, layer: bool) -> None:
        super().__init__()
        self.layer = constant(nn.Conv2d(channels, WIDTH, 1, bias=False)) if layer else nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        return torch.relu(self.layer(x)).mean((2, 3))


@pytest.mark.parametrize("channels", [1, 2, 8])
def test_functions_of_inputs_see_no_cosine(channels: int) -> None:
    """Every channel draws two positions anew: E[relu x relu x'] = 1 / 2 pi, however few channels there are."""
    x = torch.randn(2, channels, SIDE, SIDE)
    independent = (0.5 + (PLACES - 1) / (2 * math.pi)) / PLACES

    found = [kgraph.analyze(Functions(channels, layer), x).nodes[-1].q for layer in (False, True)]

    assert found[0] == pytest.approx(independent, rel=1e-12)
    assert found[1] > (1 + 0.1 / channels) * independent


def test_layers_on_functions_of_few_inputs() -> None:
    """cos(W relu(x)): covariances k scatter by Var(relu relu') / channels; their higher moments are a Gauss rule's."""
    channels = 2

    class Behind(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = constant(nn.Conv2d(channels, WIDTH, 1, bias=False))

        def forward(self, x: Tensor) -> Tensor:
            return torch.cos(self.layer(torch.relu(x))).mean((2, 3))

    found = kgraph.analyze(Behind(), torch.randn(2, channels, SIDE, SIDE)).nodes[-1].q

    generator = torch.Generator().manual_seed(0)
    a, b = torch.randn(2, 400_000, channels, generator=generator, dtype=torch.float64).relu()
    k, q = (a * b).mean(1), 0.5  # sw2 = 1, and kgraph's probes have one q

    def pooled(of_pairs: float) -> float:
        return math.exp(-q) * (math.cosh(q) + (PLACES - 1) * of_pairs) / PLACES

    higher = pooled(float((torch.cosh(k) - 1 - k.square() / 2).mean())) - pooled(0.0)
    assert found == pytest.approx(pooled(float(torch.cosh(k).mean())), abs=higher)
    assert abs(found / pooled(math.cosh(float(k.mean()))) - 1) > 0.03 > higher


def test_taps_that_no_two_outputs_share_do_not_scatter() -> None:
    """2x2 positions, padded by 1, read in steps of 2 by 2x2 taps: each tap meets one of them."""
    model = nn.Sequential(nn.Conv2d(3, WIDTH, 2, stride=2, padding=1), nn.ReLU(), nn.AdaptiveAvgPool2d(1))
    assert kgraph.analyze(model, torch.randn(2, 3, 2, 2)).nodes[-1].q > 0


def test_copies_of_one_position_do_not_scatter() -> None:
    """A layer that reads all positions leaves one; its copies are equal, whatever function follows."""

    class Copied(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = nn.Linear(2 * PLACES, WIDTH)

        def forward(self, x: Tensor) -> Tensor:
            return torch.relu(self.layer(x.flatten(1)).unsqueeze(1).repeat(1, 3, 1) + 0.5)

    found = kgraph.analyze(Copied(), torch.randn(2, 2, SIDE, SIDE)).nodes[-1]
    assert found.c_positions == pytest.approx(1.0, abs=1e-12)


def test_sums_of_what_a_norm_assumed_are_assumed() -> None:
    """x + GroupNorm(x) is one function of x with the norm's gain as a number, which of few channels it is not."""

    class Added(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.norm = nn.GroupNorm(WIDTH // 4, WIDTH)

        def forward(self, x: Tensor) -> Tensor:
            return x + self.norm(x.clamp(-0.5, 1))

    found = kgraph.analyze(Added(), torch.randn(2, WIDTH, SIDE, SIDE))
    assert {row.how for row in found.nodes if row.op in ("group_norm", "add")} == {"assumed"}
