"""The mean of its inputs that a layer does not see, since its weight sums to 0 over the fan-in.

With N = C k entries of C channels at k taps, sw2 = N E[w^2], and S(i) the sum of E[u] over the taps that meet an input,

    K'(i, j) = sum_o sw2_o K at tap o - sw2 S(i) S(j) / k^2

The measured E[w^2] holds the factor N / (N - 1) of entries that depend on each other, which the mean over N channels
that are random cancels; of given channels, whose own mean is subtracted, it is counted.
"""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from kgraph.gram.calculus import Calculus
from kgraph.gram.field import Affine, Known
from kgraph.gram.gaps import Gaps
from kgraph.gram.taps import tap_sums


@dataclass(frozen=True)
class Unseen:
    """What a layer's block lacks.

    Attributes:
        cov: sw2 S S' / k^2.
        counted: C S S' / k over the inputs C, which `Layer.own` counts: S S' / k.
        spread: factor on what is left.
        stored: as `ZeroSums`.
    """

    cov: Tensor
    counted: Tensor
    spread: float
    stored: bool


def unseen_means(engine: Calculus, u: Affine, v: Affine) -> Unseen:
    """Of two outputs of one layer."""
    zero = u.layer.zero_sums
    assert zero is not None
    sums = engine.layout.outer(engine.rows, _sums(engine, u), _sums(engine, v), u.places, v.places)
    taps = _taps(u)
    return Unseen(sums * (u.layer.weight / taps**2), sums / taps, _spread(u, v), zero.stored)


def unseen_gap(gaps: Gaps, summed: Tensor, u: Affine, v: Affine) -> Tensor:
    """The gap of two outputs, given that of all that arrives."""
    (a, b), (c, d) = (gaps.ends(_sums(gaps.engine, w)) for w in (u, v))
    return (summed - (a - b) * (c - d) * (u.layer.weight / _taps(u) ** 2 / 2)) * _spread(u, v)


def _taps(u: Affine) -> int:
    return 1 if u.layer.geometry is None else len(u.layer.geometry.terms)


def _spread(u: Affine, v: Affine) -> float:
    given = all(isinstance(w.arg, Known) and w.arg.data.shape[1] > 1 for w in (u, v))
    count = u.layer.zero_sums.fan_in if u.layer.zero_sums is not None else 1
    return count / (count - 1) if given else 1.0


def _sums(engine: Calculus, u: Affine) -> Tensor:
    """S, [N or 1, *places]."""
    means, geometry = engine.means(u.arg), u.layer.geometry
    return means if geometry is None else tap_sums(means, geometry)


__all__ = ["Unseen", "unseen_gap", "unseen_means"]
