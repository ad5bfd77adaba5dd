"""Leaky relus, solved on paper: TReLU and DKS."""

from __future__ import annotations

import math
from typing import cast

import torch
from scipy.optimize import brentq
from torch import Tensor

from kgraph.errors import InputError, TargetError
from kgraph.maps import Pointwise, pointwise
from kgraph.shaping.conditions import Moments, ShapedConstants, dks_targets, moments_of, panels_for, verified


def leaky_relu_c_map(c: Tensor, slope: float) -> Tensor:
    """Local C map of leaky relu: ``c + (1-a)^2 / (pi (1+a^2)) * (sqrt(1-c^2) - c arccos(c))``."""
    root = torch.sqrt((1 - c) * (1 + c))
    return c + (1 - slope) ** 2 / (math.pi * (1 + slope**2)) * (root - c * torch.atan2(root, c))


def two_slopes(phi: Pointwise) -> tuple[float, float] | None:
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


def trelu(slopes: tuple[float, float] | None, a: float) -> ShapedConstants:
    if not -1 <= a <= 1:
        raise InputError(f"negative_slope must be in [-1, 1], not {a}")
    if slopes is None or slopes[0] != 1:
        raise InputError("negative_slope is for relu and leaky relu", hint="Give kappa for a smooth activation")
    found = ShapedConstants(output_scale=math.sqrt(2 / (1 + a * a)), negative_slope=a)
    return verified(pointwise("leaky_relu", a), found, {"Q(1)": 1.0, "C'(1)": 1.0})


def leaky_dks(psi: float) -> ShapedConstants:
    """Leaky relu ``odd u + even |u|`` without input shift: Q'(1) = Q(1), and C'(1) = psi fixes even / odd.

    With t = (even / odd)^2: ``(1 + t) / (1 + t (1 - 2/pi)) = psi``.
    """
    spread = 1 - 2 / math.pi
    if psi >= 1 / spread:
        raise TargetError(f"A leaky relu stays below C'(1) = {1 / spread:g}, and {psi:g} is asked for")
    ratio = math.sqrt((psi - 1) / (1 - psi * spread))
    found = leaky_centred((1 - ratio) / (1 + ratio))
    return verified(pointwise("leaky_relu", found.negative_slope), found, dks_targets(psi))  # type: ignore[arg-type]


def leaky_centred(a: float) -> ShapedConstants:
    """A leaky relu of this slope with Q(1) = 1 and C(0) = 0, hence Q'(1) = 1: what DKS makes of a slope it is given."""
    even, odd = (1 - a) / 2, (1 + a) / 2
    shift = -even * math.sqrt(2 / math.pi)
    scale = 1 / math.sqrt(odd**2 + even**2 * (1 - 2 / math.pi))
    found = ShapedConstants(output_shift=shift, output_scale=scale, negative_slope=a)
    return verified(pointwise("leaky_relu", a), found, {"Q(1)": 1.0, "Q'(1)": 1.0, "C(0)": 0.0})


def relu_dks(phi: Pointwise, psi: float) -> ShapedConstants:
    """relu(a u + b) with b = 1, or -1 where 1 cannot do it: one unknown less, so Q'(1) = 1 is dropped."""
    plan = panels_for(phi, 4)

    def moments(log_scale: float, shift: float) -> Moments:
        pair = torch.tensor([[math.exp(log_scale)], [shift]], dtype=torch.float64)
        return moments_of(phi, plan, pair[0], pair[1])

    def excess(log_scale: float, shift: float) -> float:
        at = moments(log_scale, shift)
        return float(at.power / at.variance) - psi

    for shift in (1.0, -1.0):
        if excess(-1.7, shift) * excess(9.0, shift) < 0:
            log_scale = cast(float, brentq(excess, -1.7, 9.0, args=(shift,), xtol=1e-14))
            at = moments(log_scale, shift)
            found = ShapedConstants(math.exp(log_scale), shift, -float(at.mean), float(at.variance) ** -0.5)
            return verified(phi, found, {"Q(1)": 1.0, "C(0)": 0.0, "C'(1)": psi})
    raise TargetError(f"A relu shifted by 1 or -1 cannot have C'(1) = {psi:g}", hint="Use leaky relu")
