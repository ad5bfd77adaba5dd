"""Matching two kernels for an entrywise operation: dimensions by broadcasting, channel groups range by range."""

from __future__ import annotations

import itertools

from kgraph.entries import expand_positions, slice_part
from kgraph.kernel import Axes, Kernel, Part


def broadcast_axes(left: Axes, right: Axes) -> Axes:
    """Axes of the broadcast result: of two dimensions, the larger; of two equal ones, the better split one."""
    width = max(len(left), len(right))
    padded = [(((),) * (width - len(axes))) + tuple(axes) for axes in (left, right)]
    return tuple(a if _length(a) >= _length(b) else b for a, b in zip(*padded, strict=True))


def _length(axis: tuple[tuple[str, int], ...]) -> int:
    size = 1
    for _, factor in axis:
        size *= factor
    return size


def aligned(left: Kernel, right: Kernel) -> tuple[list[tuple[Part, Part]], Axes, int | None]:
    """Pairs of parts that meet, the axes of the result, and the dimension its parts lie along."""
    axes = broadcast_axes(left.axes, right.axes)
    left, right = _at_positions(left, axes), _at_positions(right, axes)
    splits = {_from_right(kernel) for kernel in (left, right) if kernel.split is not None}
    if len(splits) > 1:
        left, right, splits = left.one(), right.one(), set()
    if not splits:
        return [(left.parts[0], right.parts[0])], axes, None
    back = splits.pop()
    size = _length(axes[back])
    edges = sorted({0, size} | _edges(left) | _edges(right))
    ranges = list(itertools.pairwise(edges))
    pairs = [(cut(left, low, high, back), cut(right, low, high, back)) for low, high in ranges]
    return pairs, axes, len(axes) + back


def _from_right(kernel: Kernel) -> int:
    assert kernel.split is not None
    return kernel.split - len(kernel.axes)


def _at_positions(kernel: Kernel, axes: Axes) -> Kernel:
    """A kernel of one position, broadcast over many, has the same value at all of them."""
    positions = 1
    for axis in axes:
        positions *= _length(tuple(factor for factor in axis if factor[0] == "p"))
    if kernel.positions == 1 and positions > 1:
        return kernel.with_parts(*(expand_positions(part) for part in kernel.parts))
    return kernel


def _edges(kernel: Kernel) -> set[int]:
    edges, at = set[int](), 0
    if kernel.split is not None:
        for part in kernel.parts:
            at += part.size
            edges.add(at)
    return edges


def cut(kernel: Kernel, low: int, high: int, dim: int) -> Part:
    """Entries ``low:high`` along a dimension (counted from the right), which must lie within one part."""
    size = _length(kernel.axes[dim]) if len(kernel.axes) >= -dim else 1
    if size == 1 or (low, high) == (0, size):
        return kernel.merged
    if kernel.split is None:
        return slice_part(kernel.parts[0], low, high, f"of {size}")
    at = 0
    for part in kernel.parts:
        if at <= low and high <= at + part.size:
            whole = (low, high) == (at, at + part.size)
            return part if whole else slice_part(part, low - at, high - at, f"of {part.size}")
        at += part.size
    return slice_part(kernel.merged, low, high, f"of {size}")
