"""Stochastic depth, written out: ``x * mask / keep`` with one random mask for every input becomes a dropout.

A random mask that is computed from nothing says neither that it is 1 in eval mode nor that its mean is 1.
``feature_dropout`` of ``x[None]`` draws one number for every index of the first two dimensions: one for every input.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, fx

_aten = torch.ops.aten
_BERNOULLI = (_aten.bernoulli_.float, _aten.bernoulli.p)


def fuse_drop_paths(graph: fx.Graph) -> None:
    """Rewrite every drop path of ``graph``, in place."""
    for node in list(graph.nodes):
        match = _match(node)
        if match is None:
            continue
        source, mask, keep = match
        _replace(graph, node, source, 1 if _batched(mask, source) else 2, 1 - keep)


def _match(node: fx.Node) -> tuple[fx.Node, fx.Node, float] | None:
    """``(x, mask, keep)`` of a product ``x * (mask / keep)`` or ``(x / keep) * mask``."""
    if node.target is not _aten.mul.Tensor or len(node.all_input_nodes) != 2:
        return None
    for x, factor in (tuple(node.all_input_nodes), tuple(node.all_input_nodes[::-1])):
        divided, mask = _quotient(x), _quotient(factor)
        for source, noise, by in ((x, mask[0], mask[1]), (divided[0], factor, divided[1])):
            if by is not None and _probability(noise) == by and _one_number(noise, source):
                return source, noise, by
    return None


def _quotient(node: fx.Node) -> tuple[fx.Node, float | None]:
    """``(a, b)`` of ``a / b`` with a number b; else the node and None."""
    by = node.args[1] if node.target is _aten.div.Tensor else None
    return (node.args[0], by) if isinstance(by, float) else (node, None)  # type: ignore[return-value]


def _probability(node: fx.Node) -> float | None:
    """The probability of 1 of a node that draws zeros and ones: bernoulli, or ``floor(rand + p)``."""
    if node.target in _BERNOULLI:
        keep = node.args[1] if len(node.args) > 1 else 0.5  # the default, which graphs leave out
        return keep if isinstance(keep, float) else None
    added: Any = node.args[0] if node.target is _aten.floor.default else None
    if not isinstance(added, fx.Node) or added.target is not _aten.add.Tensor or added.kwargs:
        return None
    numbers = [a for a in added.args if isinstance(a, float)]
    drawn = [a for a in added.args if isinstance(a, fx.Node) and a.target is _aten.rand.default]
    return numbers[0] if len(numbers) == len(drawn) == 1 else None


def _one_number(mask: fx.Node, source: fx.Node) -> bool:
    """Whether a mask has one number for every index of the first dimension, or one in all."""
    value, x = mask.meta.get("val"), source.meta.get("val")
    if not isinstance(value, Tensor) or not isinstance(x, Tensor) or not 0 < value.ndim == x.ndim:
        return False
    sizes = [str(size) for size in value.shape]  # compared as text: a symbolic size must not become a number
    return all(size == "1" for size in sizes[1:]) and sizes[0] in ("1", str(x.shape[0]))


def _batched(mask: fx.Node, source: fx.Node) -> bool:
    return str(mask.meta["val"].shape[0]) == str(source.meta["val"].shape[0])


def _replace(graph: fx.Graph, node: fx.Node, source: fx.Node, leading: int, probability: float) -> None:
    value, site = node.meta["val"], node.meta.get("site")

    def made(target: Any, arguments: tuple[Any, ...], ones: int) -> fx.Node:
        new = graph.create_node("call_function", target, arguments, name=target._schema.name.split("::")[-1])
        new.meta = {**node.meta, "val": value[(None,) * ones]}
        if site is not None:
            new.meta["site"] = replace(site, shape=(*(1,) * ones, *site.shape))
        return new

    with graph.inserting_before(node):
        result = source
        for ones in range(1, leading + 1):
            result = made(_aten.unsqueeze.default, (result, 0), ones)
        result = made(_aten.feature_dropout.default, (result, probability, True), leading)
        for ones in range(leading - 1, -1, -1):
            result = made(_aten.squeeze.dim, (result, 0), ones)
    node.replace_all_uses_with(result)
    unread = [node]
    for last in unread:  # the mask with it: a draw is an effect, which nobody else removes
        if not last.users and last.op == "call_function":
            unread += last.all_input_nodes
            graph.erase_node(last)


__all__ = ["fuse_drop_paths"]
