"""q at what the model returns: 1, where drawn layers make it, or a line of the ledger says why it is not."""

from __future__ import annotations

from collections.abc import Collection, Sequence

from torch import Tensor, fx

from kgraph.canonical import operation_name
from kgraph.departures import Causes, departure, off
from kgraph.nonlinear import Region
from kgraph.passes.affine import affine_source
from kgraph.passes.base import Workspace

_JOINS = ("WeightedSum", "add", "sub", "mul", "cat", "stack", "matmul", "bmm", "einsum", "baddbmm")
"""Joins of several random tensors: what the recipe weights, or what multiplies their q."""
SOFTMAX = ("softmax", "_softmax", "log_softmax", "_log_softmax")


def check_outputs(work: Workspace, cause: Causes, regions: Sequence[Region], said: Collection[fx.Node]) -> set[fx.Node]:
    """Say where q is not 1 at an output that layers make, and which node is the cause, unless it is in ``said``.

    What a nonlinearity makes of the last layer has its own size (its input is looked at instead), and so have losses
    and statistics. What else stands behind the last layer (a factor, an average) is the user's own, and a note.
    Returns the outputs that shall have q = 1.
    """
    promised = set[fx.Node]()
    kernels, seen = work.kernels(), set(said)
    ends = {region.end for region in regions}
    for name, node in returned(work):
        if node not in kernels or node in ends:
            continue
        behind = _behind_layers(work, node, ends)
        if not behind or not _is_tensor_of_batch(node):
            continue
        promised.add(node)
        if not off(work, node):
            continue
        first = cause.of(node)
        if first in seen:
            continue
        joins = operation_name(first) in _JOINS and sum(map(work.is_random, first.all_input_nodes)) > 1
        q = float(kernels[node].merged.q)
        line = f"q is not 1 at the output {name} (q = {q:.4g}): {departure(work, first)}"
        if first not in behind or joins or affine_source(work, first) is not None:
            work.unmet.append(line)
            seen.add(first)
            continue
        promised.discard(node)
        work.notes.append(f"{line}; it stands behind the last layer and is left as it is")
        seen.add(first)
    return promised


def returned(work: Workspace) -> list[tuple[str, fx.Node]]:
    """What the graph returns; of a softmax what it reads."""
    found: list[fx.Node] = []
    fx.map_arg(next(node for node in work.nodes if node.op == "output").args, found.append)
    read = []
    for node in dict.fromkeys(found):
        first = node.args[0] if operation_name(node) in SOFTMAX else node
        read.append((node.name, first if isinstance(first, fx.Node) else node))
    return read


def _behind_layers(work: Workspace, node: fx.Node, ends: Collection[fx.Node]) -> set[fx.Node]:
    """The last stretch: what lies between the last layers and an output, those layers among it; empty without any."""
    seen, queue, layers = {node}, [node], False
    for at in queue:
        if affine_source(work, at) is not None:
            layers = True
        elif at not in ends:
            new = set(filter(work.carries_random, at.all_input_nodes)) - seen
            seen |= new
            queue += new
    return seen if layers else set()


def _is_tensor_of_batch(node: fx.Node) -> bool:
    """Whether an output has channels: not a loss, and not one number for every input."""
    value = node.meta.get("val")
    return isinstance(value, Tensor) and value.is_floating_point() and value.ndim > 1


__all__ = ["SOFTMAX", "check_outputs", "returned"]
