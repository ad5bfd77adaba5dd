"""Pointwise functions, dropout, and the modules of kgraph that act entry by entry."""

from __future__ import annotations

from typing import Any

from torch import nn

from kgraph.canonical import aten
from kgraph.gram.build import mapped, scaled
from kgraph.gram.field import Field, Masked
from kgraph.gram.rules.table import Context, rule
from kgraph.gram.value import Value
from kgraph.maps import Pointwise
from kgraph.modules import Scale, ShapedActivation
from kgraph.roots import Root
from kgraph.rules.pointwise import function_of, shaped_map


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


@rule(aten.dropout.default, aten.feature_dropout.default)
def dropout(context: Context, x: Value, p: float, train: bool) -> Value:
    """eval: nothing; train: every entry survives with probability 1 - p and is divided by it."""
    if not train or context.mode == "eval" or p == 0:
        return x
    mask = Root(f"mask of {context.node.name}")

    def masked(u: Field) -> Field:
        return Masked(u.places, u.roots | {mask}, u.how, u, 1.0 - p, mask)

    return x.each(masked)
