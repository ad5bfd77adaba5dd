"""Pointwise functions, dropout, and the modules of kgraph that act entry by entry."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

from torch import Tensor, nn

from kgraph.canonical import aten
from kgraph.gram.build import mapped, scaled, shifted
from kgraph.gram.field import Field, Masked
from kgraph.gram.functions import of_one
from kgraph.gram.rules.table import Context, rule
from kgraph.gram.value import CannotFollow, Value, roles
from kgraph.maps import Pointwise
from kgraph.maps.combine import affine_map, together
from kgraph.modules import Scale, ShapedActivation
from kgraph.roots import Root
from kgraph.rules.pointwise import COPIES, function_of, rounding_of, shaped_map
from kgraph.rules.table import drops


def apply_all(fn: Pointwise, x: Value) -> Value:
    """``fn`` of every channel group."""
    return x.each(lambda u: mapped(fn, u))


def unary(target: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Value:
    """Any pointwise operation with one random argument and numbers otherwise."""
    index = next(i for i, value in enumerate(args) if isinstance(value, Value))
    return apply_all(function_of(target, args, kwargs, index), args[index])


def of_one_field(join: Callable[..., Pointwise], args: Sequence[Any]) -> Value | None:
    """``join`` of functions of one and the same field (numbers are constant functions), None where they are not."""
    values = [x for x in args if isinstance(x, Value)]
    like = values[0]
    alike = all(v.axes == like.axes and [n for n, _ in v.groups] == [n for n, _ in like.groups] for v in values)
    numbers = [x for x in args if not isinstance(x, Value)]
    if not alike or any(isinstance(x, Tensor) and x.numel() != 1 for x in numbers):
        return None
    groups: list[tuple[int, Field]] = []
    for i, (size, _) in enumerate(like.groups):
        one = of_one(*(v.groups[i][1] for v in values))
        if one is None:
            return None
        given = iter(one[0])
        parts = [next(given) if isinstance(x, Value) else affine_map(0.0, float(x)) for x in args]
        groups.append((size, mapped(join(*parts), one[1])))
    return replace(like, groups=tuple(groups))


def several(target: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Value | None:
    """A pointwise operation (a maximum, a masked fill) of functions of one field, None where they are not."""
    plain = [x for x in args if not isinstance(x, Value)]
    if any(isinstance(x, Value) for x in kwargs.values()) or any(isinstance(x, Tensor) and x.ndim for x in plain):
        return None
    given = [x for x in args if isinstance(x, Value)]
    at = [i for i, x in enumerate(args) if isinstance(x, Value)]
    rest = [float(x) if isinstance(x, Tensor) else x for x in args]

    def function(*tensors: Tensor) -> Tensor:
        filled = list(rest)
        for i, x in zip(at, tensors, strict=True):
            filled[i] = x
        return target(*filled, **kwargs)

    name = (target, tuple(None if i in at else repr(x) for i, x in enumerate(rest)), repr(sorted(kwargs.items())))
    return of_one_field(lambda *parts: together(name, function, *parts), given)


@rule(ShapedActivation)
def shaped_activation(context: Context, module: ShapedActivation, x: Value) -> Value:
    return apply_all(shaped_map(module), x)


@rule(Scale)
def scale(context: Context, module: Scale, x: Value) -> Value:
    return x.each(lambda u: scaled(shifted(u, module.shift), module.factor))


@rule(nn.Identity)
def identity(context: Context, module: nn.Identity, x: Value) -> Value:
    return x


@rule(aten.real.default)
def real(context: Context, x: Value) -> Value:
    """Fields are real: see `kgraph.gram.complex_numbers`."""
    return x


@rule(*COPIES)
def copied(context: Context, x: Value, *args: object, **kwargs: object) -> Value:
    """Copies and casts; a type without fractions rounds."""
    rounding = rounding_of(args, kwargs, context.node)
    return x if rounding is None else apply_all(rounding, x)


@rule(aten.dropout.default, aten.feature_dropout.default)
def dropout(context: Context, x: Value, p: float, train: bool) -> Value:
    """eval: nothing; train: entries survive with probability 1 - p, divided by it; of `feature_dropout`, channels."""
    if not train or not drops(context.node, context.mode) or p == 0:
        return x
    whole = context.node.target is aten.feature_dropout.default
    if whole and roles(x.axes[1]) != {"c"}:
        raise CannotFollow("one mask for all channels of a position")
    if p >= 1:
        return x.each(lambda u: scaled(u, 0.0))
    return masked(context, x, 1.0 - p, whole)


def masked(context: Context, x: Value, keep: float, whole: bool = False) -> Value:
    """Dropout of entries, or (``whole``) of channels: the same mask at every position."""
    mask = Root(f"mask of {context.node.name}")
    return x.each(lambda u: Masked(u.places, u.roots | {mask}, u.how, u, keep, mask, whole))
