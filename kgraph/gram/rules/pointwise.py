"""Pointwise functions, dropout, and the modules of kgraph that act entry by entry."""

from __future__ import annotations

from typing import Any

from torch import nn

from kgraph.canonical import aten
from kgraph.gram.build import mapped, scaled
from kgraph.gram.field import Masked
from kgraph.gram.rules.table import Context, rule
from kgraph.gram.value import CannotFollow, Value, roles
from kgraph.maps import Pointwise
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


@rule(ShapedActivation)
def shaped_activation(context: Context, module: ShapedActivation, x: Value) -> Value:
    return apply_all(shaped_map(module), x)


@rule(Scale)
def scale(context: Context, module: Scale, x: Value) -> Value:
    return x.each(lambda u: scaled(u, module.factor))


@rule(nn.Identity)
def identity(context: Context, module: nn.Identity, x: Value) -> Value:
    return x


@rule(*COPIES)
def copied(context: Context, x: Value, *args: object, **kwargs: object) -> Value:
    """Copies and casts; a type without fractions rounds."""
    rounding = rounding_of(args, kwargs)
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
