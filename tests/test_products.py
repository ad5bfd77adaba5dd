"""Products of branches double a relative error of q: bounded by the shortcut weight, or said with numbers."""

from __future__ import annotations

import math
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import kgraph
from kgraph.products import Q_BOUND

WIDTH, INPUTS = 256, 32
BIAS = 2 / WIDTH
"""Relative, of one block: products of finite width."""


class Gated(nn.Module):
    """x + W (phi(A x) * B x), the norm in front removed by the transform."""

    def __init__(self, activation: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.norm, self.activation = nn.LayerNorm(WIDTH), activation
        self.a, self.b, self.leave = nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        h = self.norm(x)
        return x + self.leave(self.activation(self.a(h)) * self.b(h))


class Excited(nn.Module):
    """A squeeze-and-excite of vectors, in a residual branch."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.down, self.up = nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, WIDTH // 4), nn.Linear(WIDTH // 4, WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        h = torch.relu(self.a(x))
        return x + h * torch.sigmoid(self.up(torch.relu(self.down(h))))


def net(block: Callable[[], nn.Module], depth: int) -> nn.Sequential:
    return nn.Sequential(nn.Linear(INPUTS, WIDTH), *[block() for _ in range(depth)], nn.Linear(WIDTH, WIDTH))


def growth(module: nn.Module) -> tuple[float, float]:
    """Mean over inputs of ``d ln q(output) / d ln q(input)`` at q = 1 and its standard error, by plain torch."""
    x = torch.randn(64, INPUTS, dtype=torch.float64, generator=torch.Generator().manual_seed(3))
    x = x / x.square().mean(1, keepdim=True).sqrt()
    module, step = module.double().eval(), 1e-3
    with torch.no_grad():
        high, low = (module(math.exp(sign * step) * x).square().mean(1).log() for sign in (1, -1))
    slopes = (high - low) / (4 * step)  # ln q of the input changes by 2 step either way
    return float(slopes.mean()), float(slopes.std()) / 8


def spread(module: nn.Module) -> float:
    x = torch.randn(256, INPUTS, generator=torch.Generator().manual_seed(4))
    with torch.no_grad():
        sizes = module.eval()(x).square().mean(1)
    return float(sizes.quantile(0.95) / sizes.quantile(0.05))


@pytest.mark.parametrize("activation", [F.relu, F.silu], ids=["reglu", "swiglu"])
def test_deep_gated_networks_get_a_weight_that_bounds_q(activation: Callable[[Tensor], Tensor]) -> None:
    depth = 8
    result = kgraph.transform(net(lambda: Gated(activation), depth), "tat", torch.randn(4, INPUTS))
    record = result.kgraph
    weight = record.shortcut_weight
    assert weight > 0.8 and any("relative error of q grow" in note for note in record.ledger.notes)
    assert not any("relative error" in line for line in record.ledger.unmet)
    assert 2 * (2 - weight**2) ** (depth - 1) <= Q_BOUND < 2 * (2 - 0.8**2) ** (depth - 1)
    expected = (2 - weight**2) ** depth
    found, error = growth(result)
    assert abs(found - expected) < 4 * error + expected * BIAS * depth
    # inputs differ by a factor 2.3; 8 is what that becomes at most: 2.3^2.5, and the network's own fluctuation
    assert spread(result.float()) < 10


def test_a_weight_that_is_given_is_kept_and_the_growth_is_said() -> None:
    depth, weight = 5, 0.6
    result = kgraph.transform(net(lambda: Gated(F.relu), depth), "tat", torch.randn(4, INPUTS), shortcut_weight=weight)
    assert result.kgraph.shortcut_weight == weight
    said = [line for line in result.kgraph.ledger.unmet if "relative error of q" in line]
    assert len(said) == 1 and f"{2 * (2 - weight**2) ** (depth - 1):.4g}-fold" in said[0]
    found, error = growth(result)
    expected = (2 - weight**2) ** depth
    assert abs(found - expected) < 4 * error + expected * BIAS * depth


def test_products_in_a_row_are_said() -> None:
    """Without shortcuts no weight helps: three products have 2^3."""

    class Chain(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layers = nn.ModuleList(nn.Linear(WIDTH, WIDTH) for _ in range(6))
            self.enter, self.leave = nn.Linear(INPUTS, WIDTH), nn.Linear(WIDTH, 3)

        def forward(self, x: Tensor) -> Tensor:
            x = self.enter(x)
            for a, b in zip(self.layers[::2], self.layers[1::2], strict=True):
                x = torch.relu(a(x)) * b(x)
            return self.leave(x)

    ledger = kgraph.transform(Chain(), "tat", torch.randn(4, INPUTS)).kgraph.ledger
    assert any("8-fold from enter" in line or "8-fold from x" in line for line in ledger.unmet), ledger.unmet


@pytest.mark.parametrize("block", [Excited, lambda: nn.Sequential(nn.Linear(WIDTH, WIDTH), nn.ReLU())])
def test_nothing_is_said_where_errors_stay(block: Callable[[], nn.Module]) -> None:
    """Excitation adds a few percent a block, layers alone nothing; the weight stays at its default."""
    result = kgraph.transform(net(block, 5), "tat", torch.randn(4, INPUTS))
    assert not any("relative error" in line for line in (*result.kgraph.ledger.unmet, *result.kgraph.ledger.notes))
    assert growth(result)[0] < Q_BOUND
