"""The critical line of an activation: the variances at which chi_1 = 1 and q is a fixed point.

    sw2 = 1 / mu_1(q),   sb2 = q - sw2 E[phi^2]       one point for each q: no root has to be found

Source: Schoenholz et al. 2017, arXiv 1611.01232; Xiao et al. 2018, arXiv 1806.05393.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable

from scipy.optimize import brentq

from kgraph.checks import not_negative
from kgraph.errors import InputError
from kgraph.meanfield.moments import Activation, Moments, as_pointwise
from kgraph.meanfield.phases import MeanField

_LEAST, _MOST = 1e-16, 1e8
_PER_DECADE = 4


def critical_point(activation: Activation, *, q: float | None = None, sigma_b2: float | None = None) -> MeanField:
    """The critical variances for a given q value, or those whose bias variance is ``sigma_b2``.

    Args:
        activation: see `kgraph.meanfield.Activation`.
        q: q value to be kept; a network of depth L wants 1 / L.
        sigma_b2: bias variance to be met instead (the smallest such q).

    Raises:
        InputError: not exactly one of q and sigma_b2 is given, or the activation has no such critical point: the
            message says from which q on there is one.
    """
    phi = as_pointwise(activation)
    for name, value in (("q", q), ("sigma_b2", sigma_b2)):
        if value is not None:
            not_negative(name, value)
    if (q is None) == (sigma_b2 is None):
        raise InputError("give either q or sigma_b2", hint="critical_point('tanh', q=1e-3)")
    if q is None:
        assert sigma_b2 is not None
        if not 0 <= sigma_b2 < math.inf:
            raise InputError(f"sigma_b2 is {sigma_b2}", hint="A variance is finite and >= 0")
        q = _q_of_bias(phi, sigma_b2)
    q = float(q)  # a tensor of one number would make all others tensors
    moments = Moments(phi, q)
    bias, mu_1 = moments.critical_bias(), moments.mu(1)
    if mu_1 <= 0:
        what = f"the activation is flat where u ~ N(0, {q:.4g}) lies: chi_1 is 0 there whatever sigma_w2"
        raise InputError(what, hint="Choose a larger q, or an activation that is not constant")
    if bias < 0:
        least = smallest_critical_q(phi)
        hint = "It has none below 1e8" if math.isinf(least) else f"The smallest q that has one is {least:.4g}"
        raise InputError(f"the activation has no critical point at q = {q:.4g}: it would need sigma_b2 < 0", hint=hint)
    sw2 = 1 / mu_1
    chi_q = sw2 * moments.q_slope()
    return MeanField(sw2, sw2 * bias, q, 1.0, 1.0, chi_q, 1.0, mu_1, moments.mu(2), moments.slope_spread())


def critical_line(activation: Activation, qs: Iterable[float]) -> tuple[MeanField, ...]:
    """Critical points at several q values."""
    phi = as_pointwise(activation)
    return tuple(critical_point(phi, q=q) for q in qs)


def smallest_critical_q(activation: Activation) -> float:
    """The least q that has a critical point: 0 for tanh or relu, 45.6 for a sigmoid; inf where none has."""
    phi = as_pointwise(activation)
    return _first_root(lambda q: Moments(phi, q).critical_bias(), "activation")


def _q_of_bias(activation: Activation, sigma_b2: float) -> float:
    def excess(q: float) -> float:
        moments = Moments(activation, q)
        mu_1 = moments.mu(1)  # 0 where phi is flat (softshrink at a tiny q): no critical point, keep looking
        return moments.critical_bias() / mu_1 - sigma_b2 if mu_1 > 0 else -math.inf

    if sigma_b2 == 0 and abs(excess(_LEAST)) < 1e-20:
        return 0.0
    root = _first_root(excess, "bias")
    if math.isinf(root):
        raise InputError(
            f"the activation has no critical point with sigma_b2 = {sigma_b2:.4g}",
            hint="A homogeneous activation (relu) is critical with sigma_b2 = 0 only",
        )
    return root


def _first_root(excess: Callable[[float], float], kind: str) -> float:
    """The least q at which ``excess`` reaches 0 from below; 0 if it starts there, inf if it never does."""
    here = _LEAST
    if excess(here) >= 0:
        return 0.0
    while here < _MOST:
        there = here * 10 ** (1 / _PER_DECADE)
        try:
            found = excess(there)
        except InputError:  # phi has no second moment under so wide a Gaussian
            return math.inf
        if found >= 0 and excess(here) == -math.inf:
            return math.inf  # critical in the limit only: from flat to beyond at once
        if found >= 0:
            logs = math.log(here), math.log(there)
            at = brentq(lambda log_q: excess(math.exp(log_q)), *logs, xtol=1e-14, rtol=1e-14)  # pyright: ignore
            return math.exp(float(at))  # pyright: ignore[reportArgumentType]
        here = there
    return math.inf
