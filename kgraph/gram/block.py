"""What the engine computes with: numbers and their tangents (`kgraph.gram.tangents`), which move as their differential.

A `Block` is covariance of two fields for every row, `Draws` are joint draws of one field.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from typing import TypeVar

import torch
from torch import Tensor

D = TypeVar("D", bound="Dual")


@dataclass(frozen=True, eq=False)
class Dual:
    """A tensor and its tangents by name; one that is left out is zero."""

    value: Tensor
    tangents: dict[str, Tensor] = field(default_factory=dict)

    def tangent(self, name: str) -> Tensor:
        """The tangent, or the number 0."""
        return self.tangents[name] if name in self.tangents else torch.zeros((), dtype=torch.float64)

    def each(self: D, linear: Callable[[Tensor], Tensor]) -> D:
        """A linear function of all."""
        return type(self)(linear(self.value), {name: linear(t) for name, t in self.tangents.items()})

    def times(self: D, factor: float | Tensor) -> D:
        """All times a number, or times a tensor that broadcasts."""
        return self if isinstance(factor, float) and factor == 1.0 else self.each(lambda x: x * factor)

    @property
    def zero(self) -> bool:
        """Whether this is the number 0 (of independent terms of mean zero)."""
        return not self.tangents and self.value.ndim == 0 and float(self.value) == 0.0

    def __add__(self: D, other: D) -> D:
        if self.zero or other.zero:
            return other if self.zero else self
        return type(self)(self.value + other.value, added(self.tangents, other.tangents))

    def product(self: D, other: Dual, bilinear: Callable[[Tensor, Tensor], Tensor]) -> D:
        """A bilinear function of both, tangents by the product rule."""
        left = {name: bilinear(t, other.value) for name, t in self.tangents.items()}
        right = {name: bilinear(self.value, t) for name, t in other.tangents.items()}
        return type(self)(bilinear(self.value, other.value), added(left, right))

    def mapped(self: D, value: Tensor, slope: Tensor) -> D:
        """A function's value with tangents times its slope."""
        return type(self)(value, {name: slope * t for name, t in self.tangents.items()})


@dataclass(frozen=True, eq=False)
class Block(Dual):
    """``cov = E[u_a v_b]`` and its tangents, laid out by the layout."""

    @property
    def cov(self) -> Tensor:
        return self.value


@dataclass(frozen=True, eq=False)
class Draws(Dual):
    """Joint draws of a field and of its tangents' directions, [S, N, *places]."""

    def along(self, name: str) -> Tensor:
        """Its direction, also where it is zero."""
        return self.tangents[name] if name in self.tangents else torch.zeros_like(self.value)


def nothing() -> Block:
    """The block of independent fields of mean zero."""
    return Block(torch.zeros((), dtype=torch.float64))


def added(one: dict[str, Tensor], two: dict[str, Tensor]) -> dict[str, Tensor]:
    """Sums by name."""
    return {**one, **two, **{name: t + two[name] for name, t in one.items() if name in two}}


def names_of(parts: Iterable[Dual]) -> list[str]:
    """Tangents that any of the parts has."""
    return list(dict.fromkeys(name for part in parts for name in part.tangents))


__all__ = ["Block", "Draws", "Dual", "added", "names_of", "nothing"]
