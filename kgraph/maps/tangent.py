"""The part in the NTK of a trained factor in front of a nonlinearity: its tangent is the field itself.

    z = c t + b,  y = f(z):    dy/dc = f'(z) (z - b) / c

A tangent that an affine layer has mixed is independent of the field, so that its part is E[f' f'] NTK(z, z'). For the
gain of a norm (a number c in every channel) the part is instead

    E[psi psi'] / c^2,    psi(z) = f'(z) (z - b)

psi is f itself where f is homogeneous, as relu is (Euler).
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache

import torch
from torch import Tensor

from kgraph.maps.pointwise import Pointwise
from kgraph.maps.quadrature import value_and_slope

_PROBES = (-3.1, -0.7, -1e-3, 1e-3, 0.7, 3.1)


@dataclass(frozen=True)
class TrainedFactor:
    """Factors that are one number each: ``gain``, the sum of their gains over c^2, and the shift b behind them."""

    gain: float | Tensor
    shift: float


@cache
def by_factor(fn: Pointwise, b: float) -> Pointwise:
    """``psi(z) = fn'(z) (z + b)``; ``fn`` itself where it is that."""
    if b == 0.0 and homogeneous(fn):
        return fn
    return Pointwise(lambda z: value_and_slope(fn.fn, z)[1] * (z + b))


def homogeneous(fn: Pointwise) -> bool:
    """Whether ``fn'(z) z = fn(z)``."""
    z = torch.tensor(_PROBES, dtype=torch.float64)
    value, slope = value_and_slope(fn.fn, z)
    return bool((slope * z - value).abs().max() <= 1e-12)
