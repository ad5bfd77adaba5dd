"""Fields that are one function of another: whoever writes an activation out, it is integrated as one.

``x * sigmoid(x)``, ``relu(10 x + .5) - relu(10 x - .5)``, a choice by ``x < 0``: `as_function` finds the field that all
terms are functions of, so that they can be put together before anything is integrated.
"""

from __future__ import annotations

import weakref

import torch

from kgraph.gram.field import Field, Located, Mapped, Moved, Sum
from kgraph.gram.places import Gather, PlaceMap
from kgraph.maps import Pointwise
from kgraph.maps.combine import IDENTITY, affine_map, summed, transformed

_DIGITS = 13
_sums: weakref.WeakValueDictionary[tuple[object, ...], Sum] = weakref.WeakValueDictionary()
_moves: weakref.WeakValueDictionary[tuple[object, ...], Moved] = weakref.WeakValueDictionary()


def as_function(u: Field) -> tuple[Pointwise, Field]:
    """``u`` as a function of a field: of its argument, of a sum up to a factor, else the identity of itself."""
    match u:
        case Mapped(fn=fn, arg=arg):
            return fn, arg
        case Sum():
            return _of_sum(u)
        case Located(arg=arg, gain=gain, shift=shift) if gain.numel() == shift.numel() == 1:
            fn, base = as_function(arg)
            return transformed(fn, float(gain), float(shift)), base
        case Moved(arg=arg, op=op) if not op.mixes:
            return _of_moved(u, arg, op)
    return IDENTITY, u


def _of_sum(u: Sum) -> tuple[Pointwise, Field]:
    """One function where all terms are functions of one field; else a number times a sum that is made once."""
    *others, (weight, term) = u.terms
    if all(other.roots == term.roots for _, other in others):
        total, base = as_function(term)
        total = transformed(total, weight, 0.0)
        for weight, other in reversed(others):
            fn, own = as_function(other)
            if own is not base:
                break
            total = summed(transformed(fn, weight, 0.0), total)
        else:
            return total, base
    factor = u.terms[0][0]
    if factor == 0.0:
        return IDENTITY, u
    key = tuple((float(f"{w / factor:.{_DIGITS}g}"), id(t)) for w, t in u.terms)
    found = _sums.get(key)  # the terms of one that is alive are alive, so that their ids are theirs
    if found is None:
        terms = tuple((w / factor, t) for w, t in u.terms)
        found = _sums[key] = u if factor == 1.0 else Sum(u.places, u.roots, u.how, terms)
    return affine_map(factor, 0.0), found


def _of_moved(u: Moved, arg: Field, op: PlaceMap) -> tuple[Pointwise, Field]:
    """A function of what is moved is that function of the moved; holes are zeros, and must stay so."""
    fn, base = as_function(arg)
    if base is arg or (isinstance(op, Gather) and not op.keeps_constants and not _keeps_zero(fn)):
        return IDENTITY, u
    return fn, once_moved(base, op)


def _keeps_zero(fn: Pointwise) -> bool:
    return bool(fn(torch.zeros(1, dtype=torch.float64)) == 0)


def once_moved(u: Field, op: PlaceMap) -> Moved:
    """``op`` of a field; the same object as long as it lives."""
    key = id(u), op
    found = _moves.get(key)
    if found is None:
        found = _moves[key] = Moved(op.places(u.places), u.roots, u.how, u, op)
    return found


def of_one(*fields: Field) -> tuple[tuple[Pointwise, ...], Field] | None:
    """All of them as functions of one field, None where they are not."""
    functions = [as_function(u) for u in fields]
    base = functions[0][1]
    if any(other is not base for _, other in functions):
        return None
    return tuple(fn for fn, _ in functions), base


__all__ = ["as_function", "of_one", "once_moved"]
