"""Moments of fields and pairs of fields: each computed once, by the law of its kind (`kgraph.gram.laws`)."""

from __future__ import annotations

import weakref
from abc import ABC, abstractmethod
from dataclasses import dataclass

import torch
from torch import Tensor

from kgraph.gram import laws
from kgraph.gram.block import Block, nothing
from kgraph.gram.field import Field
from kgraph.gram.layout import Layout
from kgraph.gram.places import PlaceMap, Places
from kgraph.gram.rows import Rows
from kgraph.gram.tangents import Seeds


class Calculus(ABC):
    """Blocks of pairs of fields for fixed rows and layout, kept while the fields live.

    Args:
        rows: pairs of inputs.
        layout: position model.
        parametrization: of the NTK, "standard" or "ntk".
        seeds: the tangents to carry, by name.
    """

    def __init__(self, rows: Rows, layout: Layout, parametrization: str, seeds: Seeds) -> None:
        self.rows, self.layout, self.parametrization, self.seeds = rows, layout, parametrization, seeds
        self._blocks: weakref.WeakKeyDictionary[Field, weakref.WeakKeyDictionary[Field, Block]]
        self._blocks = weakref.WeakKeyDictionary()
        self._means: weakref.WeakKeyDictionary[Field, Tensor] = weakref.WeakKeyDictionary()
        self._second: weakref.WeakKeyDictionary[Field, Tensor] = weakref.WeakKeyDictionary()
        self.rounded: weakref.WeakSet[Field] = weakref.WeakSet()  # functions of biases that count as Gaussians

    @abstractmethod
    def measured(self, u: Field, v: Field) -> Block:
        """Block of fields that no law holds for."""

    @abstractmethod
    def measured_mean(self, u: Field) -> Tensor:
        """E[u] where no law holds."""

    def pair(self, u: Field, v: Field) -> Block:
        """Block of u at the first input of every row with v at the second."""
        known = self._blocks.setdefault(u, weakref.WeakKeyDictionary())
        if v not in known:
            ways = (Side(self, False), u, v), (Side(self, True), v, u)
            found = laws.pair.find(self, ways, self.outer_means)
            known[v] = self.measured(u, v) if found is None else found
        return known[v]

    def second(self, u: Field) -> Tensor:
        """q value at every input and position, [N, *places]."""
        if u not in self._second:
            own = self.layout.own(self.rows, self.pair(u, u).cov, u.places)
            law = laws.second.get(u)
            checked = None if law is None else law(self, u, own)
            self._second[u] = own if checked is None else checked
        return self._second[u]

    def variance(self, u: Field) -> Tensor:
        """q minus the squared mean, [N, *places]."""
        return (self.second(u) - self.mean(u).square()).clamp_min(0)

    def mean(self, u: Field) -> Tensor:
        """E[u], [N or 1, *places], or a 0-d tensor where it is one number."""
        if u not in self._means:
            law = laws.mean.get(u)
            found = None if law is None else law(self, u)
            self._means[u] = self.measured_mean(u) if found is None else found
        return self._means[u]

    def level(self, u: Field) -> float:
        """The mean of a field that has one for all inputs and positions."""
        return float(self.mean(u).reshape(-1)[0])

    def means(self, u: Field) -> Tensor:
        """E[u] as [N or 1, *places]."""
        mean = self.mean(u)
        return mean.reshape(1, *(1 for _ in u.places)).expand(1, *u.places) if mean.ndim == 0 else mean

    def outer_means(self, u: Field, v: Field) -> Block:
        """Block of fields that share nothing: the product of their means."""
        if not (self.mean(u).any() and self.mean(v).any()):
            return nothing()
        return Block(self.layout.outer(self.rows, self.means(u), self.means(v), u.places, v.places))


@dataclass(frozen=True)
class Side:
    """A field, named first, at one input of every row (the second if ``swapped``) and any other field at the other."""

    engine: Calculus
    swapped: bool

    def pair(self, u: Field, v: Field) -> Block:
        """Block of what stands for the field with what stands for the other one."""
        return self.engine.pair(v, u) if self.swapped else self.engine.pair(u, v)

    def apart(self, u: Field, v: Field) -> Block:
        """Block of fields that share nothing."""
        return self.engine.outer_means(v, u) if self.swapped else self.engine.outer_means(u, v)

    def outer(self, x: Tensor, y: Tensor, px: Places, py: Places) -> Tensor:
        """``x`` at the field's input times ``y`` at the other one."""
        sides = (y, x, py, px) if self.swapped else (x, y, px, py)
        return self.engine.layout.outer(self.engine.rows, *sides)

    def gain(self, x: Tensor, u: Field, v: Field) -> Tensor:
        """A gain ``x`` of the field at its own input, ready to multiply a block."""
        one = torch.ones(1, *v.places, dtype=torch.float64)
        sides = (one, x, v.places, u.places) if self.swapped else (x, one, u.places, v.places)
        left, right = self.engine.layout.sides(self.engine.rows, *sides)
        return left * right

    def move(self, x: Tensor, op: PlaceMap, places: Places, other: Places) -> Tensor:
        """A block whose field's positions are ``places``, moved."""
        layout = self.engine.layout
        return layout.move(x, (None, op), other, places) if self.swapped else layout.move(x, (op, None), places, other)
