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
from dataclasses import asdict, dataclass, replace
from functools import lru_cache, partial

import torch
from scipy.optimize import brentq
from torch import Tensor, nn

from kgraph.errors import InputError, TargetError
from kgraph.maps import Pointwise, pointwise
from kgraph.maps.quadrature import Plan, jets, line_rule

_MAX_SHIFT = 8.0
_MAX_OUTPUT_SCALE = 1e4
"""A larger output scale amplifies float32 rounding of phi by as much: no usable network."""
_ACCURACY = 1e-10
_STEPS = 24


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
    function = _as_pointwise(phi)
    slopes = _two_slopes(function)
    if negative_slope is not None:
        return _trelu(slopes, negative_slope)
    if kappa is not None:
        return _tat(function, kappa)
    assert psi is not None
    return _dks(function, slopes, psi)


def leaky_relu_c_map(c: Tensor, slope: float) -> Tensor:
    """Local C map of leaky relu: ``c + (1-a)^2 / (pi (1+a^2)) * (sqrt(1-c^2) - c arccos(c))``."""
    root = torch.sqrt((1 - c) * (1 + c))
    return c + (1 - slope) ** 2 / (math.pi * (1 + slope**2)) * (root - c * torch.atan2(root, c))


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
    if isinstance(phi, nn.Module):
        return Pointwise(copy.deepcopy(phi).to(torch.float64))
    return phi if isinstance(phi, Pointwise) else Pointwise(phi)


def _two_slopes(phi: Pointwise) -> tuple[float, float] | None:
    """``(p, n)`` if phi is ``p u`` for u > 0 and ``n u`` for u < 0, else None.

    These are identity, relu, leaky relu and abs, and are best solved on paper.
    """
    points = torch.tensor([1.0, 1e-3, 0.1, 3.7, 100.0], dtype=torch.float64)
    with torch.no_grad():
        up, down = phi(points.clone()) / points, phi(-points) / -points
    spread = torch.stack([up - up[0], down - down[0]]).abs().max()
    size = float(torch.stack([up, down]).abs().max())
    linear = math.isfinite(size) and bool(spread <= 1e-12 * size)
    return (float(up[0]), float(down[0])) if linear else None


def _jumps(phi: Pointwise, order: int) -> bool:
    """Whether phi (order 0) or phi' (order 1) jumps somewhere a standard Gaussian reaches."""
    kinks = phi.kinks()
    around = jets(phi.fn, torch.stack([kinks - 1e-9, kinks + 1e-9]))[order]
    return bool(((around[1] - around[0]).abs() > 1e-6).any())


# ---- leaky relus: solved on paper


def _trelu(slopes: tuple[float, float] | None, a: float) -> ShapedConstants:
    if not -1 <= a <= 1:
        raise InputError(f"negative_slope must be in [-1, 1], not {a}")
    if slopes is None or slopes[0] != 1:
        raise InputError(
            "negative_slope is for relu and leaky relu", hint="Give kappa for a smooth activation"
        )
    found = ShapedConstants(output_scale=math.sqrt(2 / (1 + a * a)), negative_slope=a)
    return _verified(pointwise("leaky_relu", a), found, {"Q(1)": 1.0, "C'(1)": 1.0})


def _leaky_dks(psi: float) -> ShapedConstants:
    """Leaky relu ``odd u + even |u|`` without input shift: Q'(1) = Q(1), and C'(1) = psi fixes even / odd.

    With t = (even / odd)^2: ``(1 + t) / (1 + t (1 - 2/pi)) = psi``.
    """
    spread = 1 - 2 / math.pi
    if psi >= 1 / spread:
        raise TargetError(f"A leaky relu stays below C'(1) = {1 / spread:g}, and {psi:g} is asked for")
    ratio = math.sqrt((psi - 1) / (1 - psi * spread))
    a = (1 - ratio) / (1 + ratio)
    even, odd = (1 - a) / 2, (1 + a) / 2
    shift, scale = -even * math.sqrt(2 / math.pi), 1 / math.sqrt(odd**2 + even**2 * spread)
    found = ShapedConstants(output_shift=shift, output_scale=scale, negative_slope=a)
    return _verified(pointwise("leaky_relu", a), found, _dks_targets(psi))


def _relu_dks(phi: Pointwise, psi: float) -> ShapedConstants:
    """relu(a u + b) with b = 1, or -1 where 1 cannot do it: one unknown less, so Q'(1) = 1 is dropped."""
    plan = _plan(phi)

    def moments(log_scale: float, shift: float) -> _Moments:
        pair = torch.tensor([[math.exp(log_scale)], [shift]], dtype=torch.float64)
        return _moments(phi, plan, pair[0], pair[1])

    def excess(log_scale: float, shift: float) -> float:
        at = moments(log_scale, shift)
        return float(at.power / at.variance) - psi

    for shift in (1.0, -1.0):
        if excess(-1.7, shift) * excess(9.0, shift) < 0:
            log_scale = float(brentq(excess, -1.7, 9.0, args=(shift,), xtol=1e-14, rtol=1e-14))
            at = moments(log_scale, shift)
            found = ShapedConstants(math.exp(log_scale), shift, -float(at.mean), float(at.variance) ** -0.5)
            return _verified(phi, found, {"Q(1)": 1.0, "C(0)": 0.0, "C'(1)": psi})
    raise TargetError(f"A relu shifted by 1 or -1 cannot have C'(1) = {psi:g}", hint="Use leaky relu")


# ---- any other activation: Newton from many starts at once


@dataclass(frozen=True)
class _Moments:
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


_Conditions = Callable[[_Moments, Tensor], tuple[Tensor, Tensor, Tensor]]
"""``(moments, branch [m]) -> (residuals [2, m], output_shift [m], output_scale [m])``."""


def _plan(phi: Pointwise) -> Plan:
    base = torch.linspace(-8.5, 8.5, 5, dtype=torch.float64)
    return Plan(base, phi.kinks(2 * _MAX_SHIFT), base[:0])


def _moments(phi: Pointwise, plan: Plan, scale: Tensor, shift: Tensor) -> _Moments:
    x, weight = line_rule(plan, scale, shift)
    a = scale[:, None]
    f, slope, bend = jets(phi.fn, a * x + shift[:, None])
    mean = (weight * f).sum(-1)
    f = f - mean[:, None]  # before squaring: the variance is a small part of E f^2
    slope, bend = a * slope, a * a * bend
    parts = (f * f, slope * slope, f * slope * x, slope * x, bend * bend)
    return _Moments(mean, *((weight * part).sum(-1) for part in parts))


def _dks_conditions(moments: _Moments, branch: Tensor, psi: float) -> tuple[Tensor, Tensor, Tensor]:
    """C(0) = 0 sets the output shift and Q(1) = 1 the output scale; left are Q'(1) and C'(1)."""
    v = moments.variance
    return torch.stack([moments.cross / v - 1, moments.power / v - psi]), -moments.mean, v.rsqrt()


def _tat_conditions(moments: _Moments, branch: Tensor, kappa: float) -> tuple[Tensor, Tensor, Tensor]:
    """C'(1) = 1 sets the output scale, Q(1) = 1 the shaped mean up to its sign (the branch, +1 or -1)."""
    d = moments.power
    mean = branch * (d - moments.variance).clamp_min(0.0).sqrt()
    residuals = torch.stack([(moments.cross + mean * moments.tilt) / d - 1, moments.bend / d - kappa])
    return residuals, mean - moments.mean, d.rsqrt()


def _starts(phi: Pointwise, spread: float) -> Tensor:
    """``[3, n]``: log input scale, input shift and branch to start from.

    At leading order in the input scale a, both psi and kappa fix ``spread = a |phi''/phi'|`` at the shift.
    """
    half = torch.tensor([0.04, 0.1, 0.2, 0.3, 0.45, 0.65, 0.9, 1.2, 1.6, 2.2, 3.0, 4.0], dtype=torch.float64)
    shift = torch.cat([half, -half])
    _, slope, bend = jets(phi.fn, shift)
    guess = (spread * slope.abs() / bend.abs().clamp_min(1e-12)).clamp(0.01, 1.0)
    scale = torch.cat([guess, torch.full_like(guess, 0.4)])
    return torch.stack([scale.log(), shift.repeat(2), torch.ones_like(scale)])


def _solve(phi: Pointwise, conditions: _Conditions, starts: Tensor, target: float) -> Tensor:
    """Newton steps in (log scale, shift) from all starts at once; the states that converged, ``[3, k]``."""
    plan, h = _plan(phi), 1e-6
    state, branch = starts[:2], starts[2]
    probes = torch.tensor([[0.0, h, 0.0], [0.0, 0.0, h]], dtype=torch.float64)[:, :, None]
    error = torch.full_like(branch, math.inf)
    for _ in range(_STEPS):
        around = (state[:, None, :] + probes).reshape(2, -1)
        moments = _moments(phi, plan, around[0].exp(), around[1])
        r = conditions(moments, branch.repeat(3))[0].reshape(2, 3, -1)
        error = r[:, 0].abs().amax(0)
        if bool((error < 1e-12).all()):
            break
        state = _newton_step(state, r[:, 0], (r[:, 1:] - r[:, :1]) / h)
    good = error < 1e-5 * target
    return torch.cat([state, branch[None]])[:, good]


def _newton_step(state: Tensor, residual: Tensor, jacobian: Tensor) -> Tensor:
    """Steps are clipped, and kept inside the box where solutions are looked for."""
    (a, b), (c, d) = jacobian
    step = torch.stack([d * residual[0] - b * residual[1], a * residual[1] - c * residual[0]]) / (
        a * d - b * c
    )
    state = state - torch.nan_to_num(step, nan=0.0).clamp(-0.5, 0.5)
    return torch.stack([state[0].clamp(-9.0, 3.0), state[1].clamp(-_MAX_SHIFT, _MAX_SHIFT)])


def _shape(
    phi: Pointwise, conditions: _Conditions, starts: Tensor, targets: dict[str, float], tightness: float
) -> ShapedConstants:
    """The usable solution with the smallest |input_shift|, the positive one of a pair."""
    found = _solve(phi, conditions, starts, tightness)
    scale, shift = found[0].exp(), found[1]
    _, output_shift, output_scale = conditions(_moments(phi, _plan(phi), scale, shift), found[2])
    usable = (shift.abs() < 0.99 * _MAX_SHIFT) & (output_scale < _MAX_OUTPUT_SCALE)
    if "C''(1)" in targets:
        usable &= scale * output_scale * _steepness(phi) < 2
    rows = torch.stack([scale, shift, output_shift, output_scale])[:, usable].T.tolist()
    for row in sorted(rows, key=lambda r: (round(abs(r[1]), 7), -r[1])):
        shaped = _verified(phi, ShapedConstants(*row), targets, strict=False)
        if shaped.residual <= _ACCURACY:
            return shaped
    wanted = ", ".join(f"{name} = {number:g}" for name, number in targets.items())
    raise TargetError(
        f"No usable constants found for {wanted}: tried {starts.shape[1]} starts with |input_shift| up to 4, "
        f"{found.shape[1]} converged, {len(rows)} of them usable",
        hint="Choose another activation or another target",
    )


def _steepness(phi: Pointwise) -> float:
    """Largest |phi'|, but at most 1.

    Zhang et al. reject input_scale * output_scale >= 2 (the Q map is unstable away from q = 1). They have
    activations of slope 1 in mind; a sigmoid, of slope 1/4, needs a product four times larger.
    """
    steepest = float(jets(phi.fn, torch.linspace(-8.0, 8.0, 321, dtype=torch.float64))[1].abs().max())
    return min(1.0, steepest)


# ---- what the constants are checked by


def _dks_targets(psi: float) -> dict[str, float]:
    return {"Q(1)": 1.0, "Q'(1)": 1.0, "C(0)": 0.0, "C'(1)": psi}


def _verified(
    phi: Pointwise, found: ShapedConstants, targets: dict[str, float], strict: bool = True
) -> ShapedConstants:
    """``found`` with the residuals of its shaped activation, on panels refined for that function."""
    shaped = phi.affine(found.input_scale, found.input_shift, found.output_shift, found.output_scale)
    one, zero = torch.ones(1, dtype=torch.float64), torch.zeros(1, dtype=torch.float64)
    at = _moments(shaped, shaped.plan(1.0), one, zero)
    values = {
        "Q(1)": at.variance + at.mean**2,
        "Q'(1)": at.cross + at.mean * at.tilt,
        "C(0)": at.mean**2,
        "C'(1)": at.power,
        "C''(1)": at.bend,
    }
    residual = max(abs(float(values[name]) - number) for name, number in targets.items())
    if strict and not residual <= _ACCURACY:
        raise TargetError(f"The constants found miss their targets by {residual:.1e}")
    return replace(found, residual=residual)


def _dks(phi: Pointwise, slopes: tuple[float, float] | None, psi: float) -> ShapedConstants:
    if not 1 < psi < math.inf:
        raise InputError(f"psi must be above 1, not {psi}", hint="psi = 1 would be a straight line")
    if slopes is not None:
        positive, negative = slopes
        if positive == negative:
            raise TargetError("A linear function has C'(1) = 1 whatever its constants")
        leaky = positive == 1 and 0 < abs(negative) < 1
        return _leaky_dks(psi) if leaky else _relu_dks(phi, psi)
    conditions = partial(_dks_conditions, psi=psi)
    return _shape(phi, conditions, _starts(phi, math.sqrt(2 * (psi - 1))), _dks_targets(psi), psi - 1)


def _tat(phi: Pointwise, kappa: float) -> ShapedConstants:
    if not 0 < kappa < math.inf:
        raise InputError(f"kappa must be above 0, not {kappa}", hint="kappa = 0 would be a straight line")
    if _jumps(phi, order=0) or _jumps(phi, order=1):
        raise TargetError(
            "TAT needs a smooth activation, and this one has a kink: its C''(1) is infinite",
            hint="Give negative_slope (TReLU) for relu and leaky relu, or psi (DKS)",
        )
    starts = _starts(phi, math.sqrt(kappa))
    both = torch.cat([starts, starts * torch.tensor([[1.0], [1.0], [-1.0]])], dim=1)
    targets = {"Q(1)": 1.0, "Q'(1)": 1.0, "C'(1)": 1.0, "C''(1)": kappa}
    return _shape(phi, partial(_tat_conditions, kappa=kappa), both, targets, kappa)
