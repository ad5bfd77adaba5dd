"""Order and chaos of a network in NTK form: moments of its activation, its characteristic value, its recursion.

    z = sqrt(1 - beta^2) / sqrt(n) W a + beta b,   r = (1 - beta^2) E[sigma'(u)^2],   u ~ N(0, 1), E[sigma^2] = 1

r < 1 is order (all inputs come to look alike to the NTK), r > 1 chaos (they come to look unrelated), r = 1 the edge.

Source: Jacot, Gabriel, Ged, Hongler 2019, arXiv 1907.05715.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

import torch
from scipy.optimize import root_scalar
from torch import Tensor

from kgraph.errors import InputError, TargetError
from kgraph.maps import Pointwise, pointwise
from kgraph.maps.quadrature import line_rule, value_and_slope

Activation = str | Pointwise | Callable[[Tensor], Tensor]
Form = Literal["standardized", "normalized"]
Regime = Literal["order", "edge", "chaos"]

_CONSTANT = 1e-24
"""Variance over second moment below which an activation is constant: its values differ by rounding."""
_NEAR = 1e-4
"""1 - cosine below which it is carried itself: its digits are not in the cosine."""
_CLOSEST = 1e-30
"""1 - cosine at which `fixed_point` begins to look."""
_FREQUENCIES = tuple(2.0 ** (step / 4) for step in range(-40, 21))
"""Where `frequency_for` looks for a change of sign, 2^-10 to 2^5."""


@dataclass(frozen=True)
class ActivationMoments:
    """Gaussian moments of an activation sigma at N(0, 1).

    Attributes:
        mean, variance, slope: E[sigma], E[(sigma - E[sigma])^2], E[sigma'^2].
    """

    mean: float
    variance: float
    slope: float

    @property
    def second(self) -> float:
        """E[sigma^2]."""
        return self.variance + self.mean**2

    def power(self, shift: float = 0.0) -> float:
        """E[(sigma - shift)^2] = Var + (mean - shift)^2."""
        return self.variance + (self.mean - shift) ** 2

    def balanced_slope(self, shift: float = 0.0) -> float:
        """E[sigma_c'^2] of sigma_c = (sigma - c) / sqrt(E[(sigma - c)^2]): c = 0 standardizes, c = mean normalizes."""
        return self.slope / self.power(shift)

    def r(self, beta: float = 0.1, shift: float = 0.0) -> float:
        """Characteristic value (1 - beta^2) E[sigma_c'^2]."""
        return (1 - _checked(beta) ** 2) * self.balanced_slope(shift)

    def critical_beta(self, shift: float = 0.0) -> float | None:
        """The bias weight at which r = 1; None where every one gives order."""
        slope = self.balanced_slope(shift)
        rounding = 1e-12
        return None if slope < 1 - rounding else math.sqrt(max(0.0, 1 - 1 / slope))

    def shift_for(self, r: float, beta: float = 0.1) -> float:
        """The constant c, nearest to 0, whose sigma_c has the characteristic value r.

            (mean - c)^2 = (1 - beta^2) E[sigma'^2] / r - Var

        Raises:
            TargetError: r is above that of the normalized activation; names the reachable range.
        """
        largest = self.r(beta, self.mean)
        if not 0 < r <= largest * (1 + 1e-12):
            raise TargetError(
                f"r = {r:g} is out of reach: with beta = {beta:g}, constants give it r in (0, {largest:.6g}]",
                hint="Its normalized form has the largest; a smaller beta raises it",
            )
        distance = math.sqrt(max(0.0, (1 - beta**2) * self.slope / r - self.variance))
        return self.mean - math.copysign(distance, self.mean)


def activation_moments(activation: Activation) -> ActivationMoments:
    """Moments of any elementwise torch callable (or name), by quadrature between its kinks.

    Raises:
        InputError: the function is constant, or has no finite moments.
    """
    phi = as_pointwise(activation)
    x, weight = line_rule(phi.plan(1.0), torch.ones((), dtype=torch.float64))
    value, slope = value_and_slope(phi.fn, x)
    mean = float((weight * value).sum())
    # about the mean: E[sigma^2] - E[sigma]^2 has no digits where sigma is nearly constant
    variance, power = (float((weight * f).sum()) for f in ((value - mean).square(), slope.square()))
    if not math.isfinite(variance + power) or variance <= _CONSTANT * (variance + mean**2):
        raise InputError("the activation is constant or has no finite moments", hint="Order and chaos need a variance")
    return ActivationMoments(mean, variance, power)


def as_pointwise(activation: Activation) -> Pointwise:
    """A name, a callable or a map as a map with Gaussian integrals."""
    if isinstance(activation, Pointwise):
        return activation
    return pointwise(activation) if isinstance(activation, str) else Pointwise(activation)


def shift_of(moments: ActivationMoments, form: Form) -> float:
    """The constant c of a form: 0 standardizes, the mean normalizes."""
    if form not in ("standardized", "normalized"):
        raise InputError(f"form is {form!r}", hint="Choose 'standardized' or 'normalized'")
    return moments.mean if form == "normalized" else 0.0


def balanced(activation: Activation, form: Form | float = "standardized") -> Pointwise:
    """sigma_c as a map; ``form`` by name or as the constant c itself."""
    phi = as_pointwise(activation)
    moments = activation_moments(phi)
    shift = shift_of(moments, form) if isinstance(form, str) else float(form)
    return phi.affine(output_shift=-shift, output_scale=moments.power(shift) ** -0.5)


def characteristic_value(activation: Activation, beta: float = 0.1, form: Form | float = "standardized") -> float:
    """r of the standardized or normalized activation, or of sigma_c for a number c."""
    moments = activation_moments(activation)
    return moments.r(beta, shift_of(moments, form) if isinstance(form, str) else float(form))


def regime_of(r: float, tolerance: float = 1e-9) -> Regime:
    """Order, edge or chaos; within ``tolerance`` of 1 is the edge."""
    if abs(r - 1) <= tolerance:
        return "edge"
    return "order" if r < 1 else "chaos"


def frequency_for(activation: Activation, r: float, beta: float = 0.1, form: Form = "standardized") -> float:
    """The smallest input scale w whose u -> sigma(w u), balanced, has the characteristic value r (sin: w^2 coth w^2).

    Raises:
        TargetError: no frequency in [2^-10, 2^5] does; names the range found there.
    """
    if not (math.isfinite(r) and r > 0):
        raise InputError(f"r is {r}", hint="r < 1 is order, r > 1 chaos, and r is positive")
    phi = as_pointwise(activation)

    def excess(w: float) -> float:
        return characteristic_value(phi.affine(input_scale=w), beta, form) - r

    found: list[tuple[float, float]] = []
    for w in _FREQUENCIES:
        found.append((w, excess(w)))
        if found[-1][1] == 0:
            return w
        if len(found) > 1 and found[-2][1] * found[-1][1] < 0:
            return _root(excess, found[-2][0], w)
    low, high = (bound(value for _, value in found) + r for bound in (min, max))
    raise TargetError(f"r = {r:g} is out of reach: frequencies give this activation r in [{low:.6g}, {high:.6g}]")


@dataclass(frozen=True)
class FullyConnected:
    """Kernels of a fully connected network by depth, for two inputs of norm sqrt(n) and set cosine.

    Attributes:
        gap: 1 - sigma, with all its digits where sigma is nearly 1.
        sigma: covariance of the preactivations of layer 1, 2, ..., L.
        theta: NTK(x, y) of layer l.
        theta_diagonal: NTK(x, x) = (1 - r^l) / (1 - r).
    """

    gap: Tensor
    sigma: Tensor
    theta: Tensor
    theta_diagonal: Tensor

    @property
    def vartheta(self) -> Tensor:
        """Scaled NTK, Theta(x, y) / Theta(x, x): 1 in order, C h^l in chaos."""
        return self.theta / self.theta_diagonal


def fully_connected(activation: Activation, depth: int, cosine: float, beta: float = 0.1) -> FullyConnected:
    """Sigma, Theta and scaled NTK of ``depth`` weight layers of an activation of E[sigma^2] = 1 (see `balanced`).

    Sigma' = beta^2 + (1 - beta^2) E[sigma sigma],    Theta' = Sigma' + (1 - beta^2) E[sigma' sigma'] Theta

    Raises:
        InputError: E[sigma^2] is not 1, a cosine outside [-1, 1], or a depth below 1.
    """
    if not -1 <= cosine <= 1 or depth < 1:
        raise InputError(f"cosine is {cosine}, depth is {depth}", hint="Pass a cosine in [-1, 1] and a depth from 1 on")
    phi, weight, bias = as_pointwise(activation), 1 - _checked(beta) ** 2, beta**2
    _standardized(phi)
    pair = torch.tensor([cosine, 1.0], dtype=torch.float64)
    gap, sigma = weight * (1 - pair), weight * pair + bias
    theta = sigma
    rows = [(gap, sigma, theta)]
    for _ in range(depth - 1):
        apart, value, slope = _step(phi, gap, sigma)
        gap = weight * apart
        sigma = torch.where(gap < _NEAR, 1 - gap, bias + weight * value)
        theta = sigma + weight * slope * theta
        rows.append((gap, sigma, theta))
    gaps, sigmas, thetas = (torch.stack(column) for column in zip(*rows, strict=True))
    return FullyConnected(gaps[:, 0], sigmas[:, 0], thetas[:, 0], thetas[:, 1])


def _step(phi: Pointwise, gap: Tensor, sigma: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """1 - E[sigma sigma], E[sigma sigma] and E[sigma' sigma'] of two units whose covariance is 1 - gap."""
    one = torch.ones((), dtype=torch.float64)
    value, slope = phi.dual(one, one, sigma)
    apart = (phi.second(one) - value).clamp_min(0.0)
    near = phi.near(one, one, gap) if bool((gap < _NEAR).any()) else None
    if near is None:
        return apart, value, slope
    small = gap < _NEAR
    return torch.where(small, near[0], apart), value, torch.where(small, near[1], slope)


def _standardized(phi: Pointwise) -> ActivationMoments:
    """Moments of an activation; an InputError unless E[sigma^2] = 1."""
    moments = activation_moments(phi)
    if abs(moments.second - 1) > 1e-9:
        raise InputError(f"E[sigma^2] is {moments.second:.6g}", hint="Pass balanced(activation)")
    return moments


@dataclass(frozen=True)
class FixedPoint:
    """Where the cosine of two inputs goes with depth.

    Attributes:
        cosine: rho*, the limit.
        slope: (1 - beta^2) E[sigma' sigma'] there.
        r: characteristic value.
    """

    cosine: float
    slope: float
    r: float

    @property
    def h(self) -> float:
        """Rate of the scaled NTK in chaos, |vartheta| <= C h^L: max(1, slope) / r."""
        return max(1.0, self.slope) / self.r


def fixed_point(activation: Activation, beta: float = 0.1) -> FixedPoint:
    """The limit of the cosine of two different inputs, for an activation of E[sigma^2] = 1: 1 unless chaos.

    Raises:
        InputError: E[sigma^2] is not 1: balance the activation first.
    """
    phi, weight = as_pointwise(activation), 1 - _checked(beta) ** 2
    moments = _standardized(phi)

    def step(log_gap: float) -> tuple[float, float]:
        """How much a gap 1 - c grows in a layer, less 1; and the slope there."""
        gap = torch.tensor([math.exp(log_gap)], dtype=torch.float64)
        apart, _, slope = _step(phi, gap, 1 - gap)
        return weight * float(apart) / float(gap) - 1, weight * float(slope)

    r = moments.r(beta)
    # kinks without a closed form leave no digits in a small gap
    low = math.log(_CLOSEST if phi.near(*torch.tensor([[1.0], [1.0], [1e-9]]).double()) is not None else 1e-9)
    if r <= 1 or step(low)[0] <= 0:
        return FixedPoint(1.0, r, r)
    log_gap = _root(
        lambda x: step(x)[0], low, math.log(1.5)
    )  # beyond c = 0, and short of c = -1, fixed if sigma is odd
    return FixedPoint(1 - math.exp(log_gap), step(log_gap)[1], r)


def _root(function: Callable[[float], float], low: float, high: float) -> float:
    return float(root_scalar(function, bracket=(low, high), method="brentq", xtol=1e-15, rtol=1e-14).root)


def _checked(beta: float) -> float:
    if not 0 <= beta < 1:
        raise InputError(f"beta is {beta}", hint="It is the standard deviation of the biases, in [0, 1)")
    return float(beta)
