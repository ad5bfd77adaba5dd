"""The skeleton of a graph: what is left of it when only the way of c values matters.

Every random node is a step: a start, something linear, a nonlinear layer, a sum with its shares, or a product.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import fx

from kgraph.canonical import aten, operation_name
from kgraph.kernel import Kernel
from kgraph.modules import WeightedSum
from kgraph.nonlinear import Region

_SUMS = {aten.add.Tensor, aten.sub.Tensor}
_PRODUCTS = {aten.mul.Tensor}
_CATS = {aten.cat.default, aten.concat.default, aten.stack.default}
_CONTRACTIONS = {"matmul", "bmm", "einsum"}
_SOFTMAX = ("softmax", "_softmax")
_NOISE = {"new_empty", "empty_like", "new_ones", "ones_like", "new_zeros", "zeros_like", "rand_like", "new_full"}


@dataclass(frozen=True)
class Step:
    """One node of the skeleton: ``kind`` is start, pass, nonlinear, sum, product or largest."""

    node: fx.Node
    kind: str
    inputs: tuple[int, ...] = ()
    weights: tuple[float, ...] = ()
    region: Region | None = None


@dataclass(frozen=True)
class Skeleton:
    """Steps in graph order, and the indices of those where a subnetwork may begin."""

    steps: tuple[Step, ...]
    starts: tuple[int, ...]


def build_skeleton(values: dict[fx.Node, Any], regions: tuple[Region, ...]) -> Skeleton:
    """Skeleton of a graph from its propagated values and its nonlinear regions."""
    return _Builder(values, regions).build()


class _Builder:
    def __init__(self, values: dict[fx.Node, Any], regions: tuple[Region, ...]) -> None:
        self.values, self.regions = values, regions
        self.ends = {region.end: region for region in regions}
        self.index: dict[fx.Node, int] = {}
        self.weights_only: set[fx.Node] = set()
        self.steps: list[Step] = []

    def build(self) -> Skeleton:
        left_out = self._interior() | self._masks() | self._logits()
        for node, value in self.values.items():
            if node not in left_out and _holds_kernel(value):
                self.index[node] = len(self.steps)
                self.steps.append(self._step(node))
        starts = tuple(i for i, step in enumerate(self.steps) if self._may_start(i, step))
        return Skeleton(tuple(self.steps), starts)

    def _interior(self) -> set[fx.Node]:
        """Nodes read only inside their region: x and relu6(x + 3) make one hard swish, not a product of two."""
        members = {node for region in self.regions for node in region.nodes}
        found: set[fx.Node] = set()
        for node in reversed(list(self.values)):
            known = all(user in found or user in self.ends for user in node.users)
            if node in members and node not in self.ends and known:
                found.add(node)
        return found

    def _masks(self) -> set[fx.Node]:
        """Noise that takes only its shape from the data (stochastic depth): no function of the input."""
        found: set[fx.Node] = set()
        for node, value in self.values.items():
            inputs = [n for n in node.all_input_nodes if _holds_kernel(self.values[n])]
            drawn = operation_name(node) in _NOISE or (inputs and all(n in found for n in inputs))
            if drawn and _holds_kernel(value):
                found.add(node)
        return found

    def _logits(self) -> set[fx.Node]:
        """Queries, keys and their products: they reach the output through softmax weights only."""
        found: set[fx.Node] = set()
        for node in reversed(list(self.values)):
            readers = [u for u in node.users if u.op == "output" or _holds_kernel(self.values.get(u))]
            inward = all(u in found or (operation_name(u) in _SOFTMAX and self._weighs(u)) for u in readers)
            if readers and inward and _holds_kernel(self.values[node]) and node.op != "placeholder":
                found.add(node)
        return found

    def _weighs(self, node: fx.Node) -> bool:
        """Whether the shares that a softmax makes meet another random tensor, and are not the model's own answer."""
        queue = [node]
        for one in queue:
            for user in one.users:
                if sum(_holds_kernel(self.values.get(n)) for n in user.all_input_nodes) > 1:
                    return True
                if user not in queue and user.op != "output":
                    queue.append(user)
        return False

    def _may_start(self, index: int, step: Step) -> bool:
        """Maps of slope >= 1 are largest from the very beginning; later starts matter only after a contraction."""
        if not step.inputs:
            return True
        if len(step.inputs) > 1 and not all(self._rooted(i) for i in step.inputs):
            return True
        before = [self.steps[i] for i in step.inputs]
        contracted = step.kind == "sum" and sum(step.weights) < 1 - 1e-12
        fixed = any(b.region is not None and b.region.gate for b in before)
        return contracted or fixed or len(step.inputs) > 1

    def _rooted(self, index: int) -> bool:
        return bool(self.steps[index].inputs)

    def _step(self, node: fx.Node) -> Step:
        region = self.ends.get(node)
        if region is not None and region.source in self.index:
            return Step(node, "nonlinear", (self.index[region.source],), region=region)
        inputs = tuple(self.index[n] for n in node.all_input_nodes if n in self.index)
        if operation_name(node) in _SOFTMAX:
            self.weights_only.add(node)
        if len(inputs) == 0:
            return Step(node, "start")
        return self._junction(node, inputs)

    def _junction(self, node: fx.Node, inputs: tuple[int, ...]) -> Step:
        name = operation_name(node)
        module = _module_of(node)
        if isinstance(module, WeightedSum):
            return self._weighted(node, module.weights)
        if node.target in _SUMS:
            return self._plain_sum(node)
        if node.target in _CATS:
            return self._concatenation(node)
        if len(inputs) == 1:
            if node.all_input_nodes and node.all_input_nodes[0] in self.weights_only:
                self.weights_only.add(node)
            return Step(node, "pass", inputs)
        if name == "scaled_dot_product_attention":
            value = node.args[2]
            return Step(node, "pass", (self.index.get(value, inputs[-1]),))  # type: ignore[arg-type]
        if name in _CONTRACTIONS and any(n in self.weights_only for n in node.all_input_nodes):
            kept = tuple(self.index[n] for n in node.all_input_nodes if n in self.index and n not in self.weights_only)
            return Step(node, "pass", kept[:1] or inputs[:1])
        kind = "product" if node.target in _PRODUCTS or name in _CONTRACTIONS else "largest"
        return Step(node, kind, inputs)

    def _weighted(self, node: fx.Node, weights: tuple[float, ...]) -> Step:
        """Shares w_i^2 q_i over their sum: the normalized sum when all q are equal."""
        square = [w * w for w in weights]
        total = sum(square)
        pairs = [(self.index[n], s / total) for n, s in zip(node.args, square, strict=True) if n in self.index]  # type: ignore[index]
        return Step(node, "sum", tuple(i for i, _ in pairs), tuple(w for _, w in pairs))

    def _plain_sum(self, node: fx.Node) -> Step:
        terms = [n for n in node.args[:2] if isinstance(n, fx.Node) and n in self.index]
        if len(terms) == 1 and not _adds_tensor(node, self.values):
            return Step(node, "pass", (self.index[terms[0]],))
        scale = float(node.kwargs.get("alpha", 1.0)) ** 2  # type: ignore[arg-type]
        q = [self._q(n) * (scale if n is node.args[1] else 1.0) for n in terms]
        total = (
            float(self.values[node].merged.q) if len(terms) == 1 and isinstance(self.values[node], Kernel) else sum(q)
        )
        shares = tuple(value / total if total > 0 else 1 / len(terms) for value in q)
        return Step(node, "sum", tuple(self.index[n] for n in terms), shares)

    def _q(self, node: fx.Node) -> float:
        value = self.values[node]
        return float(value.merged.q) if isinstance(value, Kernel) else 1.0

    def _concatenation(self, node: fx.Node) -> Step:
        tensors = list(node.args[0])  # type: ignore[arg-type]
        dim = int(node.args[1]) if len(node.args) > 1 else 0  # type: ignore[call-overload]
        sizes = [_size(self.values[n], dim) for n in tensors]
        total = sum(sizes)
        pairs = [(self.index[n], s / total) for n, s in zip(tensors, sizes, strict=True) if n in self.index]
        return Step(node, "sum", tuple(i for i, _ in pairs), tuple(w for _, w in pairs))


def _adds_tensor(node: fx.Node, values: dict[fx.Node, Any]) -> bool:
    """Whether the other operand is a tensor with entries of its own (a position embedding), not a number."""
    others = [values[n] for n in node.args[:2] if isinstance(n, fx.Node) and not _holds_kernel(values[n])]
    return any(isinstance(o, torch.Tensor) and o.numel() > 1 and bool(o.any()) for o in others)


def _size(value: Any, dim: int) -> int:
    return int(value.shape[dim]) if len(value.shape) else 1


def _module_of(node: fx.Node) -> Any:
    owner = node.graph.owning_module
    return owner.get_submodule(str(node.target)) if node.op == "call_module" and owner is not None else None


def _holds_kernel(value: Any) -> bool:
    if isinstance(value, (list, tuple)):
        return any(isinstance(v, Kernel) for v in value)
    return isinstance(value, Kernel)
