"""Values side by side: concatenations and stacks, along channels and along positions."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from kgraph.canonical import aten
from kgraph.gram import field as f
from kgraph.gram.align import ranges
from kgraph.gram.field import Field
from kgraph.gram.rules.merge import as_known
from kgraph.gram.rules.table import Context, rule
from kgraph.gram.value import Axes, Axis, CannotFollow, Value, expanded, place_start, roles, single_place, size_of


@rule(aten.cat.default, aten.concat.default)
def cat(context: Context, tensors: list[Any], dim: int = 0) -> Value:
    like = next(t for t in tensors if isinstance(t, Value))
    values = [t if isinstance(t, Value) else _neighbour(context, t, like, dim, i) for i, t in enumerate(tensors)]
    dim %= len(like.axes)
    kinds = {role for v in values for role in roles(v.axes[dim])}
    if "b" in kinds:
        raise CannotFollow("a concatenation of batches")
    if kinds == {"p"} or (not kinds and any("c" in roles(a) for v in values for a in v.axes)):
        return _beside(values, dim)
    return _stacked_channels(values, dim)


def _neighbour(context: Context, tensor: Tensor, like: Value, dim: int, index: int) -> Value:
    """A known tensor (a class token) laid out like its neighbour, with a size of its own along ``dim``."""
    dim %= len(like.axes)
    role = "c" if "c" in roles(like.axes[dim]) else "p"
    size = tensor.shape[dim]
    axis = ((role, size),) if size > 1 else ()
    shaped = Value(like.groups, (*like.axes[:dim], axis, *like.axes[dim + 1 :]))
    listed: Any = context.node.args[0]
    return _whole(as_known(context, tensor, shaped, context.named_of(listed[index])), shaped, tensor.shape)


def _whole(x: Value, like: Value, shape: Sequence[int]) -> Value:
    """Copies along what a known tensor was expanded over; what stands side by side has all positions."""
    for dim, size in enumerate(shape):
        kinds = roles(like.axes[dim])
        if size == 1 or x.axes[dim] or kinds == {"b"}:
            continue
        x = expanded(x, dim, size) if kinds <= {"p"} else _copied_channels(x, dim, size)
    return x


def _copied_channels(x: Value, dim: int, size: int) -> Value:
    """One number as that of ``size`` channels."""
    field = x.groups[0][1]
    if x.channels > 1 or not isinstance(field, f.Known) or field.own:
        raise CannotFollow("copies of a trained number as channels")
    copies = replace(field, data=field.data.expand(-1, size, *field.data.shape[2:]))
    return Value(((size, copies),), (*x.axes[:dim], (("c", size),), *x.axes[dim + 1 :]))


def _stacked_channels(values: list[Value], dim: int) -> Value:
    """Channels of several values side by side: groups, each with its own law."""
    groups: list[tuple[int, Field]] = []
    axis_rest = next((v.axes[dim][1:] for v in values if v.axes[dim]), ())
    total = 0
    for v in values:
        if v.split not in (None, dim):
            raise CannotFollow("channel groups along two dimensions")
        if v.axes[dim][1:] != axis_rest and v.axes[dim]:
            raise CannotFollow("a concatenation through positions and channels")
        own = v.shape[dim] // size_of(axis_rest)
        groups += [(own, v.groups[0][1])] if len(v.groups) == 1 else list(v.groups)
        total += own
    axes = _axes_around(values, dim, (("c", total), *axis_rest))
    return Value(tuple(groups), axes, dim if len(groups) > 1 else None)


def _axes_around(values: list[Value], dim: int, own: Axis) -> Axes:
    """Axes of a concatenation along ``dim``; a known tensor that is one for all inputs has no factor for them."""
    count = len(values[0].axes)
    return tuple(own if d == dim else next((v.axes[d] for v in values if v.axes[d]), ()) for d in range(count))


def _beside(values: list[Value], dim: int) -> Value:
    """Positions of several values side by side."""
    lined = []
    for v in values:
        v = single_place(v, dim)
        lined.append(v if v.axes[dim] else expanded(v, dim, 1))
    axis = place_start(lined[0].axes, dim)
    groups = tuple((size, _side_by_side(fields, axis)) for size, fields in ranges(lined))
    split = next((v.split for v in lined if v.split is not None), None)
    length = groups[0][1].places[axis]
    return Value(groups, _axes_around(lined, dim, (("p", length),)), split)


def _side_by_side(fields: tuple[Field, ...], axis: int) -> Field:
    """Fields one after the other along a position axis; what is known stays known."""
    places = list(fields[0].places)
    places[axis] = sum(u.places[axis] for u in fields)
    roots = frozenset().union(*(u.roots for u in fields))
    how = max((u.how for u in fields), key=lambda h: h.level)
    if all(isinstance(u, f.Known) and not u.own for u in fields):
        count = max(len(u.data) for u in fields)  # type: ignore[attr-defined]
        data = torch.cat([u.data.expand(count, *u.data.shape[1:]) for u in fields], 2 + axis)  # type: ignore[attr-defined]
        return f.Known(tuple(places), roots, how, data)
    return f.Joined(tuple(places), roots, how, fields, axis)


@rule(aten.stack.default)
def stack(context: Context, tensors: list[Any], dim: int = 0) -> Value:
    values = [t for t in tensors if isinstance(t, Value)]
    if len(values) != len(tensors):
        raise CannotFollow("a stack of random and known tensors")
    dim %= len(values[0].axes) + 1
    widened = [Value(v.groups, (*v.axes[:dim], (), *v.axes[dim:])) for v in values]
    return _beside(widened, dim)
