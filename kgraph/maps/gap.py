"""Local maps of the gap ``G = E[(u_a - u_b)^2] / 2 = (q_a + q_b) / 2 - cov``: what is left of 1 - c when c is nearly 1.

Thousands of layers drive c so near to 1 that ``q - cov`` has no digits left. The gap itself is carried through
affine layers unchanged in kind (``sw2 G``: biases cancel), and through a pointwise function by

    G' = E[(phi(z_a) - phi(z_b))^2] / 2,    (z_a, z_b) ~ N(0, [[q_a, (q_a + q_b) / 2 - G], [., q_b]])

written here without a difference of nearly equal numbers.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import numpy as np
import torch
from torch import Tensor

from kgraph.maps.quadrature import Plan, line_rule, value_and_slope

Near = Callable[[Tensor, Tensor, Tensor], tuple[Tensor, Tensor]]
"""``(q_a, q_b, G) -> (G', E[phi' phi'])``."""

_SMALL_ANGLE = 0.5
_TERMS = 10
_HERMITE, _SEGMENT = 24, 10


def two_slopes_gap(positive: float, negative: float) -> Near:
    """``positive max(u, 0) + negative min(u, 0)``, that is ``even |u| + odd u``.

    With r = sqrt(q_a q_b), c = cos theta: |u| has gap ``(sqrt q_a - sqrt q_b)^2 / 2 + r ((1 - c) - (2 / pi)
    (sin theta - theta cos theta))``, and ``E[sign sign] = 1 - 2 theta / pi``.
    """
    even, odd = (positive - negative) / 2, (positive + negative) / 2

    def near(q1: Tensor, q2: Tensor, g: Tensor) -> tuple[Tensor, Tensor]:
        apart, r, lack = split_gap(q1, q2, g)
        theta = angle(lack)
        folded = apart + r * (lack - (2 / math.pi) * sin_minus_cos(theta))
        return odd**2 * g + even**2 * folded, odd**2 + even**2 * (1 - (2 / math.pi) * theta)

    return near


def jump_gap(high: float, low: float) -> Near:
    """``high`` for u > 0, ``low`` for u < 0: the signs differ with probability theta / pi."""

    def near(q1: Tensor, q2: Tensor, g: Tensor) -> tuple[Tensor, Tensor]:
        _, _, lack = split_gap(q1, q2, g)
        return (high - low) ** 2 / (2 * math.pi) * angle(lack), torch.zeros_like(g)

    return near


def linear_gap(q1: Tensor, q2: Tensor, g: Tensor) -> tuple[Tensor, Tensor]:
    """The identity's."""
    return g, torch.ones_like(g)


def angle(lack: Tensor) -> Tensor:
    """``theta = arccos(1 - lack)``, with all its digits where lack is small."""
    return 2 * torch.asin((lack / 2).clamp(0, 1).sqrt())


def split_gap(q1: Tensor, q2: Tensor, g: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """``((sqrt q1 - sqrt q2)^2 / 2, sqrt(q1 q2), 1 - c)`` of a gap."""
    root1, root2 = q1.sqrt(), q2.sqrt()
    apart = (q1 - q2).square() / (2 * (root1 + root2).square()).clamp_min(1e-300)
    r = root1 * root2
    return apart, r, ((g - apart) / r.clamp_min(1e-300)).clamp(0, 2)


def sin_minus_cos(theta: Tensor) -> Tensor:
    """``sin t - t cos t``, about t^3 / 3: by its series where t is small."""
    series = torch.zeros_like(theta)
    square = theta.square()
    for n in range(_TERMS, 0, -1):
        series = series * square + (-1) ** (n + 1) * 2 * n / math.factorial(2 * n + 1)
    direct = torch.sin(theta) - theta * torch.cos(theta)
    return torch.where(theta < _SMALL_ANGLE, series * square * theta, direct)


def erf_gap(q1: Tensor, q2: Tensor, g: Tensor) -> tuple[Tensor, Tensor]:
    """``E[erf erf] = (2/pi) asin(2 cov / sqrt((1 + 2 q_a)(1 + 2 q_b)))``: differences of arcsines as one arcsine.

    ``E[erf' erf'] = (4/pi) / sqrt(1 + 2 q_a + 2 q_b + 4 (q_a q_b - cov^2))``.
    """
    cov = (q1 + q2) / 2 - g
    one, two = 1 + 2 * q1, 1 + 2 * q2
    root = (one * two).sqrt()
    y, left = 2 * cov / root, ((root - 2 * cov) * (root + 2 * cov)).clamp_min(0).sqrt() / root
    total = torch.zeros_like(g)
    for q, own in ((q1, one), (q2, two)):
        x, across = 2 * q / own, (1 + 4 * q).sqrt() / own
        # x - y = (2 / own) (G + the part by which the two q differ)
        other = q2 if q is q1 else q1
        apart = (q - other) / 2 + 2 * cov * (other - q) / (root * (own.sqrt() + (2 * other + 1).sqrt())) * own.sqrt()
        difference = 2 * (g + apart) / own
        sine = difference * (x + y) / (x * left + y * across).clamp_min(1e-300)
        total = total + torch.asin(sine.clamp(-1, 1))
    _, r, lack = split_gap(q1, q2, g)
    return total / math.pi, (4 / math.pi) / torch.sqrt(1 + 2 * (q1 + q2) + 4 * r.square() * lack * (2 - lack))


def smooth_gap(fn: Callable[[Tensor], Tensor], plan: Plan, q1: Tensor, q2: Tensor, g: Tensor) -> Tensor:
    """Any smooth function: ``z_a - z_b = d`` is small, ``phi(z_a) - phi(z_b) = d`` times the mean of phi' between.

    The middle m = (z_a + z_b) / 2 is integrated on the function's panels, d given m by Gauss-Hermite, the mean of
    phi' along the segment by Gauss-Legendre.
    """
    shape = g.shape
    q1, q2, g = (t.expand(shape).reshape(-1) for t in (q1, q2, g))
    spread, cross = 2 * g, (q1 - q2) / 2
    middle = ((q1 + q2) / 2 - g / 2).clamp_min(0)
    slope = cross / middle.clamp_min(1e-300)
    rest = (spread - slope * cross).clamp_min(0).sqrt()
    x, weight = line_rule(plan, middle.sqrt())
    m = middle.sqrt()[:, None] * x
    nodes, masses = np.polynomial.hermite_e.hermegauss(_HERMITE)
    at, share = (torch.from_numpy(t).to(g.device) for t in np.polynomial.legendre.leggauss(_SEGMENT))
    total = torch.zeros_like(g)
    for node, mass in zip(nodes.tolist(), (masses / masses.sum()).tolist(), strict=True):
        d = slope[:, None] * m + rest[:, None] * node
        _, between = value_and_slope(fn, m[..., None] + d[..., None] * at / 2)
        total = total + mass * (weight * (d * (between * share).sum(-1) / 2).square()).sum(-1)
    return (total / 2).reshape(shape)


__all__ = [
    "Near",
    "angle",
    "erf_gap",
    "jump_gap",
    "linear_gap",
    "sin_minus_cos",
    "smooth_gap",
    "split_gap",
    "two_slopes_gap",
]
