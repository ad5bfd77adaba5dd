"""Layers that read few given numbers with weights of no Gaussian law: what they give is no Gaussian.

A unit is sum_i w_i x_i. Of weights with excess kurtosis k (uniform ones: -1.2) its own is k S, S = sum x_i^4 /
(sum x_i^2)^2: 1 for one lit pixel, 1 / n for n numbers alike, about 3 / n for n Gaussian ones. Its second moments are
as they are; E[relu(u) relu(v)] changes by up to k S q / (8 pi), and what is left of it where means are subtracted,
or where averages over positions cancel, by a larger share.
"""

from __future__ import annotations

from torch import Tensor

from kgraph.biases import excess_kurtosis
from kgraph.gram.field import Field, Geometry, Known
from kgraph.gram.rules.table import Context
from kgraph.gram.taps import tap_sums

_SHOWS = 1 / 8
"""Excess kurtosis of a unit that changes E[relu(u)^2] = q / 2 by a hundredth."""
_FURTHEST = 2.0
"""No symmetric law has less excess kurtosis than a sign's, -2; of heavier tails the share tells as much."""


def reads_few(context: Context, name: str, weight: Tensor, u: Field, geometry: Geometry | None) -> bool:
    """Whether the units of a layer are further from Gaussian than shows."""
    if not isinstance(u, Known) or name in context.variances or weight.is_meta or weight.is_complex():
        return False
    share = _share(u.data.detach().abs().double(), geometry)
    return _FURTHEST * share > _SHOWS and share * abs(context.measured(excess_kurtosis, name, weight)) > _SHOWS


def _share(x: Tensor, geometry: Geometry | None) -> float:
    """S, weighted by the squared energy that a unit reads."""
    second, fourth = x.square().sum(1), x.pow(4).sum(1)
    if geometry is not None:
        second, fourth = tap_sums(second, geometry), tap_sums(fourth, geometry)
    total = float(second.square().sum())
    return float(fourth.sum()) / total if total > 0 else 0.0


__all__ = ["reads_few"]
