"""Operations that only move entries."""

from __future__ import annotations

import math
import operator
from collections.abc import Sequence
from typing import Any

import torch

from kgraph.canonical import aten
from kgraph.gram.build import moved, sliced
from kgraph.gram.field import Joined
from kgraph.gram.places import Insert
from kgraph.gram.rules.repeats import warned
from kgraph.gram.rules.table import Context, rule
from kgraph.gram.value import (
    CannotFollow,
    Value,
    channel_range,
    expanded,
    gathered,
    permuted,
    place_start,
    reshaped,
    roles,
    squeezed,
)


def _sizes(x: Value, shape: Sequence[int]) -> list[int]:
    """Sizes with -1 filled in."""
    total = math.prod(x.shape)
    known = math.prod(size for size in shape if size != -1)
    return [total // known if size == -1 else size for size in shape]


@rule(aten.view.default, aten.reshape.default, aten._unsafe_view.default)
def view(context: Context, x: Value, shape: Sequence[int]) -> Value:
    return reshaped(x, _sizes(x, shape))


@rule(aten.view_as.default, aten.reshape_as.default)
def view_as(context: Context, x: Value, other: Any) -> Value:
    return reshaped(x, list(other.shape))


@rule(aten.flatten.using_ints)
def flatten(context: Context, x: Value, start: int = 0, end: int = -1) -> Value:
    start, end = start % len(x.shape), end % len(x.shape)
    return reshaped(x, [*x.shape[:start], _product(x.shape[start : end + 1]), *x.shape[end + 1 :]])


def _product(sizes: Sequence[int]) -> int:
    return math.prod(sizes)


@rule(aten.unflatten.int)
def unflatten(context: Context, x: Value, dim: int, sizes: Sequence[int]) -> Value:
    dim %= len(x.shape)
    rest = x.shape[dim]
    known = _product([s for s in sizes if s != -1])
    full = [rest // known if s == -1 else s for s in sizes]
    return reshaped(x, [*x.shape[:dim], *full, *x.shape[dim + 1 :]])


@rule(aten.unsqueeze.default)
def unsqueeze(context: Context, x: Value, dim: int) -> Value:
    dim %= len(x.shape) + 1
    return reshaped(x, [*x.shape[:dim], 1, *x.shape[dim:]])


@rule(aten.squeeze.dim, aten.squeeze.dims, aten.squeeze.default)
def squeeze(context: Context, x: Value, dim: int | Sequence[int] | None = None) -> Value:
    dims = range(len(x.shape)) if dim is None else [dim] if isinstance(dim, int) else dim
    gone = {d % len(x.shape) for d in dims}
    return reshaped(x, [s for i, s in enumerate(x.shape) if i not in gone or s != 1])


@rule(aten.permute.default)
def permute(context: Context, x: Value, dims: Sequence[int]) -> Value:
    return permuted(x, [d % len(x.axes) for d in dims])


@rule(aten.transpose.int, aten.swapaxes.default)
def transpose(context: Context, x: Value, first: int, second: int) -> Value:
    order = list(range(len(x.axes)))
    first, second = first % len(order), second % len(order)
    order[first], order[second] = order[second], order[first]
    return permuted(x, order)


@rule(aten.movedim.int, aten.movedim.intlist)
def movedim(context: Context, x: Value, source: int | Sequence[int], target: int | Sequence[int]) -> Value:
    count = len(x.axes)
    sources = [d % count for d in ([source] if isinstance(source, int) else source)]
    targets = [d % count for d in ([target] if isinstance(target, int) else target)]
    rest = iter(d for d in range(count) if d not in sources)
    placed = dict(zip(targets, sources, strict=True))
    return permuted(x, [placed[d] if d in placed else next(rest) for d in range(count)])


@rule(aten.t.default, aten.numpy_T.default, aten.mT.default)
def t(context: Context, x: Value) -> Value:
    return transpose(context, x, -1, -2)


@rule(aten.expand.default)
def expand(context: Context, x: Value, sizes: Sequence[int], **_: object) -> Value:
    lead = len(sizes) - len(x.axes)
    x = reshaped(x, [1] * lead + list(x.shape)) if lead else x
    for dim, size in enumerate(sizes):
        if size not in (-1, x.shape[dim]):
            x = expanded(x, dim, size)
    return x


@rule(aten.repeat.default, aten.tile.default)
def repeat(context: Context, x: Value, times: Sequence[int]) -> Value:
    lead = len(times) - len(x.axes)
    x = reshaped(x, [1] * lead + list(x.shape)) if lead > 0 else x
    for dim, count in enumerate(times):
        if count != 1:
            positions_only(x, dim)
            x = gathered(x, dim, list(range(x.shape[dim])) * count)
    return x


def positions_only(x: Value, dim: int) -> None:
    if roles(x.axes[dim]) - {"p"}:
        raise CannotFollow("a copy along channels or inputs")


def _narrow(context: Context, x: Value, dim: int, index: Sequence[int]) -> Value:
    """Entries ``index`` along a dimension: positions are gathered, of channels a range is cut."""
    if list(index) == list(range(x.shape[dim])):
        return x
    kinds = roles(x.axes[dim])
    if "c" in kinds:
        if list(index) != list(range(index[0], index[-1] + 1)):
            raise CannotFollow("a cut of channels that is no range")
        return channel_range(warned(context, x), dim, index[0], index[-1] + 1)
    if "b" in kinds:
        raise CannotFollow("a cut along the inputs")
    return gathered(x, dim, index)


@rule(aten.select.int)
def select(context: Context, x: Value, dim: int, index: int) -> Value:
    dim %= len(x.axes)
    return squeezed(_narrow(context, x, dim, [index % max(x.shape[dim], 1)]), dim)


@rule(aten.slice.Tensor)
def slice_(
    context: Context, x: Value, dim: int = 0, start: int | None = None, end: int | None = None, step: int = 1
) -> Value:
    dim %= len(x.axes)
    return _narrow(context, x, dim, list(range(*slice(start, end, step).indices(x.shape[dim]))))


@rule(aten.narrow.default)
def narrow(context: Context, x: Value, dim: int, start: int, length: int) -> Value:
    dim %= len(x.axes)
    start %= max(x.shape[dim], 1)
    return _narrow(context, x, dim, list(range(start, start + length)))


@rule(aten.chunk.default)
def chunk(context: Context, x: Value, chunks: int, dim: int = 0) -> list[Value]:
    return split(context, x, -(-x.shape[dim] // chunks), dim)


@rule(aten.split.Tensor)
def split(context: Context, x: Value, size: int, dim: int = 0) -> list[Value]:
    dim %= len(x.axes)
    total = x.shape[dim]
    return split_with_sizes(context, x, [min(size, total - at) for at in range(0, total, size)], dim)


@rule(aten.split_with_sizes.default, aten.split.sizes)
def split_with_sizes(context: Context, x: Value, sizes: Sequence[int], dim: int = 0) -> list[Value]:
    dim %= len(x.axes)
    at, pieces = 0, []
    for size in sizes:
        pieces.append(_narrow(context, x, dim, list(range(at, at + size))))
        at += size
    return pieces


@rule(aten.unbind.int)
def unbind(context: Context, x: Value, dim: int = 0) -> list[Value]:
    return [select(context, x, dim, i) for i in range(x.shape[dim])]


@rule(operator.getitem)
def getitem(context: Context, x: Any, index: int) -> Any:
    return x[index]


@rule(aten.pad.default, aten.constant_pad_nd.default)
def pad(
    context: Context, x: Value, amounts: Sequence[int], mode: str = "constant", value: float | None = None
) -> Value:
    if mode == "constant" and value:
        raise CannotFollow("padding by a constant that is not 0")
    for i in range(len(amounts) // 2):
        low, high = amounts[2 * i], amounts[2 * i + 1]
        if low == high == 0:
            continue
        dim = len(x.axes) - 1 - i
        positions_only(x, dim)
        x = gathered(x, dim, padded_index(x.shape[dim], low, high, mode))
    return x


def padded_index(size: int, low: int, high: int, mode: str) -> list[int]:
    """Position that every padded position reads, -1 for zeros."""
    at = torch.arange(-low, size + high)
    if mode == "constant":
        at = torch.where((at >= 0) & (at < size), at, -1)
    elif mode == "circular":
        at = at % size
    elif mode == "replicate":
        at = at.clamp(0, size - 1)
    else:
        at = (at.abs() - (size - 1)).abs().neg() + size - 1
    return at.tolist()


@rule(aten.upsample_nearest1d.vec, aten.upsample_nearest2d.vec, aten.upsample_nearest3d.vec)
def upsample_nearest(context: Context, x: Value, sizes: Sequence[int] | None, factors: Sequence[float] | None) -> Value:
    for i in range(len(x.axes) - 2):
        places = torch.arange(x.shape[2 + i], dtype=torch.float64)[None, None]
        size, factor = [sizes[i]] if sizes else None, [factors[i]] if factors else None
        read = aten.upsample_nearest1d.vec(places, size, factor)  # which one is read is PyTorch's own rounding
        x = gathered(x, 2 + i, read.long().flatten().tolist())
    return x


@rule(aten.pixel_shuffle.default)
def pixel_shuffle(context: Context, x: Value, factor: int) -> Value:
    *lead, channels, height, width = x.shape
    n = len(lead)
    x = warned(context, x)
    x = reshaped(x, [*lead, channels // factor**2, factor, factor, height, width])
    x = _as_positions(x, (n + 1, n + 2))
    x = permuted(x, [*range(n), n, n + 3, n + 1, n + 4, n + 2])
    return reshaped(x, [*lead, channels // factor**2, height * factor, width * factor])


def _as_positions(x: Value, dims: Sequence[int]) -> Value:
    """Channel factors read as positions: each place has channels, hence random numbers, of its own."""
    for dim in dims:
        size = x.shape[dim]
        if x.split is not None:
            raise CannotFollow("groups of channels that become positions")
        u = x.groups[0][1]
        axis = place_start(x.axes, dim)
        pieces = tuple(moved(sliced(u, i, i + 1, size), Insert(axis, 1)) for i in range(size))
        places = (*u.places[:axis], size, *u.places[axis:])
        roots = frozenset().union(*(piece.roots for piece in pieces))
        joined = Joined(places, roots, u.how, pieces, axis)
        axes = (*x.axes[:dim], (("p", size),), *x.axes[dim + 1 :])
        x = Value(((max(x.channels // size, 1), joined),), axes)
    return x
