"""Linear maps of positions that act on each dimension by itself: average pools, padding, upsampling, pixel shuffles.

    y_i = sum_s P_is x_s,   P = P_1 (x) P_2 (x) ...   (a matrix for every dimension)

    K'_same = A K_same + (C - A) K_diff     A = mean_i sum_s P_is^2            C = mean_i (sum_s P_is)^2
    K'_diff = B K_same + (D - B) K_diff     B = mean_{i,j} sum_s P_is P_js    D = mean_{i,j} (sum_s P_is) (sum_s P_js)

with i != j. All are made of products of sums over single dimensions. The matrices are measured: the operation itself
is run on the unit vectors of each dimension, so that ceil_mode, uneven windows, padding counted or not and corners
are as PyTorch has them.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor
from torch.nn import functional

from kgraph import algebra
from kgraph.biases import any_bias_of
from kgraph.canonical import aten
from kgraph.entries import moved, rebuild
from kgraph.kernel import DIFF, SAME, Axes, Gaussian, Kernel, Part, Unknown
from kgraph.rules.table import Context, rule


@dataclass(frozen=True)
class Mixing:
    """Factors of (K_same, K_diff) in K'_same and in K'_diff, and of the mean."""

    same: tuple[float, float]
    diff: tuple[float, float]
    mean: float

    @property
    def moves(self) -> bool:
        """Whether every output is some input, so that the law of single entries stays."""
        return math.isclose(self.same[0], 1.0, rel_tol=1e-12) and abs(self.same[1]) < 1e-12

    def of(self, field: Tensor) -> Tensor:
        """The field [P, 2] after the map."""
        rows = torch.tensor([self.same, self.diff], dtype=field.dtype)
        # an entry that is not known (nan) must not spread through a factor of 0
        return torch.stack([_weighed(rows[index], field) for index in (SAME, DIFF)], 1)


def _weighed(weights: Tensor, field: Tensor) -> Tensor:
    terms = [weights[index] * field[:, index] for index in (SAME, DIFF) if float(weights[index])]
    return torch.stack(terms).sum(0) if terms else torch.zeros_like(field[:, SAME])


def mixing(matrices: Sequence[Tensor], others: int = 1) -> Mixing:
    """Factors of a separable map: a matrix [outputs, inputs] for each dimension; ``others`` positions besides."""
    same = same_sums = all_sums = mean = 1.0
    crossed = 1 / others
    outputs = others * math.prod(len(matrix) for matrix in matrices)
    for matrix in matrices:
        sums = matrix.sum(1)
        same *= float(matrix.square().sum(1).mean())
        crossed *= float(matrix.sum(0).square().sum()) / len(matrix) ** 2
        same_sums *= float(sums.square().mean())
        all_sums *= float(sums.mean()) ** 2
        mean *= float(sums.mean())
    if outputs == 1:
        return Mixing((same, same_sums - same), (same, same_sums - same), mean)
    apart = outputs - 1
    crossed, all_sums = (outputs * crossed - same) / apart, (outputs * all_sums - same_sums) / apart
    return Mixing((same, same_sums - same), (crossed, all_sums - crossed), mean)


def mixed(part: Part, factors: Mixing) -> Part:
    """The part after a linear map of its positions; its law is kept where entries only move."""
    moments = {name: factors.of(getattr(part, name)) for name in ("cov", "slope", "ntk")}
    if factors.moves:
        return replace(rebuild(part, ("mixed", factors), lambda piece: _copied(piece, factors)), **moments)
    bias = any_bias_of(part) if part.gaussian else None
    law = Gaussian(bias and bias.times(factors.mean))  # one number at all positions
    expr = law if part.gaussian else Unknown("Gaussian after averaging positions")
    return replace(part, **moments, mean=part.mean * factors.mean, expr=expr, scatter=None)


def _copied(part: Part, factors: Mixing) -> Part:
    """Some pairs of different positions are copies of one: their share ``factors.diff[0]`` has K_same."""
    return replace(part, **{name: factors.of(getattr(part, name)) for name in ("cov", "slope", "ntk")})


def _matrix(operate: Callable[[Tensor], Tensor], size: int) -> Tensor:
    """Matrix [outputs, inputs] of a linear operation on one dimension: what it makes of the unit vectors."""
    return operate(torch.eye(size, dtype=torch.float64)[:, None])[:, 0].T


def _each(value: object, dims: int) -> list[int]:
    values = list(value) if isinstance(value, Sequence) else [value]
    return [int(v) for v in (values * dims if len(values) == 1 else values)]  # type: ignore[call-overload]


def _positions(sizes: Sequence[int]) -> Axes:
    return tuple((("p", size),) if size > 1 else () for size in sizes)


def _over(context: Context, x: Kernel, dims: int, operate: Callable[[Tensor, int], Tensor]) -> Kernel:
    """Apply ``operate(rows, dimension)`` along each of the last ``dims`` dimensions."""
    matrices = [_matrix(lambda rows, d=d: operate(rows, d), size) for d, size in enumerate(x.shape[-dims:])]
    sizes = context.shape[-dims:]
    if any(role == "c" for axis in x.axes[-dims:] for role, _ in axis) or list(map(len, matrices)) != list(sizes):
        return context.sample()
    return over_positions(x, range(len(x.axes) - dims, len(x.axes)), matrices)


def over_positions(x: Kernel, dims: Sequence[int], matrices: Sequence[Tensor]) -> Kernel:
    """``x`` with a matrix applied along each of ``dims``, which index positions."""
    others = x.positions // math.prod(x.shape[d] for d in dims)
    factors = mixing(matrices, others)
    parts = tuple(mixed(part, factors) for part in x.parts)
    new = dict(zip(dims, _positions([len(matrix) for matrix in matrices]), strict=True))
    return Kernel(parts, tuple(new.get(d, axis) for d, axis in enumerate(x.axes)), x.split if len(parts) > 1 else None)


@rule(aten.avg_pool1d.default, aten.avg_pool2d.default, aten.avg_pool3d.default)
def avg_pool(
    context: Context,
    x: Kernel,
    kernel_size: object,
    stride: object = None,
    padding: object = 0,
    ceil_mode: bool = False,
    count_include_pad: bool = True,
    divisor_override: int | None = None,
) -> Kernel:
    dims = int(str(context.node.target).split("avg_pool")[1][0])
    sizes, paddings = _each(kernel_size, dims), _each(padding, dims)
    strides = _each(stride, dims) if stride not in (None, []) else sizes

    def pool(rows: Tensor, d: int) -> Tensor:
        count = count_include_pad or divisor_override is not None
        return functional.avg_pool1d(rows, sizes[d], strides[d], paddings[d], ceil_mode, count)

    averaged = _over(context, x, dims, pool)
    if divisor_override is None:
        return averaged
    factor = math.prod(sizes) / divisor_override
    return averaged.with_parts(*(algebra.scale(part, factor) for part in averaged.parts))


@rule(aten.adaptive_avg_pool1d.default, aten.adaptive_avg_pool2d.default, aten.adaptive_avg_pool3d.default)
def adaptive_avg_pool(context: Context, x: Kernel, output_size: object) -> Kernel:
    dims = int(str(context.node.target).split("avg_pool")[1][0])
    sizes = context.shape[-dims:]
    return _over(context, x, dims, lambda rows, d: functional.adaptive_avg_pool1d(rows, sizes[d]))


@rule(aten.pad.default, aten.constant_pad_nd.default)
def pad(
    context: Context, x: Kernel, amounts: Sequence[int], mode: str = "constant", value: float | None = None
) -> Kernel:
    """Copies of positions, or zeros: a mask of zeros that is the same for every input."""
    dims = len(amounts) // 2
    if mode == "constant" and value:
        return context.sample()

    def padded(rows: Tensor, d: int) -> Tensor:
        back = 2 * (dims - 1 - d)
        return functional.pad(rows, tuple(amounts[back : back + 2]), mode)

    if mode != "constant":
        return _over(context, x, dims, padded)
    if any(role == "c" for i, axis in enumerate(x.axes) for role, _ in axis if x.shape[i] != context.shape[i]):
        return context.sample()
    matrices = [_matrix(lambda rows, d=d: padded(rows, d), size) for d, size in enumerate(x.shape[-dims:])]
    share = math.prod(float(matrix.sum(1).mean()) for matrix in matrices)
    axes = (_resized(axis, size) for axis, size in zip(x.axes, context.shape, strict=True))
    result = replace(x.with_parts(*(_bordered(part, share, x, context) for part in x.parts)), axes=tuple(axes))
    front = tuple(int(n) for n in amounts[0::2])[::-1]
    return x.padded(result, front) if min(amounts, default=0) >= 0 else result


def _resized(axis: tuple[tuple[str, int], ...], size: int) -> tuple[tuple[str, int], ...]:
    if math.prod(own for _, own in axis) == size:
        return axis
    return ((axis[0][0] if axis else "p", size),) if size > 1 else ()


def _bordered(part: Part, share: float, x: Kernel, context: Context) -> Part:
    """Zeros at all but a ``share`` of the places: a mask, the same for every input."""
    if share == 1:
        return moved(part, f"cropped {context.shape}")
    drawn = algebra.mask(part, share, 1.0, torch.ones(part.cov.shape) * torch.tensor([1, 0]) > 0, context.node.name)
    places = max(x.positions * math.prod(context.shape) / math.prod(x.shape), 2.0)
    cov = drawn.cov.clone()
    cov[:, DIFF] = share * (share * places - 1) / (places - 1)
    return algebra.multiply(part, replace(drawn, cov=cov))


_UPSAMPLES = (
    aten.upsample_nearest1d.vec,
    aten.upsample_nearest2d.vec,
    aten.upsample_nearest3d.vec,
    aten._upsample_nearest_exact1d.vec,
    aten._upsample_nearest_exact2d.vec,
    aten._upsample_nearest_exact3d.vec,
)


@rule(*_UPSAMPLES)
def upsample_nearest(
    context: Context, x: Kernel, size: Sequence[int] | None, scales: Sequence[float] | None = None
) -> Kernel:
    """Copies of positions: single entries keep their law, more pairs of positions hold the same number."""
    name = str(context.node.target)
    exact = "exact" in name
    one = aten._upsample_nearest_exact1d.vec if exact else aten.upsample_nearest1d.vec
    return _interpolated(context, x, scales, lambda rows, s, f: one(rows, s, f))


@rule(aten.upsample_linear1d.vec, aten.upsample_bilinear2d.vec, aten.upsample_trilinear3d.vec)
def upsample_linear(
    context: Context,
    x: Kernel,
    size: Sequence[int] | None,
    align_corners: bool,
    scales: Sequence[float] | None = None,
) -> Kernel:
    return _interpolated(context, x, scales, lambda rows, s, f: aten.upsample_linear1d.vec(rows, s, align_corners, f))


def _interpolated(
    context: Context,
    x: Kernel,
    scales: Sequence[float] | None,
    operate: Callable[[Tensor, list[int] | None, list[float] | None], Tensor],
) -> Kernel:
    dims = len(x.axes) - 2

    def along(rows: Tensor, d: int) -> Tensor:
        return operate(rows, None, [scales[d]]) if scales else operate(rows, [context.shape[d - dims]], None)

    return _over(context, x, dims, along)


@rule(aten.pixel_shuffle.default, aten.pixel_unshuffle.default)
def pixel_shuffle(context: Context, x: Kernel, factor: int) -> Kernel:
    """Channels become positions or back: entries keep their second moments, one channel group remains.

    Of two positions made of one channel's block, all but the share (n - 1) / (n r^2 - 1) come of different channels.
    """
    part, positions = x.merged, x.positions
    if context.node.target is aten.pixel_shuffle.default and factor > 1:
        share = (positions - 1) / (positions * factor**2 - 1)
        part = rebuild(part, ("shuffled", share), lambda piece: _apart(piece, share))
    spatial = _positions(context.shape[-2:])
    return Kernel((part,), (*x.axes[:-3], (("c", context.shape[-3]),), *spatial))


def _apart(part: Part, share: float) -> Part:
    """K_diff - mean^2 falls to the ``share`` of pairs that are of one channel."""
    cov, slope, ntk = part.cov.clone(), part.slope.clone(), part.ntk.clone()
    centre = part.mean**2
    cov[:, DIFF] = centre + share * (cov[:, DIFF] - centre)
    slope[:, DIFF], ntk[:, DIFF] = share * slope[:, DIFF], share * ntk[:, DIFF]
    return replace(part, cov=cov, slope=slope, ntk=ntk)
