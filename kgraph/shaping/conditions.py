"""The conditions on a shaped activation: Gaussian integrals, residuals, and the check of a result."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict, dataclass, replace

import torch
from torch import Tensor

from kgraph.errors import TargetError
from kgraph.maps import Pointwise
from kgraph.maps.quadrature import Plan, jets, line_rule

MAX_SHIFT = 8.0
ACCURACY = 1e-10


@dataclass(frozen=True)
class ShapedConstants:
    """The constants of a shaped activation and how well they meet the conditions.

    Args:
        negative_slope: of the leaky relu to use instead of phi; None for any other phi.
        residual: largest absolute residual of the conditions that were solved.
    """

    input_scale: float = 1.0
    input_shift: float = 0.0
    output_shift: float = 0.0
    output_scale: float = 1.0
    negative_slope: float | None = None
    residual: float = 0.0

    def as_dict(self) -> dict[str, float | None]:
        return asdict(self)


@dataclass(frozen=True)
class Moments:
    """Gaussian integrals of f(x) = phi(scale x + shift), one entry a candidate.

    mean ``E f``, variance of f, power ``E f_x^2``, cross ``E (f - mean) f_x x``, tilt ``E f_x x``,
    bend ``E f_xx^2``.
    """

    mean: Tensor
    variance: Tensor
    power: Tensor
    cross: Tensor
    tilt: Tensor
    bend: Tensor


Conditions = Callable[[Moments, Tensor], tuple[Tensor, Tensor, Tensor]]
"""``(moments, branch [m]) -> (residuals [2, m], output_shift [m], output_scale [m])``."""


def panels_for(phi: Pointwise, panels: int) -> Plan:
    """Equal panels, cut at phi's kinks only."""
    base = torch.linspace(-8.5, 8.5, panels + 1, dtype=torch.float64)
    return Plan(base, phi.kinks(2 * MAX_SHIFT), base[:0])


def moments_of(phi: Pointwise, plan: Plan, scale: Tensor, shift: Tensor) -> Moments:
    x, weight = line_rule(plan, scale, shift)
    a = scale[:, None]
    f, slope, bend = jets(phi.fn, a * x + shift[:, None])
    mean = (weight * f).sum(-1)
    f = f - mean[:, None]  # before squaring: the variance is a small part of E f^2
    slope, bend = a * slope, a * a * bend
    parts = (f * f, slope * slope, f * slope * x, slope * x, bend * bend)
    return Moments(mean, *((weight * part).sum(-1) for part in parts))


def dks_conditions(moments: Moments, branch: Tensor, psi: float) -> tuple[Tensor, Tensor, Tensor]:
    """C(0) = 0 sets the output shift and Q(1) = 1 the output scale; left are Q'(1) and C'(1)."""
    v = moments.variance
    return torch.stack([moments.cross / v - 1, moments.power / v - psi]), -moments.mean, v.rsqrt()


def tat_conditions(moments: Moments, branch: Tensor, kappa: float) -> tuple[Tensor, Tensor, Tensor]:
    """C'(1) = 1 sets the output scale, Q(1) = 1 the shaped mean up to its sign (the branch, +1 or -1)."""
    d = moments.power
    mean = branch * (d - moments.variance).clamp_min(0.0).sqrt()
    residuals = torch.stack([(moments.cross + mean * moments.tilt) / d - 1, moments.bend / d - kappa])
    return residuals, mean - moments.mean, d.rsqrt()


def dks_targets(psi: float) -> dict[str, float]:
    return {"Q(1)": 1.0, "Q'(1)": 1.0, "C(0)": 0.0, "C'(1)": psi}


def verified(phi: Pointwise, found: ShapedConstants, targets: dict[str, float], strict: bool = True) -> ShapedConstants:
    """``found`` with the residuals of its shaped activation, on panels refined for that function."""
    shaped = phi.affine(found.input_scale, found.input_shift, found.output_shift, found.output_scale)
    one, zero = torch.ones(1, dtype=torch.float64), torch.zeros(1, dtype=torch.float64)
    at = moments_of(shaped, shaped.plan(1.0), one, zero)
    values = {
        "Q(1)": at.variance + at.mean**2,
        "Q'(1)": at.cross + at.mean * at.tilt,
        "C(0)": at.mean**2,
        "C'(1)": at.power,
        "C''(1)": at.bend,
    }
    residual = max(abs(float(values[name]) - number) for name, number in targets.items())
    if strict and not residual <= ACCURACY:
        raise TargetError(f"The constants found miss their targets by {residual:.1e}")
    return replace(found, residual=residual)
