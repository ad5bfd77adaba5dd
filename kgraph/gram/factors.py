"""Trained factors in front of a nonlinearity (`kgraph.maps.tangent`): where they stand in a field."""

from __future__ import annotations

from kgraph.gram import field as f
from kgraph.gram.build import arguments
from kgraph.gram.field import Field
from kgraph.maps.tangent import TrainedFactor


def trained_factor(u: Field) -> TrainedFactor | None:
    """The factors in ``u = c t + b``; None where there is none, or where they cannot be told apart."""
    match u:
        case f.Moved(arg=arg, op=op) if not op.mixes:
            return trained_factor(arg)
        case f.Product(left=t, right=f.Known() as k) if k.gain and k.constant:
            inner = trained_factor(t)
            if inner is None:
                return TrainedFactor(k.gain / k.constant**2, 0.0) if not holds_factor(t) else None
            return TrainedFactor(k.gain / k.constant**2 + inner.gain, 0.0) if not inner.shift else None
        case f.Sum(terms=terms):
            shifts = [w * t.constant for w, t in terms if isinstance(t, f.Known) and t.constant is not None]
            others = [(w, t) for w, t in terms if not (isinstance(t, f.Known) and t.constant is not None)]
            inner = trained_factor(others[0][1]) if len(others) == 1 else None
            return None if inner is None else TrainedFactor(inner.gain, sum(shifts) + others[0][0] * inner.shift)
    return None


def unresolved(u: Field) -> bool:
    """Whether ``u`` holds trained factors that are not one number each behind one affine layer."""
    return holds_factor(u) and trained_factor(u) is None


def holds_factor(u: Field) -> bool:
    """Whether a trained factor stands somewhere in ``u`` behind its last affine layer."""
    if isinstance(u, f.Product) and isinstance(u.right, f.Known) and u.right.gain:
        return True
    return not isinstance(u, (f.Affine, f.Known, f.Leaf)) and any(holds_factor(arg) for arg in arguments(u))
