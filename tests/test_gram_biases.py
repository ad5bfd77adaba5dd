"""Kernels of layers with uniform biases: the average over them, by adaptive quadrature of the definition."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from scipy.integrate import quad
from torch import nn

import kgraph

WIDTH, HALF, VARIANCE = 4000, 0.7, 0.05


def layer(*, uniform: bool) -> nn.Linear:
    """Biases at the quantiles of their law: uniform on [-.7, .7], or Gaussian of as large a variance."""
    made = nn.Linear(WIDTH, WIDTH)
    quantiles = (torch.arange(WIDTH, dtype=torch.float64) + 0.5) / WIDTH
    values = HALF * (2 * quantiles - 1)
    if not uniform:
        values = math.sqrt(2) * torch.erfinv(2 * quantiles - 1) * HALF / math.sqrt(3)
    with torch.no_grad():
        made.weight.zero_()
        made.weight.view(-1)[::2] = math.sqrt(2 * VARIANCE / WIDTH)  # E w^2 = VARIANCE / WIDTH
        made.weight[::2] *= -1  # about zero, but no row sums to 0
        made.bias.copy_(values[torch.randperm(WIDTH, generator=torch.Generator().manual_seed(0))])
    return made


def second_moment(cosine: float) -> float:
    """E[sin(3 u) sin(3 v)] with u, v = b + r: over the bias, of cos(3 (r - s)) / 2 - cos(6 b + 3 (r + s)) / 2."""
    apart, together = (math.exp(-9 * VARIANCE * (1 - sign * cosine)) for sign in (1, -1))
    over_biases = quad(lambda b: math.cos(6 * b) / (2 * HALF), -HALF, HALF)[0]
    return apart / 2 - over_biases * together / 2


class Sine(nn.Module):
    def __init__(self, first: nn.Linear) -> None:
        super().__init__()
        self.first = first

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return torch.sin(3 * self.first(x))


def test_uniform_biases_are_averaged_over() -> None:
    x = torch.zeros(2, WIDTH, dtype=torch.float64)
    x[0] = 1.0
    x[1, : WIDTH // 4], x[1, WIDTH // 4 :] = 1.0, -1.0
    cosines = (x @ x.T / WIDTH).numpy()
    asked = np.vectorize(second_moment)(cosines)

    with torch.no_grad():
        uniform, gaussian = (kgraph.kernels(Sine(layer(uniform=u)).double(), x).nngp for u in (True, False))

    assert uniform.numpy() == pytest.approx(asked, rel=2e-4)  # the biases are quantiles: 1 / width each
    assert np.abs(gaussian.numpy() / asked - 1).max() > 0.02
