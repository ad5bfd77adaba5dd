"""Tensors that take no more of another than its shape: known, whatever random numbers that one holds."""

from __future__ import annotations

from typing import Any, cast

import torch
from torch import Tensor, fx

from kgraph.canonical import aten
from kgraph.kernel import Kernel
from kgraph.rules.table import Context, rule

SHAPED_LIKE = (
    aten.new_zeros.default,
    aten.new_ones.default,
    aten.new_full.default,
    aten.new_empty.default,
    aten.zeros_like.default,
    aten.ones_like.default,
    aten.full_like.default,
    aten.empty_like.default,
    aten.fill.Scalar,
    aten.fill.Tensor,
    aten.zero.default,
)


def made_like(node: fx.Node, shape: tuple[int, ...], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Tensor:
    """The node's result, whatever its first argument holds; what is left empty, to be filled, is 0 until then."""
    source, target = node.args[0], cast(Any, node.target)
    value = source.meta.get("val") if isinstance(source, fx.Node) else None
    like = torch.zeros(shape, dtype=value.dtype if isinstance(value, Tensor) else None)
    return target(like, *args, **kwargs).zero_() if target in _EMPTY else target(like, *args, **kwargs)


_EMPTY = (aten.empty_like.default, aten.new_empty.default)


@rule(aten.item.default)
def item(context: Context, x: Kernel) -> Any:
    """A Python number has no kernel.

    Raises:
        RuleError: always.
    """
    raise context.error(*OF_INPUT)


OF_INPUT = (
    "the forward takes a Python number (.item(), float()) out of a tensor that depends on the input, and a number has "
    "no kernel",
    "Leave it the tensor that it is: drop .item(), or keep the dimension",
)
"""What is wrong with it, and what to do."""


@rule(*SHAPED_LIKE)
def constant(context: Context, x: Kernel, *args: Any, **kwargs: Any) -> Any:
    if any(isinstance(value, Kernel) for value in (*args, *kwargs.values())):
        return context.sample()
    return made_like(context.node, x.shape, args, kwargs)
