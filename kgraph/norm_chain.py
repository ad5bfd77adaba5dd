"""A written norm in the graph: a chain of canonical nodes, and the user's own nodes that it stands for.

    x -> [permute] -> norm -> [permute] -> [* factor] -> [* gain] -> [+ shift]

The last node carries what the user wrote, and a module that keeps the norm runs that: an eps outside the root, a
clamp, a cast are no part of the canonical operation.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import fx

from kgraph.gradient_stops import STOPS, stops_of, without_stops
from kgraph.norm_forms import Form

_aten = torch.ops.aten
WRITTEN = "written"
"""Metadata of a chain's last node: a `Written`."""
_LONGEST_CHAIN = 8
_BATCH = 3
_NEAR = 1e-9
_SOURCE = "_kgraph_source"


@dataclass(frozen=True)
class Written:
    """A norm as the user wrote it.

    Attributes:
        body: the user's own nodes; its placeholders are the source, and inputs of the whole graph (for sizes).
        chain: operations of the canonical nodes that stand for it, from the last one back to the source.
    """

    body: fx.Graph
    chain: tuple[Any, ...]

    def source(self, end: fx.Node) -> fx.Node | None:
        """The tensor that the chain which ends at ``end`` normalizes; None if it is no longer whole."""
        node: Any = end
        for index, target in enumerate(self.chain):
            if not isinstance(node, fx.Node) or node.target is not target or (index and len(node.users) > 1):
                return None
            node = node.args[0]
        return node


def restore(graph: fx.Graph) -> None:
    """Put back what the user wrote wherever a chain is still whole."""
    for end in list(graph.nodes):
        written = end.meta.get(WRITTEN)
        source = written.source(end) if written is not None else None
        if written is None or source is None:
            continue
        inputs = {str(n.target): n for n in graph.nodes if n.op == "placeholder"}
        copies: dict[fx.Node, Any] = {
            n: source if n.target == _SOURCE else inputs[str(n.target)]
            for n in written.body.nodes
            if n.op == "placeholder"
        }
        with graph.inserting_before(end):
            result: Any = graph.graph_copy(written.body, copies)
        own = {STOPS: stops_of(result)}
        result.meta = {k: v for k, v in end.meta.items() if k != WRITTEN} | own
        end.replace_all_uses_with(result)
        drop_unread(graph, end)


def chain_of(norm: fx.Node) -> list[fx.Node]:
    """The nodes that stand for a written norm, in order; of any other norm, itself alone."""
    end = norm
    for _ in range(_LONGEST_CHAIN):
        if WRITTEN in end.meta or len(end.users) != 1:
            break
        end = next(iter(end.users))
    written = end.meta.get(WRITTEN)
    if written is None or written.source(end) is None:
        return [norm]
    nodes = [end]
    while len(nodes) < len(written.chain):
        nodes.append(nodes[-1].args[0])  # type: ignore[arg-type]
    return nodes[::-1] if norm in nodes else [norm]


def body_of(source: fx.Node, nodes: list[fx.Node], live: set[fx.Node]) -> fx.Graph | None:
    """The nodes as a graph of their own; None where a size in them is of another tensor."""
    body = fx.Graph()
    copies: dict[fx.Node, fx.Node] = {source: body.placeholder(_SOURCE)}
    dims = {str(size): d for d, size in enumerate(source.meta["val"].shape) if isinstance(size, torch.SymInt)}

    def copied(node: fx.Node) -> fx.Node:
        if node not in copies:
            size = str(node.meta.get("val")) if isinstance(node.meta.get("val"), torch.SymInt) else None
            if size in dims:
                copies[node] = body.call_function(_aten.sym_size.int, (copies[source], dims[size]))
            elif node.op == "placeholder":
                copies[node] = body.placeholder(str(node.target))
            elif node in live:
                raise LookupError(node.name)
            else:
                copies[node] = made(node)
        return copies[node]

    def made(node: fx.Node) -> fx.Node:
        new = body.create_node(node.op, node.target, *fx.node.map_arg((node.args, node.kwargs), copied))  # type: ignore[misc, arg-type]
        new.meta = {key: node.meta[key] for key in ("weight_only", STOPS) if key in node.meta}
        return new

    try:
        for node in nodes:
            copies[node] = made(node)
    except LookupError:
        return None
    body.output(copies[nodes[-1]])
    return body


def size_at_three(size: Any) -> int:
    """A size, at a batch of three where it is symbolic."""
    if not isinstance(size, torch.SymInt):
        return int(size)
    expression = size.node.expr
    return int(expression.subs(dict.fromkeys(expression.free_symbols, _BATCH)))


class Chain:
    """The canonical nodes of a norm, built one behind the other."""

    def __init__(self, graph: fx.Graph, source: fx.Node, end: fx.Node) -> None:
        self.graph, self.end, self.last, self.nodes = graph, end, source, list[fx.Node]()
        self.value = source.meta["val"]

    def build(self, form: Form, parameters: list[fx.Node]) -> list[fx.Node]:
        """All nodes. A gain or shift that has the norm's own shape becomes the norm's; others stay beside it."""
        gains, shifts = ([parameters[i] for i in chosen] for chosen in (form.gains, form.shifts))
        order = _order(form, self.value.ndim)
        sizes = self._sizes(form)
        weight = next((p for p in gains if _fits(p, sizes)), None)
        gains = [p for p in gains if p is not weight]
        plain = not gains and abs(form.factor - 1) < _NEAR
        bias = next((p for p in shifts if _fits(p, sizes)), None) if plain and form.kind != "RMSNorm" else None
        self._permute(order)
        self._add(*_operation(form, sizes, weight, bias))
        self._permute([order.index(d) for d in range(len(order))])
        if abs(form.factor - 1) >= _NEAR:
            self._add(_aten.mul.Tensor, form.factor)
        for gain in gains:
            self._add(_aten.mul.Tensor, gain)
        for shift in shifts:
            if shift is not bias:
                self._add(_aten.add.Tensor, shift)
        return self.nodes

    def _sizes(self, form: Form) -> list[int]:
        """Shape of a gain that belongs to the norm itself."""
        if form.kind in ("LayerNorm", "RMSNorm"):
            return [size_at_three(self.value.shape[d]) for d in form.over]
        channel = next((d for d in range(1, self.value.ndim) if d not in form.over), 1)
        return [size_at_three(self.value.shape[1 if form.kind == "GroupNorm" else channel])]

    def _permute(self, order: list[int]) -> None:
        if order != sorted(order):
            self.value = self.value.permute(order)
            self._add(_aten.permute.default, order)

    def _add(self, target: Any, *args: Any) -> None:
        # named as if torch.export had made it: names of nodes are what people read in reports
        name = target._schema.name.split("::")[-1]
        node = self.graph.create_node("call_function", target, (self.last, *args), name=name)
        site = self.end.meta.get("site")
        node.meta = {**without_stops(self.end.meta), "val": self.value.to(self.end.meta["val"].dtype)}
        node.meta.pop(WRITTEN, None)
        if site is not None:
            node.meta["site"] = replace(site, shape=tuple(map(_hint, self.value.shape)))
        self.last = node
        self.nodes.append(node)


def _hint(size: Any) -> int:
    return int(size.node.hint) if isinstance(size, torch.SymInt) else int(size)


def _fits(parameter: fx.Node, sizes: list[int]) -> bool:
    return parameter.op == "get_attr" and list(parameter.meta["val"].shape) == sizes


def _order(form: Form, ndim: int) -> list[int]:
    """Dimensions with those of a LayerNorm or RMSNorm last, the channels of a BatchNorm second."""
    rest = [d for d in range(ndim) if d not in form.over]
    if form.kind in ("LayerNorm", "RMSNorm"):
        return [*rest, *form.over]
    if form.kind == "BatchNorm":
        channel = next(d for d in rest if d)
        return [0, channel, *(d for d in range(1, ndim) if d != channel)]
    return list(range(ndim))


def _operation(form: Form, sizes: list[int], weight: fx.Node | None, bias: fx.Node | None) -> tuple[Any, ...]:
    """The operation and its arguments behind the tensor; statistics are those of the input, in every mode."""
    eps = form.eps
    if form.kind == "LayerNorm":
        return _aten.layer_norm.default, sizes, weight, bias, eps
    if form.kind == "RMSNorm":
        return _aten.rms_norm.default, sizes, weight, eps
    if form.kind == "GroupNorm":
        return _aten.group_norm.default, form.groups, weight, bias, eps
    if form.kind == "InstanceNorm":
        return _aten.instance_norm.default, weight, bias, None, None, True, 0.1, eps, False
    return _aten.batch_norm.default, weight, bias, None, None, True, 0.1, eps, False


def drop_unread(graph: fx.Graph, node: fx.Node) -> None:
    unread, gone = [node], set[fx.Node]()
    for last in unread:
        if last not in gone and not last.users and last.op == "call_function":
            unread += last.all_input_nodes
            graph.erase_node(last)
            gone.add(last)


__all__ = ["WRITTEN", "Chain", "Written", "body_of", "chain_of", "drop_unread", "restore", "size_at_three"]
