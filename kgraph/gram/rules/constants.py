"""Tensors that take no more of another than its shape are known."""

from __future__ import annotations

from typing import Any

from kgraph.canonical import aten
from kgraph.gram.device import away, here
from kgraph.gram.rules.table import Context, rule
from kgraph.gram.value import CannotFollow, Value
from kgraph.rules.constants import OF_INPUT, SHAPED_LIKE, made_like


@rule(aten.item.default)
def item(context: Context, x: Value) -> Any:
    """A Python number has no kernel.

    Raises:
        RuleError: always.
    """
    raise context.error(*OF_INPUT)


@rule(*SHAPED_LIKE)
def constant(context: Context, x: Value, *args: Any, **kwargs: Any) -> Any:
    if any(isinstance(value, Value) for value in (*args, *kwargs.values())):
        raise CannotFollow("a tensor filled with a random number")
    return here(made_like(context.node, x.shape, away(args), away(kwargs)))
