"""Operations that only move entries: the kernel stays, its dimensions change meaning.

Each dimension is a list of factors (role, size), so that heads, windows and patches survive reshapes. Positions
that are flattened into channels are averaged over from then on: only the same-position covariance remains.
"""

from __future__ import annotations

import math
import operator
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from kgraph.canonical import aten
from kgraph.entries import expand_positions, moved, said, slice_part
from kgraph.how import assumed
from kgraph.kernel import Axes, Factor, Kernel, Part, alike
from kgraph.rules.pointwise import COPIES, apply_all, rounding_of
from kgraph.rules.table import Context, rule

aten_view = (aten.view.default, aten.reshape.default, aten._unsafe_view.default, aten.reshape_as.default)


def factors_of(axes: Axes) -> list[Factor]:
    return [factor for axis in axes for factor in axis if factor[1] > 1]


def regroup(axes: Axes, shape: tuple[int, ...]) -> Axes | None:
    """Factors of every dimension after a reshape; factors are split where the new sizes ask for it."""
    pending = factors_of(axes)[::-1]
    result: list[tuple[Factor, ...]] = []
    for size in shape:
        taken: list[Factor] = []
        while size > 1:
            if not pending:
                return None
            role, available = pending.pop()
            if size % available == 0:
                taken.append((role, available))
                size //= available
            elif available % size == 0:
                taken.append((role, size))
                pending.append((role, available // size))
                size = 1
            else:
                return None
        result.append(tuple(taken))
    return tuple(result) if not pending else None


def mixed_to_channels(axes: Axes) -> Axes:
    """A dimension made of positions and channels is a dimension of channels: what reads it sums over both."""
    return tuple(
        tuple(("c" if role == "p" else role, size) for role, size in axis)
        if {"p", "c"} <= {role for role, _ in axis}
        else axis
        for axis in axes
    )


def _moved(x: Kernel, axes: Axes) -> Kernel:
    """Same parts under other axes, if the dimension they lie along is still whole; else their average."""
    if x.split is None:
        return replace(x, axes=axes)
    whole = x.axes[x.split]
    new = [i for i, axis in enumerate(axes) if axis == whole]
    if len(new) == 1 and sum(axis == whole for axis in x.axes) == 1:
        return replace(x, axes=axes, split=new[0])
    return replace(x.one(), axes=axes)


_ACROSS = assumed("a cut across positions of several laws, counted like all of them")
_MIDDLE = assumed("the middle of what is flipped counted as moved, though it stays")


@rule(*aten_view, aten.flatten.using_ints, aten.unflatten.int, aten.squeeze.dim, aten.squeeze.default)
@rule(aten.squeeze.dims, aten.unsqueeze.default, aten.ravel.default, aten.view_as.default)
def reshape(context: Context, x: Kernel, *_: object) -> Kernel:
    axes = regroup(x.axes, context.shape)
    if axes is None:
        return context.sample()
    return _moved(x, mixed_to_channels(axes))


@rule(aten.permute.default)
def permute(context: Context, x: Kernel, dims: Sequence[int]) -> Kernel:
    order = [d % len(x.axes) for d in dims]
    split = order.index(x.split) if x.split is not None else None
    result = replace(x, axes=tuple(x.axes[d] for d in order), split=split)
    crossed = [_order_of(x.axes, order, role) for role in "pc"]
    return result if all(o == sorted(o) for o in crossed) else _elsewhere(result, f"permuted {crossed}")


def _order_of(axes: Axes, order: Sequence[int], role: str) -> list[int]:
    """Dimensions with a factor of this role, in their new order."""
    return [d for d in order if any(own == role for own, _ in axes[d])]


def _elsewhere(x: Kernel, label: str) -> Kernel:
    """The same entries at other places: no longer the same number at the same place as in ``x``."""
    return x.with_parts(*(moved(part, label) for part in x.parts))


@rule(aten.transpose.int, aten.swapaxes.default)
def transpose(context: Context, x: Kernel, first: int, second: int) -> Kernel:
    order = list(range(len(x.axes)))
    first, second = first % len(order), second % len(order)
    order[first], order[second] = order[second], order[first]
    return permute(context, x, order)


@rule(aten.t.default, aten.numpy_T.default, aten.mT.default)
def t(context: Context, x: Kernel) -> Kernel:
    return transpose(context, x, -1, -2)


@rule(*COPIES)
def copied(context: Context, x: Kernel, *args: object, **kwargs: object) -> Kernel:
    """Copies and casts; a type without fractions rounds."""
    rounding = rounding_of(args, kwargs, context.node)
    return x if rounding is None else apply_all(rounding, x)


@rule(aten.channel_shuffle.default, aten.roll.default, aten.flip.default)
def permuted(context: Context, x: Kernel, *how: object) -> Kernel:
    """Permutations of positions or channels: the same second moments of other entries."""
    result = _elsewhere(x.one(), f"{context.node.target} {how}")
    turned = how[0] if context.node.target is aten.flip.default else ()
    odd = any(x.shape[dim] % 2 and x.shape[dim] > 1 for dim in turned)  # type: ignore[attr-defined]
    return said(result, _MIDDLE) if odd else result


@rule(aten.expand.default, aten.expand_as.default, aten.repeat.default, aten.tile.default)
def expand(context: Context, x: Kernel, *_: object) -> Kernel:
    """Copies along new places: the same value at each (K_diff = K_same), as long as there was one position."""
    lead = len(context.shape) - len(x.axes)
    old: Axes = (*((),) * lead, *x.axes)
    axes: list[tuple[Factor, ...]] = []
    grown = False
    for index in range(len(old)):
        axis, size = old[index], context.shape[index]
        before = math.prod(factor for _role, factor in axis)
        if size == before:
            axes.append(axis)
        else:
            grown = grown or index > 0
            axes.append((("b" if index == 0 else "p", size),) if before == 1 else ((axis[0][0], size),))
    if grown and x.positions == 1:
        x = x.with_parts(*(expand_positions(part) for part in x.parts))
    split = x.split + lead if x.split is not None else None
    return replace(x, axes=tuple(axes), split=split)


def _narrow(x: Kernel, dim: int, start: int, stop: int) -> Kernel:
    """Entries ``start:stop`` along ``dim``: of channels, other random numbers; of positions, fewer of the same."""
    size = x.shape[dim]
    roles = {role for role, _ in x.axes[dim]}
    axes = list(x.axes)
    kept = stop - start
    if kept == size:
        return x
    if x.joined is not None and x.joined[0] == dim:
        inside = _within(x.joined[1], dim, start, stop)
        if inside is not None:
            return _narrow(*inside)
    axes[dim] = ((next(iter(roles), "p") if len(roles) == 1 else "c", kept),) if kept > 1 else ()
    if "c" not in roles:
        result = _elsewhere(replace(x, axes=tuple(axes)), f"{start}:{stop} of {dim - len(x.axes)}")
        across = x.joined is not None and x.joined[0] == dim and not alike(x.joined[1])
        return said(result, _ACROSS) if across else result
    parts = _channel_range(x, dim, start, stop)
    return Kernel(parts, tuple(axes), dim if len(parts) > 1 else None)


def _within(pieces: Sequence[Kernel], dim: int, start: int, stop: int) -> tuple[Kernel, int, int, int] | None:
    """Of tensors side by side, the one that holds ``start:stop``, with the range counted from its own start."""
    at = 0
    for piece in pieces:
        if at <= start and stop <= at + piece.shape[dim]:
            return piece, dim, start - at, stop - at
        at += piece.shape[dim]
    return None


def _channel_range(x: Kernel, dim: int, start: int, stop: int) -> tuple[Part, ...]:
    if x.split != dim:
        return (slice_part(x.merged, start, stop, f"of {x.shape[dim]}"),)
    parts, at = [], 0
    for part in x.parts:
        low, high = max(start, at), min(stop, at + part.size)
        if low < high:
            whole = (low, high) == (at, at + part.size)
            parts.append(part if whole else slice_part(part, low - at, high - at, f"of {part.size}"))
        at += part.size
    return tuple(parts)


def _squeezed(x: Kernel, dim: int) -> Kernel:
    split = x.split
    if split is not None:
        split = None if split == dim else split - (split > dim)
    return replace(x, axes=(*x.axes[:dim], *x.axes[dim + 1 :]), split=split)


@rule(aten.select.int)
def select(context: Context, x: Kernel, dim: int, index: int) -> Kernel:
    dim %= len(x.axes)
    index %= max(x.shape[dim], 1)
    narrowed = _narrow(x, dim, index, index + 1)
    return _squeezed(narrowed, dim)


@rule(aten.slice.Tensor)
def slice_(
    context: Context, x: Kernel, dim: int = 0, start: int | None = None, end: int | None = None, step: int = 1
) -> Kernel:
    dim %= len(x.axes)
    size = x.shape[dim]
    low, high, _ = slice(start, end, step).indices(size)
    if step == 1:
        return _narrow(x, dim, low, high)
    if any(role == "c" for role, _ in x.axes[dim]):
        return context.sample()
    axes = tuple((("p", context.shape[dim]),) if i == dim else axis for i, axis in enumerate(x.axes))
    return _elsewhere(replace(x, axes=axes), f"{low}:{high}:{step} of {dim - len(x.axes)}")


@rule(aten.narrow.default)
def narrow(context: Context, x: Kernel, dim: int, start: int, length: int) -> Kernel:
    dim %= len(x.axes)
    low = start % x.shape[dim] if start < 0 else start
    return _narrow(x, dim, low, low + length)


def _pieces(x: Kernel, dim: int, sizes: Sequence[int]) -> list[Kernel]:
    at, pieces = 0, []
    for size in sizes:
        pieces.append(_narrow(x, dim, at, at + size))
        at += size
    return pieces


@rule(aten.chunk.default)
def chunk(context: Context, x: Kernel, chunks: int, dim: int = 0) -> list[Kernel]:
    dim %= len(x.axes)
    size = -(-x.shape[dim] // chunks)
    return _split(x, dim, size)


@rule(aten.split.Tensor)
def split(context: Context, x: Kernel, size: int, dim: int = 0) -> list[Kernel]:
    return _split(x, dim % len(x.axes), size)


def _split(x: Kernel, dim: int, size: int) -> list[Kernel]:
    total = x.shape[dim]
    return _pieces(x, dim, [min(size, total - at) for at in range(0, total, size)])


@rule(aten.split_with_sizes.default, aten.split.sizes)
def split_with_sizes(context: Context, x: Kernel, sizes: Sequence[int], dim: int = 0) -> list[Kernel]:
    return _pieces(x, dim % len(x.axes), sizes)


@rule(aten.unbind.int)
def unbind(context: Context, x: Kernel, dim: int = 0) -> list[Kernel]:
    dim %= len(x.axes)
    return [_squeezed(_narrow(x, dim, i, i + 1), dim) for i in range(x.shape[dim])]


@rule(operator.getitem)
def getitem(context: Context, x: Any, index: int) -> Any:
    return x[index]
