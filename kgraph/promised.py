"""What a method promises of the emitted network, node by node: the plan that its constants were solved for.

    q = 1                    at the input of every nonlinear layer and at what layers return
    C(c), slope C'(1)        of every layer's own map at q = 1, composed along the graph, pooling counted as keeping c;
                             but no more than the target (zeta; eta and 1), which a plan may have to leave unmet

The plan holds no measured number: where the network departs from it, it does, and `kgraph.certificate` says so.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Iterator
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
from torch import fx

from kgraph.canonical import operation_name
from kgraph.channel_dims import channel_dim
from kgraph.closed_loop import GRID, Curve, Planned
from kgraph.methods import TAT, Method
from kgraph.modules import Scale
from kgraph.output_q import returned
from kgraph.passes.base import Workspace
from kgraph.passes.exponentials import is_rate
from kgraph.site import shape_of
from kgraph.subnetworks import Subnetworks, find_subnetworks

_KINDS = ("layer", "pool", "output")
_POOLS = ("max_pool", "avg_pool", "adaptive_avg_pool", "adaptive_max_pool")


@dataclass(frozen=True)
class Point:
    """A place in the network where its kernel is looked at.

    Attributes:
        node: name of the node whose value is meant.
        what: "input of relu_3", "before mean", "output".
        kind: "layer" (a nonlinear one reads it), "pool" or "output".
        width: channels.
        q, c, slope: promised there: q value, C map at `GRID`, C'(1); nan and () where nothing is.
    """

    node: str
    what: str
    kind: str
    width: int
    q: float = math.nan
    c: tuple[float, ...] = ()
    slope: float = math.nan

    def c_at(self, cosine: float) -> float:
        """The promised C(cosine); nan where none is, or beyond the grid."""
        if not self.c or not 0 <= cosine <= 1:
            return math.nan
        return float(np.interp(cosine, GRID, self.c))


@dataclass(frozen=True)
class Promise:
    """What is promised of a network.

    Attributes:
        points: in graph order.
        output: node of the first tensor that the network returns (of a softmax, what it reads).
        channels: by input, the dimension of its channels.
        words: the promise at the output in words; "" where the method makes none.
    """

    points: tuple[Point, ...]
    output: str
    channels: tuple[int, ...]
    words: str = ""


def promised(work: Workspace, method: Method, outputs: Collection[fx.Node], plan: Planned) -> Promise:
    """The promise of DKS or TAT on a rewritten graph; ``outputs`` are those that shall have q = 1."""
    own = find_subnetworks(work.graph, work.propagation(), free=lambda region: False)
    sized = {region.source for region in own.regions if not region.gate and not is_rate(region)} | set(outputs)
    most_c, most = (method.eta, 1.0) if isinstance(method, TAT) else (1.0, method.zeta)
    line = most_c + (1 - most_c) * np.array(GRID)
    points = []
    for place in _places(work, own):
        node = _uncorrected(work, place.node)
        curve = tuple(map(float, np.minimum(plan.c[node], line))) if place.planned and node in plan.c else ()
        slope = min(plan.slope.get(node, math.nan), most) if place.planned else math.nan
        points.append(_point(work, place, 1.0 if place.node in sized else math.nan, curve, slope))
    output = _first(work)
    words = _words(method, next((p for p in points if p.node == output), None))
    planned = next((plan.slope.get(_uncorrected(work, n), math.nan) for n in work.nodes if n.name == output), math.nan)
    if planned > most * 1.01:
        words += f" (not met by its own plan, which has {planned:.3g})"
    return Promise(tuple(points), output, _channels(work), words)


def _uncorrected(work: Workspace, node: fx.Node) -> fx.Node:
    """What the plan knows of a node: a constant that restores q or a mean has no part in it."""
    return node.all_input_nodes[0] if isinstance(work.module(node), Scale) else node


def places_only(work: Workspace) -> Promise:
    """The points of a graph whose method promises nothing about q, C and slope."""
    own = find_subnetworks(work.graph, work.propagation())
    return Promise(tuple(_point(work, place) for place in _places(work, own)), _first(work), _channels(work))


class _Place(NamedTuple):
    """A node, who reads it, what the first of them is, and whether its c is planned."""

    node: fx.Node
    readers: list[str]
    kind: str
    planned: bool


def _places(work: Workspace, own: Subnetworks) -> Iterator[_Place]:
    """Inputs of nonlinear layers and of pools, and what is returned, in graph order."""
    found: dict[fx.Node, _Place] = {}

    def add(node: fx.Node, reader: str, kind: str, planned: bool = True) -> None:
        known = found.get(node, _Place(node, [], kind, planned))
        kind = max(known.kind, kind, key=_KINDS.index)
        found[node] = _Place(node, [*known.readers, reader], kind, known.planned and planned)

    for region in own.regions:
        add(region.source, f"input of {region.end.name}", "layer", not (region.gate or is_rate(region)))
    for node in work.nodes:
        if _is_pool(node) and isinstance(source := node.args[0], fx.Node) and work.is_random(source):
            add(source, f"before {node.name}", "pool")
    for _, node in returned(work):
        if work.is_random(node):
            add(node, "output", "output")
    yield from (found[node] for node in work.nodes if node in found)


def _point(work: Workspace, place: _Place, q: float = math.nan, c: Curve = (), slope: float = math.nan) -> Point:
    told = list(dict.fromkeys(place.readers))
    what = ", ".join(told[:2]) + (f" and {len(told) - 2} more" if len(told) > 2 else "")
    return Point(place.node.name, what, place.kind, _width(work, place.node), q, c, slope)


def _width(work: Workspace, node: fx.Node) -> int:
    """Channels: those of an image lie in dimension 1, and so do those of a sequence that convolutions read."""
    shape = shape_of(node)
    first = len(shape) > 3 or (len(shape) == 3 and any(operation_name(n).startswith("conv1d") for n in work.nodes))
    return int(shape[1 if first else -1]) if shape else 1


def _channels(work: Workspace) -> tuple[int, ...]:
    places = [node for node in work.nodes if node.op == "placeholder"]
    return tuple(channel_dim(node, len(shape_of(node))) for node in places)


def _first(work: Workspace) -> str:
    return next((node.name for _, node in returned(work) if work.is_random(node)), "")


def _is_pool(node: fx.Node) -> bool:
    """Whether a node joins positions: a pool, or a mean that leaves a dimension out."""
    name = operation_name(node)
    if name == "mean":
        source = node.args[0]
        return isinstance(source, fx.Node) and 1 < len(shape_of(node)) < len(shape_of(source))
    return name.startswith(_POOLS)


def _words(method: Method, final: Point | None) -> str:
    sized = final is not None and not math.isnan(final.q)
    if final is None or math.isnan(final.slope):
        where = "" if sized else " in front of nonlinear layers"
        return f"{method!r}: no local value meets its target, so that q = 1{where} alone is promised"
    start = f"C(0) = {round(final.c_at(0.0), 6) + 0.0:.3g}, " if final.c else ""
    size = "and q = 1 at the output" if sized else "at the output, and q = 1 up to what stands behind the last layer"
    return f"{method!r}: {start}slope {final.slope:.3g} {size}"


__all__ = ["GRID", "Point", "Promise", "places_only", "promised"]
