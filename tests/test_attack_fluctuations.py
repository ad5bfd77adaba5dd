"""Measured fluctuations beside the recursions: what counts as a disagreement, and wrong arguments."""

from __future__ import annotations

import itertools

import pytest
import torch
from torch import nn

import kgraph


def chain(widths: list[int], phi: type[nn.Module]) -> nn.Sequential:
    layers: list[nn.Module] = [nn.Linear(widths[0], widths[1])]
    for fan_in, fan_out in itertools.pairwise(widths[1:]):
        layers += [phi(), nn.Linear(fan_in, fan_out)]
    return nn.Sequential(*layers)


def test_relus_p_is_zero_to_leading_order_only() -> None:
    """<phi phi''> = 0 for relu: P is 0 in 1/n, and 1/n^2 terms, half as large at twice the width, are all of it."""
    found = {}
    for width in (16, 32):
        measured = kgraph.measure_fluctuations(
            chain([width] * 4, nn.ReLU),
            torch.randn(1, width),
            draws=400,
            dntk=True,
            distribution="orthogonal",
            weight_variance=2.0,
            bias_variance=0.0,
        )
        node = measured.nodes[-1]
        assert node.scaled["P"] > 10 * node.error["P"]  # seen,
        assert measured.disagreements(quantities=("P",)) == []  # but no disagreement
        found[width] = node.scaled["P"], node.error["P"]
    (narrow, e_narrow), (wide, e_wide) = found[16], found[32]
    # a/n + b/n^2 at n = 16, 32: the ratio is 2 up to a relative b/(32 a), taken to be below 1/4, and 4 errors
    assert abs(narrow / wide - 2) < 0.5 + 4 * 2 * ((e_narrow / narrow) ** 2 + (e_wide / wide) ** 2) ** 0.5


def test_a_wrong_p_is_still_a_disagreement() -> None:
    model, x = chain([48] * 4, nn.Tanh), torch.randn(1, 48)
    variances = {"weight_variance": 1.3, "bias_variance": 0.1}
    measured = kgraph.measure_fluctuations(model, x, draws=200, dntk=True, distribution="gaussian", **variances)  # pyright: ignore
    other = kgraph.fluctuations(model, x, distribution="orthogonal", **variances)  # pyright: ignore
    # Three layers of width 48: 3/48 of B is far below the difference of the two laws, here a third of P.
    assert measured.disagreements(quantities=("P",)) == []
    assert measured.disagreements(other, quantities=("P",))


def test_a_widening_to_nothing() -> None:
    with pytest.raises(kgraph.InputError, match="above 0"):
        kgraph.fluctuations(chain([4, 4, 4], nn.Tanh), torch.randn(1, 4)).widening(0.0)


def test_numbers_of_draws_and_probes_are_whole() -> None:
    model, x = chain([4, 4, 4, 4], nn.Tanh), torch.randn(1, 4)
    with pytest.raises(kgraph.InputError, match="whole"):
        kgraph.measure_fluctuations(model, x, draws=3.5)  # pyright: ignore
    with pytest.raises(kgraph.InputError, match="whole"):
        kgraph.isometry(model, x, probes=2.5)  # pyright: ignore
