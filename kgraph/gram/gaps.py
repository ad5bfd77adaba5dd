"""Gaps: what is left of 1 - c where c is nearly 1, carried through the graph beside the covariances.

For fields u, v and inputs a, b at one position the gap is the covariance of their differences,

    D(u, v) = E[(u_a - u_b)(v_a - v_b)] / 2
    D(u, u) = (q_a + q_b) / 2 - cov = (sqrt q_a - sqrt q_b)^2 / 2 + sqrt(q_a q_b) (1 - c)

It is bilinear, biases cancel in it, and `Pointwise.near` maps it. Where no law holds it is the difference of
covariances that it stands for, with the digits that a difference leaves. Only the diagonal layout carries gaps: an
average over positions needs gaps between positions, which are not small.
"""

from __future__ import annotations

import weakref

import torch
from torch import Tensor

from kgraph.gram import laws
from kgraph.gram.calculus import Calculus
from kgraph.gram.field import Field
from kgraph.maps.gap import split_gap


class Gaps:
    """Gaps of pairs of fields for an engine's rows; computed once each.

    Attributes:
        near: by function of a Gaussian field: its gap and slope from the gap of its argument, once computed.
    """

    def __init__(self, engine: Calculus) -> None:
        self.engine: Calculus = weakref.proxy(engine)
        self._known: weakref.WeakKeyDictionary[Field, weakref.WeakKeyDictionary[Field, Tensor]]
        self._known = weakref.WeakKeyDictionary()
        self.near: weakref.WeakKeyDictionary[Field, tuple[Tensor, Tensor] | None] = weakref.WeakKeyDictionary()

    def gap(self, u: Field, v: Field) -> Tensor:
        """D(u, v), [R or 1, *places] or the number 0."""
        known = self._known.setdefault(u, weakref.WeakKeyDictionary())
        if v not in known:
            found = laws.gap.find(self, ((self, u, v), (self, v, u)), self._of_means)
            known[v] = self.difference(u, v) if found is None else found
        return known[v]

    def ends(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """A value of every input [N or 1, *places] at the rows' first and second input."""
        rows = self.engine.rows
        return (x, x) if len(x) == 1 else (x[rows.first], x[rows.second])

    def difference(self, u: Field, v: Field) -> Tensor:
        """``(K_aa + K_bb - K_ab - K_ba) / 2``, to rounding of K."""
        a, b, forth, back = self._differing(u, v)
        return (a + b - forth - back) / 2

    def skew(self, t: Field, v: Field) -> Tensor:
        """``E[(t_a + t_b)(v_a - v_b)] / 2``: a difference, but it stands behind factors that are small themselves."""
        law = laws.skew.get(v)
        found = None if law is None else law(self, v, t)
        if found is not None:
            return found
        a, b, forth, back = self._differing(t, v)
        return (a - b - forth + back) / 2

    def _differing(self, u: Field, v: Field) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """K_aa, K_bb, K_ab, K_ba."""
        engine = self.engine
        forth, back = engine.pair(u, v).cov, engine.pair(v, u).cov
        return *self.ends(engine.layout.own(engine.rows, forth, u.places)), forth, back

    def _of_means(self, u: Field, v: Field) -> Tensor:
        """Independent fields: half the product of the differences of their means."""
        total = torch.full((), 0.5, dtype=torch.float64)
        for field in (u, v):
            a, b = self.ends(self.engine.means(field))
            total = total * (a - b)
        return total


def one_minus_c(q1: Tensor, q2: Tensor, gap: Tensor) -> Tensor:
    """``1 - c`` of a gap, with its digits where it is small."""
    return split_gap(q1, q2, gap)[2]
