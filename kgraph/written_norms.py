"""Norms in other spellings: a part of the graph that computes a normalization becomes that normalization.

A region is what is computed from one tensor alone, by arithmetic, reductions and reshaping, with parameters as gains
and shifts; `kgraph.norm_forms` says which norm it is, if any. Analysis and passes then see one operation
(`kgraph.norm_chain`), and a module that keeps it still runs what the user wrote.
Norms of computed weights are no norms of activations: only what an input reaches is looked at.
"""

from __future__ import annotations

import operator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx

from kgraph.gradient_stops import stop, stopped_between
from kgraph.norm_chain import WRITTEN, Chain, Written, body_of, drop_unread, size_at_three
from kgraph.norm_forms import Form, Program, Slot, identify

REDUCTIONS = {"mean", "sum", "var", "std", "var_mean", "std_mean", "norm", "linalg_vector_norm", "linalg_norm"}
_ENTRYWISE = {
    *("add", "sub", "rsub", "mul", "div", "neg", "square", "pow", "sqrt", "rsqrt", "reciprocal", "abs"),
    *("clamp", "clamp_min", "maximum", "to", "_to_copy", "type_as", "getitem", "true_divide", "addcmul", "addcdiv"),
}
_SHAPES = {
    *(
        "view",
        "view_as",
        "reshape",
        "reshape_as",
        "flatten",
        "unflatten",
        "transpose",
        "permute",
        "expand",
        "expand_as",
        "unsqueeze",
    ),
    *("squeeze", "contiguous", "clone"),
}
ALLOWED = REDUCTIONS | _ENTRYWISE | _SHAPES
_THROUGH = {"pow", "square", "abs", "mul", "to", "_to_copy", "neg"} | _SHAPES
"""What may lie between the normalized tensor and the reduction of it."""
_LARGEST_REGION, _MOST_PARAMETERS = 60, 3


def fuse_norms(graph: fx.Graph) -> None:
    """Replace every written norm of ``graph``, in place."""
    live = _live(graph)
    renamed: dict[fx.Node, fx.Node] = {}
    for first in _sources(graph, live):
        source = renamed.get(first, first)
        while (match := _find(source, live)) is not None:
            renamed[match.nodes[-1]] = _replace(graph, source, match, live)


def name_of(node: fx.Node) -> str:
    schema = getattr(node.target, "_schema", None)
    name = schema.name.split("::")[-1] if schema is not None else ""
    return "getitem" if node.target is operator.getitem else name


def _live(graph: fx.Graph) -> set[fx.Node]:
    """Nodes whose tensors depend on an input: sizes do not count."""
    live: set[fx.Node] = set()
    for node in graph.nodes:
        if node.op == "placeholder" or (_is_tensor(node) and any(n in live for n in node.all_input_nodes)):
            live.add(node)
    return live


def _is_tensor(node: fx.Node) -> bool:
    value = node.meta.get("val")
    return isinstance(value, Tensor) or (isinstance(value, (tuple, list)) and any(isinstance(v, Tensor) for v in value))


def _sources(graph: fx.Graph, live: set[fx.Node]) -> list[fx.Node]:
    """Tensors that something is averaged of, in graph order: the tensor that a norm normalizes is one of them."""
    found: set[fx.Node] = set()
    for node in graph.nodes:
        if node in live and name_of(node) in REDUCTIONS:
            before: Any = node.args[0]
            while isinstance(before, fx.Node) and before in live:
                found.add(before)
                inputs = [n for n in before.all_input_nodes if n in live]
                before = inputs[0] if name_of(before) in _THROUGH and len(inputs) == 1 else None
    return [node for node in graph.nodes if node in found]


@dataclass(frozen=True)
class _Match:
    """A norm that was found: its nodes in order, its parameters, what it is, and its nodes as a graph."""

    nodes: list[fx.Node]
    parameters: list[fx.Node]
    form: Form
    body: fx.Graph


def _find(source: fx.Node, live: set[fx.Node]) -> _Match | None:
    """The first norm of ``source``, with the factors, gains and shifts behind it."""
    shape = _shape(source)
    if shape is None or len(shape) < 2 or not source.users:
        return None
    region = _region(source, live)
    found: _Match | None = None
    for end in [n for n in region if n.users and _same_shape(n, source)]:
        nodes = _back(end, region)
        reductions = {n for n in nodes if name_of(n) in REDUCTIONS}
        if not reductions or (found is not None and not reductions <= set(found.nodes)):
            continue
        found = _match(source, shape, nodes, live) or found
    return found


def _match(source: fx.Node, shape: tuple[int, ...], nodes: list[fx.Node], live: set[fx.Node]) -> _Match | None:
    if not _alone(nodes, source):
        return None
    parameters = _parameters(nodes, live)
    program = _program(source, shape, nodes, parameters)
    form = _identified(program, source) if program is not None else None
    body = body_of(source, nodes, live) if form is not None else None
    return _Match(nodes, parameters, form, body) if form is not None and body is not None else None


def _identified(program: Program, source: fx.Node) -> Form | None:
    try:
        return identify(program, _of_convolution(source))
    except RuntimeError:
        return None  # a graph whose batch size is fixed inside, say: whatever it is, no norm known here


def _region(source: fx.Node, live: set[fx.Node]) -> list[fx.Node]:
    """What is computed from ``source`` alone by allowed operations, every node behind what it reads."""
    known, region, queue = {source}, list[fx.Node](), list(source.users)
    for node in queue:
        inputs = [n for n in node.all_input_nodes if n in live]
        if node not in known and node in live and name_of(node) in ALLOWED and all(n in known for n in inputs):
            known.add(node)
            region.append(node)
            queue += node.users
        if len(region) == _LARGEST_REGION:
            break
    return region


def _back(end: fx.Node, region: list[fx.Node]) -> list[fx.Node]:
    """The nodes of ``region`` that ``end`` is computed from, and itself."""
    inside, needed, queue = set(region), {end}, [end]
    while queue:
        for before in queue.pop().all_input_nodes:
            if before in inside and before not in needed:
                needed.add(before)
                queue.append(before)
    return [node for node in region if node in needed]


def _alone(nodes: list[fx.Node], source: fx.Node) -> bool:
    """Whether nobody else reads the normalized tensor before its last node (its statistics may be read)."""
    inside, end = set(nodes), nodes[-1]
    reduced: set[fx.Node] = set()
    for node in nodes:
        if name_of(node) in REDUCTIONS or any(n in reduced for n in node.all_input_nodes):
            reduced.add(node)
    inner = [n for n in nodes if n is not end and n in reduced and _same_shape(n, source) and name_of(n) not in _SHAPES]
    return all(user in inside for node in inner for user in node.users)


def _parameters(nodes: list[fx.Node], live: set[fx.Node]) -> list[fx.Node]:
    """Tensors that no input reaches, in the order in which they are read."""
    read = [n for node in nodes for n in node.all_input_nodes if n not in live and _is_tensor(n)]
    return list(dict.fromkeys(read))


def _shape(node: fx.Node) -> tuple[int, ...] | None:
    value = node.meta.get("val")
    if not isinstance(value, Tensor) or not value.is_floating_point():
        return None
    return tuple(map(size_at_three, value.shape))


def _same_shape(node: fx.Node, source: fx.Node) -> bool:
    one, two = node.meta.get("val"), source.meta.get("val")
    return isinstance(one, Tensor) and isinstance(two, Tensor) and [*map(str, one.shape)] == [*map(str, two.shape)]


def _program(
    source: fx.Node, shape: tuple[int, ...], nodes: list[fx.Node], parameters: list[fx.Node]
) -> Program | None:
    """The region in double precision, on the CPU."""
    shapes = [_shape(p) for p in parameters]
    if len(parameters) > _MOST_PARAMETERS or any(s is None for s in shapes):
        return None
    slots = {node: Slot(index) for index, node in enumerate((source, *parameters, *nodes))}

    def given(value: Any) -> Any:
        if isinstance(value, fx.Node):
            return slots[value] if value in slots else size_at_three(value.meta["val"])
        if isinstance(value, (list, tuple)):
            return tuple(map(given, value))
        return torch.float64 if isinstance(value, torch.dtype) and value.is_floating_point else value

    steps = tuple(
        (n.target, tuple(map(given, n.args)), tuple((k, given(v)) for k, v in n.kwargs.items() if k != "device"))
        for n in nodes
    )
    return Program(shape, tuple(s for s in shapes if s is not None), steps)  # type: ignore[arg-type]


def _of_convolution(node: fx.Node) -> bool:
    """Whether the nearest layer before ``node`` is a convolution, so that dimension 1 holds channels."""
    while node.all_input_nodes and not name_of(node).startswith("conv"):
        if name_of(node) in ("linear", "matmul", "embedding"):
            return False
        node = node.all_input_nodes[0]
    return name_of(node).startswith("conv")


def _replace(graph: fx.Graph, source: fx.Node, match: _Match, live: set[fx.Node]) -> fx.Node:
    end = match.nodes[-1]
    with graph.inserting_before(end):
        chain = Chain(graph, source, end).build(match.form, match.parameters)
    if (line := stopped_between(source, end, match.nodes)) is not None:
        stop(chain[0], source, line)
    chain[-1].meta[WRITTEN] = Written(match.body, tuple(node.target for node in reversed(chain)))
    live.update(chain)
    end.replace_all_uses_with(chain[-1])
    drop_unread(graph, end)
    return chain[-1]


__all__ = ["ALLOWED", "REDUCTIONS", "fuse_norms", "name_of"]
