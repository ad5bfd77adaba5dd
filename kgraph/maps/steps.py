"""Functions that are constant between jumps (roundings, signs, comparisons): the inner integral is in closed form.

    f(z) = v_0 + sum_k (v_k+1 - v_k) [z > t_k],    E[f(z2) | z1] = v_0 + sum_k (v_k+1 - v_k) Phi((m - t_k) / s)

for z2 ~ N(m, s^2) given z1. Their slope is 0 almost everywhere.
"""

from __future__ import annotations

import torch
from torch import Tensor

_WITHIN = (1e-9, 0.07, 0.31, 0.5, 0.66, 0.93, 1 - 1e-9)
"""Points between two jumps, as shares of the way, at which a constant function is seen to be one.

Those at the ends tell a jump from two kinks so near to one another that one of them was found: hardtanh of sd 500.
"""


def levels(values: Tensor, slopes: Tensor) -> Tensor | None:
    """Values between jumps, given function and slope at ``probes``, [cells, points]; None if they differ within one."""
    constant = bool((values == values[:, :1]).all()) and not bool(slopes.any())
    return values[:, 0] if constant else None


def probes(jumps: Tensor, reach: float) -> Tensor:
    """Points within every cell between sorted jumps and the ends, [cells, points]."""
    edges = torch.cat([jumps.new_tensor([-reach]), jumps, jumps.new_tensor([reach])])
    return edges[:-1, None] + edges.diff()[:, None] * jumps.new_tensor(_WITHIN)


def conditional_mean(jumps: Tensor, heights: Tensor, mean: Tensor, deviation: Tensor) -> Tensor:
    """``E[f(z)]`` for z ~ N(mean, deviation^2), both [...]; ``heights`` are the values between the jumps."""
    above = torch.special.ndtr((mean[..., None] - jumps) / deviation[..., None])
    return heights[0] + above @ heights.diff()


__all__ = ["conditional_mean", "levels", "probes"]
