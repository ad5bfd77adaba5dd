"""Any activation: Newton steps from many starts at once."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from kgraph.errors import TargetError
from kgraph.maps import Pointwise
from kgraph.maps.quadrature import Plan, jets
from kgraph.shaping.conditions import (
    ACCURACY,
    MAX_SHIFT,
    Conditions,
    ShapedConstants,
    moments_of,
    panels_for,
    verified,
)

_MAX_OUTPUT_SCALE = 1e4
"""A larger output scale amplifies float32 rounding of phi by as much: no usable network."""
_STEPS = 24


def starts_for(phi: Pointwise, spread: float) -> Tensor:
    """``[3, n]``: log input scale, input shift and branch to start from.

    At leading order in the input scale a, both psi and kappa fix ``spread = a |phi''/phi'|`` at the shift.
    """
    half = torch.tensor([0.04, 0.1, 0.2, 0.3, 0.45, 0.65, 0.9, 1.2, 1.6, 2.2, 3.0, 4.0], dtype=torch.float64)
    shift = torch.cat([half, -half])
    _, slope, bend = jets(phi.fn, shift)
    guess = (spread * slope.abs() / bend.abs().clamp_min(1e-12)).clamp(0.01, 1.0)
    scale = torch.cat([guess, torch.full_like(guess, 0.4)])
    return torch.stack([scale.log(), shift.repeat(2), torch.ones_like(scale)])


def _solve(phi: Pointwise, plan: Plan, conditions: Conditions, starts: Tensor, target: float) -> Tensor:
    """Newton steps in (log scale, shift) from all starts at once; the states that converged, ``[3, k]``."""
    h = 1e-6
    state, branch = starts[:2], starts[2]
    probes = torch.tensor([[0.0, h, 0.0], [0.0, 0.0, h]], dtype=torch.float64)[:, :, None]
    error = torch.full_like(branch, math.inf)
    for _ in range(_STEPS):
        around = (state[:, None, :] + probes).reshape(2, -1)
        moments = moments_of(phi, plan, around[0].exp(), around[1])
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
    step = torch.stack([d * residual[0] - b * residual[1], a * residual[1] - c * residual[0]]) / (a * d - b * c)
    state = state - torch.nan_to_num(step, nan=0.0).clamp(-0.5, 0.5)
    return torch.stack([state[0].clamp(-9.0, 3.0), state[1].clamp(-MAX_SHIFT, MAX_SHIFT)])


def best_solution(
    phi: Pointwise, conditions: Conditions, starts: Tensor, targets: dict[str, float], tightness: float
) -> ShapedConstants:
    """The usable solution with the smallest |input_shift|, the positive one of a pair."""
    rough = _solve(phi, panels_for(phi, 4), conditions, starts, tightness)
    fine = panels_for(phi, 16)
    found = _solve(phi, fine, conditions, _distinct(rough), tightness)
    scale, shift = found[0].exp(), found[1]
    _, output_shift, output_scale = conditions(moments_of(phi, fine, scale, shift), found[2])
    usable = (shift.abs() < 0.99 * MAX_SHIFT) & (output_scale < _MAX_OUTPUT_SCALE)
    if "C''(1)" in targets:
        usable &= scale * output_scale * _steepness(phi) < 2
    rows = torch.stack([scale, shift, output_shift, output_scale])[:, usable].T.tolist()
    for row in sorted(rows, key=lambda r: (round(abs(r[1]), 7), -r[1])):
        shaped = verified(phi, ShapedConstants(*row), targets, strict=False)
        if shaped.residual <= ACCURACY:
            return shaped
    wanted = ", ".join(f"{name} = {number:g}" for name, number in targets.items())
    inexact = ", and none of these meets them to the last digits" if rows else ""
    raise TargetError(
        f"No usable constants found for {wanted}: tried {starts.shape[1]} starts with |input_shift| up to 4, "
        f"{found.shape[1]} converged, {len(rows)} of them usable{inexact}",
        hint="Choose another activation or another target",
    )


def _distinct(states: Tensor) -> Tensor:
    """One of each of the states that agree to about 1e-4."""
    _, group = (states * 1e4).round().unique(dim=1, return_inverse=True)
    return states[:, [int((group == i).nonzero()[0]) for i in group.unique()]]


def _steepness(phi: Pointwise) -> float:
    """Largest |phi'|, but at most 1.

    Zhang et al. reject input_scale * output_scale >= 2 (the Q map is unstable away from q = 1). They have
    activations of slope 1 in mind; a sigmoid, of slope 1/4, needs a product four times larger.
    """
    steepest = float(jets(phi.fn, torch.linspace(-8.0, 8.0, 321, dtype=torch.float64))[1].abs().max())
    return min(1.0, steepest)
