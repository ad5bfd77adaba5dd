"""The engine: covariance and tangents of any two fields, from how they are made.

    pair(W u, W v)       = sum over taps of sw2 pair(u, v) at the tap + sb2      (one weight; else 0)
    pair(f(u), f(v))     = E[f f],  tangents E[f' f'] T(u, v)                  (Gaussian u, v)
    pair(f(u), v)        = E[f'(u)] pair(u, v)                                   (Stein's lemma)
    pair(sum, v)         = sum of pairs;  pair of maps of positions = the maps on either side
    pair(u v, u' v')     = pair(u, u') pair(v, v')                               (u, u' independent of v, v')

The laws are in `kgraph.gram.kinds`. Whatever fits none of them is measured on joint draws (`kgraph.gram.joint`).
"""

from __future__ import annotations

import weakref
from typing import Any

from torch import Tensor, fx

from kgraph.gram import field as f
from kgraph.gram import laws
from kgraph.gram.block import Block
from kgraph.gram.build import arguments
from kgraph.gram.calculus import Calculus
from kgraph.gram.field import Field
from kgraph.gram.gaps import Gaps
from kgraph.gram.joint import JointDraws
from kgraph.gram.layout import Layout
from kgraph.gram.places import total_places
from kgraph.gram.rows import Rows
from kgraph.gram.tangents import Seeds
from kgraph.how import EXACT, How, assumed, sampled

AVERAGING = ("stationary", "exchangeable")
"""Position models that hold averages over positions: what is done to an average is not what is done to each."""


class Engine(Calculus):
    """A calculus with joint draws for what has no law, gaps, and what it came to know on the way.

    Args:
        rows, layout, parametrization, seeds: as `Calculus`.
        seed: of the joint draws.
    """

    def __init__(self, rows: Rows, layout: Layout, parametrization: str, seeds: Seeds, seed: int = 0) -> None:
        super().__init__(rows, layout, parametrization, seeds)
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
        self._how: weakref.WeakKeyDictionary[Field, How] = weakref.WeakKeyDictionary()

    def measured(self, u: Field, v: Field) -> Block:
        return self.draws.pair(u, v)

    def measured_mean(self, u: Field) -> Tensor:
        return self.draws.mean(u)

    def how(self, u: Field) -> How:
        """How the field's kernel was obtained: its own way, or that of what it is made of."""
        if u not in self._how:
            parts = [self.how(arg) for arg in arguments(u)]
            self._how[u] = max((u.how, self._own_how(u), *parts), key=lambda how: how.level)
        return self._how[u]

    def _own_how(self, u: Field) -> How:
        if self.layout.name in AVERAGING and total_places(u.places) > 1 and not isinstance(u, f.Known):
            return assumed("positions are alike: an average over them stands for each")
        if u in self.draws.used:
            return sampled(self.draws.standard_error(u))
        law = laws.how.get(u)
        found = None if law is None else law(self, u)
        return EXACT if found is None else found
