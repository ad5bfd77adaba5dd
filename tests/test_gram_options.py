"""Wrong requests of `kernels` are refused by name, before anything is computed."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

import kgraph
from kgraph.errors import InputError, ModelError
from kgraph.rules.weights import real_mean

X = torch.randn(3, 4, generator=torch.Generator().manual_seed(0))


def model() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 2))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"variances": {"0.wieght": 1.0}}, r"variances names '0.wieght'.*Such as 0.weight"),
        ({"variances": {"0.weight": -1.0}}, r"variances\['0.weight'\] is -1.0"),
        ({"variances": {"0.weight": "a"}}, r"variances\['0.weight'\] is 'a'"),
        ({"variances": 3}, "variances is a int"),
        ({"multipliers": {"1.weight": 1.0}}, "multipliers names '1.weight'"),
        ({"nodes": 3}, "nodes is 3"),
        ({"nodes": "linear"}, "nodes is 'linear'"),
        ({"memory_gib": "a"}, "memory_gib is 'a'"),
        ({"memory_gib": 0}, "memory_gib is 0"),
        ({"x2": torch.randn(2, 7)}, r"x1 and x2 differ: \[\(4,\)\] against \[\(7,\)\]"),
    ],
    ids=["typo", "negative", "text", "number", "multiplier", "nodes", "node", "memory", "nothing", "shapes"],
)
def test_wrong_options(options: dict[str, Any], message: str) -> None:
    with pytest.raises(InputError, match=message):
        kgraph.kernels(model(), X, **options)


def test_no_inputs_and_no_values() -> None:
    with pytest.raises(InputError, match="there are no inputs"):
        kgraph.nngp(model(), X[:0])
    with pytest.raises(ModelError, match=r"0\.weight is on the meta device"):
        kgraph.nngp(model().to("meta"), X)


def test_a_constant_bias_has_a_mean_and_a_drawn_one_has_none() -> None:
    """Few entries: their own spread is the noise, by Student's law; one entry alone says nothing."""
    generator = torch.Generator().manual_seed(0)
    assert real_mean(torch.ones(4)) == 1.0 and real_mean(torch.zeros(4)) == 0.0 and real_mean(torch.ones(1)) == 0.0
    drawn = [torch.empty(size).uniform_(-1, 1, generator=generator) for size in (2, 3, 5, 16, 64) for _ in range(200)]
    assert all(real_mean(bias) == 0.0 for bias in drawn)
    assert real_mean(1.0 + 0.1 * drawn[-1]) == pytest.approx(1.0, abs=0.05)
