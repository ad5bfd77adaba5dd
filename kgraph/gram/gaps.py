"""Gaps: what is left of 1 - c where c is nearly 1, carried through the graph beside the covariances.

For fields u, v and inputs a, b at one position the gap is the covariance of their differences,

    D(u, v) = E[(u_a - u_b)(v_a - v_b)] / 2
    D(u, u) = (q_a + q_b) / 2 - cov = (sqrt q_a - sqrt q_b)^2 / 2 + sqrt(q_a q_b) (1 - c)

It is bilinear, biases cancel in it, and `Pointwise.near` maps it. Where no formula holds it is the difference of
covariances that it stands for, with the digits that a difference leaves. Only the diagonal layout carries gaps: an
average over positions needs gaps between positions, which are not small.
"""

from __future__ import annotations

import weakref
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from kgraph.gram import field as f
from kgraph.gram.field import Field
from kgraph.gram.means import centred, mean_slope, shaped
from kgraph.gram.taps import convolve
from kgraph.maps.gap import split_gap

if TYPE_CHECKING:
    from kgraph.gram.engine import Engine


class Gaps:
    """Gaps of pairs of fields for an engine's rows; computed once each."""

    def __init__(self, engine: Engine) -> None:
        self.engine = weakref.proxy(engine)
        self._known: weakref.WeakKeyDictionary[Field, weakref.WeakKeyDictionary[Field, Tensor]]
        self._known = weakref.WeakKeyDictionary()
        self._near: weakref.WeakKeyDictionary[Field, tuple[Tensor, Tensor] | None] = weakref.WeakKeyDictionary()

    def gap(self, u: Field, v: Field) -> Tensor:
        """D(u, v), [R or 1, *places] or the number 0."""
        known = self._known.setdefault(u, weakref.WeakKeyDictionary())
        if v not in known:
            found = self._linear(u, v)
            if found is None:
                found = self._linear(v, u)
            if found is None:
                found = self._alike(u, v)
            known[v] = self.difference(u, v) if found is None else found
        return known[v]

    def difference(self, u: Field, v: Field) -> Tensor:
        """``(K_aa + K_bb - K_ab - K_ba) / 2``, to rounding of K."""
        engine = self.engine
        forth, back = engine.pair(u, v).cov, engine.pair(v, u).cov
        a, b = self._ends(engine.layout.own(engine.rows, forth, u.places))
        return (a + b - forth - back) / 2

    def _ends(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """A value of every input [N or 1, *places] at the rows' first and second input."""
        rows = self.engine.rows
        return (x, x) if len(x) == 1 else (x[rows.first], x[rows.second])

    def _linear(self, u: Field, v: Field) -> Tensor | None:
        """``u`` is linear in other fields, or shares nothing with ``v``."""
        match u:
            case _ if u.independent(v) and not (isinstance(u, f.Known) and isinstance(v, f.Known)):
                return self._of_means(u, v)
            case f.Sum(terms=terms):
                return sum((self.gap(term, v) * weight for weight, term in terms), torch.zeros(()).double())
            case f.Located():
                return self._located(u, v)
            case f.Product(left=left, right=f.Known() as right) if right.constant is not None and not right.gain:
                return self.gap(left, v) * right.constant
        return None

    def _of_means(self, u: Field, v: Field) -> Tensor:
        """Independent fields: half the product of the differences of their means."""
        total = torch.full((), 0.5, dtype=torch.float64)
        for field in (u, v):
            a, b = self._ends(shaped(self.engine.mean(field), field.places))
            total = total * (a - b)
        return total

    def _located(self, u: f.Located, v: Field) -> Tensor:
        """``g_a t_a - g_b t_b = (g_a + g_b) (t_a - t_b) / 2 + (g_a - g_b) (t_a + t_b) / 2``."""
        (gain_a, gain_b), (shift_a, shift_b) = self._ends(u.gain), self._ends(u.shift)
        total = (gain_a + gain_b) / 2 * self.gap(u.arg, v)
        if not torch.equal(gain_a, gain_b):
            total = total + (gain_a - gain_b) / 2 * self._crossed(u.arg, v)
        if not torch.equal(shift_a, shift_b):
            mean_a, mean_b = self._ends(shaped(self.engine.mean(v), v.places))
            total = total + (shift_a - shift_b) * (mean_a - mean_b) / 2
        return total

    def _crossed(self, t: Field, v: Field) -> Tensor:
        """``E[(t_a + t_b)(v_a - v_b)] / 2``: a difference, but it stands behind factors that are small themselves."""
        engine = self.engine
        if isinstance(v, f.Located) and v.arg is t and not v.shift.any():
            (gain_a, gain_b), (a, b) = self._ends(v.gain), self._ends(engine.second(t))
            return ((gain_a + gain_b) * (a - b) + (gain_a - gain_b) * (a + b + 2 * engine.pair(t, t).cov)) / 4
        forth, back = engine.pair(t, v).cov, engine.pair(v, t).cov
        a, b = self._ends(engine.layout.own(engine.rows, forth, t.places))
        return (a - b - forth + back) / 2

    def _alike(self, u: Field, v: Field) -> Tensor | None:
        """Two fields of one kind."""
        engine = self.engine
        match u, v:
            case f.Known(), f.Known() if u.data.shape[1] == v.data.shape[1]:
                (xa, xb), (ya, yb) = self._ends(u.data), self._ends(v.data)
                return ((xa - xb) * (ya - yb)).mean(1) / 2
            case f.Leaf(), f.Leaf() if u is v:
                return u.gap
            case f.Affine(), f.Affine() if u.layer is v.layer:
                return self._through(u, v)
            case f.Moved(), f.Moved():
                inner, places = self.gap(u.arg, v.arg), (u.arg.places, v.arg.places)
                return engine.layout.move(inner, (u.op, v.op), *places)
            case f.Folded(), f.Folded() if u.axes == v.axes:
                inner = self.gap(u.arg, v.arg)
                return inner if inner.ndim == 0 else engine.layout.fold(inner, u.axes, u.arg.places, v.arg.places)
            case f.Grouped(), f.Grouped() if len(u.args) == len(v.args):
                total = sum(size for size, _ in u.args)
                pairs = zip(u.args, v.args, strict=True)
                return sum((self.gap(a, b) * (n / total) for (n, a), (_, b) in pairs), torch.zeros(()).double())
            case f.Sliced(), f.Sliced() if u.roots == v.roots:
                return self.gap(u.arg, v.arg)
            case f.Product(), f.Product() if u is v and u.left.independent(u.right):
                return self._product(u)
            case f.Crossed(), f.Crossed() if u is v:
                return self._product(u)
            case f.Mapped(), f.Mapped() if u.fn is v.fn and u.arg is v.arg and u.arg.gaussian:
                return self._mapped(u)
            case f.Mapped(), _ if u.arg.gaussian and v.gaussian:
                return self._stein(u, v)
            case _, f.Mapped() if v.arg.gaussian and u.gaussian:
                return self._stein(v, u)
        return None

    def _through(self, u: f.Affine, v: f.Affine) -> Tensor:
        """The weight's share of `kgraph.gram.pairs.affine_block`: biases cancel."""
        inner, geometry = self.gap(u.arg, v.arg), u.layer.geometry
        if geometry is None:
            return inner * u.layer.weight
        return convolve(self.engine.layout, inner, geometry, u.arg.places)

    def _product(self, u: f.Product | f.Crossed) -> Tensor:
        """``E[l_a l_b] E[r_a r_b]`` with each factor as its middle minus its gap."""
        middles, gaps, apart = [], [], torch.full((), 0.25, dtype=torch.float64)
        for side in (u.left, u.right):
            a, b = self._ends(self.engine.second(side))
            middles.append((a + b) / 2)
            gaps.append(self.gap(side, side))
            apart = apart * (a - b)
        return apart + middles[0] * gaps[1] + middles[1] * gaps[0] - gaps[0] * gaps[1]

    def _mapped(self, u: f.Mapped) -> Tensor | None:
        near = self.near(u)
        return None if near is None else near[0]

    def near(self, u: f.Mapped) -> tuple[Tensor, Tensor] | None:
        """The gap of ``fn(arg)`` and ``E[fn' fn']`` from the gap of its argument, where `Pointwise.near` has them."""
        if u not in self._near:
            self._near[u] = self._from_argument(u)
        return self._near[u]

    def _from_argument(self, u: f.Mapped) -> tuple[Tensor, Tensor] | None:
        engine = self.engine
        fn = centred(u.fn, float(engine.mean(u.arg).reshape(-1)[0]))
        inner = self.gap(u.arg, u.arg)
        q1, q2 = self._ends(engine.variance(u.arg))
        if inner.ndim == 0:
            inner = inner.expand(torch.broadcast_shapes(q1.shape, q2.shape))
        return fn.near(q1, q2, inner.clamp_min(0))

    def _stein(self, u: f.Mapped, v: Field) -> Tensor:
        """``E[f(u) v] = E[f'(u)] cov(u, v)``: its slope at each input is a gain."""
        engine = self.engine
        shift = float(engine.mean(u.arg).reshape(-1)[0])
        a, b = self._ends(mean_slope(centred(u.fn, shift), engine.variance(u.arg)))
        total = (a + b) / 2 * self.gap(u.arg, v)
        return total if torch.equal(a, b) else total + (a - b) / 2 * self._crossed(u.arg, v)


def one_minus_c(q1: Tensor, q2: Tensor, gap: Tensor) -> Tensor:
    """``1 - c`` of a gap, with its digits where it is small."""
    return split_gap(q1, q2, gap)[2]
