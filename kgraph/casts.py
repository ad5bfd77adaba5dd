"""Types that a forward writes down: which of them are the model's own, and follow when it is cast.

An exported graph holds ``dtype=torch.float32`` both for ``torch.zeros(n, dtype=x.dtype)`` and where float32 was meant.
The model tells them apart: it is run in another type, and what the graph needs to compute the same there follows.
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Collection
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.utils import _pytree as pytree

from kgraph.capture import Graph
from kgraph.copies import copied
from kgraph.errors import ModelError
from kgraph.inputs import Inputs
from kgraph.lift import FOLLOWS
from kgraph.site import site_of
from kgraph.verify import seeded_run

Source = tuple[str, str]
"""Operation and line: nodes that one line makes follow together."""
_PROBES = (torch.float64, torch.float32, torch.bfloat16)
"""Types to run in: a wider one, in which errors show, and a narrower one, which float32 numbers would widen."""


@dataclass(frozen=True)
class _Cast:
    """What the model gives in another type."""

    dtype: torch.dtype
    inputs: Inputs
    outputs: list[Tensor]

    def error(self, module: nn.Module) -> float:
        """Of another module in that type; infinite where it does not run, or returns other types."""
        found = _run(module, self.inputs, self.dtype)
        return math.inf if found is None else _distance(found, self.outputs)


def follow_types(graph: Graph) -> None:
    """Mark the nodes of a captured graph whose type is that of the model, at the fewest lines that need it.

    A line's types follow if else the cast graph fails, or is further from the cast model's output. Where the model
    itself does not run in another type, all stay.
    """
    own = _type_of_model(graph)
    lines = _written(graph.module.graph, own) if own is not None else {}
    casts = _casts(graph, own) if lines and own is not None else []
    if not casts:
        return

    def error(follow: Collection[Source]) -> tuple[int, float]:
        _mark(lines, follow)
        errors = [cast.error(copied(graph.emit())) for cast in casts]
        return sum(map(math.isinf, errors)), errors[0]

    fixed, follow = error(()), list(lines)
    if fixed == (0, 0.0) or not (moved := error(follow)) < fixed:
        _mark(lines, ())
        return
    for line in lines:
        fewer = [one for one in follow if one != line]
        if error(fewer) <= moved:
            follow = fewer
    _mark(lines, follow)


def _casts(graph: Graph, own: torch.dtype) -> list[_Cast]:
    """The model in every other type that it runs in; none of a model without a copy."""
    found: list[_Cast] = []
    for dtype in _PROBES:
        inputs = Inputs(*pytree.tree_map(lambda x, to=dtype: _cast(x, to), tuple(graph.inputs)))
        try:
            model = copied(graph.root)
        except ModelError:  # it is rewritten in place, which takes no copy
            return []
        outputs = _run(model, inputs, dtype) if dtype != own else None
        if outputs is not None:
            found.append(_Cast(dtype, inputs, outputs))
    return found


def _type_of_model(graph: Graph) -> torch.dtype | None:
    """Of the first parameter with fractions, or else input; None where there is none, or none has values to run."""
    tensors = [x for x in (*graph.root.parameters(), *pytree.tree_leaves(tuple(graph.inputs))) if isinstance(x, Tensor)]
    if any(tensor.is_meta for tensor in tensors):
        return None
    return next((tensor.dtype for tensor in tensors if tensor.is_floating_point()), None)


def _written(graph: fx.Graph, own: torch.dtype) -> dict[Source, list[fx.Node]]:
    """Nodes that say the model's type, or make tensors of the default type, which it is, by the line that made them."""
    found: dict[Source, list[fx.Node]] = defaultdict(list)
    for node in graph.nodes:
        if node.op == "call_function" and (own in pytree.tree_leaves((node.args, node.kwargs)) or _makes(node, own)):
            found[str(node.target), site_of(node).source if "site" in node.meta else ""].append(node)
    return dict(found)


def _makes(node: fx.Node, own: torch.dtype) -> bool:
    """Whether a node makes a tensor, out of sizes and numbers, and leaves its type to PyTorch."""
    value = node.meta.get("val")
    if not isinstance(value, Tensor) or value.dtype != own or not isinstance(node.target, torch._ops.OpOverload):
        return False
    typed = any(argument.name == "dtype" for argument in node.target._schema.arguments)
    read = [before.meta.get("val") for before in node.all_input_nodes]
    return typed and node.kwargs.get("dtype") is None and not any(isinstance(one, Tensor) for one in read)


def _mark(lines: dict[Source, list[fx.Node]], follow: Collection[Source]) -> None:
    for line, nodes in lines.items():
        for node in nodes:
            node.meta.pop(FOLLOWS, None)
            if line in follow:
                node.meta[FOLLOWS] = node.meta["val"].dtype


def _cast(value: Any, dtype: torch.dtype) -> Any:
    return value.detach().to(dtype) if isinstance(value, Tensor) and value.is_floating_point() else value


def _run(module: nn.Module, inputs: Inputs, dtype: torch.dtype) -> list[Tensor] | None:
    """Outputs in eval mode and another type; None where it does not run there."""
    try:
        with torch.no_grad():
            return seeded_run(module.to(dtype).eval(), inputs)
    except Exception:  # whatever the user's operations raise of mixed types
        return None


def _distance(actual: list[Tensor], expected: list[Tensor]) -> float:
    """Largest difference, over the size of the output; infinite where the outputs are not of one form."""
    if [(x.shape, x.dtype) for x in actual] != [(x.shape, x.dtype) for x in expected]:
        return math.inf
    errors = [0.0]
    for one, other in zip(actual, expected, strict=True):
        if one.numel() and not torch.equal(one, other):
            wide = torch.promote_types(one.dtype, torch.float64)
            left, right = one.to(wide).nan_to_num(), other.to(wide).nan_to_num()
            errors.append(float((left - right).abs().max() / right.abs().max().clamp_min(_NOTHING)))
    return min(max(errors), 1 / _NOTHING)  # finite: it runs


_NOTHING = 1e-30

__all__ = ["follow_types"]
