"""Maxima over subnetworks, read off the graph: nobody should derive a maximal slope function by hand again.

A subnetwork is a single-entry region of the graph, a pair (u, v) in which u dominates v; its map is the map from
the c value at u to that at v. All of them are swept at once: every node carries one entry per start u, NaN where u
does not dominate it - at a junction an entry survives only if every operand has it, which is dominance. Entries that
can no longer become the largest are dropped on the way: see `kgraph.sweep`.

    nonlinear layer   slope psi s        curvature psi k + kappa s^2        c value C(c)
    normalized sum    sum w_i^2 s_i      sum w_i^2 k_i                      sum w_i^2 c_i
    concatenation     the same with channel shares
    product           s_1 + s_2          k_1 + k_2 + 2 s_1 s_2              c_1 c_2
    anything linear   s                  k                                  c

Source: Martens et al. 2021, arXiv 2110.01765, section 5; Zhang et al. 2022, arXiv 2203.08120.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property, lru_cache

import numpy as np
import torch
from torch import fx

from kgraph.capture import Graph
from kgraph.errors import InputError
from kgraph.maps import Pointwise
from kgraph.nonlinear import Region, find_regions
from kgraph.propagate import Propagation
from kgraph.shaping import leaky_relu_c_map, local_slope
from kgraph.skeleton import Step, build_skeleton
from kgraph.sweep import Array, Maps, Program, Value, combine


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
        return self._largest(_SlopeMaps(self, psi))

    def max_curvature(self, kappa: float, psi: float = 1.0) -> Extreme:
        """Largest curvature C''(1) when free layers have local curvature ``kappa`` (and slope ``psi``)."""
        return self._largest(_CurvatureMaps(self, psi, kappa), 1)

    def max_c(self, negative_slope: float) -> Extreme:
        """Largest C(0) when free layers are leaky relus of this negative slope (scaled to Q(1) = 1)."""
        return self._largest(_LeakyMaps(self, negative_slope))

    def max_q_slope(self, *, planned: bool = False) -> Extreme:
        """Largest ``d ln q(v) / d ln q(u)`` at q = 1: what a relative error of q grows by on its way.

        A product of two branches has 2, a shaped layer 1 (``planned``: that of the free layers, whatever they are
        now), a normalized sum the average of its terms: n gated blocks of shortcut weight w have (2 - w^2)^n.
        """
        return self._largest(_RelativeQMaps(self, planned))

    def c_values(self) -> dict[fx.Node, float]:
        """C(0) from the inputs, all of them at c = 0, to every node, every layer with its own map at q = 1."""
        return {node: float(c[0]) for node, c in self.c_maps(np.zeros(1)).items()}

    def c_maps(self, cosines: Array) -> dict[fx.Node, Array]:
        """C at each of ``cosines`` of the inputs, at every node, every layer with its own map at q = 1."""
        return self._from_inputs(_LeakyMaps(self, 0.0), cosines)

    def slopes(self) -> dict[fx.Node, float]:
        """Slope at c = 1 from the inputs, all of them together, to every node."""
        ones = np.ones(1)
        return {node: float(slope[0]) for node, slope in self._from_inputs(_SlopeMaps(self, None), ones).items()}

    def _from_inputs(self, maps: Maps, start: Array) -> dict[fx.Node, Array]:
        """The first component at every node, from inputs that have ``start``."""
        values: list[Value] = []
        for step in self.steps:
            arguments = [values[i] for i in step.inputs]
            values.append(combine(step, arguments, maps) if arguments else (start,))
        return {step.node: value[0] for step, value in zip(self.steps, values, strict=True)}

    def _largest(self, maps: Maps, component: int = 0) -> Extreme:
        value, start, end = self._program.largest(maps, component)
        return Extreme(value, self.steps[start].node.name, self.steps[end].node.name)

    @cached_property
    def _program(self) -> Program:
        return Program(self.steps, self.starts)


class _SlopeMaps:
    start: tuple[float, ...] = (1.0,)
    constant: tuple[float, ...] = (0.0,)

    def __init__(self, owner: Subnetworks, psi: float | None) -> None:
        self.owner, self.psi = owner, psi

    def nonlinear(self, region: Region, x: Value) -> Value:
        free = self.psi is not None and region in self.owner.free
        slope = self.psi if free else _own_slope(region)
        return (slope * x[0],)  # type: ignore[operator]

    def product(self, x: Value, y: Value) -> Value:
        return (x[0] + y[0],) if self.owner.products_add else (np.maximum(x[0], y[0]),)


class _CurvatureMaps:
    start: tuple[float, ...] = (1.0, 0.0)
    constant: tuple[float, ...] = (0.0, 0.0)

    def __init__(self, owner: Subnetworks, psi: float, kappa: float) -> None:
        self.owner, self.psi, self.kappa = owner, psi, kappa

    def nonlinear(self, region: Region, x: Value) -> Value:
        slope, curvature = x
        if region in self.owner.free:
            return self.psi * slope, self.psi * curvature + self.kappa * slope**2
        own = _own_slope(region)
        with np.errstate(invalid="ignore"):  # none behind an infinite slope (log|u|): NaN, which no maximum counts
            return own * slope, own * curvature

    def product(self, x: Value, y: Value) -> Value:
        if not self.owner.products_add:
            return np.maximum(x[0], y[0]), np.maximum(x[1], y[1])
        return x[0] + y[0], x[1] + y[1] + 2 * x[0] * y[0]


class _LeakyMaps:
    start: tuple[float, ...] = (0.0,)
    constant: tuple[float, ...] = (1.0,)

    def __init__(self, owner: Subnetworks, negative_slope: float) -> None:
        self.owner, self.negative_slope = owner, negative_slope

    def nonlinear(self, region: Region, x: Value) -> Value:
        if region in self.owner.free:
            return (leaky_relu_c_map(torch.from_numpy(x[0]), self.negative_slope).numpy(),)
        return (local_c(region, x[0]),)

    def product(self, x: Value, y: Value) -> Value:
        return (x[0] * y[0],) if self.owner.products_add else (np.maximum(x[0], y[0]),)


class _RelativeQMaps:
    start: tuple[float, ...] = (1.0,)
    constant: tuple[float, ...] = (0.0,)

    def __init__(self, owner: Subnetworks, planned: bool) -> None:
        self.owner, self.planned = owner, planned

    def nonlinear(self, region: Region, x: Value) -> Value:
        planned = self.planned and region in self.owner.free
        return (x[0] * (1.0 if planned else _own_q_slope(region)),)

    def product(self, x: Value, y: Value) -> Value:
        return (x[0] + y[0],)


_ONE = torch.ones((), dtype=torch.float64, device="cpu")  # the first import may be under torch.device("meta")


def _own_slope(region: Region) -> float:
    """The local slope; that of the identity where the function is not defined for all numbers."""
    return _slope_of(region.fn) if region.everywhere else 1.0


def _own_q_slope(region: Region) -> float:
    """``d ln Q / d ln q`` at q = 1; that of the identity where the function is not defined for all numbers."""
    return _q_slope_of(region.fn) if region.everywhere else 1.0


@lru_cache(maxsize=4096)
def _q_slope_of(fn: Pointwise) -> float:
    """By a symmetric difference; 0 for a map that falls (errors do not grow there)."""
    step = 1e-4
    try:
        high, low = (float(fn.second(_ONE * math.exp(sign * step))) for sign in (1, -1))
    except InputError:  # log|u|: no integral converges; it is not shaped, and counts as the identity
        return 1.0
    return max(math.log(high / low) / (2 * step), 0.0) if low > 0 and high > 0 else 0.0


@lru_cache(maxsize=4096)
def _slope_of(fn: Pointwise) -> float:
    """Infinite where ``E[phi'^2]`` does not converge (sqrt|u|)."""
    try:
        return local_slope(fn)
    except InputError:
        return math.inf


def local_c(region: Region, c: Array) -> Array:
    """C(c) = E[phi phi] / E[phi^2] of a layer's own map at q = 1; NaN stays NaN.

    A function without a Gaussian integral (log, 1 / u) leaves c as it is: what it is applied to is not Gaussian.
    """
    known = ~np.isnan(c)
    result = c.copy()
    if known.any() and region.everywhere:
        try:
            value, _ = region.fn.dual(_ONE, _ONE, torch.from_numpy(c[known]))
            result[known] = (value / region.fn.second(_ONE)).numpy()
        except InputError:
            return result
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
