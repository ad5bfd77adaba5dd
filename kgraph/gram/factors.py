"""Trained factors in front of a nonlinearity: their tangent is the field itself, not independent of it.

    z = c t + b,  y = f(z):    dy/dc = f'(z) (z - b) / c

The engine takes every tangent to be independent of the field, E[f' f'] NTK(z, z'), which is right for tangents that an
affine layer has mixed. For the gain of a norm (a number c in every channel) straight in front of f the part is

    E[psi psi'] / c^2,    psi(z) = f'(z) (z - b)        instead of        E[f' f'] E[(z - b)(z' - b)] / c^2

psi is f itself where f is homogeneous, as relu is (Euler).
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from kgraph.gram import field as f
from kgraph.gram.build import arguments
from kgraph.gram.field import Field
from kgraph.maps import Pointwise
from kgraph.maps.quadrature import value_and_slope

_PROBES = (-3.1, -0.7, -1e-3, 1e-3, 0.7, 3.1)


@dataclass(frozen=True)
class Factor:
    """Factors that are one number each: ``gain``, the sum of their gains over c^2, and the shift b behind them."""

    gain: float | Tensor
    shift: float


def trained_factor(u: Field) -> Factor | None:
    """The factors in ``u = c t + b``; None where there is none, or where they cannot be told apart."""
    match u:
        case f.Moved(arg=arg, op=op) if not op.mixes:
            return trained_factor(arg)
        case f.Product(left=t, right=f.Known() as k) if k.gain and k.constant:
            inner = trained_factor(t)
            if inner is None:
                return Factor(k.gain / k.constant**2, 0.0) if not holds_factor(t) else None
            return Factor(k.gain / k.constant**2 + inner.gain, 0.0) if not inner.shift else None
        case f.Sum(terms=terms):
            shifts = [w * t.constant for w, t in terms if isinstance(t, f.Known) and t.constant is not None]
            others = [(w, t) for w, t in terms if not (isinstance(t, f.Known) and t.constant is not None)]
            inner = trained_factor(others[0][1]) if len(others) == 1 else None
            return None if inner is None else Factor(inner.gain, sum(shifts) + others[0][0] * inner.shift)
    return None


def holds_factor(u: Field) -> bool:
    """Whether a trained factor stands somewhere in ``u`` behind its last affine layer."""
    if isinstance(u, f.Product) and isinstance(u.right, f.Known) and u.right.gain:
        return True
    return not isinstance(u, (f.Affine, f.Known, f.Leaf)) and any(holds_factor(arg) for arg in arguments(u))


def correction(fn: Pointwise, mean: float, factor: Factor, sides: tuple[Tensor, Tensor], cov: Tensor) -> Tensor:
    """What the factor's part is more than independence gives it, per ``sides`` (variances) and covariance of z - mean.

    Args:
        fn: of z - mean.
        mean: of z.
    """
    b = mean - factor.shift
    value, slope = fn.dual(*sides, cov)
    if not (b == 0.0 and homogeneous(fn)):
        value = tangent(fn, b).dual(*sides, cov)[0]
    return factor.gain * (value - slope * (cov + b * b))


_known: dict[tuple[Pointwise, float], Pointwise] = {}


def tangent(fn: Pointwise, b: float) -> Pointwise:
    """``psi(z) = fn'(z) (z + b)``; made once."""
    if (fn, b) not in _known:
        _known[fn, b] = Pointwise(lambda z: value_and_slope(fn.fn, z)[1] * (z + b))
    return _known[fn, b]


def homogeneous(fn: Pointwise) -> bool:
    """Whether ``fn'(z) z = fn(z)``."""
    z = torch.tensor(_PROBES, dtype=torch.float64)
    value, slope = value_and_slope(fn.fn, z)
    return bool((slope * z - value).abs().max() <= 1e-12)
