"""Where values meet: sums, products, concatenations, and known tensors on the way."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from kgraph.canonical import aten
from kgraph.draws import CONSTANTS_APART
from kgraph.gram import field as f
from kgraph.gram.align import CHANNELS, DRAWN_CHANNELS, aligned, known_value
from kgraph.gram.build import mapped, scaled, shifted
from kgraph.gram.field import Field
from kgraph.gram.functions import of_one
from kgraph.gram.rules.pointwise import of_one_field, unary
from kgraph.gram.rules.table import Context, rule
from kgraph.gram.shares import Change, entry_terms, repeated, unchanged
from kgraph.gram.value import CannotFollow, Value, roles
from kgraph.how import How, assumed
from kgraph.maps import Pointwise
from kgraph.maps.combine import chosen, line_of, multiplied, summed
from kgraph.modules import WeightedSum


def combine(x: Value, y: Value, meet: Callable[[Field, Field], Field]) -> Value:
    """``meet`` of the fields that stand side by side."""
    ranges, axes, split = aligned(x, y)
    groups = tuple((size, meet(u, v)) for size, u, v in ranges)
    return Value(groups, axes, split if len(groups) > 1 else None)


def plus(u: Field, v: Field) -> Field:
    """``u + v``."""
    if isinstance(u, f.Known) and isinstance(v, f.Known) and not (u.own or v.own) and _fits(u.data, v.data):
        return f.Known(u.places, u.roots | v.roots, u.how | v.how, u.data + v.data)
    if (one := of_one(u, v)) is not None:  # put together before they are integrated: differences keep their digits
        (first, second), base = one
        return function_on(summed(first, second), base, u.how | v.how)
    return f.Sum(u.places, u.roots | v.roots, u.how | v.how, ((1.0, u), (1.0, v)))


def function_on(fn: Pointwise, base: Field, how: How) -> Field:
    """``fn(base)``: a straight line as what it is, so that it stays Gaussian."""
    line = line_of(fn)
    result = mapped(fn, base) if line is None else shifted(scaled(base, line[0]), line[1])
    return result if result.how == how else replace(result, how=how)


def _fits(x: Tensor, y: Tensor) -> bool:
    return x.shape[1] == y.shape[1] or 1 in (x.shape[1], y.shape[1])


def times(u: Field, v: Field) -> Field:
    """``u v``: one function where both are functions of one and the same field."""
    if isinstance(u, f.Known) and isinstance(v, f.Known) and not (u.own or v.own) and _fits(u.data, v.data):
        return f.Known(u.places, u.roots | v.roots, u.how | v.how, u.data * v.data)
    if (one := of_one(u, v)) is not None:
        (first, second), base = one
        return function_on(multiplied(first, second), base, u.how | v.how)
    if isinstance(u, f.Known):  # known factors stand on the right
        u, v = v, u
    how = u.how | v.how
    if DRAWN_CHANNELS in u.roots | v.roots and all(u.roots & _OF_CHANNELS for u in (u, v)):
        how = how | _MEET
    return f.Product(u.places, u.roots | v.roots, how, u, v)


_OF_CHANNELS = frozenset({CHANNELS, DRAWN_CHANNELS})
_MEET = assumed(CONSTANTS_APART)


def known(context: Context, tensor: Any, like: Value, index: int) -> Value:
    """A known operand as a value; a parameter is trained, so tangents have a term of its own."""
    x = torch.as_tensor(tensor)
    argument = context.node.args[index] if index < len(context.node.args) else None
    return as_known(context, x, like, context.named_of(argument))


def as_known(context: Context, x: Tensor, like: Value, name: str | None, change: Change = unchanged) -> Value:
    """``change`` of a known tensor laid out like ``like``; ``name`` is its parameter's, or its node's."""
    node = context.named.get(name) if name is not None else None
    if name in context.variances:
        why = f"the variance declared of {name!r} has no rule: it is used entry by entry, with the entries that it has"
        raise context.error(why, "Set its entries instead")
    context.refuse_declared(name or "", "it is used entry by entry")
    shared = one_for_all(x, like)
    fixed = known_value(change(shared(x)), like)
    if node is None or not context.moves(node):
        return fixed
    if fixed.places:
        shared = _without_repeats(context, node, shared, x, like)
    own = entry_terms(context, node, lambda t: change(shared(t)), places=bool(fixed.places))
    moving = known_value(change(shared(x)), like, name, own)
    if moving.channels == 1 < like.channels:
        return moving.each(lambda u: replace(u, how=u.how | ONE_FOR_ALL))
    return moving


ONE_FOR_ALL = assumed("the gradient by one number that all channels share is taken to be independent of them")


def _without_repeats(context: Context, node: torch.fx.Node, shared: Change, x: Tensor, like: Value) -> Change:
    """One of the positions, where all of them read the same parameters."""
    t, lead = shared(x), len(like.axes) - x.ndim
    dims = [d for d in range(t.ndim) if t.shape[d] > 1 and roles(like.axes[lead + d]) == {"p"}]
    found = repeated(context, node, shared, dims)

    def first(whole: Tensor) -> Tensor:
        whole = shared(whole)
        for d in found:
            whole = whole.narrow(d, 0, 1)
        return whole

    return first


def one_for_all(x: Tensor, like: Value) -> Change:
    """What takes one of the copies where a tensor is expanded, or repeated for every input."""
    dims = [d for d in range(x.ndim) if x.shape[d] > 1 and x.stride(d) == 0]
    inputs = x.ndim == len(like.axes) and roles(like.axes[0]) == {"b"} and 0 not in dims
    if inputs and len(x) > 1 and torch.equal(x, x[:1].expand_as(x)):
        dims.append(0)

    def first(t: Tensor) -> Tensor:
        for d in dims if t.ndim == x.ndim else ():
            t = t.narrow(d, 0, 1)
        return t

    return first


def _sum(context: Context, x: Any, y: Any, wx: float, wy: float) -> Value:
    if isinstance(x, Value) and isinstance(y, Value):
        return combine(_scaled(x, wx), _scaled(y, wy), plus)
    random, other, weight, at = (_scaled(x, wx), y, wy, 1) if isinstance(x, Value) else (_scaled(y, wy), x, wx, 0)
    if not isinstance(other, Tensor) or (other.numel() == 1 and not isinstance(context.node.args[at], torch.fx.Node)):
        return random.each(lambda u: shifted(u, weight * float(other)))
    return combine(random, _scaled(known(context, other, random, at), weight), plus)


def _scaled(x: Value, factor: float) -> Value:
    return x.each(lambda u: scaled(u, factor))


@rule(aten.add.Tensor, aten.add.Scalar)
def add(context: Context, x: Any, y: Any, alpha: float = 1.0) -> Value:
    return _sum(context, x, y, 1.0, float(alpha))


@rule(aten.sub.Tensor, aten.sub.Scalar)
def sub(context: Context, x: Any, y: Any, alpha: float = 1.0) -> Value:
    return _sum(context, x, y, 1.0, -float(alpha))


@rule(aten.rsub.Scalar, aten.rsub.Tensor)
def rsub(context: Context, x: Any, y: Any, alpha: float = 1.0) -> Value:
    return _sum(context, x, y, -float(alpha), 1.0)


@rule(aten.neg.default)
def neg(context: Context, x: Value) -> Value:
    return _scaled(x, -1.0)


@rule(aten.lerp.Scalar)
def lerp(context: Context, x: Any, y: Any, weight: float) -> Value:
    """``(1 - w) x + w y``."""
    return _sum(context, x, y, 1.0 - weight, weight)


@rule(WeightedSum)
def weighted_sum(context: Context, module: WeightedSum, *terms: Value) -> Value:
    total = _scaled(terms[0], module.weights[0])
    for term, weight in zip(terms[1:], module.weights[1:], strict=True):
        total = combine(total, _scaled(term, weight), plus)
    return total


@rule(aten.mul.Tensor, aten.mul.Scalar)
def mul(context: Context, x: Any, y: Any) -> Value:
    if isinstance(x, Value) and isinstance(y, Value):
        return combine(x, y, times)
    random, other, at = (x, y, 1) if isinstance(x, Value) else (y, x, 0)
    if not isinstance(other, Tensor) or (other.numel() == 1 and not context.trains(at)):
        return _scaled(random, float(other))
    return combine(random, known(context, other, random, at), times)


@rule(aten.where.self, aten.where.ScalarOther, aten.where.ScalarSelf, aten.where.Scalar)
def where(context: Context, condition: Any, x: Any, y: Any) -> Value:
    """``1[c] x + 1[not c] y``; the gradient is that of what is chosen."""
    if not isinstance(condition, Value):
        return _by_known_mask(context, condition, x, y)
    if (one := of_one_field(chosen, (condition, x, y))) is not None:
        return one
    other = condition.each(lambda u: shifted(scaled(u, -1.0), 1.0))
    return combine(_chosen(context, condition, x, 1), _chosen(context, other, y, 2), plus)


@rule(aten.masked_fill.Scalar, aten.masked_fill.Tensor)
def masked_fill(context: Context, x: Any, mask: Any, value: Any) -> Value:
    """``1[not m] x + 1[m] value``."""
    if not isinstance(mask, Value) or isinstance(value, Value):
        raise CannotFollow("a fill of a known mask")
    if isinstance(value, Tensor) and context.trains(2):
        raise CannotFollow("a fill with a parameter")
    if (one := of_one_field(chosen, (mask, value, x))) is not None:
        return one
    other = mask.each(lambda u: shifted(scaled(u, -1.0), 1.0))
    kept = _chosen(context, other, x, 0)
    return kept if float(value) == 0 else combine(kept, _scaled(mask, float(value)), plus)


def _by_known_mask(context: Context, condition: Any, x: Any, y: Any) -> Value:
    """``c x + (1 - c) y`` for a known mask c: a factor like others, the same channels of which meet."""
    numbers = all(isinstance(o, Value) or not isinstance(o, Tensor) or o.numel() == 1 for o in (x, y))
    if not numbers or not isinstance(condition, Tensor):
        raise CannotFollow("a choice by a known mask")
    like = x if isinstance(x, Value) else y
    mask = known_value(condition.double(), like)
    rest = mask.each(lambda u: shifted(scaled(u, -1.0), 1.0))
    kept = [combine(v, m, times) if isinstance(v, Value) else _scaled(m, float(v)) for v, m in ((x, mask), (y, rest))]
    zero = [not isinstance(v, Value) and float(v) == 0 for v in (x, y)]
    return kept[1] if zero[0] else kept[0] if zero[1] else combine(kept[0], kept[1], plus)


def _chosen(context: Context, mask: Value, x: Any, at: int) -> Value:
    if isinstance(x, Value):
        return combine(mask, x, times)
    if not isinstance(x, Tensor) or x.numel() == 1:
        return _scaled(mask, float(x))
    return combine(mask, known(context, x, mask, at), times)


@rule(aten.div.Tensor, aten.div.Scalar)
def div(context: Context, x: Any, y: Any) -> Value:
    if isinstance(x, Value) and not isinstance(y, Value):
        if not isinstance(y, Tensor) or (y.numel() == 1 and not context.trains(1)):
            return _scaled(x, 1.0 / float(y))
        name = context.named_of(context.node.args[1])
        return combine(x, as_known(context, y, x, name, lambda t: 1.0 / t.double()), times)
    if isinstance(y, Value) and not isinstance(x, Value) and torch.as_tensor(x).numel() == 1:
        return unary(aten.div.Tensor, (torch.as_tensor(float(x), dtype=torch.float64), y), {})
    return combine(x, y.each(lambda u: mapped(_reciprocal, u)), times)


_reciprocal = Pointwise(torch.reciprocal)
