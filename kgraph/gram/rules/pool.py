"""Pooling: averages are linear maps of positions; a maximum is measured on joint draws."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from kgraph.canonical import aten
from kgraph.gram.build import moved, scaled
from kgraph.gram.field import Drawn, Field
from kgraph.gram.places import Mix, adaptive_matrix, window_matrix
from kgraph.gram.rules.affine import each_axis
from kgraph.gram.rules.table import Context, rule
from kgraph.gram.value import CannotFollow, Value, place_start, roles, single_place


def mixed(x: Value, dim: int, matrix: Tensor) -> Value:
    """``matrix`` applied along a dimension of positions."""
    x = single_place(x, dim)
    if not x.axes[dim]:
        return x.each(lambda u: scaled(u, float(matrix.sum())))
    if roles(x.axes[dim]) != {"p"}:
        raise CannotFollow("an average over channels or inputs")
    drop = len(matrix) == 1
    op = Mix(place_start(x.axes, dim), matrix, drop)
    axis = () if drop else (("p", len(matrix)),)
    return x.each(lambda u: moved(u, op), (*x.axes[:dim], axis, *x.axes[dim + 1 :]), x.split)


def pooled_size(size: int, width: int, stride: int, padding: int, dilation: int, ceil_mode: bool) -> int:
    """Windows along one axis, as PyTorch counts them."""
    reach = dilation * (width - 1) + 1
    free = size + 2 * padding - reach
    count = (-(-free // stride) if ceil_mode else free // stride) + 1
    return count - 1 if ceil_mode and (count - 1) * stride >= size + padding else count


@rule(aten.avg_pool1d.default, aten.avg_pool2d.default, aten.avg_pool3d.default)
def avg_pool(
    context: Context,
    x: Value,
    kernel: Any,
    stride: Any = None,
    padding: Any = 0,
    ceil_mode: bool = False,
    count_include_pad: bool = True,
    divisor: int | None = None,
) -> Value:
    dims = len(x.axes) - 2
    widths = each_axis(kernel, dims)
    strides = each_axis(stride, dims) if stride else widths
    paddings = each_axis(padding, dims)
    if any(paddings) and not count_include_pad and dims > 1:
        raise CannotFollow("an average that leaves padding out in two directions")
    for i in range(dims):
        size = x.shape[2 + i]
        out = pooled_size(size, widths[i], strides[i], paddings[i], 1, ceil_mode)
        matrix = window_matrix(size, out, widths[i], strides[i], paddings[i], count_pad=count_include_pad)
        x = mixed(x, 2 + i, matrix if divisor is None else (matrix > 0).double())
    return x if divisor is None else x.each(lambda u: scaled(u, 1 / divisor))


@rule(aten.adaptive_avg_pool1d.default, aten.adaptive_avg_pool2d.default, aten.adaptive_avg_pool3d.default)
def adaptive_avg_pool(context: Context, x: Value, output_size: Any) -> Value:
    sizes = [output_size] if isinstance(output_size, int) else list(output_size)
    first = len(x.axes) - len(sizes)
    for i, out in enumerate(sizes):
        x = mixed(x, first + i, adaptive_matrix(x.shape[first + i], out))
    return x


def _dims(x: Value, dim: Any) -> list[int]:
    dims = range(len(x.axes)) if dim is None else [dim] if isinstance(dim, int) else dim
    return sorted((d % len(x.axes) for d in dims), reverse=True)


def _reduced(x: Value, dim: Any, keepdim: bool, weight: float | None) -> Value:
    """Mean (weight None) or weighted sum over dimensions of positions."""
    for d in _dims(x, dim):
        if roles(x.axes[d]) - {"p"}:
            raise CannotFollow("an average over channels or inputs")
        size = x.shape[d]
        x = mixed(x, d, torch.full((1, size), weight or 1.0 / size, dtype=torch.float64))
        if not keepdim:
            split = x.split - (x.split > d) if x.split is not None else None
            x = Value(x.groups, (*x.axes[:d], *x.axes[d + 1 :]), split)
    return x


@rule(aten.mean.dim)
def mean(context: Context, x: Value, dim: Any, keepdim: bool = False, **_: object) -> Value:
    return _reduced(x, dim, keepdim, None)


@rule(aten.sum.dim_IntList)
def total(context: Context, x: Value, dim: Any, keepdim: bool = False, **_: object) -> Value:
    return _reduced(x, dim, keepdim, 1.0)


@rule(aten.max_pool1d.default, aten.max_pool2d.default, aten.max_pool3d.default)
def max_pool(
    context: Context,
    x: Value,
    kernel: Any,
    stride: Any = None,
    padding: Any = 0,
    dilation: Any = 1,
    ceil_mode: bool = False,
) -> Value:
    dims = len(x.axes) - 2
    widths, paddings, dilations = each_axis(kernel, dims), each_axis(padding, dims), each_axis(dilation, dims)
    strides = each_axis(stride, dims) if stride else widths
    new = [
        pooled_size(x.shape[2 + i], widths[i], strides[i], paddings[i], dilations[i], ceil_mode) for i in range(dims)
    ]
    function = (torch.max_pool1d, torch.max_pool2d, torch.max_pool3d)[dims - 1]
    return _pooled(x, new, lambda t: function(t, widths, strides, paddings, dilations, ceil_mode))


@rule(aten.adaptive_max_pool1d.default, aten.adaptive_max_pool2d.default, aten.adaptive_max_pool3d.default)
def adaptive_max_pool(context: Context, x: Value, output_size: Any) -> tuple[Value, None]:
    """Maxima, and None for where they are."""
    dims = len(x.axes) - 2
    sizes = each_axis(output_size, dims)
    function = (F.adaptive_max_pool1d, F.adaptive_max_pool2d, F.adaptive_max_pool3d)[dims - 1]
    return _pooled(x, sizes, lambda t: function(t, sizes)), None


def _pooled(x: Value, new: list[int], function: Callable[[Tensor], Tensor]) -> Value:
    """``function`` of images of one channel, the last dimensions of x, on joint draws; ``new`` are its sizes."""
    for i in range(len(new)):
        x = single_place(x, 2 + i)
        if roles(x.axes[2 + i]) - {"p"}:
            raise CannotFollow("a maximum over channels or inputs")
    old, start = x.shape[2:], place_start(x.axes, 2)
    axes = (*x.axes[:2], *(((("p", s),) if s > 1 else ()) for s in new))

    def pooled(draws: Tensor) -> Tensor:
        """[S, N, *other places, *image] -> the same with pooled image."""
        out = function(draws.reshape(-1, 1, *old))
        return out.reshape(*draws.shape[: 2 + start], *(s for s in new if s > 1))

    def change(u: Field) -> Field:
        places = (*u.places[:start], *(s for s in new if s > 1))
        return Drawn(places, u.roots, u.how, (u,), pooled)

    return x.each(change, axes, x.split)
