"""Find where a pointwise function has to be cut: its kinks, and the places where it is sharp."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from kgraph.errors import InputError
from kgraph.maps.quadrature import Function, Plan, gaussian_rule, jets, value_and_slope
from kgraph.maps.steps import levels, probes

_CELLS = 4001
_SMALLEST_JUMP = 1e-11
"""A jump below this share of the function's largest value is rounding, or does not matter."""
_TOLERANCE = 1e-11
_PANEL = 4.25
_WIDE = 8.5 * 8
_MAX_HALVINGS = 44
_MAX_PANELS = 2000
_FAR = (0, 2, 4, 6, 8, 12, 16, 24, 32, 48, 64, 96, 128, 192, 256, 384, 512)
"""Exponents of landmarks: dense where activations bend, and few up to the largest float."""
_SPANS = (8.5, 12.75, 17.0, 25.5, 38.25)
"""Half ranges tried, in standard deviations: 8.5 unless the function grows exponentially."""


def find_kinks(fn: Function, reach: float, device: torch.device) -> Tensor:
    """Points in [-reach, reach] where phi, phi' or phi'' jumps, sorted.

    Every cell of a fine grid is halved, keeping the half over which the quantity changes more. Over a smooth
    place the change halves with the cell; over a jump it stays. What stays down to the last bit is a kink.
    Two kinks in one cell (reach / 2000), of which one is found, are told apart by cells that shrink towards it: those
    of a steep hardtanh. Where both hide, the adaptive panels have to see what lies between.
    """
    # Off-centre ends: no grid point falls on 0, 1, 3 or 6, where activations have their kinks.
    grid = torch.linspace(-reach * 1.0037, reach * 1.0071, _CELLS, dtype=torch.float64, device=device)
    points = _kinks_between(fn, grid)
    if 0 < len(points) <= _FEW:
        away = (grid[1] - grid[0]) * 2.0 ** -torch.arange(_HALVINGS, dtype=torch.float64, device=device)
        near = (points[:, None] + torch.cat([-away, away])).flatten().sort().values
        points = torch.cat([points, _kinks_between(fn, near)])
    return distinct(torch.where(points.abs() < 1e-15 * reach, 0.0, points), 1e-12 * reach)


_FEW, _HALVINGS = 32, 34


def _kinks_between(fn: Function, grid: Tensor) -> Tensor:
    """At most one of each order a cell, of sorted points."""
    values = _finite_jets(fn, grid)
    floor = _SMALLEST_JUMP * values.abs().amax(dim=1)
    order = torch.arange(3, device=grid.device).repeat_interleave(len(grid) - 1)
    low, high = grid[:-1].repeat(3), grid[1:].repeat(3)
    at_low, at_high = values[:, :-1].reshape(-1), values[:, 1:].reshape(-1)
    start = (at_high - at_low).abs()
    for steps in (6, 12, 34):
        low, high, at_low, at_high = _bisect(fn, order, low, high, at_low, at_high, steps)
        change = (at_high - at_low).abs()
        keep = (change > start * 2.0 ** (2 - steps)) & (change > floor[order])
        order, low, high, start = order[keep], low[keep], high[keep], change[keep]
        at_low, at_high = at_low[keep], at_high[keep]
    return (low + high) / 2


def _finite_jets(fn: Function, z: Tensor) -> Tensor:
    # An infinite derivative at a single point (sqrt|u| at 0) is no jump; panels shrink towards it instead.
    return torch.nan_to_num(jets(fn, z), nan=0.0, posinf=0.0, neginf=0.0)


def _bisect(
    fn: Function, order: Tensor, low: Tensor, high: Tensor, at_low: Tensor, at_high: Tensor, steps: int
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    rows = torch.arange(len(order), device=order.device)
    for _ in range(steps if len(order) else 0):
        middle = (low + high) / 2
        at_middle = _finite_jets(fn, middle)[order, rows]
        left = (at_middle - at_low).abs() > (at_high - at_middle).abs()
        low, at_low = torch.where(left, low, middle), torch.where(left, at_low, at_middle)
        high, at_high = torch.where(left, middle, high), torch.where(left, at_middle, at_high)
    return low, high, at_low, at_high


def distinct(points: Tensor, gap: float) -> Tensor:
    """Sorted points, those nearer than ``gap`` to the one before left out."""
    points = points.sort().values
    keep = torch.ones_like(points, dtype=torch.bool)
    keep[1:] = points.diff() > gap
    return points[keep]


def make_plan(fn: Function, kinks: Callable[[float], Tensor], scale: float, device: torch.device) -> Plan:
    """Panels that integrate phi^2 and phi'^2 under N(0, scale^2) to about 1e-11 relative.

    Args:
        kinks: ``reach -> kinks in [-reach, reach]``, on the device.
        scale: standard deviation of the widest Gaussian the plan must serve.
        device: where the function is evaluated.

    Raises:
        InputError: phi is not finite, or has no finite Gaussian second moment.
    """
    span = _span(fn, scale, device)
    inside = kinks(span * scale)
    inside = inside[inside.abs() < span * scale]
    cuts = torch.cat([inside, _landmarks(span * scale).to(device)]) / scale
    fewest = round(2 * span / _PANEL)
    for panels in (fewest - 1, fewest, *((6, 8, 12) if len(cuts) == 0 else ())):
        base = torch.linspace(-span, span, panels + 1, dtype=torch.float64, device=device)
        if not any(_unresolved(fn, grid, cuts, scale) for grid in _shifts(base)):
            return Plan(base, inside, cuts[len(inside) :] * scale, _heights(fn, inside, span * scale))
    base = torch.linspace(-span, span, fewest + 1, dtype=torch.float64, device=device)
    for grid in _shifts(base):
        cuts = torch.cat([cuts, _refine(fn, grid, cuts, scale)])
    return Plan(base, inside, cuts[len(inside) :].sort().values * scale)


def _heights(fn: Function, kinks: Tensor, reach: float) -> Tensor | None:
    return levels(*value_and_slope(fn, probes(kinks, reach))) if len(kinks) else None


def _landmarks(reach: float) -> Tensor:
    """0 and some +-2^k for a wide Gaussian: activations bend near 0, between its nodes."""
    if reach <= _WIDE:
        return torch.zeros(0, dtype=torch.float64, device="cpu")
    powers = 2.0 ** torch.tensor(_FAR, dtype=torch.float64, device="cpu")
    powers = powers[powers < reach]
    return torch.cat([-powers.flip(0), torch.zeros_like(powers[:1]), powers])


def _shifts(base: Tensor) -> tuple[Tensor, Tensor]:
    """The panels, and the panels moved by half their width: inner panels lie anywhere along phi."""
    return base, torch.cat([base[:1], (base[:-1] + base[1:]) / 2, base[-1:]])


def _span(fn: Function, scale: float, device: torch.device) -> float:
    for span in _SPANS:
        x, weight = gaussian_rule(torch.linspace(-span, span, 4 * int(span), dtype=torch.float64, device=device))
        mass = weight * torch.stack(value_and_slope(fn, scale * x)) ** 2
        if not torch.isfinite(mass).all():
            break
        ends = x.abs() > 0.9 * span
        if (mass[:, ends].sum(1) <= 1e-11 * mass.sum(1)).all():
            return span
    raise InputError(
        f"A function or its derivative is not finite, or not square integrable, for q = {scale**2:g}",
        hint="Check its domain; kgraph.montecarlo measures the model as it is",
    )


def _panels(grid: Tensor, cuts: Tensor) -> Tensor:
    """``[panels, 2]``: ends of the panels between grid points and cuts, empty ones left out."""
    edges = torch.cat([grid, cuts]).unique()
    return torch.stack([edges[:-1], edges[1:]], dim=-1)


def _masses(fn: Function, panels: Tensor, scale: float) -> tuple[Tensor, Tensor]:
    """Integrals over the panels by one rule, and by the rule on both halves: two ``[8, panels]``."""
    halves = torch.stack([panels[:, 0], panels.mean(1), panels[:, 1]], dim=-1)
    return _mass(fn, *gaussian_rule(panels), scale), _mass(fn, *gaussian_rule(halves), scale)


def _mass(fn: Function, x: Tensor, weight: Tensor, scale: float) -> Tensor:
    """Integrals of f^2, f, x f^2 and x f, for f = phi and phi'.

    f^2 sets the scale; the others see what squaring (|u|^3) or symmetry (a sine, a step) hides.
    """
    f = torch.stack(value_and_slope(fn, scale * x))
    once = torch.cat([weight * f * f, weight * f])
    return torch.cat([once, x * once]).sum(-1)


def _bad(whole: Tensor, split: Tensor, total: Tensor) -> Tensor:
    """Panels whose two integrals disagree, or are no numbers; total ``[2, 1]`` is E[phi^2] and E[phi'^2]."""
    allowed = _TOLERANCE * torch.cat([total, total.sqrt()]).repeat(2, 1)
    return ~((whole - split).abs() <= allowed).all(0)


def _unresolved(fn: Function, grid: Tensor, cuts: Tensor, scale: float) -> bool:
    whole, split = _masses(fn, _panels(grid, cuts), scale)
    return bool(_bad(whole, split, split[:2].sum(1, keepdim=True)).any())


def _refine(fn: Function, grid: Tensor, cuts: Tensor, scale: float) -> Tensor:
    """Halve unresolved panels until none is left: their ends and middles, without cuts already made."""
    panels, done = _panels(grid, cuts), grid.new_zeros(2, 1)
    found = [grid[:0]]
    for _ in range(_MAX_HALVINGS):
        whole, split = _masses(fn, panels, scale)
        # The totals are summed anew each round: the first panels may have missed all of a narrow phi'.
        bad = _bad(whole, split, done + split[:2].sum(1, keepdim=True))
        done = done + split[:2, ~bad].sum(1, keepdim=True)
        panels = panels[bad]
        if len(panels) == 0:
            points = torch.cat(found).unique()
            return points[~torch.isin(points, torch.cat([cuts, grid[[0, -1]]]))]
        if len(panels) > _MAX_PANELS:
            break
        middles = panels.mean(1)
        found.append(torch.cat([panels.flatten(), middles]))
        panels = torch.cat([torch.stack([panels[:, 0], middles], -1), torch.stack([middles, panels[:, 1]], -1)])
    raise InputError(
        "The Gaussian integral of a pointwise function or of its squared derivative does not converge",
        hint="Its derivative may be infinite somewhere; kgraph.analyze draws such functions",
    )
