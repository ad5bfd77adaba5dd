"""Pooling. Averages mix same- and different-position covariance; a maximum has no closed form and is drawn."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import Tensor

from kgraph.algebra import empirical
from kgraph.canonical import aten
from kgraph.draws import COUNT
from kgraph.fields import FieldDraws
from kgraph.how import assumed
from kgraph.kernel import DIFF, SAME, Axes, Gaussian, Kernel, Pairs, Part
from kgraph.rules.table import Context, rule

_WINDOWS = 16384


def average(part: Part, window: float) -> Part:
    """Mean of ``window`` positions: K_same' = K_same / n + (1 - 1/n) K_diff; K_diff' = K_diff (disjoint windows)."""

    def mix(field: Tensor) -> Tensor:
        mixed = field.clone()
        mixed[:, SAME] = field[:, SAME] / window + (1 - 1 / window) * field[:, DIFF]
        return mixed

    if window <= 1:
        return part
    how = part.how if part.gaussian else part.how | assumed("Gaussian after averaging positions")
    return replace(part, cov=mix(part.cov), slope=mix(part.slope), ntk=mix(part.ntk), expr=Gaussian(), how=how)


def _averaged(x: Kernel, window: float, axes: Axes) -> Kernel:
    parts = tuple(average(part, window) for part in x.parts)
    return Kernel(parts, axes, x.split if len(parts) > 1 else None)


def _spatial(context: Context, x: Kernel, dims: int) -> Axes:
    sizes = context.shape[-dims:]
    return (*x.axes[:-dims], *(((("p", size),) if size > 1 else ()) for size in sizes))


def _window(size: object, dims: int) -> list[int]:
    values = list(size) if isinstance(size, Sequence) else [size]
    return [int(v) for v in (values * dims if len(values) == 1 else values)]  # type: ignore[call-overload]


def _product(values: Sequence[float]) -> float:
    result = 1.0
    for value in values:
        result *= value
    return result


@rule(aten.avg_pool1d.default, aten.avg_pool2d.default, aten.avg_pool3d.default)
def avg_pool(context: Context, x: Kernel, kernel_size: object, *rest: object) -> Kernel:
    dims = len(context.shape) - 2
    padding = _window(rest[1], dims) if len(rest) > 1 else [0] * dims
    if any(padding) or any(role == "c" for axis in x.axes[-dims:] for role, _ in axis):
        return context.sample()
    return _averaged(x, _product(_window(kernel_size, dims)), _spatial(context, x, dims))


@rule(aten.adaptive_avg_pool1d.default, aten.adaptive_avg_pool2d.default, aten.adaptive_avg_pool3d.default)
def adaptive_avg_pool(context: Context, x: Kernel, output_size: object) -> Kernel:
    dims = len(context.shape) - 2
    if any(role == "c" for axis in x.axes[-dims:] for role, _ in axis):
        return context.sample()
    ratios = [max(i / o, 1.0) for i, o in zip(x.shape[-dims:], context.shape[-dims:], strict=True)]
    return _averaged(x, _product(ratios), _spatial(context, x, dims))


@rule(aten.mean.dim)
def mean(context: Context, x: Kernel, dim: Sequence[int] | int, keepdim: bool = False, **_: object) -> Kernel:
    if not isinstance(x, Kernel):
        return context.sample()
    dims = {d % len(x.axes) for d in (dim if isinstance(dim, Sequence) else [dim])}
    roles = {role for d in dims for role, _ in x.axes[d]}
    if roles - {"p"}:
        return context.sample()
    window = _product([x.shape[d] for d in dims])
    axes = tuple(() if d in dims else axis for d, axis in enumerate(x.axes))
    averaged = _averaged(x, window, axes)
    if keepdim:
        return averaged
    split = averaged.split
    if split is not None:
        split -= sum(d < split for d in dims)
    return Kernel(averaged.parts, tuple(a for d, a in enumerate(axes) if d not in dims), split)


@rule(aten.max_pool1d.default, aten.max_pool2d.default, aten.max_pool3d.default)
def max_pool(context: Context, x: Kernel, kernel_size: object, *_: object) -> Kernel:
    """Maximum over a window of exchangeable positions, drawn; windows of two positions taken as disjoint."""
    dims = len(context.shape) - 2
    if any(role == "c" for axis in x.axes[-dims:] for role, _ in axis):
        return context.sample()
    count = int(_product(_window(kernel_size, dims)))
    parts = tuple(max_of_window(part, count) for part in x.parts)
    return Kernel(parts, _spatial(context, x, dims), x.split if len(parts) > 1 else None)


def max_of_window(part: Part, count: int) -> Part:
    """Draw windows of ``count`` positions; keep their maxima and the derivatives at the places that attain them."""
    draws = FieldDraws(seed=11, elsewhere=True)
    shape, positions = (_WINDOWS, count), (False, True)
    first, second = draws.values(part, shape, positions)
    top_a, at_a = first.max(-1)
    top_b, at_b = second.max(-1)
    meets = (at_a == at_b).double()
    meets[len(part.cov) :] = 0.0  # another window: never the same position
    slope, ntk = torch.zeros(2, len(part.cov), 2, dtype=torch.float64)
    for leaf, (d_a, d_b) in draws.gradients(part, shape, positions).items():
        both = d_a.gather(-1, at_a[..., None])[..., 0] * d_b.gather(-1, at_b[..., None])[..., 0]
        same, apart = (both * meets).mean(-1), (both * (1 - meets)).mean(-1)
        slope = slope + _by_place(same, apart, leaf.slope)
        ntk = ntk + _by_place(same, apart, leaf.ntk)
    mean = float(torch.cat([top_a[None], top_b]).mean())
    rows = ((top_a - top_a.mean()) * (top_b - top_b.mean(-1, keepdim=True))).mean(-1) + mean**2
    cov = rows.reshape(2, -1).T
    first, second = _corrected(top_a[:COUNT], top_b[:, :COUNT].reshape(2, -1, COUNT).transpose(0, 1), cov, mean)
    return replace(empirical(part, first, second, slope, ntk, part.roots), cov=cov, mean=mean)


def _by_place(same: Tensor, apart: Tensor, kernel: Tensor) -> Tensor:
    """sum over draws of d_a d_b times the kernel at the same position, or at two different ones; [P, 2]."""
    rows = same.reshape(2, -1).T * kernel[:, SAME : SAME + 1] + apart.reshape(2, -1).T * kernel[:, DIFF:]
    return rows


def _corrected(first: Tensor, second: Tensor, cov: Tensor, mean: float) -> tuple[Tensor, Tensor]:
    """Draws whose own mean and covariances are those given: a linear correction of the sampling error."""
    centred = first - first.mean()
    variance = (cov[Pairs.SELF, SAME] - mean**2).clamp_min(0)
    centred = centred * (variance / centred.square().mean().clamp_min(1e-300)).sqrt()
    other = second - second.mean(-1, keepdim=True)
    lacking = (cov - mean**2) - (centred * other).mean(-1)
    other = other + (lacking / variance.clamp_min(1e-300))[..., None] * centred
    return centred + mean, other + mean
