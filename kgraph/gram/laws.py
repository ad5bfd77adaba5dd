"""Laws of fields, by kind: tables that the files of `kgraph.gram.kinds` fill and the engine looks up.

A law is a function of who asks (it answers about the fields that the law leads back to) and of the field or fields. It
returns None where it does not hold.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Concatenate, Generic, ParamSpec, TypeVar

from torch import Tensor

from kgraph.gram.block import Block, Draws
from kgraph.gram.field import Field
from kgraph.how import How

T = TypeVar("T")
F = TypeVar("F", bound=Field)
More = ParamSpec("More")
OneLaw = Callable[Concatenate[Any, F, More], T | None]
Asked = tuple[Any, Field, Field]
"""Who asks, a field of the law's own kind, and any other."""


class Table(Generic[T]):
    """One law a kind."""

    def __init__(self) -> None:
        self._laws: dict[type[Field], Callable[..., T | None]] = {}

    def __call__(self, kind: type[F]) -> Callable[[OneLaw[F, More, T]], OneLaw[F, More, T]]:
        """Decorator: the law of a kind."""

        def register(law: OneLaw[F, More, T]) -> OneLaw[F, More, T]:
            self._laws[kind] = law
            return law

        return register

    def get(self, u: Field) -> Callable[..., T | None] | None:
        """The law of the field's kind."""
        return self._laws.get(type(u))


class PairTable(Generic[T]):
    """Laws of two fields, tried in this order.

    Attributes:
        outright: whether or not the two share random numbers.
        first: of what is taken apart before anything else (sums: their terms may move alike).
        linear: of what is linear in other fields, with any other field.
        alike: of two fields of the kind.
        against: with any other field.
    """

    def __init__(self) -> None:
        self.outright, self.first, self.linear, self.alike, self.against = (Table[T]() for _ in range(5))
        self._order = self.outright, self.first, self.linear, self.alike, self.against

    def find(self, asker: Any, ways: tuple[Asked, Asked], independent: Callable[[Field, Field], T]) -> T | None:
        """What the first law that holds says; ``ways`` are the pair as it is and turned about."""
        _, u, v = ways[0]
        same = ((asker, u, v),) if type(u) is type(v) else ()
        for table in self._order:
            if table is self.first and u.independent(v):
                return independent(u, v)
            for way in same if table is self.alike else ways:
                law = table.get(way[1])
                found = None if law is None else law(*way)
                if found is not None:
                    return found
        return None


mean: Table[Tensor] = Table()
"""``E[u]`` from (engine, u)."""
second: Table[Tensor] = Table()
"""The q value that counts, from (engine, u, the measured one)."""
how: Table[How] = Table()
"""How the field's own step is computed, from (engine, u)."""
pair: PairTable[Block] = PairTable()
"""Block from (`kgraph.gram.calculus.Side`, u, v), or (engine, u, v) for two fields of the kind."""
gap: PairTable[Tensor] = PairTable()
"""Gap (`kgraph.gram.gaps`) from (gaps, u, v)."""
skew: Table[Tensor] = Table()
"""``E[(t_a + t_b)(v_a - v_b)] / 2`` from (gaps, v, t)."""
draw: Table[Draws] = Table()
"""Joint draws from (draws, u)."""
