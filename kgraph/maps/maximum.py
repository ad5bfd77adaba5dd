"""The law of the maximum over a window of alike positions, for pairs of inputs, without draws.

For a window of m independent Gaussian positions, with rho the correlation of two inputs at one position,

    P(max_1 <= s, max_2 <= t) = Phi_2(s, t; rho)^m
    density = m Phi_2^(m-1) d_s d_t Phi_2    (both maxima at one position)
            + m (m-1) Phi_2^(m-2) (d_s Phi_2) (d_t Phi_2)    (at two)

Exchangeable positions share one Gaussian, which goes in front of the maximum: max_i(g + e_i) = g + max_i e_i.
Phi_2 is that of Owen (1956), by his T function.
"""

from __future__ import annotations

import math

import numpy as np
import torch
from scipy.special import owens_t
from torch import Tensor

from kgraph.maps.marginal import Breaks, Nodes, each_polynomial, lanczos, panels, polynomials
from kgraph.maps.quadrature import unit_rule, with_edges
from kgraph.maps.stream import EQUAL, Law, added, gaussian, scaled, shifted

_SPAN = 9.5
"""Range of integration, in deviations of one position."""
_PANELS = 12
_LAYERS = (-7.0, -3.5, 0.0, 3.5, 7.0)
"""Panel edges of the second maximum round the first, in deviations of one given the other."""

Shares = tuple[tuple[int, float], ...]
"""How many positions windows hold, with the share of windows that do."""


def maximum(
    mean: float, variance: float, cov: Tensor, tangents: dict[str, Tensor], shares: Shares, overlap: float, degree: int
) -> Law | None:
    """Law of the maximum over windows of a Gaussian field with exchangeable positions.

    Args:
        mean, variance: of one position.
        cov: covariance of two inputs at one position and at two, [P, 2]; the row of an input with itself holds the
            variance first.
        tangents: likewise, {name: [P, 2]}.
        shares: window sizes.
        overlap: mean share of the positions that two windows have in common; their law moves as far from that of
            windows apart to that of one window.
        degree: number of polynomials kept.

    Returns:
        The law of rows [2 P]: the same window and another one of every pair. None where positions of one input
        differ more than independent ones.
    """
    own = cov[:, 0] >= variance * (1 - EQUAL)
    common = float(cov[own, 1].min()) if own.any() else -1.0
    alone = variance - common
    if common < -EQUAL * variance or alone <= EQUAL * variance:
        return None
    common = common if common > EQUAL * variance else 0.0
    rho = ((cov[:, 0] - cov[:, 1]) / alone).clamp(-1, 1)
    apart = {name: k[:, 0] - k[:, 1] for name, k in tangents.items()}
    law = scaled(_independent(rho, apart, alone, shares, overlap, degree), math.sqrt(alone))
    shared = {name: k[:, 1:].expand(-1, 2).flatten() for name, k in tangents.items()}
    if common:
        front = gaussian(mean, common, cov[:, 1:].expand(-1, 2).flatten(), shared, degree)
        return added(law, front, degree)
    return shifted(law, mean).carrying(shared)


def _independent(
    rho: Tensor, tangents: dict[str, Tensor], variance: float, shares: Shares, overlap: float, degree: int
) -> Law:
    """Maximum of independent standard Gaussians, which stand for a field of ``variance``."""
    own = {name: (k / variance).repeat_interleave(2)[:, None] for name, k in tangents.items()}

    def nodes(breaks: Breaks) -> Nodes:
        points, weights = panels(-_SPAN, _SPAN, _PANELS, breaks(_SPAN))
        mass = weights * sum(share * _density(points, count) for count, share in shares)
        return Nodes(points, mass, {name: k.expand(-1, len(points)) for name, k in own.items()})

    grid = nodes(lambda _: torch.zeros(0, dtype=torch.float64))
    jacobi = lanczos(grid.points, grid.mass, degree)
    values = polynomials(jacobi, grid.points)
    first = (values * grid.mass).sum(1)
    apart = first[:, None] * first
    pair, moved = [], {name: [] for name in tangents}
    found: dict[float, tuple[Tensor, Tensor]] = {}
    for row, c in enumerate(rho.tolist()):
        if c not in found:
            found[c] = _one_window(c, shares, jacobi)
        alike, different = found[c]
        both = alike + different
        pair += [both, apart + overlap * (both - apart)]
        for name, k in tangents.items():
            moved[name] += [k[row] / variance * alike, overlap * k[row] / variance * alike]
    equal = torch.stack([rho >= 1 - EQUAL, torch.zeros_like(rho, dtype=torch.bool)], 1).flatten()
    few = grid.compressed(torch.zeros(0, dtype=torch.float64))
    return Law(jacobi, torch.stack(pair), {name: torch.stack(rows) for name, rows in moved.items()}, equal, nodes, few)


def _density(z: Tensor, count: int) -> Tensor:
    """Of the maximum of ``count`` standard Gaussians."""
    return count * _phi(z) * torch.special.ndtr(z) ** (count - 1)


def _one_window(rho: float, shares: Shares, jacobi: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
    """E[p_m(max_1) p_n(max_2)] where both maxima are at one position, and where they are at two; [M, M] each."""
    degree = len(jacobi[0])
    if rho >= 1 - EQUAL:
        return torch.eye(degree, dtype=torch.float64), torch.zeros(degree, degree, dtype=torch.float64)
    e = math.sqrt((1 - rho) * (1 + rho))
    base = torch.linspace(-_SPAN, _SPAN, _PANELS + 1, dtype=torch.float64)
    s, outer = panels(-_SPAN, _SPAN, _PANELS, base[:0])
    edges = with_edges(base, rho * s[:, None] + e * torch.tensor(_LAYERS, dtype=torch.float64))
    x, weights = unit_rule(edges.device)
    t = (edges[:, :-1, None] + edges.diff()[..., None] * x).flatten(1)
    inner = (edges.diff()[..., None] * weights).flatten(1) * outer[:, None]
    s = s[:, None].expand_as(t)
    below = bivariate_cdf(s, t, rho)
    density = _phi(s) * _phi((t - rho * s) / e) / e
    by_s, by_t = _phi(s) * torch.special.ndtr((t - rho * s) / e), _phi(t) * torch.special.ndtr((s - rho * t) / e)
    alike = sum(share * n * below ** (n - 1) for n, share in shares) * density
    different = sum(share * n * (n - 1) * below ** max(n - 2, 0) for n, share in shares) * by_s * by_t
    masses = [(inner * mass).numpy() for mass in (alike, different)]
    moments = [[np.einsum("st,st->s", mass, row) for mass in masses] for row in each_polynomial(jacobi, t)]
    one, two = torch.einsum("ms,nks->kmn", polynomials(jacobi, s[:, 0]), torch.from_numpy(np.array(moments)))
    return (one + one.T) / 2, (two + two.T) / 2


def bivariate_cdf(s: Tensor, t: Tensor, rho: float) -> Tensor:
    """``P(z_1 <= s, z_2 <= t)`` of two standard Gaussians of correlation rho in (-1, 1); s, t not 0 (Owen 1956)."""
    e = math.sqrt((1 - rho) * (1 + rho))
    tails = [torch.from_numpy(owens_t(h.numpy(), ((k - rho * h) / (e * h)).numpy())) for h, k in ((s, t), (t, s))]
    apart = torch.where(s * t < 0, 0.5, 0.0)
    return ((torch.special.ndtr(s) + torch.special.ndtr(t)) / 2 - tails[0] - tails[1] - apart).clamp_min(0)


def _phi(z: Tensor) -> Tensor:
    return torch.exp(-z * z / 2) / math.sqrt(2 * math.pi)
