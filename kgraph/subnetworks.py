"""Maxima over subnetworks, read off the graph: nobody should derive a maximal slope function by hand again.

A subnetwork is a single-entry region of the graph, a pair (u, v) in which u dominates v; its map is the map from
the c value at u to that at v. All of them are swept at once: every node carries one entry per start u, NaN where u
does not dominate it - at a junction an entry survives only if every operand has it, which is dominance.

    nonlinear layer   slope psi s        curvature psi k + kappa s^2        c value C(c)
    normalized sum    sum w_i^2 s_i      sum w_i^2 k_i                      sum w_i^2 c_i
    concatenation     the same with channel shares
    product           s_1 + s_2          k_1 + k_2 + 2 s_1 s_2              c_1 c_2
    anything linear   s                  k                                  c

Source: Martens et al. 2021, arXiv 2110.01765, section 5; Zhang et al. 2022, arXiv 2203.08120.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import fx

from kgraph.canonical import aten, operation_name
from kgraph.capture import Graph
from kgraph.kernel import Kernel
from kgraph.maps import Pointwise
from kgraph.modules import WeightedSum
from kgraph.nonlinear import Region, find_regions
from kgraph.propagate import Propagation
from kgraph.shaping import leaky_relu_c_map, local_slope

Array = NDArray[np.float64]
_SUMS = {aten.add.Tensor, aten.sub.Tensor}
_PRODUCTS = {aten.mul.Tensor}
_CATS = {aten.cat.default, aten.concat.default, aten.stack.default}
_CONTRACTIONS = {"matmul", "bmm", "einsum"}
_SOFTMAX = ("softmax", "_softmax")
_NOISE = {"new_empty", "empty_like", "new_ones", "ones_like", "new_zeros", "zeros_like", "rand_like", "new_full"}


@dataclass(frozen=True)
class Extreme:
    """A maximum over subnetworks and the subnetwork that attains it."""

    value: float
    source: str
    target: str

    def __str__(self) -> str:
        return f"{self.source} -> {self.target}"


@dataclass(frozen=True)
class Step:
    """One node of the skeleton: ``kind`` is start, pass, nonlinear, sum, product or largest."""

    node: fx.Node
    kind: str
    inputs: tuple[int, ...] = ()
    weights: tuple[float, ...] = ()
    region: Region | None = None


@dataclass(frozen=True)
class Subnetworks:
    """Skeleton of a graph: what is needed to map c values through it.

    Attributes:
        steps: in graph order.
        starts: index of the steps where a subnetwork may begin.
        regions: the nonlinear layers; those in ``free`` get the local map under study, the others keep their own.
    """

    steps: tuple[Step, ...]
    starts: tuple[int, ...]
    regions: tuple[Region, ...]
    free: frozenset[Region]
    products_add: bool = True

    def max_slope(self, psi: float | None = None) -> Extreme:
        """Largest slope of any subnetwork at c = 1 when free layers have local slope ``psi`` (None: their own)."""
        slopes = self._sweep(_SlopeMaps(self, psi))
        return self._largest([s[0] for s in slopes])

    def max_curvature(self, kappa: float, psi: float = 1.0) -> Extreme:
        """Largest curvature C''(1) when free layers have local curvature ``kappa`` (and slope ``psi``)."""
        return self._largest([s[1] for s in self._sweep(_CurvatureMaps(self, psi, kappa))])

    def max_c(self, negative_slope: float) -> Extreme:
        """Largest C(0) when free layers are leaky relus of this negative slope (scaled to Q(1) = 1)."""
        return self._largest([s[0] for s in self._sweep(_LeakyMaps(self, negative_slope))])

    def _sweep(self, maps: _Maps) -> list[tuple[Array, ...]]:
        values: list[tuple[Array, ...]] = []
        position = {step: column for column, step in enumerate(self.starts)}
        missing = np.full(len(self.starts), np.nan)
        for index, step in enumerate(self.steps):
            arguments = [values[i] for i in step.inputs]
            result = _combine(step, arguments, maps) if arguments else tuple(missing.copy() for _ in maps.start)
            if index in position:
                result = tuple(r.copy() for r in result)
                for r, start in zip(result, maps.start, strict=True):
                    r[position[index]] = start
            values.append(result)
        return values

    def _largest(self, columns: list[Array]) -> Extreme:
        table = np.array(columns)
        filled = np.where(np.isnan(table), -np.inf, table)
        row, column = np.unravel_index(int(np.argmax(filled)), filled.shape)
        source = self.steps[self.starts[int(column)]].node.name
        return Extreme(float(filled[row, column]), source, self.steps[int(row)].node.name)


def _combine(step: Step, arguments: list[tuple[Array, ...]], maps: _Maps) -> tuple[Array, ...]:
    if step.kind == "nonlinear":
        assert step.region is not None
        return maps.nonlinear(step.region, arguments[0])
    if step.kind == "sum":
        constant = 1.0 - sum(step.weights)
        total: list[Any] = [
            sum(w * a[i] for w, a in zip(step.weights, arguments, strict=True)) for i in range(len(maps.start))
        ]
        return tuple(t + constant * maps.constant[i] for i, t in enumerate(total))
    if step.kind == "product":
        result = arguments[0]
        for other in arguments[1:]:
            result = maps.product(result, other)
        return result
    if step.kind == "largest":
        return tuple(np.maximum.reduce([a[i] for a in arguments]) for i in range(len(maps.start)))
    return arguments[0]


class _Maps:
    """How one kind of quantity passes through nonlinear layers and products."""

    start: tuple[float, ...] = (1.0,)
    constant: tuple[float, ...] = (0.0,)
    """Value of a term that is the same for all inputs."""

    def __init__(self, owner: Subnetworks) -> None:
        self.owner = owner

    def nonlinear(self, region: Region, x: tuple[Array, ...]) -> tuple[Array, ...]:
        raise KeyError(region)

    def product(self, x: tuple[Array, ...], y: tuple[Array, ...]) -> tuple[Array, ...]:
        raise KeyError


class _SlopeMaps(_Maps):
    def __init__(self, owner: Subnetworks, psi: float | None) -> None:
        super().__init__(owner)
        self.psi = psi

    def nonlinear(self, region: Region, x: tuple[Array, ...]) -> tuple[Array, ...]:
        free = self.psi is not None and region in self.owner.free
        slope = self.psi if free else _own_slope(region.fn)
        return (slope * x[0],)  # type: ignore[operator]

    def product(self, x: tuple[Array, ...], y: tuple[Array, ...]) -> tuple[Array, ...]:
        return (x[0] + y[0],) if self.owner.products_add else (np.maximum(x[0], y[0]),)


class _CurvatureMaps(_Maps):
    start = (1.0, 0.0)
    constant = (0.0, 0.0)

    def __init__(self, owner: Subnetworks, psi: float, kappa: float) -> None:
        super().__init__(owner)
        self.psi, self.kappa = psi, kappa

    def nonlinear(self, region: Region, x: tuple[Array, ...]) -> tuple[Array, ...]:
        slope, curvature = x
        if region in self.owner.free:
            return self.psi * slope, self.psi * curvature + self.kappa * slope**2
        own = _own_slope(region.fn)
        return own * slope, own * curvature

    def product(self, x: tuple[Array, ...], y: tuple[Array, ...]) -> tuple[Array, ...]:
        if not self.owner.products_add:
            return np.maximum(x[0], y[0]), np.maximum(x[1], y[1])
        return x[0] + y[0], x[1] + y[1] + 2 * x[0] * y[0]


class _LeakyMaps(_Maps):
    start = (0.0,)
    constant = (1.0,)

    def __init__(self, owner: Subnetworks, negative_slope: float) -> None:
        super().__init__(owner)
        self.negative_slope = negative_slope

    def nonlinear(self, region: Region, x: tuple[Array, ...]) -> tuple[Array, ...]:
        if region in self.owner.free:
            return (leaky_relu_c_map(torch.from_numpy(x[0]), self.negative_slope).numpy(),)
        return (local_c(region, x[0]),)

    def product(self, x: tuple[Array, ...], y: tuple[Array, ...]) -> tuple[Array, ...]:
        return (x[0] * y[0],) if self.owner.products_add else (np.maximum(x[0], y[0]),)


_ONE = torch.ones((), dtype=torch.float64)


@lru_cache(maxsize=4096)
def _own_slope(fn: Pointwise) -> float:
    return local_slope(fn)


def local_c(region: Region, c: Array) -> Array:
    """C(c) = E[phi phi] / E[phi^2] of a layer's own map at q = 1; NaN stays NaN."""
    known = ~np.isnan(c)
    result = c.copy()
    if known.any():
        value, _ = region.fn.dual(_ONE, _ONE, torch.from_numpy(c[known]))
        result[known] = (value / region.fn.second(_ONE)).numpy()
    return result


def find_subnetworks(
    graph: Graph,
    propagation: Propagation,
    *,
    free: Callable[[Region], bool] = lambda region: not region.gate,
    products_add: bool = True,
) -> Subnetworks:
    """Skeleton of a captured graph.

    Args:
        graph: captured model.
        propagation: its kernels (which nodes are random; q shares of plain sums).
        free: which nonlinear layers get the local map under study.
        products_add: False counts a product as the larger of its operands (to see what binds besides products).
    """
    kernels = propagation.kernels()
    regions = tuple(find_regions(graph.module, kernels.__contains__))
    return _Builder(propagation.values, regions).build(frozenset(filter(free, regions)), products_add)


class _Builder:
    def __init__(self, values: dict[fx.Node, Any], regions: tuple[Region, ...]) -> None:
        self.values, self.regions = values, regions
        self.ends = {region.end: region for region in regions}
        self.index: dict[fx.Node, int] = {}
        self.weights_only: set[fx.Node] = set()
        self.steps: list[Step] = []

    def build(self, free: frozenset[Region], products_add: bool) -> Subnetworks:
        left_out = self._interior() | self._masks() | self._logits()
        for node, value in self.values.items():
            if node not in left_out and _holds_kernel(value):
                self.index[node] = len(self.steps)
                self.steps.append(self._step(node))
        starts = tuple(i for i, step in enumerate(self.steps) if self._may_start(i, step))
        return Subnetworks(tuple(self.steps), starts, self.regions, free, products_add)

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
            inward = all(u in found or operation_name(u) in _SOFTMAX for u in readers)
            if readers and inward and _holds_kernel(self.values[node]) and node.op != "placeholder":
                found.add(node)
        return found

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
        q = [self._q(n) for n in terms]
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
