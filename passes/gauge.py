"""The choice of scales and shifts under which most constants vanish: v = s v' + t for every tensor of a graph."""

from __future__ import annotations

import math
from collections.abc import Hashable, Iterator
from dataclasses import dataclass, field

from torch import fx

from kgraph.emitted import EmittedModule
from kgraph.passes.equations import Equations
from kgraph.passes.gauge_laws import Held, Laws
from kgraph.passes.gauge_places import Constant, Place, Shaped, Sum

_ROUNDING = 1e-12
_RANGE = 8 * math.log(2)
"""A stream may grow or shrink by 256 against the model's own before a constant stays: float16 ends at 65504."""
Wish = tuple[str, dict[Hashable, float], float]
"""A constant's name, and the equation under which it vanishes."""
Missed = dict[tuple[fx.Node, str], tuple[str, ...]]
"""What could not be had: (node, constant) -> reasons."""


@dataclass(frozen=True)
class Gauge:
    """Scales s and shifts t, and the constants that stay in spite of them."""

    scale: dict[Hashable, float]
    shift: dict[Hashable, float]
    missed: Missed = field(default_factory=dict)


def solve(module: EmittedModule, laws: Laws) -> Gauge:
    """The gauge in which every law holds, and as many constants as possible vanish."""
    unknowns: list[Hashable] = [*module.graph.nodes, *laws.held]  # weights last: they give way to what tensors want
    missed: Missed = {}
    logs = _scales(unknowns, laws, missed)
    if pins := _out_of_range(laws, logs):
        missed.clear()
        logs = _scales(unknowns, laws, missed, pins)
    scale = {key: math.exp(value) for key, value in logs.items()}
    shift = _shifts(unknowns, laws, missed)
    return Gauge(scale, shift, missed)


def _scales(
    unknowns: list[Hashable], laws: Laws, missed: Missed, pins: tuple[fx.Node, ...] = ()
) -> dict[Hashable, float]:
    equations = Equations(unknowns)
    for node in pins:  # first, so that they are named
        equations.adopt({node: 1.0}, why="the stream would leave the range of half precision")
    for law in laws.scales:
        equations.adopt(law.terms, why=law.why)
    for place in laws.places:
        for name, terms, constant in _scale_wishes(place):
            _adopt(equations, missed, place, (name, terms, constant))
    return equations.solution()


def _scale_wishes(place: Place) -> Iterator[Wish]:
    if isinstance(place, Sum):
        for i, (term, weight) in enumerate(zip(place.terms, place.weights, strict=True)):
            yield f"weights[{i}]", _ratio(place.node, term), math.log(abs(weight))
    elif isinstance(place, Constant):
        yield "factor", _ratio(place.node, place.x), math.log(abs(place.factor))
    elif place.homogeneous:
        yield "scale", _ratio(place.node, place.x), math.log(abs(place.slope))
    else:
        yield "input_scale", {place.x: 1.0}, -math.log(abs(place.module.input_scale))
        yield "output_scale", {place.node: 1.0}, math.log(abs(place.module.output_scale))


def _ratio(node: fx.Node, x: Hashable) -> dict[Hashable, float]:
    return {node: 1.0, x: -1.0}


def _out_of_range(laws: Laws, logs: dict[Hashable, float]) -> tuple[fx.Node, ...]:
    """Sums behind which a stream starts again at the model's own scale."""
    pins, origin = [], 0.0
    for place in laws.places:
        if isinstance(place, Sum) and abs(logs[place.node] - origin) > _RANGE:
            pins.append(place.node)
            origin = logs[place.node]
    return tuple(pins)


def _shifts(unknowns: list[Hashable], laws: Laws, missed: Missed) -> dict[Hashable, float]:
    """First what can only be absorbed in one way; a ReLU is a maximum, which takes any shift of what it reads."""
    equations = Equations(unknowns)
    for law in laws.shifts:
        equations.adopt(law.terms, why=law.why)
    shaped = [place for place in laws.places if isinstance(place, Shaped)]
    clips = [place for place in shaped if place.is_relu and place.slope > 0 and (place.node, "scale") not in missed]
    for place in shaped:
        if place not in clips:
            _adopt(equations, missed, place, ("output_shift", {place.node: 1.0}, place.outer))
            _adopt(equations, missed, place, ("input_shift", {place.x: 1.0}, -place.inner))
    for place in laws.places:
        if isinstance(place, Constant):
            _adopt(equations, missed, place, ("shift", {place.node: 1.0, place.x: -place.factor}, place.shift))
    # max(u + c, 0) k + d = k max(u', f) of a shifted u' where t_out = d + k (t_u + c)
    kept = [place for place in clips if equations.adopt(*_clip(place)) is not None]
    for place in clips:
        equations.adopt({place.x: 1.0}, -place.inner)  # a ReLU rather than a maximum with another number
        if place in kept:
            _adopt(equations, missed, place, ("output_shift", {place.node: 1.0}, place.outer))
            _adopt(equations, missed, place, ("input_shift", {place.x: 1.0}, -place.inner))
    return equations.solution()


def _clip(place: Shaped) -> tuple[dict[Hashable, float], float]:
    return {place.node: 1.0, place.x: -place.slope}, place.outer + place.slope * place.inner


def _adopt(equations: Equations, missed: Missed, place: Place, wish: Wish) -> None:
    name, terms, constant = wish
    reasons = equations.adopt(terms, constant, f"the constants at {place.node.name} need another one", wish=True)
    if reasons is not None:
        missed[place.node, name] = reasons


def near(value: float, target: float) -> bool:
    """Equal up to the rounding of the equations' solution."""
    return abs(value - target) <= _ROUNDING * max(1.0, abs(target))


__all__ = ["Gauge", "Held", "near", "solve"]
