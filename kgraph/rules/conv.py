"""Convolutions: K'(i, j) = sb2 + sum over taps of (fan_in E[W_o^2]) K(s i + d o - p, s j + d o - p).

Under exchangeable positions every tap sees the same two numbers; what the taps' positions add is how often a tap
falls on padding, which is counted exactly, tap by tap. A transposed convolution is the same with the transposed
tap relation: a tap reaches one output position in ``stride``.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import Tensor

from kgraph.biases import bias_law
from kgraph.canonical import aten
from kgraph.entries import once, said
from kgraph.how import EXACT, assumed
from kgraph.kernel import DIFF, SAME, Kernel, Part, Unknown
from kgraph.rules.linear import FEW, Affine, affine_part, bias_moments, both_ways, of_rows, without_shared_channels
from kgraph.rules.table import Context, rule
from kgraph.rules.zero_sums import OF_POSITIONS, units_of, zero_sums


def tap_counts(
    size_in: int, size_out: int, taps: int, stride: int, padding: int, dilation: int, transposed: bool
) -> Tensor:
    """Share of output positions (one axis) at which each tap meets an input position, shape [taps]."""
    tap = torch.arange(taps) * dilation - padding
    if transposed:
        target = torch.arange(size_in)[None] * stride + tap[:, None]
        hits = (target >= 0) & (target < size_out)
    else:
        source = torch.arange(size_out)[None] * stride + tap[:, None]
        hits = (source >= 0) & (source < size_in)
    return hits.double().sum(1) / max(size_out, 1)


def taps_met(
    size_in: int, size_out: int, taps: int, stride: int, padding: int, dilation: int, transposed: bool
) -> Tensor:
    """How many taps meet an input position at every output position (one axis), shape [size_out]."""
    tap = torch.arange(taps)[:, None] * dilation - padding
    out = torch.arange(size_out)[None]
    if not transposed:
        source = out * stride + tap
        return ((source >= 0) & (source < size_in)).double().sum(0)
    source = out - tap
    return ((source % stride == 0) & (source >= 0) & (source < size_in * stride)).double().sum(0)


def _outer(factors: Sequence[Tensor]) -> Tensor:
    result = torch.ones((), dtype=torch.float64)
    for factor in factors:
        result = result[..., None] * factor
    return result


def _met_by_two(met: Tensor, positions: int) -> Tensor:
    """Share of pairs of different output positions at which a tap meets the input twice, given that of positions."""
    hits = met * positions
    return met.square() if positions < 2 else hits * (hits - 1).clamp_min(0) / (positions * (positions - 1))


Sizes = int | Sequence[int]


def each_axis(value: Sizes, dims: int) -> list[int]:
    values = [value] if isinstance(value, int) else list(value)
    return [int(v) for v in (values * dims if len(values) == 1 else values)]


def _tap_variances(weight: Tensor, transposed: bool, groups: int) -> Tensor:
    """fan_in-weighted second moment of every tap: (channels per group) * E[W_o^2], shape [k...]."""
    moments = weight.detach().double().square().mean((0, 1))
    channels = weight.shape[0] // groups if transposed else weight.shape[1]
    return channels * moments


def _convolve(
    context: Context,
    x: Kernel,
    weight: Tensor,
    bias: Tensor | None,
    stride: Sizes,
    padding: Sizes | str,
    dilation: Sizes,
    groups: int,
    *,
    transposed: bool = False,
) -> Kernel:
    if any(isinstance(a, Kernel) != (a is x) for a in (x, weight, bias)):
        return context.sample()
    name, other = both_ways(context, 1, transposed)
    if any(part.roots.named(other) for part in x.parts):
        return context.sample()
    dims = weight.ndim - 2
    strides, dilations = each_axis(stride, dims), each_axis(dilation, dims)
    paddings = paddings_of(padding, weight.shape[2:], dilations)
    if x.unpadded is not None and not transposed and len(x.unpadded[1]) <= dims:
        x, front = x.unpadded
        paddings = [own + n for own, n in zip(paddings, (0,) * (dims - len(front)) + front, strict=True)]
    sizes_in, sizes_out = x.shape[-dims:], context.shape[-dims:]
    counts = [
        tap_counts(sizes_in[i], sizes_out[i], weight.shape[2 + i], strides[i], paddings[i], dilations[i], transposed)
        for i in range(dims)
    ]
    taps, met = _tap_variances(weight, transposed, groups), _outer(counts)
    zero = zero_sums(context, context.node.args[1], units_of(weight, transposed, groups))
    if zero is not None:
        at = [
            taps_met(sizes_in[i], sizes_out[i], weight.shape[2 + i], strides[i], paddings[i], dilations[i], transposed)
            for i in range(dims)
        ]
        zero = zero.meeting(_outer(at))
    twice = _met_by_two(met, math.prod(sizes_out))
    same, different = float((taps * met).sum()), float((taps * twice).sum())
    alike = different**2 / max(float((taps * twice).square().sum()), 1e-300)  # taps that weigh alike
    out_channels = context.shape[-dims - 1]
    sb2, mean = bias_moments(bias)
    channels = weight.shape[0] // groups if transposed else weight.shape[1]
    fan_in = channels * float(met.sum())
    speeds = context.speed("weight"), context.speed("bias")
    layer = Affine(1.0, sb2, mean, fan_in, bias is not None, name, speeds, bias_law(bias, mean))
    mixes = any(role == "c" for axis in x.axes[-dims:] for role, _ in axis)

    def summed(part: Part) -> Part:
        arriving = without_shared_channels(part) if mixes else part
        again = float(twice.sum() / met.sum().clamp_min(1e-300))
        result = _summed_taps(context, arriving, layer, (same, different, again), out_channels)
        if part.scatter is not None:
            own = layer.ntk_gains(context.parametrization)[0] * (
                again if context.parametrization != "ntk" else different
            )
            result = replace(result, scatter=part.scatter.layer(different, own, alike))
        if zero is not None and mixes:
            result = replace(result, how=result.how | OF_POSITIONS)
        elif zero is not None:
            result = zero.applied(context, part, result, float(taps.sum()), layer.speeds[0])
        if groups > 1 and len(x.parts) > 1:  # each of its groups reads one of them
            result = replace(result, how=result.how | _AVERAGED)
        return result if groups == 1 or channels >= FEW else _of_few(part, result, channels, layer.root)

    part = once(x.merged, context.signature, summed)
    batch = x.axes[: -dims - 1]
    spatial = tuple((("p", size),) if size > 1 else () for size in sizes_out)
    result = Kernel((part,), (*batch, (("c", out_channels),), *spatial))
    rows = of_rows(context, 1, weight.transpose(0, 1) if transposed else weight, x)
    return result if rows is EXACT else said(result, rows)


_AVERAGED = assumed("channels of several laws counted as if every group read them all")


def _of_few(part: Part, result: Part, channels: int, root: str) -> Part:
    """Sums of a few channels have the right second moments, and no Gaussian law: their variances differ by channel."""
    number = "one channel" if channels == 1 else f"{channels} channels"
    if part.roots.named(root):  # E[w^4] = 3 E[w^2]^2 enters
        result = replace(
            result, how=result.how | assumed(f"weights of {number} each that are used before count as new")
        )
    return replace(result, expr=Unknown(f"Gaussian sums of {number} each (a grouped convolution)", part.roots))


def _summed_taps(context: Context, part: Part, layer: Affine, shares: tuple[float, float, float], size: int) -> Part:
    """``shares``: sw2 of the taps met at one position and at two, and how many taps two meet for one of one."""
    gains, seen = torch.empty(2, dtype=torch.float64), torch.ones(2, dtype=torch.float64)
    gains[SAME], gains[DIFF], seen[DIFF] = shares
    arriving = replace(part, cov=part.cov * gains, slope=part.slope * gains, ntk=part.ntk * gains)
    result = affine_part(context, arriving, layer, size)
    if context.parametrization == "ntk":
        return result
    # the gradient by a weight sums inputs, not inputs times weights: fan_in K instead of fan_in (sw2 K)
    own_weight, own_bias = layer.ntk_gains(context.parametrization)
    return replace(result, ntk=own_weight * seen * part.cov + own_bias + arriving.ntk)


def paddings_of(padding: Sizes | str, taps: Sequence[int], dilations: Sequence[int]) -> list[int]:
    if padding == "valid":
        return [0] * len(taps)
    if padding == "same":  # PyTorch pads the odd one at the end, so the front gets the floor
        return [dilation * (size - 1) // 2 for size, dilation in zip(taps, dilations, strict=True)]
    assert not isinstance(padding, str)
    return each_axis(padding, len(taps))


@rule(
    aten.conv1d.default,
    aten.conv2d.default,
    aten.conv3d.default,
    aten.conv1d.padding,
    aten.conv2d.padding,
    aten.conv3d.padding,
)
def conv(
    context: Context,
    x: Kernel,
    weight: Tensor,
    bias: Tensor | None = None,
    stride: Sizes = 1,
    padding: Sizes | str = 0,
    dilation: Sizes = 1,
    groups: int = 1,
) -> Kernel:
    return _convolve(context, x, weight, bias, stride, padding, dilation, groups)


@rule(aten.conv_transpose1d.default, aten.conv_transpose2d.input, aten.conv_transpose3d.input)
def conv_transpose(
    context: Context,
    x: Kernel,
    weight: Tensor,
    bias: Tensor | None = None,
    stride: Sizes = 1,
    padding: Sizes | str = 0,
    output_padding: Sizes = 0,
    groups: int = 1,
    dilation: Sizes = 1,
) -> Kernel:
    del output_padding  # it shows in the result's size, from which taps are counted
    return _convolve(context, x, weight, bias, stride, padding, dilation, groups, transposed=True)
