"""The Jacobian between two nodes of a finite network: its singular values, exact or from random probes."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from scipy.sparse.linalg import LinearOperator, svds
from torch import Tensor, fx
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils import _pytree as pytree

from kgraph.capture import Graph
from kgraph.errors import InputError
from kgraph.node_moments import MeasuringInterpreter

MOST_EXACT = 1024
"""Inputs of a Jacobian that is written out and decomposed."""
_CHUNK = 256


@dataclass(frozen=True)
class MeasuredJacobian:
    """Squared singular values of a Jacobian J [n, n0].

    Attributes:
        mean: tr(J J^T) / n. variance: of the n eigenvalues of J J^T.
        mean_error, variance_error: standard errors from the probes; 0 where J was decomposed.
        largest: largest singular value. smallest: the smallest of the min(n, n0) ones; nan where not decomposed.
        how: "exact SVD", or with how many probes.
    """

    mean: float
    variance: float
    mean_error: float
    variance_error: float
    largest: float
    smallest: float
    shape: tuple[int, int]
    how: str


class _Keeper(MeasuringInterpreter):
    """Runs the graph once in float64 and keeps the values of some nodes."""

    def __init__(self, module: fx.GraphModule, mode: str, wanted: set[fx.Node]) -> None:
        super().__init__(module, mode, lambda name, value: None)
        self.wanted, self.kept = wanted, dict[fx.Node, Any]()

    def run_node(self, n: fx.Node) -> Any:
        value = super().run_node(n)
        if n in self.wanted:
            self.kept[n] = value
        return value


class Segment:
    """The value of ``end`` as a function of that of ``start``, all else as in one run on one input, in float64.

    Args:
        mode: "train" or "eval".
    """

    def __init__(self, graph: Graph, start: fx.Node, end: fx.Node, mode: str) -> None:
        self.start, self.end = start, end
        self.nodes = between(graph, start, end)
        inside = {start, *self.nodes}
        outer = {n for node in self.nodes for n in node.all_input_nodes if n not in inside}
        keeper = _Keeper(graph.module, mode, {start, end, *outer})
        leaves = [_first(x) for x in pytree.tree_flatten(graph.inputs)[0]]
        with torch.no_grad():
            keeper.run(*leaves, enable_io_processing=False)
        self.at, self.value = keeper.kept[start], keeper.kept[end]
        if not all(isinstance(x, Tensor) and x.is_floating_point() for x in (self.at, self.value)):
            raise InputError(f"{start.name} or {end.name} is no real tensor", hint="Pass other nodes as start and end")
        if not self.at.numel() or not (self.at.isfinite().all() and self.value.isfinite().all()):
            what = "not finite" if self.at.numel() else "empty"
            raise InputError(f"the Jacobian {start.name} -> {end.name} cannot be measured: a value there is {what}")
        self._outer = {node: value for node, value in keeper.kept.items() if node in outer}
        self._run_node = MeasuringInterpreter(graph.module, mode, lambda name, value: None)
        self._last = {n: node for node in self.nodes for n in node.all_input_nodes}

    def __call__(self, x: Tensor) -> Tensor:
        run, env = self._run_node, {self.start: x}
        for node in self.nodes:
            run.env = {n: env[n] if n in env else self._outer[n] for n in node.all_input_nodes}
            env[node] = run.run_node(node)
            for read in node.all_input_nodes:
                if self._last[read] is node and read is not self.end:
                    env.pop(read, None)
        return env[self.end]

    @property
    def batched(self) -> bool:
        """Whether rows of a larger batch do not see each other, so that many tangents go through in one run."""
        if self.at.ndim < 2 or self.at.shape[0] != 1 or self.value.shape[0] != 1:
            return False
        with torch.no_grad():
            try:
                two = self(torch.cat([self.at, self.at * 0.5]))
            except RuntimeError:  # a reshape to a fixed batch
                return False
        return two.shape[0] == 2 and torch.allclose(two[:1], self.value, rtol=1e-9, atol=1e-12)

    def jvp(self, tangents: Tensor) -> Tensor:
        """J v of every row, [k, n0] -> [k, n]."""
        pieces = tangents.split(_CHUNK) if self.batched else tangents.split(1)
        return torch.cat([self._jvp(piece) for piece in pieces])

    def vjp(self, cotangents: Tensor) -> Tensor:
        """J^T u of every row, [k, n] -> [k, n0]."""
        pieces = cotangents.split(_CHUNK) if self.batched else cotangents.split(1)
        return torch.cat([self._vjp(piece) for piece in pieces])

    def _jvp(self, tangents: Tensor) -> Tensor:
        at = self._repeated(len(tangents))
        with sdpa_kernel(SDPBackend.MATH):  # the fused attentions have no forward derivative
            out: Any = torch.func.jvp(self, (at,), (tangents.reshape(at.shape),))[1]
        return out.reshape(len(tangents), -1).detach()

    def _vjp(self, cotangents: Tensor) -> Tensor:
        at = self._repeated(len(cotangents)).requires_grad_()
        out = self(at)
        (gradient,) = torch.autograd.grad(out, at, cotangents.reshape(out.shape))
        return gradient.reshape(len(cotangents), -1)

    def _repeated(self, count: int) -> Tensor:
        return self.at.repeat(count, *[1] * (self.at.ndim - 1)) if count > 1 else self.at.clone()


def between(graph: Graph, start: fx.Node, end: fx.Node) -> list[fx.Node]:
    """Nodes on the paths from ``start`` (left out) to ``end``, in order.

    Raises:
        InputError: there is no path.
    """
    after: set[fx.Node] = {start}
    for node in graph.module.graph.nodes:
        if node is not start and any(n in after for n in node.all_input_nodes):
            after.add(node)
    if end not in after or end is start:
        raise InputError(f"{end.name} does not depend on {start.name}", hint="Pass start and end in their order")
    needed: set[fx.Node] = {end}
    for node in reversed(list(graph.module.graph.nodes)):
        if node in needed and node is not start:
            needed.update(n for n in node.all_input_nodes if n in after)
    return [node for node in graph.module.graph.nodes if node in needed and node is not start]


def _first(value: Any) -> Any:
    if not isinstance(value, Tensor) or value.ndim == 0:
        return value
    return value[:1].double() if value.is_floating_point() else value[:1]


def measure_jacobian(segment: Segment, *, probes: int, seed: int) -> MeasuredJacobian:
    """Moments of the squared singular values: by SVD up to `MOST_EXACT` inputs, else by Hutchinson's estimator."""
    if segment.at.numel() <= MOST_EXACT:
        return _decomposed(segment)
    return _estimated(segment, probes, torch.Generator().manual_seed(seed))


def _decomposed(segment: Segment) -> MeasuredJacobian:
    columns = segment.jvp(torch.eye(segment.at.numel(), dtype=torch.float64))
    n, n0 = columns.shape[1], columns.shape[0]
    values = torch.linalg.svdvals(columns)
    mean = float(values.square().sum()) / n
    variance = float(values.pow(4).sum()) / n - mean**2
    return MeasuredJacobian(mean, variance, 0.0, 0.0, float(values[0]), float(values[-1]), (n, n0), "exact SVD")


def _estimated(segment: Segment, probes: int, generator: torch.Generator) -> MeasuredJacobian:
    """tr(J J^T) = E |J^T u|^2, and tr((J J^T - m)^2) = E |J J^T u - m u|^2, over signs u; the largest by Lanczos."""
    n, n0 = segment.value.numel(), segment.at.numel()
    signs = torch.randint(0, 2, (probes, n), generator=generator).double() * 2 - 1
    back = segment.vjp(signs)
    forth = segment.jvp(back)
    squares = back.square().sum(1) / n
    total = float(squares.mean())
    spreads = (forth - total * signs).square().sum(1) / n
    root = math.sqrt(probes)
    how = f"Hutchinson, {probes} probes; largest by Lanczos"
    return MeasuredJacobian(
        total,
        float(spreads.mean()),
        float(squares.std()) / root,
        float(spreads.std()) / root,
        _largest(segment, n, n0, generator),
        math.nan,
        (n, n0),
        how,
    )


def _largest(segment: Segment, n: int, n0: int, generator: torch.Generator) -> float:
    if min(n, n0) == 1:  # a single row or column has one singular value, which Lanczos does not take
        only = torch.ones(1, 1, dtype=torch.float64)
        return float((segment.vjp(only) if n == 1 else segment.jvp(only)).norm())

    def forth(v: np.ndarray) -> np.ndarray:
        return segment.jvp(torch.from_numpy(np.ascontiguousarray(v)).reshape(1, -1)).numpy().ravel()

    def back(u: np.ndarray) -> np.ndarray:
        return segment.vjp(torch.from_numpy(np.ascontiguousarray(u)).reshape(1, -1)).numpy().ravel()

    operator = LinearOperator((n, n0), matvec=forth, rmatvec=back, dtype=np.float64)  # pyright: ignore
    start = torch.randn(min(n, n0), generator=generator, dtype=torch.float64).numpy()
    found: Any = svds(operator, k=1, tol=1e-4, v0=start, return_singular_vectors=False)  # pyright: ignore
    return float(found[0])
