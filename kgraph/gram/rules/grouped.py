"""Convolutions in groups: where groups read channels of unlike laws, their outputs have laws of their own."""

from __future__ import annotations

from kgraph.gram.field import Field, Known
from kgraph.gram.value import Value

MOST_GROUPS = 64
Range = tuple[int, int]


def ranges_of(x: Value, dim: int, width: int) -> list[Range]:
    """Channels cut where what the groups (``width`` channels each) read changes its law.

    Channels of a layer are alike, those of an input are not. One range if there is nothing to cut.
    """
    total = x.shape[dim]
    if width == total or x.axes[dim] != (("c", total),) or x.split not in (None, dim):
        return [(0, total)]
    ranges: list[Range] = []
    at = 0
    for size, u in x.groups:
        if at % width or size % width:  # a group reads several laws
            return [(low, low + width) for low in range(0, total, width)]
        own = width if varies(u) else size
        ranges += [(low, low + own) for low in range(at, at + size, own)]
        at += size
    return ranges


def varies(u: Field) -> bool:
    """Whether channels have numbers of their own."""
    return isinstance(u, Known) and u.data.shape[1] > 1 and u.constant is None
