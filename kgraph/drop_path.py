"""Dropout and stochastic depth, written out: ``x * mask / keep`` with a random mask becomes a dropout.

A random mask that is computed from nothing says neither that it is 1 in eval mode nor that its mean is 1.
``feature_dropout`` draws one number for every index of the first two dimensions; of ``x[None]``, one for every input.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, fx

from kgraph.gradient_stops import read_instead, stopped_between, without_stops

BY_HAND = "by_hand"
"""Among the metadata of a dropout: the forward writes it out."""
_aten = torch.ops.aten
_BERNOULLI = (_aten.bernoulli_.float, _aten.bernoulli.p)
_RAND = (_aten.rand.default, _aten.rand_like.default)
_FULL = (_aten.full.default, _aten.full_like.default, _aten.new_full.default)
_BELOW = (_aten.lt.Scalar, _aten.le.Scalar)
_ABOVE = (_aten.gt.Scalar, _aten.ge.Scalar)
_SAME = ("to", "_to_copy", "view", "reshape", "unsqueeze", "expand", "clone")
"""Operations that keep zeros and ones."""


def fuse_drop_paths(graph: fx.Graph) -> None:
    """Rewrite every drop path and dropout of ``graph`` that is written out, in place."""
    for node in list(graph.nodes):
        match = _match(node)
        if match is None:
            continue
        source, mask, keep = match
        leading = _leading(mask, source)
        if leading is not None:
            _replace(graph, node, source, leading, 1 - keep)


def _match(node: fx.Node) -> tuple[fx.Node, fx.Node, float] | None:
    """``(x, mask, keep)`` of a product ``x * mask / keep``, whatever is divided; None for any other node."""
    inner, factor = _scaled(node)
    if inner.target is not _aten.mul.Tensor or len(inner.all_input_nodes) != 2 or len(node.users) == 0:
        return None
    if inner is not node and len(inner.users) > 1:
        return None
    for x, factors in (tuple(inner.all_input_nodes), tuple(inner.all_input_nodes[::-1])):
        (plain, of_x), (mask, of_mask) = _scaled(x), _scaled(factors)
        keep = _probability(mask)
        if keep is None or _shared(factors):
            continue
        for source, number in ((x, factor * of_mask), (plain, factor * of_x * of_mask)):
            if abs(number * keep - 1) < 1e-6:
                return source, mask, keep
    return None


def _scaled(node: fx.Node) -> tuple[fx.Node, float]:
    """``(a, number)`` of ``a * number`` and ``a / number``; else the node and 1."""
    by = node.args[1] if node.target in (_aten.div.Tensor, _aten.mul.Tensor) else None
    if not isinstance(by, (int, float)) or not isinstance(node.args[0], fx.Node) or by == 0:
        return node, 1.0
    return node.args[0], 1 / by if node.target is _aten.div.Tensor else float(by)


def _probability(node: fx.Node) -> float | None:
    """The probability of 1 of a node that draws zeros and ones: bernoulli, ``floor(rand + p)``, ``rand < p``."""
    while node.op == "call_function" and _name(node) in _SAME and isinstance(node.args[0], fx.Node):
        node = node.args[0]
    args: list[Any] = list(node.args)
    number = args[1] if len(args) > 1 else None
    if node.target in _BERNOULLI:
        return _share(0.5 if number is None else number)  # the default, which graphs leave out
    if node.target is _aten.bernoulli.default:
        filled = args[0]
        return _share(filled.args[1]) if isinstance(filled, fx.Node) and filled.target in _FULL else None
    if node.target in (*_BELOW, *_ABOVE) and _is_rand(args[0]):
        share = _share(number)
        return share if share is None or node.target in _BELOW else 1 - share
    added: Any = args[0] if node.target is _aten.floor.default else None
    if not isinstance(added, fx.Node) or added.target is not _aten.add.Tensor or added.kwargs:
        return None
    numbers = [a for a in added.args if isinstance(a, float)]
    return numbers[0] if len(numbers) == 1 and any(_is_rand(a) for a in added.args) else None


def _shared(mask: fx.Node) -> bool:
    """Whether something else reads the same draw: two dropouts would draw anew."""
    queue = [mask]
    for node in queue:
        if len(node.users) > 1:
            return True
        if node.target not in (*_BERNOULLI, *_RAND, _aten.bernoulli.default):
            queue += [before for before in node.all_input_nodes if isinstance(before.meta.get("val"), Tensor)]
    return False


def _share(value: object) -> float | None:
    return value if isinstance(value, float) and 0 < value < 1 else None


def _is_rand(value: object) -> bool:
    return isinstance(value, fx.Node) and value.target in _RAND


def _name(node: fx.Node) -> str:
    return str(node.target).split(".")[1] if str(node.target).startswith("aten.") else ""


def _leading(mask: fx.Node, source: fx.Node) -> int | None:
    """Dimensions to put in front for ``feature_dropout``; -1 where every entry has its own number; None: neither."""
    value, x = mask.meta.get("val"), source.meta.get("val")
    if not isinstance(value, Tensor) or not isinstance(x, Tensor) or not 0 < value.ndim == x.ndim:
        return None
    sizes, own = [str(size) for size in value.shape], [str(size) for size in x.shape]  # symbols must not become numbers
    if sizes == own:
        return -1
    if any(size != "1" for size in sizes[2:]) or sizes[0] not in ("1", own[0]):
        return None
    if len(sizes) > 1 and sizes[1] != "1":
        return 0 if sizes[:2] == own[:2] else None
    return 1 if sizes[0] == own[0] else 2


def _replace(graph: fx.Graph, node: fx.Node, source: fx.Node, leading: int, probability: float) -> None:
    value, site = node.meta["val"], node.meta.get("site")

    def made(target: Any, arguments: tuple[Any, ...], ones: int) -> fx.Node:
        new = graph.create_node("call_function", target, arguments, name=target._schema.name.split("::")[-1])
        new.meta = {**without_stops(node.meta), "val": value[(None,) * ones], BY_HAND: True}
        if site is not None:
            new.meta["site"] = replace(site, shape=(*(1,) * ones, *site.shape))
        return new

    with graph.inserting_before(node):
        result = source
        for ones in range(1, leading + 1):
            result = made(_aten.unsqueeze.default, (result, 0), ones)
        target = _aten.dropout.default if leading < 0 else _aten.feature_dropout.default
        result = made(target, (result, probability, True), max(leading, 0))
        for ones in range(leading - 1, -1, -1):
            result = made(_aten.squeeze.dim, (result, 0), ones)
    on_the_way = [before for before in node.all_input_nodes if source in before.all_input_nodes]
    read_instead(node, result, stopped_between(source, node, on_the_way))
    unread = [node]
    for last in unread:  # the mask with it: a draw is an effect, which nobody else removes
        if not last.users and last.op == "call_function":
            unread += last.all_input_nodes
            graph.erase_node(last)


__all__ = ["BY_HAND", "fuse_drop_paths"]
