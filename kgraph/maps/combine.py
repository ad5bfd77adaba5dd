"""Functions made of functions: compositions, sums, products, choices; each made once, with the kinks of its parts.

A function put together from others is integrated as one: its kinks are those of its parts and, of a composition, the
points that the inner one maps to kinks of the outer one. Where closed forms are known to stay (two slopes, squares)
they do.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor

from kgraph.maps.closed import ClosedForm, closed_form, two_slopes
from kgraph.maps.panels import find_kinks
from kgraph.maps.pointwise import Pointwise
from kgraph.maps.quadrature import value

IDENTITY = Pointwise(lambda u: u, closed_form("identity"))
_CELLS = 4001
_HALVINGS = 60
_made: dict[tuple[Any, ...], Pointwise] = {}


def _once(key: tuple[Any, ...], make: Callable[[], Pointwise]) -> Pointwise:
    if key not in _made:
        _made[key] = make()
    return _made[key]


def affine_map(scale: float, shift: float) -> Pointwise:
    """``scale z + shift``."""
    if (scale, shift) == (1.0, 0.0):
        return IDENTITY
    return _once(("affine", scale, shift), lambda: _line(scale, shift))


def _line(scale: float, shift: float) -> Pointwise:
    moved = IDENTITY.affine(input_scale=scale, output_shift=shift)
    _lines[moved] = scale, shift
    return moved


_lines: dict[Pointwise, tuple[float, float]] = {IDENTITY: (1.0, 0.0)}


def line_of(fn: Pointwise) -> tuple[float, float] | None:
    """(scale, shift) of a function made by `affine_map`, else None."""
    return _lines.get(fn)


def transformed(fn: Pointwise, scale: float, shift: float) -> Pointwise:
    """``scale fn(z) + shift``."""
    if (scale, shift) == (1.0, 0.0):
        return fn
    if line := line_of(fn):
        return affine_map(scale * line[0], scale * line[1] + shift)
    if scale == 0.0:
        return affine_map(0.0, shift)
    return _once(("out", fn, scale, shift), lambda: fn.affine(output_scale=scale, output_shift=shift / scale))


def composed(outer: Pointwise, inner: Pointwise) -> Pointwise:
    """``outer(inner(z))``."""
    if outer is IDENTITY or inner is IDENTITY:
        return inner if outer is IDENTITY else outer
    if line := line_of(outer):
        return transformed(inner, *line)
    if line := line_of(inner):
        return _once(("in", outer, *line), lambda: outer.affine(input_scale=line[0], input_shift=line[1]))
    return _once(("composed", outer, inner), lambda: _compose(outer, inner))


def _compose(outer: Pointwise, inner: Pointwise) -> Pointwise:
    def both(z: Tensor) -> Tensor:
        return outer(inner(z))

    one, two = _slopes(outer), _slopes(inner)
    closed = None
    if one is not None and two is not None:
        positive, negative = two
        closed = two_slopes(positive * one[int(positive < 0)], negative * one[int(negative >= 0)])
    return Pointwise(both, closed, kinks_of=partial(_composed_kinks, outer, inner))


def _slopes(fn: Pointwise) -> tuple[float, float] | None:
    return None if fn.closed is None else fn.closed.slopes


def _composed_kinks(outer: Pointwise, inner: Pointwise, reach: float, device: torch.device) -> Tensor:
    """Kinks of the inner function, and where it crosses those of the outer one."""
    own = inner.kinks(reach, device)
    grid = torch.linspace(-reach * 1.0037, reach * 1.0071, _CELLS, dtype=torch.float64, device=device)
    grid = torch.cat([grid, own]).sort().values  # between jumps of the inner function it is monotone, or nearly
    with torch.no_grad():
        at = value(inner.fn, grid)
    at = torch.nan_to_num(at, nan=0.0, posinf=1e300, neginf=-1e300)
    found = [own]
    for level in outer.kinks(float(at.abs().max().clamp_max(2.0**20)), device).tolist():
        below = at < level
        cells = (below[1:] != below[:-1]).nonzero().flatten()
        found += [_crossings(inner, level, grid[cells], grid[cells + 1], below[cells])]
        found += [grid[_ends(at == level)]]
    return torch.cat(found)


def _ends(on: Tensor) -> Tensor:
    """Of every run of true entries, the first and the last: where a function stays at one level, nothing jumps."""
    inside = on.clone()
    inside[1:] &= on[:-1]
    inside[:-1] &= on[1:]
    return on & ~inside


def _crossings(fn: Pointwise, level: float, low: Tensor, high: Tensor, below: Tensor) -> Tensor:
    """Points between low and high where ``fn`` crosses ``level``; ``below`` says which side low is on."""
    for _ in range(_HALVINGS if len(low) else 0):
        middle = (low + high) / 2
        with torch.no_grad():
            like_low = (value(fn.fn, middle) < level) == below
        low, high = torch.where(like_low, middle, low), torch.where(like_low, high, middle)
    return (low + high) / 2


def summed(f: Pointwise, g: Pointwise) -> Pointwise:
    """``f(z) + g(z)``."""
    one, two = line_of(f), line_of(g)
    if one and two:
        return affine_map(one[0] + two[0], one[1] + two[1])
    return _once(
        ("sum", f, g), lambda: Pointwise(lambda z: f(z) + g(z), _summed(f, g), kinks_of=partial(_of_parts, (f, g)))
    )


def _summed(f: Pointwise, g: Pointwise) -> ClosedForm | None:
    one, two = _slopes(f), _slopes(g)
    return None if one is None or two is None else two_slopes(one[0] + two[0], one[1] + two[1])


def multiplied(f: Pointwise, g: Pointwise) -> Pointwise:
    """``f(z) g(z)``."""
    one, two = line_of(f), line_of(g)
    if one and one[0] == 0.0:
        return transformed(g, one[1], 0.0)
    if two and two[0] == 0.0:
        return transformed(f, two[1], 0.0)
    if one and two and one[1] == two[1] == 0.0:
        return transformed(_SQUARE, one[0] * two[0], 0.0)
    return _once(("product", f, g), lambda: Pointwise(lambda z: f(z) * g(z), kinks_of=partial(_of_parts, (f, g))))


_SQUARE = Pointwise(torch.square, closed_form("square"))


def chosen(condition: Pointwise, f: Pointwise, g: Pointwise) -> Pointwise:
    """``f(z)`` where ``condition(z)``, else ``g(z)``."""

    def choice(z: Tensor) -> Tensor:
        return torch.where(condition(z) != 0, f(z).to(z.dtype), g(z).to(z.dtype))

    parts = (condition, f, g)
    return _once(("where", *parts), lambda: Pointwise(choice, kinks_of=partial(_of_parts, parts)))


def together(name: tuple[Any, ...], function: Callable[..., Tensor], *parts: Pointwise) -> Pointwise:
    """``function(f(z), g(z), ...)`` for an elementwise ``function`` that ``name`` tells from others."""

    def all_of_them(z: Tensor) -> Tensor:
        return function(*(f(z) for f in parts))

    def kinks(reach: float, device: torch.device) -> Tensor:  # a maximum has kinks where no part has one
        return torch.cat([_of_parts(parts, reach, device), find_kinks(all_of_them, reach, device)])

    return _once(("together", name, *parts), lambda: Pointwise(all_of_them, kinks_of=kinks))


def _of_parts(parts: tuple[Pointwise, ...], reach: float, device: torch.device) -> Tensor:
    return torch.cat([part.kinks(reach, device) for part in parts])


__all__ = [
    "IDENTITY",
    "affine_map",
    "chosen",
    "composed",
    "line_of",
    "multiplied",
    "summed",
    "together",
    "transformed",
]
