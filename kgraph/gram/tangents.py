"""Tangents: how much fields of two inputs move together, carried beside their covariance by one recursion.

    T(W u + b) = sw2 T(u) + own term,   T(f(u), f(v)) = E[f' f'] T(u, v),   T(u v) = T(u) K(v) + K(u) T(v)

One tangent is told from another by where it starts. The slope is 1 at inputs and no parameter has a term of its own:
E[<grad_x f(x), grad_x' f(x')>]. The NTK is 0 at inputs and every parameter has its own term, times its learning-rate
multiplier (0 where it is frozen); the NTK of one layer has those of the layer's parameters alone.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from torch import Tensor

Own = Mapping[str, float | Tensor]
"""Factor on an own term, by tangent; those that have none are left out."""


@dataclass(frozen=True)
class Seed:
    """Where a tangent starts.

    Attributes:
        at_inputs: its value between equal positions of inputs.
        multipliers: factors on the own terms of parameters, by name.
        others: that of all others.
    """

    at_inputs: float = 0.0
    multipliers: Mapping[str, float | Tensor] = field(default_factory=dict)
    others: float = 1.0


Seeds = Mapping[str, Seed]
SLOPE = Seed(at_inputs=1.0, others=0.0)


def ntk_of_layers(multipliers: Mapping[str, float | Tensor]) -> dict[str, Seed]:
    """The NTK of every layer, by the path of the module that owns the parameters."""
    layers: dict[str, dict[str, float | Tensor]] = {}
    for name, multiplier in multipliers.items():
        layers.setdefault(name.rpartition(".")[0], {})[name] = multiplier
    return {layer: Seed(multipliers=own, others=0.0) for layer, own in layers.items()}


def own_terms(seeds: Seeds, shares: Mapping[str, float]) -> Own:
    """Own term of every tangent that has one: ``sum over parameters p of multiplier_p share_p``."""
    found: dict[str, float | Tensor] = {}
    for tangent, seed in seeds.items():
        total: float | Tensor = 0.0
        for name, share in shares.items():
            total = total + seed.multipliers.get(name, seed.others) * share
        if isinstance(total, Tensor) or total:
            found[tangent] = total
    return found


def times(own: Own, factor: float) -> Own:
    """Every own term times a number."""
    return {tangent: term * factor for tangent, term in own.items()} if factor else {}


__all__ = ["SLOPE", "Own", "Seed", "Seeds", "ntk_of_layers", "own_terms", "times"]
