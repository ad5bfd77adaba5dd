"""Maxima over windows against brute force."""

from __future__ import annotations

import pytest
import torch
from gram_montecarlo import CHANNELS, Case, Net, check_nngp, conv, images, prepared
from torch import Tensor, nn
from torch.nn.functional import relu

import kgraph


def net(pool: nn.Module) -> Net:
    def forward(m: Net, x: Tensor) -> Tensor:
        return m.b(m.pool(relu(m.a(x)))).mean((2, 3))

    return Net(forward, a=conv(3), pool=pool, b=conv())


def test_positions_of_a_maximum_are_drawn_together() -> None:
    """Equal positions have their own value for a maximum, also where the kernel itself needs no pairs of positions."""

    def net(pool: nn.Module) -> nn.Module:
        return prepared(Net(lambda m, x: m.pool(m.a(x)).flatten(1), a=conv(3, size=1), pool=pool), False)

    constant = images()[..., :1, :1].expand(3, 3, 4, 4)
    kept, pooled = (kgraph.nngp(net(pool), constant) for pool in (nn.Identity(), nn.MaxPool2d(2)))
    torch.testing.assert_close(pooled, kept, rtol=1e-6, atol=1e-6)  # moments of the draws are set right
    apart = kgraph.nngp(net(nn.MaxPool2d(2)), images())
    assert not torch.allclose(apart, kgraph.nngp(net(nn.Identity()), images()), rtol=0.1)


POOLS = {
    "max": (lambda: net(nn.MaxPool2d(2)), lambda: net(nn.AvgPool2d(2))),
    "max with overlap and padding": (lambda: net(nn.MaxPool2d(3, 2, 1)), lambda: net(nn.MaxPool2d(2))),
    "average with padding": (
        lambda: net(nn.AvgPool2d(3, 2, 1)),
        lambda: net(nn.AvgPool2d(3, 2, 1, count_include_pad=True, divisor_override=4)),
    ),
    "adaptive": (lambda: net(nn.AdaptiveAvgPool2d(3)), lambda: net(nn.AvgPool2d(2, 1, 1))),
}


@pytest.mark.parametrize("name", POOLS)
def test_pooled(name: str) -> None:
    right, wrong = POOLS[name]
    check_nngp(Case(right, wrong, images, 2, CHANNELS, 100))


@pytest.mark.parametrize("size", [1, 2])
def test_adaptive_maxima_are_those_of_equal_windows(size: int) -> None:
    """4 x 4 positions in 1 or 2 x 2 windows; the same draws, and the NTK too."""
    x = images()
    side = x.shape[-1]
    assert side % size == 0
    pools = nn.AdaptiveMaxPool2d(size), nn.MaxPool2d(side // size), nn.AdaptiveAvgPool2d(size)
    found, expected, wrong = (kgraph.kernels(prepared(net(p), False), x) for p in pools)
    assert found.ntk is not None and expected.ntk is not None
    torch.testing.assert_close(found.nngp, expected.nngp, rtol=0.02, atol=0)
    torch.testing.assert_close(found.ntk, expected.ntk, rtol=0.04, atol=0)
    assert not torch.allclose(wrong.nngp, expected.nngp, rtol=0.05)
