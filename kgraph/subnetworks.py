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

from kgraph.capture import Graph
from kgraph.maps import Pointwise
from kgraph.nonlinear import Region, find_regions
from kgraph.propagate import Propagation
from kgraph.shaping import leaky_relu_c_map, local_slope
from kgraph.skeleton import Step, build_skeleton

Array = NDArray[np.float64]


@dataclass(frozen=True)
class Extreme:
    """A maximum over subnetworks and the subnetwork that attains it."""

    value: float
    source: str
    target: str

    def __str__(self) -> str:
        return f"{self.source} -> {self.target}"


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

    def c_values(self) -> dict[fx.Node, float]:
        """C(0) from the inputs, all of them at c = 0, to every node, every layer with its own map at q = 1."""
        return self._from_inputs(_LeakyMaps(self, 0.0))

    def slopes(self) -> dict[fx.Node, float]:
        """Slope at c = 1 from the inputs, all of them together, to every node."""
        return self._from_inputs(_SlopeMaps(self, None))

    def _from_inputs(self, maps: _Maps) -> dict[fx.Node, float]:
        values: list[tuple[Array, ...]] = []
        start = tuple(np.array([value]) for value in maps.start)
        for step in self.steps:
            arguments = [values[i] for i in step.inputs]
            values.append(_combine(step, arguments, maps) if arguments else start)
        return {step.node: float(value[0][0]) for step, value in zip(self.steps, values, strict=True)}

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
    skeleton = build_skeleton(propagation.values, regions)
    shaped = frozenset(filter(free, regions))
    return Subnetworks(skeleton.steps, skeleton.starts, regions, shaped, products_add)
