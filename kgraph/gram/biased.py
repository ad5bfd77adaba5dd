"""Functions of what holds biases that are no Gaussians: averaged over the biases, Gaussian about each of them.

PyTorch draws uniform biases. Of few inputs, or behind layers that make q small, they are a large share of a unit.
Of relu and its kin, that would cost the closed form and a hundred times the speed: they count all biases as Gaussians.
E[relu(u) relu(v)] is then off by about a twelfth of the biases' fourth cumulant over the square of the variance, and
the less the nearer c is to 1.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache

from torch import Tensor

from kgraph.biases import SHOWS, together
from kgraph.gram import field as f
from kgraph.gram.calculus import Calculus
from kgraph.gram.field import Field
from kgraph.kernel import Bias
from kgraph.maps import Pointwise


@dataclass(frozen=True)
class About:
    """One value of the biases: its weight, what it adds to the field, and the variance that the biases have in it."""

    weight: float = 1.0
    value: float = 0.0
    less: float = 0.0

    def of(self, fn: Pointwise, level: float) -> Pointwise:
        """The function of what is left, a Gaussian of mean 0."""
        return centred(fn, level + self.value)

    def left(self, variance: Tensor) -> Tensor:
        return (variance - self.less).clamp_min(0) if self.less else variance


Held = dict[Bias, float]
"""Biases in a field, with their weights."""


def about(engine: Calculus, u: Field) -> tuple[About, ...]:
    """The values of the biases that show in a Gaussian field; the one value 0 where none does."""
    return _values(_law(_held(u))) if shows(engine, u) else (About(),)


def about_both(engine: Calculus, u: Field, v: Field) -> list[tuple[About, About, float]] | None:
    """Values in two fields at once and the biases' covariance; None where some are shared, others not."""
    if not (shows(engine, u) or shows(engine, v)):
        return [(About(), About(), 0.0)]
    one, two = _held(u), _held(v)
    if not one.keys() & two.keys():
        return [(a, b, 0.0) for a in about(engine, u) for b in about(engine, v)]
    if one == two:
        return [(a, a, a.less) for a in _values(_law(one))]
    if one.keys() == two.keys() and len(one) == 1:
        ((bias, mine),), (theirs,) = one.items(), two.values()
        both = zip(_values(bias.times(mine)), _values(bias.times(theirs)), strict=True)
        return [(a, b, mine * theirs * bias.variance) for a, b in both]
    return None


def shows(engine: Calculus, u: Field) -> bool:
    """Whether the law of the biases in a field shows: their fourth cumulant is a share of its variance squared."""
    law = _law(_held(u))
    return law is not None and abs(law.excess) > SHOWS * float(engine.variance(u).min()) ** 2


def _values(law: Bias | None) -> tuple[About, ...]:
    if law is None:
        return (About(),)
    pairs = zip(law.weights.tolist(), law.nodes.tolist(), strict=True)
    return tuple(About(weight, node, law.variance) for weight, node in pairs)


def _law(held: Held) -> Bias | None:
    return _sum(frozenset(held.items())) if held else None


@lru_cache(256)
def _sum(held: frozenset[tuple[Bias, float]]) -> Bias:
    return together([bias.times(weight) for bias, weight in held])


def _held(u: Field) -> Held:
    match u:
        case f.Affine(layer=layer):
            return {} if layer.bias_law is None else {layer.bias_law: 1.0}
        case f.Leaf(bias_law=law):
            return {} if law is None else {law: 1.0}
        case f.Sliced(arg=arg):
            return _held(arg)
        case f.Moved(arg=arg, op=op) if not op.mixes:
            return _held(arg)
        case f.Sum(terms=terms) if len(terms) <= _MOST_TERMS:
            found: Held = {}
            for weight, term in terms:
                for bias, own in _held(term).items():
                    found[bias] = found.get(bias, 0.0) + weight * own
            return found
    return {}


_MOST_TERMS = 8


def of_few(u: Field) -> bool:
    """Whether a Gaussian field holds units of few weights that are no Gaussians."""
    match u:
        case f.Affine(layer=layer):
            return layer.few
        case f.Leaf(few=few):
            return few
        case f.Sliced(arg=arg) | f.Moved(arg=arg):
            return of_few(arg)
        case f.Sum(terms=terms):
            return any(of_few(term) for _, term in terms[:_MOST_TERMS])
    return False


def averages(fn: Pointwise) -> bool:
    """Whether a function is averaged over biases; functions with kinks and a closed form are not."""
    return fn.closed is None or not len(fn.kinks())


def centred(fn: Pointwise, shift: float) -> Pointwise:
    """``u -> fn(u + shift)``; made once."""
    return fn if shift == 0.0 else _shifted(fn, shift)


@lru_cache(1024)
def _shifted(fn: Pointwise, shift: float) -> Pointwise:
    return fn.affine(input_shift=shift)


__all__ = ["About", "about", "about_both", "averages", "centred", "of_few", "shows"]
