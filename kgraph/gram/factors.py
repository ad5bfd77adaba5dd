"""Trained factors in front of a nonlinearity: their own term in the tangents of what comes behind it.

    z = c t + b,  y = f(z):    dy/dc = f'(z) (z - b) / c,    own term E[psi psi'] / c^2,  psi(z) = f'(z) (z - b)

A tangent that an affine layer has mixed is independent of the field, so that it becomes E[f' f'] T(z, z'). That of a
factor (the gain of a norm: a number c in every channel) is the field itself, so that it starts behind f instead.
"""

from __future__ import annotations

import weakref
from dataclasses import dataclass, replace

from kgraph.gram import field as f
from kgraph.gram.build import arguments, moved
from kgraph.gram.field import Field


@dataclass(frozen=True)
class Factor:
    """A trained factor in front of ``(z - shift) / c``.

    Attributes:
        shift: b.
        size: c.
        known: the factor as a field.
    """

    shift: float
    size: float
    known: Field


@dataclass(frozen=True)
class Factors:
    """Those in a field, and the field ``still`` with factors that do not move."""

    still: Field
    each: tuple[Factor, ...] = ()

    def line(self, still: Field, scale: float, shift: float) -> Factors:
        """Those of ``scale u + shift``, which is ``still`` where no factor moves."""
        return Factors(still, tuple(replace(one, shift=scale * one.shift + shift) for one in self.each))


_found: weakref.WeakKeyDictionary[Field, Factors | None] = weakref.WeakKeyDictionary()
_holding: weakref.WeakKeyDictionary[Field, bool] = weakref.WeakKeyDictionary()


def factors(u: Field) -> Factors | None:
    """Those in ``u``; None where they are not one number each behind one affine layer."""
    if not holds_factor(u):
        return Factors(u)
    if u not in _found:
        _found[u] = _factors(u)
    return _found[u]


def _factors(u: Field) -> Factors | None:
    match u:
        case f.Moved(arg=arg, op=op) if not op.mixes:
            inner = factors(arg)
            if inner is None or any(one.shift and not (one.known.places or op.keeps_constants) for one in inner.each):
                return None
            each = (replace(one, known=moved(one.known, op)) if one.known.places else one for one in inner.each)
            return Factors(moved(inner.still, op), tuple(each))
        case f.Product(left=t, right=k):
            inner, c = factors(t), f.constant_of(k)
            if inner is None or not c:
                return None
            outer = inner.line(replace(u, left=inner.still, right=_at_rest(k)), c, 0.0)
            return replace(outer, each=(*outer.each, Factor(0.0, c, k))) if _moves(k) else outer
        case f.Sum(terms=terms):
            return _of_sum(u, terms)
    return None


def _of_sum(u: f.Sum, terms: tuple[tuple[float, Field], ...]) -> Factors | None:
    """Of one term that is no constant, and constants."""
    constants = [f.constant_of(t) for _, t in terms]
    at = [i for i, constant in enumerate(constants) if constant is None]
    inner = factors(terms[at[0]][1]) if len(at) == 1 else None
    if inner is None:
        return None
    at_rest = tuple((w, inner.still if i == at[0] else t) for i, (w, t) in enumerate(terms))
    shift = sum(w * constant for (w, _), constant in zip(terms, constants, strict=True) if constant is not None)
    return inner.line(replace(u, terms=at_rest), terms[at[0]][0], shift)


def _moves(k: Field) -> bool:
    """Whether a factor is trained."""
    return _moves(k.arg) if isinstance(k, f.Moved) else isinstance(k, f.Known) and bool(k.own)


def _at_rest(k: Field) -> Field:
    """A factor as a constant."""
    if isinstance(k, f.Moved):
        return moved(_at_rest(k.arg), k.op)
    return replace(k, own={}) if isinstance(k, f.Known) else k


def holds_factor(u: Field) -> bool:
    """Whether a trained factor stands somewhere in ``u`` behind its last affine layer."""
    if isinstance(u, (f.Affine, f.Known, f.Leaf)):
        return False
    if u not in _holding:  # streams are long: what was asked of one before is known of its continuation
        own = isinstance(u, f.Product) and _moves(u.right)
        _holding[u] = own or any(holds_factor(arg) for arg in arguments(u))
    return _holding[u]
