"""The engine: covariance and NTK of any two fields, from how they are made.

    pair(W u, W v)       = sum over taps of sw2 pair(u, v) at the tap + sb2      (one weight; else 0)
    pair(f(u), f(v))     = E[f f],  NTK = E[f' f'] NTK(u, v)                     (Gaussian u, v)
    pair(f(u), v)        = E[f'(u)] pair(u, v)                                   (Stein's lemma)
    pair(sum, v)         = sum of pairs;  pair of maps of positions = the maps on either side
    pair(u v, u' v')     = pair(u, u') pair(v, v')                               (u, u' independent of v, v')

Whatever fits none of these is measured on joint draws (`kgraph.gram.joint`).
"""

from __future__ import annotations

import weakref
from typing import Any

import torch
from torch import Tensor, fx

from kgraph.errors import RuleError
from kgraph.gram import field as f
from kgraph.gram.attention import attended_block, scores_block
from kgraph.gram.block import Block, nothing
from kgraph.gram.build import arguments
from kgraph.gram.factors import unresolved
from kgraph.gram.field import Field
from kgraph.gram.gaps import Gaps
from kgraph.gram.joint import JointDraws
from kgraph.gram.layout import Layout
from kgraph.gram.means import mean_of, shaped
from kgraph.gram.pairs import (
    affine_block,
    all_channels_block,
    both_joined_block,
    crossed_block,
    folded_block,
    grouped_block,
    joined_block,
    known_block,
    known_factor_block,
    located_block,
    mapped_block,
    masked_block,
    products_block,
    sliced_block,
    stein_block,
)
from kgraph.gram.places import total_places
from kgraph.gram.rows import Rows
from kgraph.how import EXACT, QUADRATURE, How, assumed, sampled

_ROUNDING = 1e-9
_FEW_DIGITS = 1e-9
"""Of the terms' own q values: a sum of less has lost more than half of its digits."""
AVERAGING = ("stationary", "exchangeable")
"""Position models that hold averages over positions: what is done to an average is not what is done to each."""


class Engine:
    """Blocks of pairs of fields for fixed rows and layout; computed once each, kept while the fields live.

    Args:
        rows: pairs of inputs.
        layout: position model.
        parametrization: of the NTK, "standard" or "ntk".
        with_ntk: whether to carry the NTK.
        seed: of the joint draws.
    """

    def __init__(self, rows: Rows, layout: Layout, parametrization: str, with_ntk: bool, seed: int = 0) -> None:
        self.rows, self.layout, self.parametrization, self.with_ntk = rows, layout, parametrization, with_ntk
        self.draws = JointDraws(self, seed)
        self.gaps = Gaps(self) if layout.name == "diagonal" else None
        self.crossed: weakref.WeakSet[Field] = weakref.WeakSet()  # functions integrated with other ones
        self.cancelled: weakref.WeakSet[Field] = weakref.WeakSet()  # sums whose digits are mostly lost
        self.ways: dict[str, int] = {}  # the dimension that layers sum a weight over, by its name
        self.made_of: dict[str, str] = {}  # the weight that a parameter is behind, by their names
        self.repeats: dict[str, bool] = {}  # whether rows of a weight repeat, by its name
        self.tables: set[int] = set()  # where the data of tables lies that tokens were looked up in
        self.made: dict[fx.Node, dict[fx.Node, Any]] = {}  # of known tensors computed from parameters: what they read
        self.readers: dict[str, dict[str, Tensor]] = {}  # by parameter: who reads which of its entries, entry by entry
        self._blocks: weakref.WeakKeyDictionary[Field, weakref.WeakKeyDictionary[Field, Block]]
        self._blocks = weakref.WeakKeyDictionary()
        self._means: weakref.WeakKeyDictionary[Field, Tensor] = weakref.WeakKeyDictionary()
        self._how: weakref.WeakKeyDictionary[Field, How] = weakref.WeakKeyDictionary()
        self._second: weakref.WeakKeyDictionary[Field, Tensor] = weakref.WeakKeyDictionary()

    def pair(self, u: Field, v: Field) -> Block:
        """Block of u at the first input of every row with v at the second."""
        known = self._blocks.setdefault(u, weakref.WeakKeyDictionary())
        if v not in known:
            known[v] = self._pair(u, v)
        return known[v]

    def second(self, u: Field) -> Tensor:
        """q value at every input and position, [N, *places]."""
        if u not in self._second:
            own = self.layout.own(self.rows, self.pair(u, u).cov, u.places)
            self._second[u] = self._checked(u, own) if isinstance(u, f.Sum) else own
        return self._second[u]

    def _checked(self, u: f.Sum, q: Tensor) -> Tensor:
        """The q value of a sum, whose terms may cancel.

        Raises:
            RuleError: it is negative by more than rounding.
        """
        sizes = [w * w * self.second(term) for w, term in u.terms]
        whole = torch.stack(torch.broadcast_tensors(q, *sizes))[1:].sum(0)
        if bool((q < -_ROUNDING * whole).any()):
            what = f"a variance came out negative ({float(q.min()):.2g}): the terms of a sum cancel to the last digit"
            raise RuleError(what, hint="Write the sum as one function of its argument")
        if bool(((q < _FEW_DIGITS * whole) & (q != 0)).any()):
            self.cancelled.add(u)
        return q.clamp_min(0)

    def variance(self, u: Field) -> Tensor:
        """q minus the squared mean, [N, *places]."""
        return (self.second(u) - self.mean(u).square()).clamp_min(0)

    def mean(self, u: Field) -> Tensor:
        """E[u], [N or 1, *places], or a 0-d tensor where it is one number."""
        if u not in self._means:
            self._means[u] = mean_of(self, u)
        return self._means[u]

    def outer_means(self, u: Field, v: Field) -> Block:
        """Block of fields that share nothing: the product of their means."""
        mean_u, mean_v = self.mean(u), self.mean(v)
        zero = nothing(self.with_ntk)
        if not (mean_u.any() and mean_v.any()):
            return zero
        x, y = shaped(mean_u, u.places), shaped(mean_v, v.places)
        return Block(self.layout.outer(self.rows, x, y, u.places, v.places), zero.ntk)

    def _pair(self, u: Field, v: Field) -> Block:
        if isinstance(u, f.Known) and isinstance(v, f.Known):
            return known_block(self, u, v)
        if isinstance(u, f.Sliced) and isinstance(v, f.Sliced):
            return sliced_block(self, u, v)
        if u.independent(v) or _part_and_whole(u, v) or _part_and_whole(v, u):
            return self.outer_means(u, v)
        for one, two, swapped in ((u, v, False), (v, u, True)):  # sums first: their terms may move alike
            if isinstance(one, f.Sum):
                return self._sum(one, two, swapped)
        for one, two, swapped in ((u, v, False), (v, u, True)):
            found = self._linear(one, two, swapped)
            if found is not None:
                return found
        found = self._alike(u, v)
        return self.draws.pair(u, v) if found is None else found

    def _sum(self, u: f.Sum, v: Field, swapped: bool) -> Block:
        total = nothing(self.with_ntk)
        for weight, term in u.terms:
            total = total + (self.pair(v, term) if swapped else self.pair(term, v)).times(weight)
        return total

    def _linear(self, u: Field, v: Field, swapped: bool) -> Block | None:
        """Fields that are linear in others; ``swapped`` says that u stands at the second input."""

        def pair(one: Field, two: Field) -> Block:
            return self.pair(two, one) if swapped else self.pair(one, two)

        match u:
            case f.Located():
                return located_block(self, u, v, swapped)
            case f.Moved(arg=arg, op=op) if isinstance(v, f.Moved) and not swapped:
                inner = self.pair(arg, v.arg)
                return inner.each(lambda x: self.layout.move(x, (op, v.op), arg.places, v.arg.places))
            case f.Moved(arg=arg, op=op) if not isinstance(v, f.Moved):
                ops = (None, op) if swapped else (op, None)
                places = (v.places, arg.places) if swapped else (arg.places, v.places)
                return pair(arg, v).each(lambda x: self.layout.move(x, ops, *places))
            case f.Joined() if not isinstance(v, f.Joined):
                return joined_block(self, u, v, swapped)
            case f.Masked(arg=arg, mask=mask) if not any(r.name == mask.name for r in v.roots):
                return pair(arg, v)
            case f.Product(left=left, right=f.Known() as right) if right.constant is not None and not right.gain:
                return pair(left, v).times(right.constant)
        return None

    def _alike(self, u: Field, v: Field) -> Block | None:
        """Two fields of one kind."""
        match u, v:
            case f.Leaf(), f.Leaf() if u is v:
                return u.block
            case f.Affine(), f.Affine():
                return affine_block(self, u, v)
            case f.Folded(), f.Folded() if u.axes == v.axes:
                return folded_block(self, u, v)
            case f.Grouped(), f.Grouped() if len(u.args) == len(v.args):
                return grouped_block(self, u, v)
            case f.Joined(), f.Joined() if u.axis == v.axis:
                return both_joined_block(self, u, v)
            case f.Masked(), f.Masked():
                return masked_block(self, u, v)
            case f.Product(), f.Product():
                return products_block(self, u, v)
            case f.Crossed(), f.Crossed():
                return all_channels_block(self, u, v)
            case f.Product(), f.Known():
                return known_factor_block(self, u, v, swapped=False)
            case f.Known(), f.Product():
                return known_factor_block(self, v, u, swapped=True)
            case f.Mapped(), f.Mapped() if u.arg.gaussian and v.arg.gaussian:
                return mapped_block(self, u, v) if u.fn is v.fn else self._crossed(u, v)
            case f.Mapped(), _ if v.gaussian:
                return stein_block(self, u, v, swapped=False)
            case _, f.Mapped() if u.gaussian:
                return stein_block(self, v, u, swapped=True)
            case f.Scores(), f.Scores():
                return scores_block(self, u, v)
            case f.Attended(), f.Attended():
                return attended_block(self, u, v)
        return None

    def _crossed(self, u: f.Mapped, v: f.Mapped) -> Block | None:
        self.crossed.update((u, v))
        return crossed_block(self, u, v)

    def how(self, u: Field) -> How:
        """How the field's kernel was obtained: its own way, or that of what it is made of."""
        if u not in self._how:
            parts = [self.how(arg) for arg in arguments(u)]
            integrated = isinstance(u, f.Mapped) and (u.fn.how == "quadrature" or u in self.crossed)
            own = QUADRATURE if integrated else EXACT
            if u in self.cancelled:
                own = assumed("its terms cancel, and few digits are left")
            if u in self.draws.used:
                own = sampled(self.draws.standard_error(u))
            if self.with_ntk and isinstance(u, f.Mapped) and unresolved(u.arg) and u not in self.draws.used:
                own = assumed("the gradient by a factor in front of a nonlinearity is taken to be independent of it")
            if self.layout.name in AVERAGING and total_places(u.places) > 1 and not isinstance(u, f.Known):
                own = assumed("positions are alike: an average over them stands for each")
            self._how[u] = max((u.how, own, *parts), key=lambda how: how.level)
        return self._how[u]

    def entries(self, u: Field) -> int:
        """Entries of the field's own block."""
        count = total_places(u.places)
        return len(self.rows.first) * (count * count if self.layout.name == "full" else count)


def _part_and_whole(u: Field, v: Field) -> bool:
    """A channel among some of a layer's and one among all of them: hardly ever the same one."""
    return isinstance(u, f.Sliced) and isinstance(v, (f.Affine, f.Leaf, f.Scores))
