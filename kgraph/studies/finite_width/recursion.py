"""Layer by layer: connected correlators of a chain of finite width, to leading order in 1/n.

With H the NTK matrix over units (H_ij = sum_p lambda_p dz_i/dp dz_j/dp), dH its derivative tensor
(dH_ijk = sum_pq lambda_p lambda_q d2z_i/dpdq dz_j/dp dz_k/dq), units i != j, averages over draws of the parameters:

    V/n = Cov(z_i^2, z_j^2)    D/n = Cov(H_ii, z_j^2)    F/n = E[H_ij z_i z_j]
    A/n = Cov(H_ii, H_jj)      B/n = E[H_ij^2]           P/n = E[dH_ijj z_i]    Q/n = E[dH_iij z_j]

Here the correlators themselves (V/n, ...) are carried, so that every layer has its own widths; orthogonality enters as
E[O_ik^2 O_jk^2] = 1/(m (m + 2)) of a Haar matrix of side m = max(in, out).

Source: Day, Kahn, Roberts 2023, arXiv 2310.07765; Roberts, Yaida, Hanin 2022, arXiv 2106.10165 (Gaussian weights).
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from kgraph.maps import Pointwise
from kgraph.maps.quadrature import Plan, value_and_slope
from kgraph.meanfield.moments import fine_rule
from kgraph.studies.finite_width.chain import ChainLayer

Deficit = Literal["exact", "leading"]
_STEP = 1e-7
"""Half the distance over which a jump is looked for, in standard deviations,"""
_PLACE = 4e-11
"""but not below what kinks are found to;"""
_JUMP = 1e-2
"""a continuous function changes by far less than this share of its size over it."""


@dataclass(frozen=True)
class Correlators:
    """K, Theta and the connected correlators of one layer's units (V stands for V/n, and so on)."""

    K: float
    Theta: float
    V: float
    D: float = 0.0
    F: float = 0.0
    A: float = 0.0
    B: float = 0.0
    P: float = 0.0
    Q: float = 0.0


@dataclass(frozen=True)
class GaussianMoments:
    """Averages over z ~ N(0, K) of a pointwise function; those with phi'' by parts, so that kinks count in full.

    Attributes:
        phi2, phi4, slope2, slope4, both: <phi^2>, <phi^4>, <phi'^2>, <phi'^4>, <phi^2 phi'^2>.
        phi2_rate: d<phi^2>/dK = <phi^2 (z^2 - K)>/(2K^2) = <z phi phi'>/K; chi_par = C_W times it.
        slope2_rate: d<phi'^2>/dK = <phi'^2 (z^2 - K)>/(2K^2) = <z phi' phi''>/K.
        bend: <phi phi''> = phi2_rate - slope2.
        bend_slope: <phi phi'' phi'^2> = (<z phi phi'^3>/K - <phi'^4>)/3.
    """

    phi2: float
    phi4: float
    slope2: float
    slope4: float
    both: float
    phi2_rate: float
    slope2_rate: float
    bend: float
    bend_slope: float


def gaussian_moments(phi: Pointwise, K: float) -> GaussianMoments:
    """The averages by quadrature on panels cut at the kinks; nan for those of phi' where phi jumps.

    By parts, phi' phi'' = (phi'^2)'/2 and phi'^2 phi'' = (phi'^3)'/3: the limit of smooth functions that get a kink.
    """
    if not (K > 0 and math.isfinite(K)):
        return GaussianMoments(*[math.nan] * 9)
    plan, root = phi.plan(K), torch.tensor(K, dtype=torch.float64).sqrt()
    x, weight = fine_rule(plan, root)
    z = root * x
    f, slope = value_and_slope(phi.fn, z)
    if jumps(phi.fn, plan, root, float((weight * f * f).sum()) ** 0.5).any():
        slope = torch.full_like(slope, math.nan)
    f2, s2, hermite = f * f, slope * slope, (x * x - 1) / (2 * K)

    def mean(values: Tensor) -> float:
        return float((weight * values).sum())

    slope2, slope4, rate = mean(s2), mean(s2 * s2), mean(f2 * hermite)
    return GaussianMoments(
        phi2=mean(f2),
        phi4=mean(f2 * f2),
        slope2=slope2,
        slope4=slope4,
        both=mean(f2 * s2),
        phi2_rate=rate,
        slope2_rate=mean(s2 * hermite),
        bend=rate - slope2,
        bend_slope=(mean(z * f * s2 * slope) / K - slope4) / 3,
    )


def jumps(values: Callable[[Tensor], Tensor], plan: Plan, root: Tensor, size: float) -> Tensor:
    """Which of the plan's kinks are jumps of ``values`` (phi, or phi'), against its own size."""
    reach = (_STEP * root).clamp_min(_PLACE)
    with torch.no_grad():
        change = values(plan.kinks + reach) - values(plan.kinks - reach)
    return change.abs() > _JUMP * size


def first_layer(layer: ChainLayer, q: float, parametrization: str, deficit: Deficit) -> Correlators:
    """K = C_b + C_W q, Theta = lambda_b + lambda_W q, V/n = -deficit (C_W q)^2, for q = |x|^2 / width_in."""
    lambda_W, lambda_b = layer.learning_rates(parametrization)
    own = layer.C_W * q
    V = -deficit_of(layer, deficit) * own**2
    return Correlators(layer.C_b + own, lambda_b + lambda_W * q, V + 0.0)


def next_layer(
    layer: ChainLayer, m: GaussianMoments, s: Correlators, parametrization: str, deficit: Deficit
) -> Correlators:
    """One step of the recursions; ``m`` over N(0, s.K)."""
    lambda_W, lambda_b = layer.learning_rates(parametrization)
    C, n, Theta = layer.C_W, layer.width_in, s.Theta
    lack = deficit_of(layer, deficit)
    chi_par, chi_perp, chi_perp_rate = C * m.phi2_rate, C * m.slope2, C * m.slope2_rate
    a = lambda_W * m.phi2_rate + Theta * chi_perp_rate
    spread = (m.phi4 - m.phi2**2) / n
    cross = (m.both - m.phi2 * m.slope2) / n
    u_spread = lambda_W**2 * spread + 2 * lambda_W * C * Theta * cross + (C * Theta) ** 2 * (m.slope4 - m.slope2**2) / n
    source = C**2 * m.bend_slope * Theta**2 / n
    return Correlators(
        K=layer.C_b + C * m.phi2,
        Theta=lambda_b + lambda_W * m.phi2 + chi_perp * Theta,
        V=chi_par**2 * s.V + C**2 * (spread - lack * m.phi2**2),
        D=lambda_W * C * spread + C**2 * Theta * cross + chi_par * a * s.V + chi_perp * chi_par * s.D,
        F=chi_par**2 * s.F + C**2 * Theta * (m.both / n - lack / 2 * m.phi2 * m.slope2),
        A=u_spread + a**2 * s.V + 2 * a * chi_perp * s.D + chi_perp**2 * s.A,
        B=chi_perp**2 * s.B + Theta**2 * (C**2 * m.slope4 / n - lack / 2 * chi_perp**2),
        P=source + C * chi_perp * m.bend * s.B + chi_perp * chi_par * s.P,
        Q=source
        + Theta * chi_par * C * m.slope2_rate * s.F
        + chi_perp * chi_par * s.Q
        + lambda_W * C * (m.both * Theta / n + m.phi2_rate**2 * s.F),
    )


def deficit_of(layer: ChainLayer, deficit: Deficit) -> float:
    """What orthogonality takes off Cov(z_i^2, z_j^2)/K^2: 1 - m/(m + 2), m = max(in, out); 2/m to leading order."""
    m = max(layer.width_in, layer.width_out)
    if layer.law != "orthogonal":
        return 0.0
    return 2 / (m + 2) if deficit == "exact" else 2 / m
