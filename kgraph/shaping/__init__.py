"""Constants of the shaped activation ``output_scale * (phi(input_scale * u + input_shift) + output_shift)``.

DKS (Martens et al. 2021, arXiv 2110.01765), TAT and TReLU (Zhang, Botev & Martens 2022, arXiv 2203.08120):
the local Q and C maps of the shaped activation at q = 1 get prescribed values and derivatives.

Which solution. The conditions have several solutions. Of those that are usable, the one with the smallest
``|input_shift|`` is taken: the one that leaves the activation nearest its usual working point. Signs:
``input_scale > 0`` and ``output_scale > 0`` always (the mirrored input scale is the same function of a
Gaussian); where phi is point-symmetric (tanh, sigmoid) both signs of ``input_shift`` serve, and the positive
one is taken.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Callable
from functools import lru_cache, partial

import torch
from torch import Tensor, nn

from kgraph.checks import number
from kgraph.errors import InputError, TargetError
from kgraph.maps import Pointwise, pointwise
from kgraph.maps.quadrature import jets, line_rule
from kgraph.meanfield.moments import refuse_vectors
from kgraph.shaping.conditions import ShapedConstants, dks_conditions, dks_targets, tat_conditions
from kgraph.shaping.leaky import leaky_dks, leaky_relu_c_map, relu_dks, trelu, two_slopes
from kgraph.shaping.newton import best_solution, starts_for

__all__ = ["ShapedConstants", "leaky_relu_c_map", "local_curvature", "local_slope", "shape_activation"]


def shape_activation(
    phi: str | nn.Module | Pointwise | Callable[[Tensor], Tensor],
    psi: float | None = None,
    kappa: float | None = None,
    negative_slope: float | None = None,
) -> ShapedConstants:
    """Constants for which the shaped activation has the wanted local maps at q = 1.

    - ``psi > 1``: DKS. Q(1) = 1, Q'(1) = 1, C(0) = 0, C'(1) = psi. A relu cannot meet Q'(1) = 1 as well (the
      condition is dropped, input_shift is 1 or -1); a leaky relu gets a new negative slope.
    - ``kappa > 0``: TAT for smooth phi. Q(1) = 1, Q'(1) = 1, C'(1) = 1, C''(1) = kappa.
    - ``negative_slope`` in [-1, 1]: TReLU, TAT for (leaky) relu. Q(1) = 1 and C'(1) = 1, no shifts.

    Raises:
        InputError: not exactly one target, or a target out of its range, or an unknown name.
        TargetError: this phi cannot meet the target.
    """
    given = [target for target in (psi, kappa, negative_slope) if target is not None]
    if len(given) != 1:
        raise InputError(f"Exactly one of psi, kappa and negative_slope must be given, not {len(given)}")
    for name, target in (("psi", psi), ("kappa", kappa), ("negative_slope", negative_slope)):
        if target is not None:
            number(name, target)
    function = _as_pointwise(phi)
    slopes = two_slopes(function)
    if negative_slope is not None:
        return trelu(slopes, negative_slope)
    if kappa is not None:
        return _tat(function, kappa)
    assert psi is not None
    return _dks(function, slopes, psi)


def local_slope(phi: Pointwise) -> float:
    """C'(1) of the local C map at q = 1: ``E[phi'^2] / E[phi^2]``; infinite where phi jumps."""
    if _jumps(phi, order=0):
        return math.inf
    one = torch.ones((), dtype=torch.float64)
    value, slope = phi.dual(one, one, one)
    return float(slope / value)


def local_curvature(phi: Pointwise) -> float:
    """C''(1) of the local C map at q = 1: ``E[phi''^2] / E[phi^2]``; infinite where phi
    or phi' jumps (relu)."""
    if _jumps(phi, order=0) or _jumps(phi, order=1):
        return math.inf
    x, weight = line_rule(phi.plan(1.0), torch.ones((), dtype=torch.float64))
    value, _, bend = (weight * jets(phi.fn, x) ** 2).sum(-1)
    return float(bend / value)


@lru_cache(maxsize=64)
def _named(name: str) -> Pointwise:
    return pointwise(name)


def _as_pointwise(phi: str | nn.Module | Pointwise | Callable[[Tensor], Tensor]) -> Pointwise:
    if isinstance(phi, str):
        return _named(phi)
    if not callable(phi):
        raise InputError(f"{phi!r} is no activation", hint="Pass a name, a function or a module")
    if isinstance(phi, nn.Module):
        phi = copy.deepcopy(phi).to(torch.float64)
    if isinstance(phi, Pointwise):
        return phi
    refuse_vectors(phi)
    return Pointwise(phi)


def _jumps(phi: Pointwise, order: int) -> bool:
    """Whether phi (order 0) or phi' (order 1) jumps somewhere a standard Gaussian reaches."""
    kinks = phi.kinks()
    around = jets(phi.fn, torch.stack([kinks - 1e-9, kinks + 1e-9]))[order]
    return bool(((around[1] - around[0]).abs() > 1e-6).any())


def _dks(phi: Pointwise, slopes: tuple[float, float] | None, psi: float) -> ShapedConstants:
    if not 1 < psi < math.inf:
        raise InputError(f"psi must be above 1, not {psi}", hint="psi = 1 would be a straight line")
    if slopes is not None:
        positive, negative = slopes
        if positive == negative:
            raise TargetError("A linear function has C'(1) = 1 whatever its constants")
        leaky = positive == 1 and 0 < abs(negative) < 1
        return leaky_dks(psi) if leaky else relu_dks(phi, psi)
    conditions = partial(dks_conditions, psi=psi)
    return best_solution(phi, conditions, starts_for(phi, math.sqrt(2 * (psi - 1))), dks_targets(psi), psi - 1)


def _tat(phi: Pointwise, kappa: float) -> ShapedConstants:
    if not 0 < kappa < math.inf:
        raise InputError(f"kappa must be above 0, not {kappa}", hint="kappa = 0 would be a straight line")
    if _jumps(phi, order=0) or _jumps(phi, order=1):
        raise TargetError(
            "TAT needs a smooth activation, and this one has a kink: its C''(1) is infinite",
            hint="Give negative_slope (TReLU) for relu and leaky relu, or psi (DKS)",
        )
    starts = starts_for(phi, math.sqrt(kappa))
    both = torch.cat([starts, starts * torch.tensor([[1.0], [1.0], [-1.0]])], dim=1)
    targets = {"Q(1)": 1.0, "Q'(1)": 1.0, "C'(1)": 1.0, "C''(1)": kappa}
    return best_solution(phi, partial(tat_conditions, kappa=kappa), both, targets, kappa)
