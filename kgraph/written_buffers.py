"""Writes to a model's own buffers (counters, masks, running averages): what is read behind them, on copies."""

from __future__ import annotations

from collections.abc import MutableMapping
from typing import Any

from torch import Tensor, fx
from torch._ops import OpOverload


def writes(node: fx.Node) -> bool:
    """Whether a call writes to its first argument."""
    return isinstance(node.target, OpOverload) and node.target._schema.is_mutable and bool(node.args)


def writes_buffer(node: fx.Node) -> bool:
    """Whether a call writes to a tensor of the model: to itself, a view of it, or what an earlier write returns."""
    if not writes(node):
        return False
    before = _behind(node.args[0])[-1]
    while before is not None and writes(before):
        before = _behind(before.args[0])[-1]
    return before is not None and before.op == "get_attr"


def written(node: fx.Node, args: tuple[Any, ...], kwargs: dict[str, Any], values: MutableMapping[fx.Node, Any]) -> Any:
    """Result of a call that may write to a buffer; the buffer itself keeps its numbers.

    Nodes that read behind the call read its result, but for a buffer written to through a view of it, as in
    ``mask[:8] = 1``: of that, ``values`` gets the new numbers.
    """
    target: Any = node.target
    if not writes(node) or not isinstance(args[0], Tensor):
        return target(*args, **kwargs)
    *views, base = _behind(node.args[0])
    if base is None or base.op != "get_attr":
        return target(*args, **kwargs)
    read = {n for view in views for n in view.all_input_nodes if n not in views}
    if not views or any(n not in values for n in read):  # nobody reads the whole buffer any more
        return target(args[0].clone(), *args[1:], **kwargs)
    changed = {base: values[base].clone()}
    for view in reversed(views):
        own: Any = fx.map_arg((view.args, view.kwargs), lambda n: changed[n] if n in changed else values[n])
        changed[view] = view.target(*own[0], **own[1])  # type: ignore[operator]
    result = target(changed[views[0]], *args[1:], **kwargs)
    values.update(changed)
    return result


def _behind(argument: Any) -> list[Any]:
    """The node that an argument is, through the nodes that it is a view of, to the one that is no view."""
    found: list[Any] = [argument if isinstance(argument, fx.Node) else None]
    while found[-1] is not None and _is_view(found[-1]):
        found.append(found[-1].args[0])
    return found


def _is_view(node: fx.Node) -> bool:
    if not isinstance(node.target, OpOverload) or not node.args or not isinstance(node.args[0], fx.Node):
        return False
    alias = [result.alias_info for result in node.target._schema.returns]
    return any(a is not None and not a.is_write for a in alias)
