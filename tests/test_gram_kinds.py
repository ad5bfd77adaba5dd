"""Kinds of fields: each has laws, found by the kind alone, and tried in a fixed order."""

from __future__ import annotations

import pytest

from kgraph.gram import field as f
from kgraph.gram import laws
from kgraph.roots import Root

KINDS = [kind for kind in f.Field.__subclasses__() if kind.__module__ == f.__name__]
SHARED = frozenset({Root("weight")})


@pytest.mark.parametrize("kind", KINDS, ids=lambda kind: kind.__name__)
def test_every_kind_has_laws(kind: type[f.Field]) -> None:
    """A mean and a block with its own kind, or draws: without any it would pass for a Gaussian leaf."""
    u = kind(())
    of_two = (laws.pair.outright, laws.pair.first, laws.pair.linear, laws.pair.alike)
    block = any(table.get(u) is not None for table in of_two)
    assert laws.draw.get(u) is not None or (block and laws.mean.get(u) is not None)


def test_laws_are_not_inherited() -> None:
    class Other(f.Mapped):
        pass

    assert laws.mean.get(Other(())) is None and laws.draw.get(Other(())) is None


def test_the_order_of_laws() -> None:
    """What is known, what shares nothing, sums, maps, two of a kind; None where nothing holds."""
    table: laws.PairTable[str] = laws.PairTable()
    table.outright(f.Known)(lambda asker, u, v: "outright" if isinstance(v, f.Known) else None)
    table.first(f.Sum)(lambda asker, u, v: f"{asker} sum")
    table.linear(f.Moved)(lambda asker, u, v: None if isinstance(v, f.Moved) else f"{asker} moved")
    table.alike(f.Moved)(lambda asker, u, v: f"{asker} both")
    table.against(f.Leaf)(lambda asker, u, v: None if isinstance(v, f.Leaf) else f"{asker} leaf")
    known, total, moved, leaf, mapped = (
        kind((), SHARED if kind is not f.Known else frozenset()) for kind in (f.Known, f.Sum, f.Moved, f.Leaf, f.Mapped)
    )

    def found(u: f.Field, v: f.Field) -> str | None:
        return table.find("alike", (("forth", u, v), ("back", v, u)), lambda u, v: "independent")

    assert found(known, known) == "outright" and found(known, total) == "independent"
    assert found(total, moved) == "forth sum" and found(moved, total) == "back sum"
    assert found(moved, leaf) == "forth moved" and found(leaf, moved) == "back moved"
    assert found(moved, moved) == "alike both"
    assert found(mapped, leaf) == "back leaf" and found(leaf, leaf) is None
