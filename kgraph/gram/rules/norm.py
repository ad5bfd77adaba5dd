"""Normalization layers: numbers for every input and position where many channels are averaged, draws otherwise.

Statistics over infinitely many channels are numbers: the layer is then a known gain and shift at every location.
Statistics over positions or a batch of *one* channel fluctuate from channel to channel; they are measured on draws.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from kgraph.canonical import aten
from kgraph.gram.align import CHANNELS, known_value
from kgraph.gram.field import Drawn, Field, Located
from kgraph.gram.rules.grouped import varies
from kgraph.gram.rules.merge import as_known, combine, plus, times
from kgraph.gram.rules.repeats import warned
from kgraph.gram.rules.table import Context, rule
from kgraph.gram.value import CannotFollow, Value, channel_range, place_start, places_of, roles
from kgraph.how import assumed
from kgraph.modules import PerLocationNorm


def _over(x: Value, dims: range) -> tuple[int, ...]:
    """Place axes within some dimensions."""
    return tuple(place_start(x.axes, d) + i for d in dims for i in range(len(places_of((x.axes[d],)))))


def _average(context: Context, x: Value, name: str, over: tuple[int, ...]) -> Tensor:
    """Mean or q value of all channel groups, averaged over some place axes (kept as size 1), [N, *places]."""
    engine = context.engine
    total = sum(size for size, _ in x.groups)
    result = torch.zeros((), dtype=torch.float64)
    for size, u in x.groups:
        own = engine.mean(u) if name == "mean" else engine.second(u)
        own = own.reshape(1, *(1 for _ in u.places)).expand(1, *u.places) if own.ndim == 0 else own
        if over:
            own = own.mean(tuple(1 + axis for axis in over), keepdim=True)
        result = result + size / total * own
    return result.expand(-1, *x.places)


def normalized(context: Context, x: Value, over: tuple[int, ...], eps: float, *, centre: bool = True) -> Value:
    """``(u - m) / sqrt(var + eps)`` with statistics over all channels and the place axes ``over``."""
    mean = _average(context, x, "mean", over)
    q = _average(context, x, "second", over)
    variance = q - mean.square() if centre else q
    gain = (variance.clamp_min(0) + eps).rsqrt()
    shift = -mean * gain if centre else torch.zeros_like(gain)
    return x.each(lambda u: Located(u.places, u.roots, u.how, u, gain, shift))


def gain_and_bias(context: Context, x: Value, weight: Any, bias: Any, at: tuple[int, int], dim: int) -> Value:
    """Entrywise gain and bias along one dimension: trained, so tangents have terms of their own there."""
    for tensor, index, meet in ((weight, at[0], times), (bias, at[1], plus)):
        if tensor is None:
            continue
        shaped = tensor.reshape(*tensor.shape, *(1 for _ in range(len(x.axes) - dim - tensor.ndim)))
        name = context.named_of(context.node.args[index]) if index < len(context.node.args) else None
        x = combine(x, as_known(context, shaped, x, name), meet)
    return x


@rule(aten.layer_norm.default)
def layer_norm(
    context: Context, x: Value, shape: list[int], weight: Any = None, bias: Any = None, eps: float = 1e-5, *_: object
) -> Value:
    first = len(x.axes) - len(shape)
    inside = {role for axis in x.axes[first:] for role in roles(axis)}
    if "c" not in inside or any("c" in roles(axis) for axis in x.axes[:first]):
        raise CannotFollow("a LayerNorm over positions alone")
    result = normalized(context, x, _over(x, range(first, len(x.axes))), eps)
    return gain_and_bias(context, result, weight, bias, (2, 3), first)


@rule(aten.rms_norm.default)
def rms_norm(context: Context, x: Value, shape: list[int], weight: Any = None, eps: float | None = None) -> Value:
    first = len(x.axes) - len(shape)
    if any("c" in roles(axis) for axis in x.axes[:first]):
        raise CannotFollow("an RMSNorm over a part of the channels")
    over = _over(x, range(first, len(x.axes)))
    value = context.node.meta.get("val")
    smallest = torch.finfo(value.dtype).eps if isinstance(value, Tensor) else 0.0
    result = normalized(context, x, over, eps if eps is not None else smallest, centre=False)
    return gain_and_bias(context, result, weight, None, (2, 99), first)


@rule(PerLocationNorm)
def per_location_norm(context: Context, module: PerLocationNorm, x: Value) -> Value:
    if module.append_constant:
        raise CannotFollow("a location norm with a constant channel")
    return normalized(context, x, (), 0.0, centre=False)


@rule(aten.group_norm.default)
def group_norm(
    context: Context, x: Value, groups: int, weight: Any = None, bias: Any = None, eps: float = 1e-5, *_: object
) -> Value:
    over, width = _over(x, range(2, len(x.axes))), x.shape[1] // groups
    x = warned(context, x)
    few = width <= FEW
    if few and not any(size % width for size, _ in x.groups):
        result = _by_draws(x, eps, over, width)
    else:
        parts = [normalized(context, part, over, eps) for part in _parts(x, width)]
        if few:  # every channel of a group has a law of its own
            parts = [p.each(lambda u: replace(u, how=u.how | _AS_MANY), p.axes, p.split) for p in parts]
        result = replace(
            x, groups=tuple(g for part in parts for g in part.groups), split=1 if len(parts) > 1 else x.split
        )
    return gain_and_bias(context, result, weight, bias, (2, 3), 1)


_AS_MANY = assumed("statistics of a few channels as if they were those of many")
FEW = 16
"""Channels of a group up to which its statistics count as random; those of many channels are numbers."""


def _parts(x: Value, width: int) -> list[Value]:
    """Channel groups cut where the norm's groups (``width`` channels each) end as well."""
    if len(x.groups) == 1:
        alike = not varies(x.groups[0][1]) and CHANNELS not in x.groups[0][1].roots
        if alike or width == x.shape[1]:
            return [x]
        return [channel_range(x, 1, low, low + width) for low in range(0, x.shape[1], width)]
    parts: list[Value] = []
    held: list[tuple[int, Field]] = []
    for group in x.groups:
        held.append(group)
        total = sum(size for size, _ in held)
        if total % width == 0:
            if len(held) > 1 and total > width:
                raise CannotFollow("a GroupNorm across channel groups")
            parts.append(replace(x, groups=tuple(held)))
            held = []
    return parts


def _by_draws(x: Value, eps: float, over: tuple[int, ...], width: int = 1) -> Value:
    """Every ``width`` channels by their own mean and variance over positions."""
    dims = (1, *(3 + axis for axis in over))

    def run(draws: Tensor) -> Tensor:
        whole = len(draws) // width * width
        grouped = draws[:whole].reshape(-1, width, *draws.shape[1:])
        mean = grouped.mean(dims, keepdim=True)
        variance = (grouped - mean).square().mean(dims, keepdim=True)
        result = ((grouped - mean) * (variance + eps).rsqrt()).reshape(whole, *draws.shape[1:])
        return torch.cat([result, result[: len(draws) - whole]])

    return x.each(lambda u: Drawn(u.places, u.roots, u.how, (u,), run))


@rule(aten.instance_norm.default)
def instance_norm(
    context: Context,
    x: Value,
    weight: Any = None,
    bias: Any = None,
    running_mean: Tensor | None = None,
    running_var: Tensor | None = None,
    use_input_stats: bool = True,
    momentum: float = 0.1,
    eps: float = 1e-5,
    *_: object,
) -> Value:
    if running_mean is not None and running_var is not None and context.mode == "eval":
        result = _by_running_statistics(x, running_mean, running_var, eps)
    else:
        result = _by_draws(x, eps, _over(x, range(2, len(x.axes))))
    return gain_and_bias(context, result, weight, bias, (1, 2), 1)


def _by_running_statistics(x: Value, mean: Tensor, variance: Tensor, eps: float) -> Value:
    """The affine map of the stored statistics."""
    gain = (variance.double() + eps).rsqrt()
    shift = -mean.double() * gain
    trailing = (1,) * (len(x.axes) - 2)
    result = combine(x, known_value(gain.reshape(-1, *trailing), x), times)
    if not shift.any():
        return result
    return combine(result, known_value(shift.reshape(-1, *trailing), x), plus)


@rule(aten.batch_norm.default)
def batch_norm(
    context: Context,
    x: Value,
    weight: Any,
    bias: Any,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    training: bool,
    momentum: float,
    eps: float,
    *_: object,
) -> Value:
    """eval: stored statistics. train: those of the batch that the inputs are, channel by channel, on draws."""
    if running_mean is not None and running_var is not None and (context.mode == "eval" or not training):
        result = _by_running_statistics(x, running_mean, running_var, eps)
    else:
        result = x.each(lambda u: _by_batch(context, u, eps))
    return gain_and_bias(context, result, weight, bias, (1, 2), 1)


def _by_batch(context: Context, u: Field, eps: float) -> Field:
    batches = context.engine.rows.batches
    dims = (1, *(2 + i for i in range(len(u.places))))

    def run(draws: Tensor) -> Tensor:
        pieces = []
        for low, high in batches:
            part = draws[:, low:high]
            mean = part.mean(dims, keepdim=True)
            variance = (part - mean).square().mean(dims, keepdim=True)
            pieces.append((part - mean) * (variance + eps).rsqrt())
        return torch.cat(pieces, 1)

    return Drawn(u.places, u.roots, u.how, (u,), run)
