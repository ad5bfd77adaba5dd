"""Gaussian integrals of two arguments at many entries: Mehler's series over normalized Hermite polynomials.

    E[phi(z1) phi(z2)] = sum_n a_n(q1) a_n(q2) c^n,    a_n(q) = E[phi(sqrt(q) x) he_n(x)],  x ~ N(0, 1)

The coefficients take one integral a location; an entry then takes one product a term. What n >= N leave out is at most
``sqrt(tail(q1) tail(q2)) |c|^N`` with ``tail = E[phi^2] - sum_{n < N} a_n^2`` (Cauchy and Schwarz), so the series
knows where it is good. Source: Mehler 1866; Daniely, Frostig, Singer 2016, arXiv 1602.05897, section 2.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from kgraph.maps.quadrature import Function, Plan, gaussian_rule, value_and_slope, with_edges

TERMS = 256
TOLERANCE = 1e-11
"""Largest error allowed, in shares of sqrt(E[phi(z1)^2] E[phi(z2)^2]); the same for phi'."""
_SPAN = 12.0
_PANELS = 48
"""Half a deviation each: he_256 turns 8 radians on a panel of 20 nodes."""
_ROUNDING = 1e-14
_NUMBERS = 1 << 21
_STEPS = (16, 32, 64, 128, 192, TERMS)


@dataclass(frozen=True)
class Series:
    """Coefficients of phi and phi' at some q values.

    Attributes:
        coefficients: [2, N, L].
        tails: [2, L], sqrt of the share of the second moment that the terms leave out.
    """

    coefficients: Tensor
    tails: Tensor

    @property
    def terms(self) -> int:
        return self.coefficients.shape[1]

    def good(self, first: Tensor, second: Tensor, c: Tensor) -> Tensor:
        """Entries whose error is surely below `TOLERANCE`; first and second index the q values."""
        reach = c.abs() ** self.terms
        worst = torch.maximum(*(tail[first] * tail[second] for tail in self.tails))
        return worst * reach <= TOLERANCE

    def sum(self, first: Tensor, second: Tensor, c: Tensor) -> tuple[Tensor, Tensor]:
        """Both series by Horner's rule."""
        out = []
        for table in self.coefficients:
            total = torch.zeros_like(c)
            for n in range(self.terms - 1, -1, -1):
                row = table[n]
                total.mul_(c).add_(row[first] * row[second])
            out.append(total)
        return out[0], out[1]


def make_series(fn: Function, plan: Plan, q: Tensor, terms: int | None = None) -> Series | None:
    """Series at ``q`` [L], with the fewest of `_STEPS` terms that serve c = 1, else all; None if phi overflows."""
    span = max(_SPAN, float(plan.base[-1]))
    base = torch.linspace(-span, span, _PANELS * math.ceil(span / _SPAN) + 1, dtype=torch.float64, device=q.device)
    step = max(1, _NUMBERS // (20 * (len(base) + len(plan.breaks))))
    parts = [_coefficients(fn, plan, base, q[i : i + step], terms or TERMS) for i in range(0, len(q), step)]
    table = torch.cat([p[0] for p in parts], -1)
    energy = torch.cat([p[1] for p in parts], -1)
    if not (torch.isfinite(table).all() and torch.isfinite(energy).all()):
        return None
    left = 1 - table.square().cumsum(1) / energy.clamp_min(1e-300)[:, None]
    tails = torch.where(energy[:, None] > 0, left.clamp_min(_ROUNDING), 0.0)
    count = next((n for n in _STEPS if n <= table.shape[1] and bool((tails[:, n - 1] <= TOLERANCE).all())), None)
    count = terms or count or table.shape[1]
    return Series(table[:, :count].contiguous(), tails[:, count - 1].sqrt())


def _coefficients(fn: Function, plan: Plan, base: Tensor, q: Tensor, terms: int) -> tuple[Tensor, Tensor]:
    """([2, terms, L], [2, L]): coefficients and second moments of phi and phi'."""
    root = q.sqrt()[:, None]
    x, weight = gaussian_rule(with_edges(base, plan.breaks / root.clamp_min(1e-150)))
    f = torch.stack(value_and_slope(fn, (root * x).expand(len(q), -1)))
    mass = weight * f
    before, now = torch.zeros_like(x), torch.ones_like(x)
    rows = []
    for n in range(terms):
        rows.append((mass * now).sum(-1))
        before, now = now, (x * now - math.sqrt(n) * before) / math.sqrt(n + 1)
    return torch.stack(rows, 1), (mass * f).sum(-1)
