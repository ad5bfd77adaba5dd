"""How fast a known tensor moves when the parameters behind it are trained: its own part of the NTK.

A parameter moves as it is (1); a frozen one, a buffer or a number does not (0). A tensor computed from parameters (a
weight times a constant, a normalized weight) moves by the chain rule: with J its derivative by theirs, the mean of the
diagonal of J J^T, found on random signs v as E|J^T v|^2.
"""

from __future__ import annotations

import weakref
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, fx, nn

from kgraph.canonical import operation_name

_PROBES = 4
_OF_SHAPE = frozenset(
    """sym_size zeros_like ones_like full_like empty_like new_zeros new_ones new_full new_empty fill zero""".split()  # noqa: SIM905
)


def held(node: object) -> object:
    """What the model holds at a `get_attr` node; None for others."""
    if not isinstance(node, fx.Node) or node.op != "get_attr":
        return None
    value: object = node.graph.owning_module
    for name in str(node.target).split("."):
        value = getattr(value, name)
    return value


def is_parameter(node: fx.Node) -> bool:
    """Whether a known tensor is a parameter, or anything computed from one; else it is a constant."""
    return any(isinstance(held(one), nn.Parameter) for one in _behind(node))


def speed(node: fx.Node, parametrization: str, count_frozen: bool, known: Mapping[fx.Node, Any]) -> float:
    """Mean square speed of the tensor's entries; under "ntk" that of unit parameters, relative to its own E[x^2]."""
    own = held(node)
    if node.op == "get_attr":
        return float(_is_trained(own, count_frozen))
    trained = [n for n in _behind(node) if _is_trained(held(n), count_frozen)]
    if not trained:
        return 0.0
    leaves = {n: held(n).detach().clone().requires_grad_() for n in trained}  # type: ignore[union-attr]
    if any(leaf.is_meta for leaf in leaves.values()):
        return 1.0
    with torch.enable_grad():
        value = _value(node, dict(leaves), known)
        if isinstance(value, Tensor) and value.ndim > 1 and bool((value == value[:1]).all()):
            value = value[:1]  # one and the same for the whole batch
    if not isinstance(value, Tensor) or not value.requires_grad:
        return 0.0
    total = 0.0
    for probe in range(_PROBES):
        generator = torch.Generator().manual_seed(probe)
        signs = torch.randint(0, 2, value.shape, generator=generator).to(value) * 2 - 1
        found = torch.autograd.grad(value, list(leaves.values()), signs, retain_graph=True, materialize_grads=True)
        for leaf, gradient in zip(leaves.values(), found, strict=True):
            size = 1.0 if parametrization == "standard" else float(leaf.detach().double().square().mean())
            total += size * float(gradient.double().square().sum()) / _PROBES
    mean = total / max(value.numel(), 1)
    moment = float(value.detach().double().square().mean())
    return mean if parametrization == "standard" else mean / moment if moment else 0.0


def _is_trained(value: object, count_frozen: bool) -> bool:
    return isinstance(value, nn.Parameter) and (count_frozen or value.requires_grad)


def _behind(node: fx.Node) -> list[fx.Node]:
    """The node and everything that its entries are computed from: of some tensors only the shape is read."""
    found = [node]
    for one in found:
        found += [n for n in one.all_input_nodes if n not in found and not _reads_shape(one)]
    return found


def _reads_shape(node: fx.Node) -> bool:
    return operation_name(node) in _OF_SHAPE


def _value(node: fx.Node, moved: dict[fx.Node, Any], known: Mapping[fx.Node, Any]) -> Any:
    """The node's value, computed anew from the parameters in ``moved``; what none of them reaches is known."""
    behind = set(_behind(node))
    for one in (n for n in node.graph.nodes if n in behind and n not in moved):
        if not any(n in moved for n in one.all_input_nodes):
            continue
        args, kwargs = fx.node.map_arg((one.args, one.kwargs), lambda n: moved[n] if n in moved else known[n])  # type: ignore[misc]
        run: Any = one.graph.owning_module.get_submodule(str(one.target)) if one.op == "call_module" else one.target  # type: ignore[union-attr]
        moved[one] = run(*args, **kwargs)
    return moved[node]


def same_tensor(node: fx.Node) -> list[fx.Node]:
    """All `get_attr` nodes of the graph that hold the tensor which the node is, or is a view of."""
    while node.op != "get_attr" and node.args and isinstance(node.args[0], fx.Node):
        node = node.args[0]
    own = held(node)
    if own is None:
        return []
    size, table = _holders.get(node.graph, (0, {}))
    if size != len(node.graph.nodes):
        table = {}
        for one in node.graph.nodes:
            if one.op == "get_attr":
                table.setdefault(id(held(one)), []).append(one)
        _holders[node.graph] = len(node.graph.nodes), table
    return table[id(own)]


_holders: weakref.WeakKeyDictionary[fx.Graph, tuple[int, dict[int, list[fx.Node]]]] = weakref.WeakKeyDictionary()
"""The `get_attr` nodes of a graph by the tensor that they hold, and the size of the graph that they were read off."""


def restart() -> None:
    """Begin a new walk: graphs may have changed."""
    _holders.clear()
