"""Joint draws of parts that are functions of several Gaussians, for which no quadrature exists.

Every Gaussian part gets its own quasi-random dimensions, so that expressions sharing a part share its draws.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache

import torch
from torch import Tensor

from kgraph.biases import bias_of
from kgraph.kernel import SAME, Apply, Channel, Gaussian, Mask, Pairs, Part, Product, Samples, Sum, Unknown, made_of

COUNT = 4096
"""Draws of an expression; a power of two (Sobol points)."""

_DIMENSIONS = 512
_BLOCKS = 8
_values: weakref.WeakKeyDictionary[Part, Values] = weakref.WeakKeyDictionary()
_leaves: weakref.WeakKeyDictionary[Part, int] = weakref.WeakKeyDictionary()
_found: weakref.WeakKeyDictionary[Part, frozenset[Part]] = weakref.WeakKeyDictionary()
_counter = [0]


@dataclass(frozen=True, eq=False)
class Values:
    """Draws of a part at input a (``first``, [S]) and at input b of every pair (``second``, [P, 2, S]).

    ``slope`` and ``ntk`` are, draw by draw, ``sum over Gaussian parts g of (dv_a/dg) (dv_b/dg)`` times the part's
    own slope or NTK, [P, 2, S] (Price's theorem). They add up only while no Gaussian part is met twice
    (``leaves`` are those met so far); an expression that meets one twice is differentiated afresh.
    """

    first: Tensor
    second: Tensor
    slope: Tensor
    ntk: Tensor
    leaves: frozenset[Part]

    def standard_error(self) -> float:
        """Largest standard error of the covariances, relative to q, from blocks of the point set.

        Each block is itself balanced.
        """
        second = self.second[:, SAME].reshape(-1, len(self.first)) if self.second.ndim > 1 else self.second[None]
        rows = torch.cat([(self.first * second), self.first.square()[None]])
        blocks = rows.reshape(len(rows), _BLOCKS, -1).mean(2)
        return float(blocks.std(1).max() / (_BLOCKS**0.5 * blocks[-1].mean().clamp_min(1e-300)))


@lru_cache(maxsize=1)
def _normals() -> Tensor:
    """Sobol points mapped to normals, whitened dimension by dimension, shape [dimensions, S]."""
    engine = torch.quasirandom.SobolEngine(_DIMENSIONS, scramble=True, seed=7)
    uniform = engine.draw(COUNT, dtype=torch.float64).T
    z = torch.special.ndtri(uniform.clamp(1e-12, 1 - 1e-12))
    z = (z - z.mean(1, keepdim=True)) / z.std(1, keepdim=True, unbiased=False)
    first, second = z[0::2], z[1::2]  # the two dimensions of one part: exactly uncorrelated
    second = second - (first * second).mean(1, keepdim=True) * first
    z[1::2] = second / second.std(1, keepdim=True, unbiased=False)
    return z


def _dimension(part: Part) -> int:
    if part not in _leaves:
        _leaves[part] = _counter[0]
        _counter[0] = (_counter[0] + 2) % _DIMENSIONS
    return _leaves[part]


def restart() -> None:
    """Begin a new analysis: the same model gets the same draws, hence the same numbers."""
    _counter[0] = 0
    _values.clear()
    _leaves.clear()
    _found.clear()


def evaluate(part: Part) -> Values:
    """Draws of ``part``; kept, so that long chains cost one step each."""
    queue = [part]
    while queue:  # not by recursion: a residual network is nested as deeply as it is
        one = queue[-1]
        missing = [] if one in _values else [inner for inner in made_of(one) if inner not in _values]
        if one not in _values and not missing:
            _values[one] = _draw(one)
        if not missing:
            queue.pop()
        queue += missing
    return _values[part]


def _draw(part: Part) -> Values:
    match part.expr:
        case Gaussian() | Unknown():
            return _as_leaf(part, *_draw_gaussian(part))
        case Mask(keep, height, shared):
            return _as_leaf(part, *_draw_mask(part, keep, height, shared))
        case Samples(first, second):
            return _as_leaf(part, first, second)
        case Apply(fn, arg):
            return _draw_apply(fn, evaluate(arg))
        case Sum(terms):
            return _draw_sum(part, [(weight, evaluate(term)) for weight, term in terms])
        case Product(left, right):
            return _draw_product(part, evaluate(left), evaluate(right))


def _as_leaf(part: Part, first: Tensor, second: Tensor) -> Values:
    return Values(first, second, part.slope[..., None], part.ntk[..., None], frozenset({part}))


def _draw_gaussian(part: Part) -> tuple[Tensor, Tensor]:
    dimension = _dimension(part)
    z1, z2 = _normals()[dimension], _normals()[(dimension + 1) % _DIMENSIONS]
    variance = (part.cov[Pairs.SELF, SAME] - part.mean**2).clamp_min(0)
    cov = part.cov - part.mean**2
    root = variance.sqrt()
    share = torch.where(root > 0, cov / root.clamp_min(1e-300), torch.zeros_like(cov))
    rest = (variance - share.square()).clamp_min(0).sqrt()
    return part.mean + root * z1, part.mean + share[..., None] * z1 + rest[..., None] * z2


def _draw_mask(part: Part, keep: float, height: float, shared: Tensor) -> tuple[Tensor, Tensor]:
    """The share ``keep`` of all draws, to the draw, is ``height``; two independent masks take two dimensions."""
    dimension = _dimension(part)
    z = _normals()[[dimension, (dimension + 1) % _DIMENSIONS]]
    kept = min(max(round(keep * COUNT), 1), COUNT)
    first, other = height * (z <= z.kthvalue(kept, 1, keepdim=True)[0]).double()
    return first, torch.where(shared[..., None], first, other)


def value_and_derivative(fn: Callable[[Tensor], Tensor], x: Tensor) -> tuple[Tensor, Tensor]:
    """``fn(x)`` and ``fn'(x)``, entry by entry."""
    with torch.enable_grad():
        leaf = x.detach().requires_grad_()
        value = fn(leaf).to(x)  # a comparison gives truth values
        if not value.requires_grad:
            return value, torch.zeros_like(x)
        (gradient,) = torch.autograd.grad(value.sum(), leaf)
    return value.detach(), gradient


def _draw_apply(fn: Callable[[Tensor], Tensor], arg: Values) -> Values:
    first, slope1 = value_and_derivative(fn, arg.first)
    second, slope2 = value_and_derivative(fn, arg.second)
    both = slope1 * slope2
    return Values(first, second, both * arg.slope, both * arg.ntk, arg.leaves)


def _meets_twice(values: list[Values]) -> bool:
    return sum(len(v.leaves) for v in values) > len(frozenset().union(*(v.leaves for v in values)))


def _draw_sum(part: Part, terms: list[tuple[float, Values]]) -> Values:
    if _meets_twice([values for _, values in terms]):
        return _differentiate(part)

    def total(name: str, power: int) -> Tensor:
        result = torch.zeros((), dtype=torch.float64)
        for weight, values in terms:
            result = result + weight**power * getattr(values, name)
        return result

    leaves = frozenset().union(*(values.leaves for _, values in terms))
    return Values(total("first", 1), total("second", 1), total("slope", 2), total("ntk", 2), leaves)


def _draw_product(part: Part, left: Values, right: Values) -> Values:
    if _meets_twice([left, right]):
        return _differentiate(part)
    left_both, right_both = left.first * left.second, right.first * right.second
    return Values(
        left.first * right.first,
        left.second * right.second,
        left.slope * right_both + right.slope * left_both,
        left.ntk * right_both + right.ntk * left_both,
        left.leaves | right.leaves,
    )


def _differentiate(part: Part) -> Values:
    """Values of an expression that meets a Gaussian part several times: derivatives by autodiff, part by part."""
    leaves = sorted(leaves_of(part), key=_dimension)
    known = {leaf: evaluate(leaf) for leaf in leaves}
    with torch.enable_grad():
        first_in = {leaf: known[leaf].first.detach().clone().requires_grad_() for leaf in leaves}
        second_in = {leaf: known[leaf].second.detach().clone().requires_grad_() for leaf in leaves}
        first, second = _substitute(part, dict(first_in)), _substitute(part, dict(second_in))
        d_first = torch.autograd.grad(first.sum(), list(first_in.values()), materialize_grads=True)
        d_second = torch.autograd.grad(second.sum(), list(second_in.values()), materialize_grads=True)
    slope = torch.zeros_like(second)
    ntk = torch.zeros_like(second)
    for leaf, one, two in zip(leaves, d_first, d_second, strict=True):
        slope = slope + one * two * leaf.slope[..., None]
        ntk = ntk + one * two * leaf.ntk[..., None]
    return Values(first.detach(), second.detach(), slope.detach(), ntk.detach(), frozenset(leaves))


def leaves_of(part: Part) -> frozenset[Part]:
    """The Gaussian or drawn parts that ``part`` is a function of; kept, for branches are read many times."""
    if part not in _found:
        queue, seen, leaves = [part], {part}, set[Part]()
        while queue:  # not by recursion: a residual network is nested as deeply as it is
            one = queue.pop()
            inner = () if one in _found else made_of(one)
            leaves |= _found.get(one, frozenset() if inner else frozenset({one}))
            queue += [other for other in inner if other not in seen]
            seen.update(inner)
        _found[part] = frozenset(leaves)
    return _found[part]


CONSTANTS_APART = "known tensors that differ by channel as independent of one another (they meet in the same channels)"


def uneven(part: Part) -> bool:
    """Whether channels differ in law: a known tensor with a number for every channel went into them."""
    return any(
        isinstance(leaf.expr, Channel) or (isinstance(leaf.expr, Samples) and leaf.expr.uneven)
        for leaf in leaves_of(part)
    )


def unknown_law(part: Part) -> str:
    """Why draws of the part are of another law than its own, or ""."""
    leaves = leaves_of(part)
    reason = next((leaf.expr.reason for leaf in leaves if isinstance(leaf.expr, Unknown)), "")
    if sum(isinstance(leaf.expr, Channel) for leaf in leaves) > 1:
        return CONSTANTS_APART
    if not reason and any(isinstance(leaf.expr, Gaussian) and bias_of(leaf) is not None for leaf in leaves):
        return "Gaussian biases (they are not, and a large share of what few inputs give)"
    return reason


def _substitute(part: Part, known: dict[Part, Tensor]) -> Tensor:
    """The expression with its leaves replaced; what is met several times is computed once."""
    if part not in known:
        known[part] = _substituted(part, known)
    return known[part]


def _substituted(part: Part, known: dict[Part, Tensor]) -> Tensor:
    match part.expr:
        case Apply(fn, arg):
            return fn(_substitute(arg, known))
        case Sum(terms):
            first, *rest = (weight * _substitute(term, known) for weight, term in terms)
            return sum(rest, first)
        case Product(left, right):
            return _substitute(left, known) * _substitute(right, known)
        case _:
            raise KeyError(part)  # leaves_of names every leaf
