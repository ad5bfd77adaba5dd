"""Affine layers: linear maps of the channels, and convolutions."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from kgraph.biases import bias_law
from kgraph.canonical import aten
from kgraph.gram import field as f
from kgraph.gram.build import moved, sliced
from kgraph.gram.field import Affine, Field, Layer, Leaf
from kgraph.gram.places import Relabel
from kgraph.gram.rules.few import reads_few
from kgraph.gram.rules.grouped import MOST_GROUPS, ranges_of
from kgraph.gram.rules.measured import second_moment
from kgraph.gram.rules.over_positions import position_layer, sums_positions
from kgraph.gram.rules.repeats import draws_of, zero_sums_of
from kgraph.gram.rules.table import Context, rule
from kgraph.gram.shares import layer_terms
from kgraph.gram.tangents import times
from kgraph.gram.taps import axis_runs, geometry_of, tap_shares
from kgraph.gram.value import Axes, CannotFollow, Value, channel_range, place_start, places_of, roles, size_of
from kgraph.how import EXACT, How, assumed
from kgraph.kernel import Bias
from kgraph.roots import Root
from kgraph.rules.weights import real_mean, sums_to_zero
from kgraph.rules.zero_sums import EACH_TAP, by_tap, units_of


def contracted(x: Value, dims: Sequence[int]) -> tuple[Field, Axes]:
    """What a layer that sums over ``dims`` sees: one field (groups averaged) and the axes that stay."""
    axes = [() if d in dims else axis for d, axis in enumerate(x.axes)]
    if any("c" in roles(axis) for axis in axes):
        raise CannotFollow("a layer that sums over positions and keeps channels")
    if any("b" in roles(x.axes[d]) for d in dims):
        raise CannotFollow("a layer that sums over inputs")
    folded = tuple(place_start(x.axes, d) + i for d in dims for i in range(len(places_of((x.axes[d],)))))
    fields = [(size, fold(field, folded)) for size, field in x.groups]
    return averaged(fields), tuple(axes)


def fold(u: Field, axes: tuple[int, ...]) -> Field:
    """Position axes read as channels."""
    if not axes:
        return u
    places = tuple(s for i, s in enumerate(u.places) if i not in axes)
    if isinstance(u, f.Known) and not u.own:
        data = u.data
        kept = [i for i in range(len(u.places)) if i not in axes]
        data = data.permute(0, 1, *(2 + i for i in axes), *(2 + i for i in kept))
        return f.Known(places, u.roots, u.how, data.reshape(len(data), -1, *places))
    return f.Folded(places, u.roots, u.how, u, axes)


def averaged(fields: list[tuple[int, Field]]) -> Field:
    """Channel groups read together by a layer: their kernels' average."""
    if len(fields) == 1:
        return fields[0][1]
    roots = frozenset().union(*(u.roots for _, u in fields))
    return f.Grouped(fields[0][1].places, roots, args=tuple(fields))


def layer_output(context: Context, u: Field, layer: Layer, places: tuple[int, ...], how: How | None = None) -> Field:
    """``W u + b``; kept as a leaf where its weight is read once, so that what came before can be forgotten."""
    roots = frozenset({Root(layer.root)})
    output = Affine(places, roots, how or u.how, arg=u, layer=layer)
    if context.uses[layer.root] > 1:
        return output
    engine = context.engine
    block = engine.pair(output, output)
    gap = engine.gaps.gap(output, output) if engine.gaps is not None else None
    how = engine.how(output)  # known once the block is
    return Leaf(places, roots, how, block, layer.bias_mean, gap, layer.bias_law, layer.few)


def make_layer(
    context: Context,
    names: tuple[str, str],
    weight: Tensor,
    bias: Tensor | None,
    fan_in: int,
    geometry: Any = None,
    units: Tensor | None = None,
) -> Layer:
    """Moments of a layer, and its own terms: times (fan_in, 1) as PyTorch trains, (sw2, sb2) in NTK form.

    ``units`` is the weight as [units, ...], where it is stored otherwise.
    """
    sb2 = second_moment(context, names[1], bias) if bias is not None else 0.0
    drawn = bias if names[1] not in context.variances else None
    mean = 0.0 if drawn is None else context.measured(real_mean, names[1], drawn)
    law = None if drawn is None else context.measured(_law, names[1], drawn)
    sw2 = fan_in * second_moment(context, names[0], weight)
    own, own_bias = (layer_terms(context, name) for name in names)
    if context.engine.parametrization == "standard":
        own = times(own, float(fan_in if geometry is None else geometry.channels))
    zero = zero_sums_of(context, names[0], weight if units is None else units)
    return Layer(names[0], sw2, sb2, mean, own, {} if bias is None else own_bias, geometry, law, zero)


def _law(bias: Tensor) -> Bias | None:
    return bias_law(bias, real_mean(bias))


def _linear(
    context: Context, x: Value, weight: Tensor, bias: Tensor | None, out: int, at: tuple[int, int], along: int
) -> Value:
    """``along``: the dimension of the weight that is summed over; ``at``: arguments that are weight and bias."""
    names = (context.name(at[0]), context.name(at[1]))
    if sums_positions(x):
        return position_layer(context, x, weight if along else weight.T, bias, names)
    u, axes = contracted(x, [len(x.axes) - 1])
    context.read_one_way(at[0], along)
    units = weight if along else weight.T
    layer = make_layer(context, names, weight, bias, weight.numel() // max(out, 1), units=units)
    layer = replace(layer, few=reads_few(context, names[0], weight, u, None))
    how = u.how | draws_of(context, names[0], units, u)
    how |= _TIED if weight.data_ptr() in context.engine.tables else EXACT
    result = layer_output(context, u, layer, u.places, how)
    return Value(((out, result),), (*axes[:-1], (("c", out),) if out > 1 else ()))


@rule(aten.linear.default)
def linear(context: Context, x: Value, weight: Tensor, bias: Tensor | None = None) -> Value:
    return _linear(context, x, weight, bias, weight.shape[0], (1, 2), 1)


@rule(aten.addmm.default)
def addmm(context: Context, bias: Tensor, x: Value, weight: Tensor, **scales: float) -> Value:
    if scales or any(isinstance(a, Value) != (a is x) for a in (bias, x, weight)):
        raise CannotFollow("an addmm that is scaled, or has a random bias")
    return _linear(context, x, weight, bias, weight.shape[1], (2, 0), 0)


def weight_product(context: Context, x: Value, weight: Tensor) -> Value:
    """``x @ weight`` with a known matrix."""
    if weight.ndim != 2:
        raise CannotFollow("a product with a known tensor that is no matrix")
    return _linear(context, x, weight, None, weight.shape[1], (1, 99), 0)


def each_axis(value: int | Sequence[int], dims: int) -> list[int]:
    values = [value] if isinstance(value, int) else list(value)
    return [int(v) for v in (values * dims if len(values) == 1 else values)]


def _paddings(padding: int | Sequence[int] | str, taps: Sequence[int], dilations: Sequence[int]) -> list[int]:
    if padding == "valid":
        return [0] * len(taps)
    if padding == "same":  # PyTorch pads the odd one at the end, so the front gets the floor
        return [dilation * (size - 1) // 2 for size, dilation in zip(taps, dilations, strict=True)]
    assert not isinstance(padding, str)
    return each_axis(padding, len(taps))


def _with_axes(x: Value, dims: int) -> Value:
    """Every convolved dimension as exactly one position axis (sizes of one included)."""
    places: list[int] = []
    axes = list(x.axes)
    for i, axis in enumerate(x.axes):
        if i < len(axes) - dims:
            places += places_of((axis,))
            continue
        if roles(axis) - {"p"}:
            raise CannotFollow("a convolution over channels or inputs")
        axes[i] = (("p", size_of(axis)),)
        places.append(size_of(axis))
    if tuple(places) == x.places:
        return Value(x.groups, tuple(axes), x.split)
    op = Relabel(tuple(places), tuple(range(len(places))))
    return x.each(lambda u: moved(u, op), tuple(axes), x.split)


def _convolve(
    context: Context,
    x: Value,
    weight: Tensor,
    bias: Tensor | None,
    options: tuple[Any, Any, Any],
    groups: int,
    output_padding: Any = 0,
    transposed: bool = False,
) -> Value:
    dims = weight.ndim - 2
    context.read_one_way(1, int(not transposed))
    stride, dilation = each_axis(options[0], dims), each_axis(options[2], dims)
    padding = _paddings(options[1], weight.shape[2:], dilation)
    x = _with_axes(x, dims)
    sizes_in = x.shape[-dims:]
    extra = each_axis(output_padding, dims)
    sizes = tuple(
        out_size(
            sizes_in[i],
            weight.shape[2 + i],
            stride[i],
            padding[i],
            dilation[i],
            extra[i],
            transposed,
            options[1] == "same",
        )
        for i in range(dims)
    )
    runs = [
        axis_runs(sizes_in[i], sizes[i], weight.shape[2 + i], stride[i], padding[i], dilation[i], transposed)
        for i in range(dims)
    ]
    channels = weight.shape[0] // groups if transposed else weight.shape[1]
    taps, equal = context.measured(tap_shares, context.name(1), weight)
    if context.name(1) in context.variances:
        taps, equal = torch.full_like(taps, context.variances[context.name(1)]), True
    key = (tuple(stride), tuple(padding), tuple(dilation), transposed, tuple(weight.shape[2:]), sizes)
    geometry = geometry_of(taps, equal, runs, sizes, channels, key)
    units = units_of(weight, transposed, groups)
    fan_in = channels * taps.numel()
    layer = make_layer(context, (context.name(1), context.name(2)), weight, bias, fan_in, geometry, units)
    out = weight.shape[1] * groups if transposed else weight.shape[0]
    at = len(x.axes) - dims - 1
    read = contracted(x, [at])[0]
    layer = replace(layer, few=reads_few(context, layer.root, weight, read, geometry))
    way = draws_of(context, layer.root, weight.transpose(0, 1) if transposed else weight, read)
    if layer.zero_sums is not None and (transposed or any(padding)) and sums_to_zero(by_tap(units)):
        way |= EACH_TAP
    results = _by_groups(context, x, at, channels, layer, out, way)
    axes = (*contracted(x, [at])[1][:at], (("c", out),), *((("p", s),) for s in sizes))
    return _without_ones(Value(results, axes, at if len(results) > 1 else None))


_FEW = 4
"""Channels that one output reads up to which it is far from Gaussian: a mixture, by the squares of its weights."""
_TIED = assumed("independent of the table that tokens are looked up in, though it is the same one")


def _by_groups(
    context: Context, x: Value, dim: int, width: int, layer: Layer, out: int, way: How
) -> tuple[tuple[int, Field], ...]:
    """A convolution's output: a channel group for every range of channels whose groups read the same law."""
    assert layer.geometry is not None
    ranges, total = ranges_of(x, dim, width), x.shape[dim]
    note = EXACT
    if len(ranges) > MOST_GROUPS:
        ranges, note = [(0, total)], assumed("groups of channels alike")
    results: list[tuple[int, Field]] = []
    for low, high in ranges:
        u, _ = contracted(x if high - low == total else channel_range(x, dim, low, high), [dim])
        how = u.how | note | way
        if width <= min(_FEW, total - 1) and not isinstance(u, f.Known):
            how |= assumed(f"Gaussian after a convolution of {width} {'channel' if width == 1 else 'channels'} each")
        places = (*u.places[: len(u.places) - len(layer.geometry.sizes)], *layer.geometry.sizes)
        if high - low == total:
            return ((out, layer_output(context, u, layer, places, how)),)
        whole = Affine(places, frozenset({Root(layer.root)}), how, arg=u, layer=layer)
        first, last = low * out // total, high * out // total
        results.append((last - first, sliced(whole, first, last, out)))
    return tuple(results)


def _without_ones(x: Value) -> Value:
    axes = tuple(tuple(factor for factor in axis if factor[1] > 1 or factor[0] == "b") for axis in x.axes)
    places = places_of(axes)
    if places == x.places:
        return Value(x.groups, axes, x.split)
    op = Relabel(places, tuple(range(len(places))))
    return x.each(lambda u: moved(u, op), axes, x.split)


def out_size(
    size: int, taps: int, stride: int, padding: int, dilation: int, extra: int, transposed: bool, same: bool
) -> int:
    """Output size of a convolution along one axis, as PyTorch computes it."""
    if same:
        return size
    reach = dilation * (taps - 1) + 1
    if transposed:
        return (size - 1) * stride - 2 * padding + reach + extra
    return (size + 2 * padding - reach) // stride + 1


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
    x: Value,
    weight: Tensor,
    bias: Tensor | None = None,
    stride: Any = 1,
    padding: Any = 0,
    dilation: Any = 1,
    groups: int = 1,
) -> Value:
    return _convolve(context, x, weight, bias, (stride, padding, dilation), groups)


@rule(aten.conv_transpose1d.default, aten.conv_transpose2d.input, aten.conv_transpose3d.input)
def conv_transpose(
    context: Context,
    x: Value,
    weight: Tensor,
    bias: Tensor | None = None,
    stride: Any = 1,
    padding: Any = 0,
    output_padding: Any = 0,
    groups: int = 1,
    dilation: Any = 1,
) -> Value:
    return _convolve(context, x, weight, bias, (stride, padding, dilation), groups, output_padding, transposed=True)
