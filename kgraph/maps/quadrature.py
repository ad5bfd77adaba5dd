"""Composite Gauss-Legendre quadrature of pointwise functions under one or two Gaussians.

The integrals are taken of the function itself, on panels whose edges sit on its kinks, so a kinked function
converges as fast as a smooth one (plain Gauss-Hermite is off by 1e-2 to 1e-4 on relu at any practical order).
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache

import numpy as np
import torch
from torch import Tensor

from kgraph.errors import InputError
from kgraph.maps.steps import conditional_mean

Function = Callable[[Tensor], Tensor]
_Two = tuple[Function, Function]
NODES = 20
"""Gauss-Legendre nodes a panel: exact to rounding for a Gaussian on panels up to 4.5 deviations wide."""
_CHUNK = 1 << 18
"""Function values held at once; small enough for the processor's cache."""
_MOST = 1 << 26
"""Function values that one row may take: some seconds' work."""
_FEW = 64
"""Rows up to which looking for equal ones costs less than it saves."""
_LAYERS = (-7.0, -2.5, 2.5, 7.0)
"""Panel edges round a smoothed kink, in widths of the smoothing Gaussian."""
_TINY = 1e-150


@dataclass(frozen=True)
class Plan:
    """Where to cut the line to integrate one function.

    Args:
        base: panel edges in standard deviations, symmetric, covering all weight that counts.
        kinks: points z where phi, phi' or phi'' jumps.
        splits: further points z that resolve sharp but smooth places.
        heights: the function's values between the kinks, where it is constant there; else None.
    """

    base: Tensor
    kinks: Tensor
    splits: Tensor
    heights: Tensor | None = None

    @property
    def breaks(self) -> Tensor:
        return torch.cat([self.kinks, self.splits])


@cache
def unit_rule(device: torch.device) -> tuple[Tensor, Tensor]:
    """Gauss-Legendre points and weights on [0, 1]."""
    points, weights = np.polynomial.legendre.leggauss(NODES)
    return torch.from_numpy((points + 1) / 2).to(device), torch.from_numpy(weights / 2).to(device)


def gaussian_rule(edges: Tensor) -> tuple[Tensor, Tensor]:
    """Points and N(0,1) weights on panels with sorted ``edges[..., B]``: two ``[..., (B-1) * NODES]``."""
    points, weights = unit_rule(edges.device)
    width = edges.diff(dim=-1)[..., None]
    x = (edges[..., :-1, None] + width * points).flatten(-2)
    return x, (width * weights).flatten(-2) * torch.exp(-x * x / 2) / math.sqrt(2 * math.pi)


def with_edges(base: Tensor, extra: Tensor) -> Tensor:
    """``base`` joined with ``extra[..., T]`` (clipped to base's range), sorted; ``base`` itself for T = 0."""
    if extra.shape[-1] == 0:
        return base
    clipped = extra.clamp(float(base[0]), float(base[-1]))
    return torch.cat([base.expand(*extra.shape[:-1], -1), clipped], dim=-1).sort(dim=-1).values


def value(fn: Function, z: Tensor) -> Tensor:
    """``phi(z)`` in float64; raises InputError when phi is not elementwise."""
    # A copy goes in, because the function may work in place (nn.ReLU(inplace=True)).
    out = fn(z.clone())
    if out.shape != z.shape:
        raise InputError(
            f"A pointwise function returned shape {tuple(out.shape)} for input {tuple(z.shape)}",
            hint="Pass a function that maps every element by itself",
        )
    return out.to(torch.float64)


def slope_of(out: Tensor, z: Tensor, keep: bool = False) -> Tensor:
    """``d out / d z`` elementwise by autodiff; zero where no gradient flows (step functions)."""
    if not out.requires_grad:
        return torch.zeros_like(z)
    (slope,) = torch.autograd.grad(out.sum(), z, create_graph=keep, allow_unused=True)
    return torch.zeros_like(z) if slope is None else slope


def value_and_slope(fn: Function, z: Tensor) -> tuple[Tensor, Tensor]:
    """``(phi(z), phi'(z))``, detached."""
    with torch.enable_grad():
        z = z.detach().requires_grad_()
        out = value(fn, z)
        slope = slope_of(out, z).detach()
        lost = slope.isnan() & out.detach().isfinite()
        if lost.any():  # 0 times infinity at one point, in the branch that a choice does not take
            beside = (z.detach()[lost] + _BESIDE).requires_grad_()
            slope[lost] = slope_of(value(fn, beside), beside).detach()
        return out.detach(), slope


_BESIDE = 1e-9


def jets(fn: Function, z: Tensor) -> Tensor:
    """``[3, ...]``: phi, phi' and phi'' at z; phi'' is zero for functions that autodiff cannot do twice."""
    with torch.enable_grad():
        z = z.detach().requires_grad_()
        out = value(fn, z)
        slope = slope_of(out, z, keep=True)
        try:
            bend = slope_of(slope, z)
        except RuntimeError:  # a custom autograd.Function whose backward is itself not differentiable
            bend = torch.zeros_like(z)
    return torch.stack([out.detach(), slope.detach(), bend.detach()])


def line_rule(plan: Plan, scale: Tensor, shift: Tensor | float = 0.0) -> tuple[Tensor, Tensor]:
    """Points x and N(0,1) weights, ``[..., N]``, for integrals of phi(scale * x + shift)."""
    scale = scale[..., None]
    scale = torch.where(scale.abs() > _TINY, scale, _TINY)
    offset = shift[..., None] if isinstance(shift, Tensor) else shift
    return gaussian_rule(with_edges(plan.base, (plan.breaks - offset) / scale))


def moment(fn: Function, plan: Plan, q: Tensor, power: int) -> Tensor:
    """``E[phi(z)^power]`` for z ~ N(0, q), any shape of q."""
    root = torch.sqrt(q)
    x, weight = line_rule(plan, root)
    with torch.no_grad():
        return (weight * value(fn, root[..., None] * x) ** power).sum(-1)


def dual(
    fn: Function, plan: Plan, roots: Tensor, c: Tensor, s: Tensor, other: Function | None = None
) -> tuple[Tensor, Tensor]:
    """``E[phi phi]`` and ``E[phi' phi']``: outer over z1, inner over z2 given z1.

    Args:
        roots: ``[2, n]``, sqrt(q1) and sqrt(q2).
        c, s: ``[n]``, correlation and ``sqrt(1 - c^2)``.
        other: the function of z2, where it is another one; the plan must serve both.

    Raises:
        InputError: phi is cut into too many panels: the work grows with their square.
    """
    fns = fn, fn if other is None else other
    if 1 < len(c) <= _FEW:
        first, place = _distinct_rows(roots, c)
        if len(first) < len(c):
            value, slope = _dual_rows(fns, plan, roots[:, first], c[first], s[first])
            return value[place], slope[place]
    return _dual_rows(fns, plan, roots, c, s)


def _distinct_rows(roots: Tensor, c: Tensor) -> tuple[list[int], list[int]]:
    """Indices of the rows that differ, and for every row its place among them (``s`` follows from ``c``).

    The probe pairs of a network repeat: (a, a) is a pair with c = 1, and all pairs of positions are alike.
    """
    seen: dict[tuple[float, ...], int] = {}
    place = [seen.setdefault(row, len(seen)) for row in zip(*roots.tolist(), c.tolist(), strict=True)]
    first = {row: i for i, row in reversed(list(enumerate(place)))}
    return [first[row] for row in range(len(seen))], place


def _dual_rows(fns: _Two, plan: Plan, roots: Tensor, c: Tensor, s: Tensor) -> tuple[Tensor, Tensor]:
    breaks = len(plan.breaks)
    outer = len(plan.base) + 2 * breaks + len(_LAYERS) * len(plan.kinks)
    steps = plan.heights is not None
    cost = outer * NODES * (breaks if steps else (len(plan.base) + breaks) * NODES)
    if cost > _MOST:
        raise InputError(
            f"A pointwise function is too fine for integrals under two Gaussians: it is cut at {breaks} points",
            hint="It may oscillate or bend many times; kgraph.montecarlo measures the model as it is",
        )
    step = max(1, _CHUNK // cost)
    chunk = _step_chunk if steps else _dual_chunk
    parts = [chunk(fns, plan, roots[:, i : i + step], c[i : i + step], s[i : i + step]) for i in range(0, len(c), step)]
    return torch.cat([p[0] for p in parts]), torch.cat([p[1] for p in parts])


def _dual_chunk(fns: _Two, plan: Plan, roots: Tensor, c: Tensor, s: Tensor) -> tuple[Tensor, Tensor]:
    root1, root2 = roots[0, :, None], roots[1, :, None]
    x, weight = gaussian_rule(_outer_edges(plan, root1, root2, c[:, None], s[:, None]))
    first, first_slope = value_and_slope(fns[0], root1 * x)
    step = max(1, _CHUNK // ((len(plan.base) + len(plan.breaks)) * NODES * len(c)))  # many cuts: nodes one by one
    parts = [_smoothed(fns[1], plan, c[:, None] * root2 * part, s[:, None] * root2) for part in x.split(step, -1)]
    second, second_slope = (torch.cat(part, -1) for part in zip(*parts, strict=True))
    return (weight * first * second).sum(-1), (weight * first_slope * second_slope).sum(-1)


def _smoothed(fn: Function, plan: Plan, centre: Tensor, spread: Tensor) -> tuple[Tensor, Tensor]:
    """``E[phi(centre + spread w)]`` and ``E[phi'(...)]`` for w ~ N(0, 1), at every centre ``[n, N]``."""
    centre, spread = centre[..., None], spread[..., None]
    inner = with_edges(plan.base, (plan.breaks - centre) / spread.clamp_min(_TINY))
    w, weight = gaussian_rule(inner)
    value, slope = value_and_slope(fn, centre + spread * w)
    return (weight * value).sum(-1), (weight * slope).sum(-1)


def _step_chunk(fns: _Two, plan: Plan, roots: Tensor, c: Tensor, s: Tensor) -> tuple[Tensor, Tensor]:
    """The same of a function that is constant between its kinks."""
    assert plan.heights is not None
    root1, root2 = roots[0, :, None], roots[1, :, None]
    x, weight = gaussian_rule(_outer_edges(plan, root1, root2, c[:, None], s[:, None]))
    spread = (s[:, None] * root2).clamp_min(_TINY).expand_as(x)
    inner = conditional_mean(plan.kinks, plan.heights, c[:, None] * root2 * x, spread)
    total = (weight * value(fns[0], root1 * x) * inner).sum(-1)
    return total, torch.zeros_like(total)


def _outer_edges(plan: Plan, root1: Tensor, root2: Tensor, c: Tensor, s: Tensor) -> Tensor:
    """Edges for x = z1 / sqrt(q1): phi's own breaks, those of z2's conditional mean, and boundary layers.

    The inner integral, as a function of x, is phi smoothed by a Gaussian of width s / |c| round each kink,
    so panels of that width stand there; without them |c| near 1 loses five digits.
    """
    slope = c * root2
    slope = torch.where(slope.abs() > _TINY, slope, _TINY)
    width = s / c.abs().clamp_min(_TINY)
    layers = torch.tensor(_LAYERS, dtype=torch.float64, device=width.device) * width
    smoothed = (plan.kinks / slope)[..., :, None] + layers[..., None, :]
    own = plan.breaks / root1.clamp_min(_TINY)
    return with_edges(plan.base, torch.cat([own, plan.breaks / slope, smoothed.flatten(-2)], dim=-1))
