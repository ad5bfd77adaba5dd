"""Two values that meet entry by entry: dimensions by broadcasting, factors refined alike, groups range by range."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import Tensor

from kgraph.gram import field as f
from kgraph.gram.build import moved, sliced
from kgraph.gram.field import Field
from kgraph.gram.places import Relabel
from kgraph.gram.tangents import Own
from kgraph.gram.value import Axes, Axis, CannotFollow, Value, expanded, places_of, roles, size_of
from kgraph.roots import Root

CHANNELS = Root("channels of known tensors")
DRAWN_CHANNELS = Root("channels of known tensors that were drawn")
"""Of what was measured on draws of its channels: which draw is which channel is not kept."""


def aligned(x: Value, y: Value) -> tuple[list[tuple[int, Field, Field]], Axes, int | None]:
    """(channels, field of x, field of y) of every range, the axes of the result and its split dimension."""
    width = max(len(x.axes), len(y.axes))
    x, y = _widened(x, width), _widened(y, width)
    for dim in range(width):
        x, y = _stretched(x, y, dim), _stretched(y, x, dim)
    x, y = _refined(x, y), _refined(y, x)
    axes = tuple(a or b for a, b in zip(x.axes, y.axes, strict=True))
    split = next((v.split for v in (x, y) if v.split is not None), None)
    return [(size, u, v) for size, (u, v) in ranges([x, y])], axes, split


def ranges(values: Sequence[Value]) -> list[tuple[int, tuple[Field, ...]]]:
    """(channels, every value's field) of the ranges of channels within which each of them is one field."""
    splits = {v.split for v in values if v.split is not None}
    if len(splits) > 1:
        raise CannotFollow("channel groups along two dimensions")
    if not splits:
        return [(max(v.channels for v in values), tuple(v.groups[0][1] for v in values))]
    edges = sorted({0}.union(*(_edges(v) for v in values)))
    return [(b - a, tuple(_range(v, a, b) for v in values)) for a, b in itertools.pairwise(edges)]


def _widened(x: Value, width: int) -> Value:
    lead = width - len(x.axes)
    split = x.split + lead if x.split is not None else None
    return Value(x.groups, (*((),) * lead, *x.axes), split) if lead else x


def _stretched(x: Value, like: Value, dim: int) -> Value:
    """Dimension ``dim`` of size one in x copied along the positions of ``like`` there."""
    if x.axes[dim] or not like.axes[dim]:
        return x
    for role, size in reversed(like.axes[dim]):
        if role == "p":
            x = _prepended(x, dim, size)
    if x.channels == 1 and roles(like.axes[dim]) == {"c", "p"}:  # one number for all channels that lie there
        return replace(x, axes=(*x.axes[:dim], like.axes[dim], *x.axes[dim + 1 :]))
    return x


def _prepended(x: Value, dim: int, size: int) -> Value:
    if not x.axes[dim]:
        return expanded(x, dim, size)
    rest = x.axes[dim]
    bare = expanded(replace(x, axes=(*x.axes[:dim], (), *x.axes[dim:])), dim, size)
    merged: Axis = (*bare.axes[dim], *rest)
    return replace(bare, axes=(*bare.axes[:dim], merged, *bare.axes[dim + 2 :]))


def _refined(x: Value, like: Value) -> Value:
    """Factors split as those of ``like`` are; a dimension must mean the same in both."""
    axes = tuple(_refine(a, b) for a, b in zip(x.axes, like.axes, strict=True))
    if axes == x.axes:
        return x
    places = places_of(axes)
    op = Relabel(places, tuple(range(len(places))))
    changed = x if places == x.places else x.each(lambda u: moved(u, op))
    return replace(changed, axes=axes)


def _refine(axis: Axis, like: Axis) -> Axis:
    """Both axes' factors cut at every boundary of either."""
    if not like or not axis or axis == like:
        return axis
    if roles(axis) <= {"p", "b"} and "c" in roles(like) and all(role != "c" for role, _ in axis):
        raise CannotFollow("positions meet channels")
    cuts = set(itertools.accumulate((s for _, s in reversed(like)), lambda a, b: a * b))
    result: list[tuple[str, int]] = []
    at = 1
    for role, size in reversed(axis):
        inner = sorted(c // at for c in cuts if at < c < at * size and c % at == 0 and size % (c // at) == 0)
        last = 1
        for c in inner:
            result.append((role, c // last))
            last = c
        result.append((role, size // last))
        at *= size
    return tuple(reversed(result))


def _edges(x: Value) -> set[int]:
    return set(itertools.accumulate(size for size, _ in x.groups)) if x.split is not None else set()


def _range(x: Value, low: int, high: int) -> Field:
    if x.split is None:
        total = x.channels
        return x.groups[0][1] if total == 1 else sliced(x.groups[0][1], low, high, total)
    at = 0
    for size, field in x.groups:
        if at <= low and high <= at + size:
            return sliced(field, low - at, high - at, size)
        at += size
    raise CannotFollow("channel groups that do not meet")


def known_value(tensor: Tensor, like: Value, root: str | None = None, own: Own | None = None) -> Value:
    """A known tensor as a value, its dimensions meaning what they mean in ``like`` (its last ones, broadcast).

    Args:
        root: name of the parameter it is, None for constants.
        own: own terms of its tangents.
    """
    x = tensor.detach().double()
    x = x.reshape((1,) * (len(like.axes) - x.ndim) + tuple(x.shape))
    axes: list[Axis] = []
    shape: list[int] = []
    for axis, size in zip(like.axes, x.shape, strict=True):
        if size == 1:
            axes.append(())
        elif size == size_of(axis):
            axes.append(axis)
            shape += [s for _, s in axis]
        elif not axis:
            axes.append((("p", size),))
            shape.append(size)
        else:
            raise CannotFollow("a known tensor of another size")
    order = [(role, i) for i, role in enumerate(role for axis in axes for role, _ in axis)]
    ranked = [i for want in "bcp" for role, i in order if role == want]
    sizes = {want: [shape[i] for role, i in order if role == want] for want in "bcp"}
    data = x.reshape(shape).permute(ranked)
    inputs = int(torch.tensor(sizes["b"] or [1]).prod())
    channels = int(torch.tensor(sizes["c"] or [1]).prod())
    data = data.reshape(inputs, channels, *sizes["p"])
    roots = frozenset({Root(root)}) if root is not None else frozenset()
    if bool((data != data[:, :1]).any()):  # two known tensors that vary over channels do so over the same ones
        roots |= {CHANNELS}
    known = f.Known(tuple(sizes["p"]), roots, data=data, own=own or {})
    return Value(((channels, known),), tuple(axes))
