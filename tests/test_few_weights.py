"""Layers that read few given numbers: their units have the law of the weights, and functions of them say so."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor, nn

import kgraph
from kgraph.biases import excess_kurtosis

WIDTH = 4096


def relus(fan_in: int, law: str, *, conv: bool = False) -> nn.Sequential:
    first = nn.Conv2d(fan_in, WIDTH, 1, bias=False) if conv else nn.Linear(fan_in, WIDTH, bias=False)
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        if law == "uniform":
            first.weight.uniform_(-math.sqrt(3), math.sqrt(3), generator=generator)
        else:
            first.weight.normal_(generator=generator)
    return nn.Sequential(first, nn.ReLU()).double()


def two_of(fan_in: int) -> Tensor:
    return torch.eye(fan_in, dtype=torch.float64)[:2]


def test_a_unit_of_one_uniform_weight_is_no_gaussian() -> None:
    """E[relu(w) relu(w')] = (E|w| / 2)^2 = 3 / 16 of two uniform weights of variance 1; 1 / (2 pi) of Gaussian ones."""
    model = relus(4, "uniform")
    with torch.no_grad():
        first, second = model(two_of(4))

    found = kgraph.kernels(model, two_of(4))

    error = math.sqrt(1 / WIDTH)  # relu(w) relu(w') has variance 1 / 4 - 9 / 256 < 1 / 4
    assert float(first @ second) / WIDTH == pytest.approx(3 / 16, abs=2 * error)
    assert abs(float(found.nngp[0, 1]) - 3 / 16) > 0.02
    assert found.output.how == "assumed"


@pytest.mark.parametrize("conv", [False, True])
@pytest.mark.parametrize(
    ("fan_in", "law", "how"), [(4, "normal", "exact"), (4, "uniform", "assumed"), (256, "uniform", "exact")]
)
def test_only_few_weights_of_another_law_show(fan_in: int, law: str, how: str, conv: bool) -> None:
    x = torch.randn(2, fan_in, dtype=torch.float64, generator=torch.Generator().manual_seed(1))

    found = kgraph.kernels(relus(fan_in, law, conv=conv), x[..., None, None] if conv else x)

    assert found.output.how == how


def test_second_moments_alone_do_not_ask_for_the_law() -> None:
    assert kgraph.kernels(relus(4, "uniform")[0], two_of(4)).output.how == "exact"


def test_the_excess_kurtosis_is_the_laws_or_none() -> None:
    generator = torch.Generator().manual_seed(0)

    assert excess_kurtosis(torch.rand(10_000, generator=generator) - 0.5) == pytest.approx(-1.2, abs=0.05)
    assert excess_kurtosis(torch.randn(10_000, generator=generator)) == 0.0
    assert excess_kurtosis(torch.zeros(10)) == 0.0
