"""Residual branches: the last affine layer V of a branch, what feeds it, and its block type.

    res-1   g = sigma(h)        no affine layer but V
    res-2   g = sigma(W h)      sigma other than relu
    res-3   g = relu(W h)

Norms on the branch are part of g. Source of the block types: arXiv 2206.06929.
"""

from __future__ import annotations

import operator
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import fx

from kgraph.canonical import aten, operation_name
from kgraph.contractions import contraction_of
from kgraph.modules import Scale
from kgraph.nonlinear import Region, find_regions

IsRandom = Callable[[object], bool]

AFFINE = {
    **dict.fromkeys(("linear", "matmul", "mm", "conv1d", "conv2d", "conv3d"), 1),
    **dict.fromkeys(("conv_transpose1d", "conv_transpose2d", "conv_transpose3d"), 1),
    "addmm": 2,
}
"""Affine operations and the position of their weight."""
IDENTITY = {"dropout", "feature_dropout", "alpha_dropout", "contiguous", "clone", "alias", "detach", "to", "_to_copy"}
"""Operations through which a value stays what it is."""
LINEAR = IDENTITY | {"reshape", "view", "flatten", "unsqueeze", "squeeze", "permute", "transpose", "mul", "div", "neg"}
"""Operations, of one random operand, that a factor passes."""
_NOISE = {"new_empty", "empty_like", "new_ones", "ones_like", "rand_like", "new_full", "bernoulli", "bernoulli_"}


@dataclass(frozen=True, eq=False)
class Branch:
    """One residual branch: from a term of the sum down to its last affine layer V, and what feeds V.

    Attributes:
        end: the term of the sum.
        kind: "res-1", "res-2", "res-3", "linear", "attention", "product" (of two activations), "gated", "activated" (a
            nonlinearity follows V).
        law: which displacement exponent it has, see `kgraph.depth_correlated.displacement_exponent`.
        affine: its affine layers in order; the last is V.
        term: its weight in the sum.
        constant: number that V's output is multiplied with altogether, ``term`` included.
        activation: the nonlinearity that feeds V (or follows it), if there is one.
        exact: whether V, one activation and at most one inner affine layer are all there is.
    """

    end: fx.Node
    kind: str
    law: str
    affine: tuple[fx.Node, ...]
    term: float
    constant: float
    activation: Region | None = None
    exact: bool = False


class BranchReader:
    """Reads branches off a flat graph."""

    def __init__(self, module: fx.GraphModule, is_random: IsRandom) -> None:
        self.module, self.is_random = module, is_random
        self.order = {node: i for i, node in enumerate(module.graph.nodes)}
        self.carrying: set[fx.Node] = set()
        for node in self.order:  # tuples of random tensors (unbind, split) carry on what is random
            several = any(user.target is operator.getitem for user in node.users)
            if is_random(node) or (several and any(n in self.carrying for n in node.all_input_nodes)):
                self.carrying.add(node)
        regions = find_regions(module, is_random)
        self.ends = {region.end: region for region in regions}
        self.interior = {node for region in regions for node in region.nodes if node is not region.end}

    def constant(self, node: fx.Node) -> float | None:
        """The number a node multiplies by, if that is all it does."""
        module = self.submodule(node)
        if isinstance(module, Scale):
            return module.factor
        other = node.args[1] if len(node.args) > 1 else None
        if node.target in (aten.mul.Tensor, aten.mul.Scalar) and isinstance(other, (int, float)):
            return float(other)
        return 1 / other if node.target is aten.div.Tensor and isinstance(other, (int, float)) and other else None

    def weight(self, node: fx.Node) -> fx.Node | None:
        """The weight of an affine node: an operand that no input reaches."""
        at = AFFINE.get(operation_name(node)) if node.op == "call_function" else None
        weight = node.args[at] if at is not None and len(node.args) > at else None
        known = isinstance(weight, fx.Node) and not self.is_random(weight)
        return weight if known else None  # type: ignore[return-value]

    def submodule(self, node: fx.Node) -> torch.nn.Module | None:
        return self.module.get_submodule(str(node.target)) if node.op == "call_module" else None

    def branch(self, end: fx.Node, weight: float, nodes: set[fx.Node]) -> Branch | str:
        affine = tuple(sorted((n for n in nodes if self.weight(n) is not None), key=self.order.__getitem__))
        if not affine:
            return "no affine layer lies in the branch"
        last, after, constant = self._towards_affine(end, nodes)
        if last is None:
            return f"the branch ends in {operation_name(after or end)}, of which no affine layer is the last"
        upstream = self._upstream(last, nodes)
        inner = tuple(n for n in affine if n in upstream)
        kind, law, feed = self._type(last, nodes, bool(inner))
        if isinstance(after, fx.Node):
            feed = self.ends[after]
            kind, law = "activated", ("positive" if _is_odd(feed) else "drift")
        plain = all(n in inner or n in self.ends or n in self.interior or self._plain(n) for n in upstream)
        exact = kind.startswith("res") and len(inner) <= 1 and plain
        return Branch(end, kind, law, (*inner, last), weight, weight * constant, feed, exact)

    def _plain(self, node: fx.Node) -> bool:
        return operation_name(node) in IDENTITY

    def _towards_affine(self, end: fx.Node, nodes: set[fx.Node]) -> tuple[fx.Node | None, fx.Node | None, float]:
        """V, the nonlinearity after it (or the node where the search ended), and the constant after V."""
        node, after, constant = end, None, 1.0
        while node in nodes:
            if self.weight(node) is not None:
                return node, after, constant
            constant *= self.constant(node) or 1.0
            if node in self.ends and not self.ends[node].gate:
                after, node = node, self.ends[node].source
                continue
            inputs = self._value_inputs(node, nodes)
            if len(inputs) != 1:
                return None, node, constant
            node = inputs[0]
        return None, after, constant

    def _value_inputs(self, node: fx.Node, nodes: set[fx.Node]) -> list[fx.Node]:
        """Random inputs, without masks and gates."""
        inputs = [n for n in node.all_input_nodes if n in nodes]
        if operation_name(node) in ("reshape_as", "view_as", "expand_as"):
            return inputs[:1]
        if len(inputs) > 1 and node.target is aten.mul.Tensor:
            inputs = [n for n in inputs if not self._scales(n, nodes)] or inputs
        return inputs

    def _scales(self, node: fx.Node, nodes: set[fx.Node]) -> bool:
        """Whether a factor is noise (stochastic depth) or a gate, seen through views."""
        while node in nodes:
            if operation_name(node) in _NOISE or (node in self.ends and self.ends[node].gate):
                return True
            inputs = [n for n in node.all_input_nodes if n in nodes]
            if len(inputs) != 1 or node in self.ends or self.weight(node) is not None:
                return False
            node = inputs[0]
        return False

    def _upstream(self, last: fx.Node, nodes: set[fx.Node]) -> set[fx.Node]:
        found, queue = set[fx.Node](), list(last.all_input_nodes)
        while queue:
            node = queue.pop()
            if node in nodes and node not in found:
                found.add(node)
                queue += node.all_input_nodes
        return found

    def _type(self, last: fx.Node, nodes: set[fx.Node], inner: bool) -> tuple[str, str, Region | None]:
        """Type and law by the first thing met on the way from V's input back to the shortcut."""
        node = next(n for n in last.all_input_nodes if n in self.carrying)
        while node in nodes and self.weight(node) is None:
            if node in self.ends and not self.ends[node].gate:
                return self._activated(self.ends[node], inner)
            inputs = self._value_inputs(node, nodes)
            contraction = contraction_of(node, lambda n: n in self.carrying)
            if contraction in ("attention", "logits"):
                return "attention", "centred", None
            if contraction == "product":
                return "product", "positive", None
            if len(inputs) > 1:
                return ("gated" if node.target is aten.mul.Tensor else "other"), "positive", None
            if not inputs:
                break
            node = inputs[0]
        return "linear", ("centred" if inner else "fixed"), None

    def _activated(self, region: Region, inner: bool) -> tuple[str, str, Region | None]:
        if not inner:
            return "res-1", "fixed", region
        relu = region.nodes == (region.end,) and operation_name(region.end) in ("relu", "ReLU")
        return ("res-3" if relu else "res-2"), ("centred" if _is_odd(region) else "positive"), region


def _is_odd(region: Region) -> bool:
    u = torch.linspace(0.05, 4, 40, dtype=torch.float64)
    with torch.no_grad():
        return bool((region.fn(u) + region.fn(-u)).abs().max() < 1e-9)
