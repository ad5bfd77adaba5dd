"""Roots: the random parameters that a tensor depends on, as sets that grow along a network at no cost.

A residual stream has read every parameter before it: ordinary sets of 10,000 blocks would take gigabytes. Here
a set is one integer, with a bit for every root ever named.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass


@dataclass(frozen=True)
class Root:
    """A random parameter, perhaps cut to a range of its output channels: (axis label, from, to)."""

    name: str
    cuts: tuple[tuple[str, int, int], ...] = ()

    def disjoint(self, other: Root) -> bool:
        """Whether the two name different random numbers."""
        if self.name != other.name:
            return True
        mine = {label: (low, high) for label, low, high in self.cuts}
        for label, low, high in other.cuts:
            if label in mine and (mine[label][1] <= low or high <= mine[label][0]):
                return True
        return False


class _Registry:
    """All roots ever named, by the number of their bit."""

    def __init__(self) -> None:
        self.roots: list[Root] = []
        self.bits: dict[Root, int] = {}
        self.named: dict[str, int] = {}
        self.cut = 0

    def bit(self, root: Root) -> int:
        if root not in self.bits:
            self.bits[root] = bit = 1 << len(self.roots)
            self.roots.append(root)
            self.named[root.name] = self.named.get(root.name, 0) | bit
            self.cut |= bit if root.cuts else 0
        return self.bits[root]


_REGISTRY = _Registry()


class Roots:
    """An immutable set of roots."""

    __slots__ = ("_bits",)

    def __init__(self, roots: Iterable[Root] = ()) -> None:
        self._bits = 0
        for root in roots:
            self._bits |= _REGISTRY.bit(root)

    @classmethod
    def _of(cls, bits: int) -> Roots:
        made = cls.__new__(cls)
        made._bits = bits
        return made

    @classmethod
    def union(cls, sets: Iterable[Roots]) -> Roots:
        """All roots of all ``sets``."""
        bits = 0
        for one in sets:
            bits |= one._bits
        return cls._of(bits)

    def __or__(self, other: Roots) -> Roots:
        return Roots._of(self._bits | other._bits)

    def __iter__(self) -> Iterator[Root]:
        return _members(self._bits)

    def __len__(self) -> int:
        return self._bits.bit_count()

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Roots) and self._bits == other._bits

    def __hash__(self) -> int:
        return hash(self._bits)

    def __repr__(self) -> str:
        return f"Roots({list(self)})"

    def __reduce__(self) -> tuple[type[Roots], tuple[list[Root]]]:
        return Roots, (list(self),)  # bits mean something in this process only

    def named(self, name: str) -> bool:
        """Whether a parameter of this name is among them, cut or whole."""
        return bool(self._bits & _REGISTRY.named.get(name, 0))

    def disjoint(self, other: Roots) -> bool:
        """Whether the two sets name different random numbers."""
        if self._bits & other._bits:
            return False
        cut = _REGISTRY.cut
        if not (self._bits | other._bits) & cut:
            return True
        return self._apart(other, cut) and other._apart(self, cut)

    def _apart(self, other: Roots, cut: int) -> bool:
        """Whether every cut root here has no number in common with the roots of its name there."""
        for mine in _members(self._bits & cut):
            same = other._bits & _REGISTRY.named[mine.name]
            if not all(mine.disjoint(theirs) for theirs in _members(same)):
                return False
        return True


def _members(bits: int) -> Iterator[Root]:
    digits = bin(bits)[:1:-1]
    at = digits.find("1")
    while at >= 0:
        yield _REGISTRY.roots[at]
        at = digits.find("1", at + 1)


__all__ = ["Root", "Roots"]
