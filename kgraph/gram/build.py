"""Making fields: scaled, shifted, mapped, moved, cut. Each looks at what it is given, so that laws stay simple."""

from __future__ import annotations

import zlib
from collections.abc import Callable
from dataclasses import replace

import torch
from torch import Tensor

from kgraph.gram.field import (
    Affine,
    Attended,
    Crossed,
    Drawn,
    Field,
    Grouped,
    Joined,
    Known,
    Leaf,
    Located,
    Mapped,
    Masked,
    Moved,
    Product,
    Scores,
    Sliced,
    Sum,
)
from kgraph.gram.functions import as_function, once_moved
from kgraph.gram.places import Gather, PlaceMap, apply
from kgraph.maps import Pointwise
from kgraph.maps.combine import composed, transformed
from kgraph.roots import Root

Cut = tuple[str, int, int]
"""Which axis of channels, from where to where."""
Pick = Callable[[Tensor], Tensor]
"""The channels cut out of a known tensor's, [N, C, *places]."""


def scaled(u: Field, factor: float) -> Field:
    """``factor * u``."""
    if factor == 1.0:
        return u
    if isinstance(u, Known) and not u.own:
        return Known(u.places, u.roots, u.how, u.data * factor)
    if isinstance(u, Sum):
        return Sum(u.places, u.roots, u.how, tuple((w * factor, t) for w, t in u.terms))
    if isinstance(u, Scores):
        return replace(u, scale=u.scale * factor)
    if isinstance(u, Mapped):
        return Mapped(u.places, u.roots, u.how, transformed(u.fn, factor, 0.0), u.arg)
    return Sum(u.places, u.roots, u.how, ((factor, u),))


def mapped(fn: Pointwise, u: Field) -> Field:
    """``fn(u)``: one function of what ``u`` itself is a function of; a fixed tensor is mapped at once."""
    match u:
        case Known() if not u.own:  # what moves does so by the function's slope, which draws know
            return Known(u.places, u.roots, u.how, fn(u.data.clone()).double())
        case Moved(arg=arg, op=op) if not op.mixes and not isinstance(op, Gather):
            return moved(mapped(fn, arg), op)
        case Moved(arg=arg, op=Gather() as op) if u.level is None and arg.level is not None:
            at_zero = float(fn(torch.zeros(1, dtype=torch.float64)))  # what holes become
            return shifted(moved(mapped(fn.affine(output_shift=-at_zero), arg), op), at_zero)
        case Joined(args=args, axis=axis) if u.level is None:
            parts = tuple(mapped(fn, arg) for arg in args)
            return Joined(u.places, u.roots, u.how, parts, axis)
        case Masked():
            return _mapped_mask(fn, u)
    inner, base = as_function(u)
    if base is not u and isinstance(base, Moved | Joined | Masked):
        return mapped(composed(fn, inner), base)
    return Mapped(u.places, base.roots, u.how, composed(fn, inner), base)


def _mapped_mask(fn: Pointwise, u: Masked) -> Field:
    """``fn(m u / keep) = fn(0) + (m / keep) keep (fn(u / keep) - fn(0))`` for a mask m of zeros and ones."""
    at_zero = float(fn(torch.zeros(1, dtype=torch.float64)))
    jump = mapped(fn.affine(1 / u.keep, 0.0, -at_zero, u.keep), u.arg)
    return shifted(replace(u, arg=jump), at_zero)


def shifted(u: Field, constant: float) -> Field:
    """``u + constant``."""
    if constant == 0.0:
        return u
    if isinstance(u, Known):
        return Known(u.places, u.roots, u.how, u.data + constant, u.own, u.given)
    if isinstance(u, Mapped):
        return Mapped(u.places, u.roots, u.how, transformed(u.fn, 1.0, constant), u.arg)
    one = torch.ones((1,) * (1 + len(u.places)), dtype=torch.float64)
    return Located(u.places, u.roots, u.how, u, one, constant * one)


def moved(u: Field, op: PlaceMap) -> Field:
    """A linear map of positions, applied to a known tensor at once."""
    places = op.places(u.places)
    if isinstance(u, Known) and not u.own:  # what moves keeps its own positions: its tangents are about them
        return Known(places, u.roots, u.how, apply(op, u.data, 2, u.places))
    return once_moved(u, op)


def arguments(u: Field) -> tuple[Field, ...]:
    """The fields that ``u`` is made of."""
    match u:
        case Sum(terms=terms):
            return tuple(term for _, term in terms)
        case Grouped(args=args):
            return tuple(arg for _, arg in args)
        case Product(left=left, right=right) | Crossed(left=left, right=right):
            return left, right
        case Joined(args=args) | Drawn(args=args):
            return args
        case Scores(query=query, key=key):
            return query, key
        case Attended(weights=weights, value=value):
            return weights, value
        case Known() | Leaf():
            return ()
    return (u.arg,)  # type: ignore[attr-defined]


def sliced(u: Field, low: int, high: int, total: int) -> Field:
    """Channels ``low:high`` of ``total``: the cut is pushed down to the leaves."""
    if (low, high) == (0, total):
        return u
    return _cut(u, (f"of {total}", low, high), lambda x: x[:, low:high], {})


def reordered(u: Field, order: Tensor) -> Field:
    """Channels in another order: the same law, and (but for a few that stay where they are) other random numbers."""
    name = zlib.crc32(order.numpy().tobytes())
    return _cut(u, (f"{_ORDER} {name:x}", 0, 1), lambda x: x[:, order.to(x.device)], {})


def is_reordered(u: Field) -> bool:
    """Whether channels behind the field stand in another order already."""
    return any(label.startswith(_ORDER) for root in u.roots for label, _, _ in root.cuts)


_ORDER = "order"


def _after(cuts: tuple[Cut, ...], cut: Cut) -> tuple[Cut, ...]:
    """A cut of what is cut already: another axis, even where it is as long as an earlier one."""
    label, low, high = cut
    return (*cuts, (f"{label} at {len(cuts)}", low, high))


def _cut(u: Field, cut: Cut, pick: Pick, seen: dict[Field, Field]) -> Field:
    if u not in seen:
        seen[u] = _cut_once(u, cut, pick, seen)
    return seen[u]


def _cut_once(u: Field, cut: Cut, pick: Pick, seen: dict[Field, Field]) -> Field:
    def part(v: Field) -> Field:
        return _cut(v, cut, pick, seen)

    roots = frozenset(Root(r.name, _after(r.cuts, cut)) for r in u.roots)
    match u:
        case Known():
            whole = u.data.shape[1] == 1 or u.constant is not None
            if not u.own:  # channels of an input are as like each other as they are: no cut makes them independent
                roots = u.roots
            elif u.given:
                roots |= u.roots
            return replace(u, roots=roots, data=u.data if whole else pick(u.data))
        case Affine() | Leaf() | Sliced() | Scores():
            return Sliced(u.places, roots, u.how, u)
        case Attended():
            return replace(u, roots=roots, weights=part(u.weights), value=part(u.value))
        case Sum():
            return replace(u, roots=roots, terms=tuple((w, part(t)) for w, t in u.terms))
        case Product():
            return replace(u, roots=roots, left=part(u.left), right=part(u.right))
        case Joined() | Drawn():
            return replace(u, roots=roots, args=tuple(part(a) for a in u.args))
        case _:
            return replace(u, roots=roots, arg=part(u.arg))  # type: ignore[attr-defined]
