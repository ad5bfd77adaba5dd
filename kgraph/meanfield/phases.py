"""Fixed points of the q and c maps of ``z' = W phi(z) + b``, their slopes chi and depth scales xi.

    q' = sb2 + sw2 E[phi(u)^2]                      u ~ N(0, q)
    chi_1 = sw2 E[phi'(u)^2]                        slope of the c map at c = 1: order < 1 < chaos
    chi_q = sw2 d E[phi^2] / d q                    slope of the q map
    chi_c = sw2 E[phi'(u1) phi'(u2)]                slope of the c map at its stable fixed point c*
    xi = -1 / ln chi                                layers in which a distance from the fixed point falls e-fold

Source: Poole et al. 2016, arXiv 1606.05340; Schoenholz et al. 2017, arXiv 1611.01232.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

import torch
from scipy.optimize import brentq

from kgraph.checks import not_negative, positive
from kgraph.maps import Pointwise
from kgraph.meanfield.moments import Activation, Moments, as_pointwise, refuse_jumps

Regime = Literal["ordered", "critical", "chaotic"]
CRITICAL = 1e-6
"""|chi_1 - 1| below which a point counts as critical: a depth scale of a million layers."""
_LEAST, _MOST = 2.0**-40, 2.0**40
_ROUNDING = 1e-13
_NEAREST = 1e-9


@dataclass(frozen=True)
class MeanField:
    """A point (sigma_w^2, sigma_b^2) of an activation's phase diagram.

    Attributes:
        sigma_w2, sigma_b2: variances of weights (times fan_in) and biases.
        q: fixed point of the q map (0 or inf where it has none between).
        c: stable fixed point of the c map.
        chi_1, chi_q, chi_c: slopes of the c map at 1, of the q map at q, of the c map at c.
        xi_q, xi_c: depth scales of q and c; inf at slope 1.
        mu_1, mu_2: E[phi'^2], E[phi'^4] at q.
        slope_spread: mu_2 / mu_1^2 - 1, what a layer adds to the relative variance of the Jacobian's spectrum.
    """

    sigma_w2: float
    sigma_b2: float
    q: float
    c: float
    chi_1: float
    chi_q: float
    chi_c: float
    mu_1: float
    mu_2: float
    slope_spread: float

    @property
    def xi_q(self) -> float:
        return depth_scale(self.chi_q)

    @property
    def xi_c(self) -> float:
        return depth_scale(self.chi_c)

    @property
    def regime(self) -> Regime:
        """ "ordered" (inputs converge), "critical" or "chaotic" (inputs diverge)."""
        if abs(self.chi_1 - 1) < CRITICAL:
            return "critical"
        return "ordered" if self.chi_1 < 1 else "chaotic"


def depth_scale(chi: float) -> float:
    """``xi = -1 / ln |chi|``; inf at |chi| >= 1, where nothing decays."""
    size = abs(chi)
    if size >= 1 - 4e-16:
        return math.inf
    return -1 / math.log(size) if size > 0 else 0.0


def mean_field(activation: Activation, sigma_w2: float, sigma_b2: float = 0.0, *, q0: float = 1.0) -> MeanField:
    """Fixed points, slopes and depth scales at given variances.

    Args:
        activation: see `Activation`.
        sigma_w2: sw2 = fan_in Var(W).
        sigma_b2: sb2 = Var(b).
        q0: q value to start from, which decides where several fixed points exist (for relu every q is one).

    Raises:
        InputError: a variance is negative, or phi jumps.
    """
    phi = as_pointwise(activation)
    refuse_jumps(phi)
    q = q_fixed_point(phi, sigma_w2, sigma_b2, q0=q0)
    if math.isinf(q):  # taken at the end of the range: chi_1 of a homogeneous function is the same everywhere
        return _at(phi, sigma_w2, sigma_b2, _MOST, shown=q)
    return _at(phi, sigma_w2, sigma_b2, q, shown=q)


def q_fixed_point(activation: Activation, sigma_w2: float, sigma_b2: float = 0.0, *, q0: float = 1.0) -> float:
    """The fixed point of ``q' = sb2 + sw2 E[phi^2]`` that q moves to from ``q0``: 0 or inf where none stops it."""
    sigma_w2, sigma_b2 = not_negative("sigma_w2", sigma_w2), not_negative("sigma_b2", sigma_b2)
    q0 = positive("q0", q0)
    phi = as_pointwise(activation)

    def excess(log_q: float) -> float:
        """(q' - q) / q, rounding counted as none."""
        q = math.exp(log_q)
        relative = (sigma_b2 + sigma_w2 * float(phi.second(torch.tensor(q, dtype=torch.float64)))) / q - 1
        return 0.0 if abs(relative) < _ROUNDING else relative

    here = math.log(q0)
    start = excess(here)
    if start == 0:
        return q0
    step = math.copysign(math.log(2), start)
    # q' >= sb2 everywhere, so that a fixed point may lie below the least q only where sb2 does.
    least = min(_LEAST, sigma_b2 / 2) if sigma_b2 > 0 else _LEAST
    while math.log(least) < here < math.log(_MOST):
        there = here + step
        found = excess(there)
        if found == 0 and excess(there + step) == 0:
            break  # the excess only falls below rounding, as that of relu, sb2 / q, does: q goes on
        if found == 0:
            return math.exp(there)
        if found * start < 0:
            return math.exp(brentq(excess, *sorted((here, there)), xtol=1e-14, rtol=1e-14))  # pyright: ignore
        here = there
    return 0.0 if start < 0 else math.inf


def _at(phi: Pointwise, sw2: float, sb2: float, q: float, shown: float) -> MeanField:
    moments = Moments(phi, q)
    mu_1 = moments.mu(1)
    chi_1 = sw2 * mu_1
    c = c_fixed_point(phi, sw2, sb2, moments.q) if chi_1 > 1 + CRITICAL else 1.0
    chi_c = chi_1 if c == 1 else sw2 * dual_at(phi, moments.q, c)[1]
    chi_q = sw2 * moments.q_slope()
    return MeanField(sw2, sb2, shown, c, chi_1, chi_q, chi_c, mu_1, moments.mu(2), moments.slope_spread())


def c_fixed_point(phi: Pointwise, sigma_w2: float, sigma_b2: float, q: float) -> float:
    """The fixed point below 1 of the c map in the chaotic phase.

    The map is a power series in c with coefficients >= 0, hence convex on [0, 1]: with slope > 1 at its fixed point
    1 it crosses the diagonal once more, at most.
    """
    # q need not be a fixed point (it may have been given, or be infinite): the map is taken relative to c = 1.
    whole = sigma_b2 + sigma_w2 * dual_at(phi, q, 1.0)[0]

    def excess(c: float) -> float:
        return (sigma_b2 + sigma_w2 * dual_at(phi, q, c)[0]) / whole - c

    if excess(0.0) <= 1e-15:
        return 0.0
    lack = 0.5
    while excess(1 - lack) > 0:
        lack /= 4
        if lack < _NEAREST:
            return 1.0
    return float(brentq(excess, 0.0, 1 - lack, xtol=1e-14, rtol=1e-13))  # pyright: ignore[reportArgumentType]


def dual_at(phi: Pointwise, q: float, c: float) -> tuple[float, float]:
    """``E[phi phi]`` and ``E[phi' phi']`` at one q and one cosine."""
    at = torch.tensor([q], dtype=torch.float64)
    value, slope = phi.dual(at, at, c * at)
    return float(value), float(slope)
