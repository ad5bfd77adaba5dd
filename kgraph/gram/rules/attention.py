"""Attention: the fused operation, and the same written out as matmul, softmax, matmul."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from kgraph.canonical import aten
from kgraph.gram.field import Attended, Drawn, Field, Known, Scores
from kgraph.gram.rules.affine import weight_product
from kgraph.gram.rules.pointwise import dropout
from kgraph.gram.rules.pool import mixed
from kgraph.gram.rules.table import Context, parameters_behind, rule
from kgraph.gram.value import Axes, CannotFollow, Value, permuted, place_start, roles, single_place, size_of
from kgraph.how import EXACT, How, assumed
from kgraph.roots import Root

_LOGITS = "logits of "


def scores(context: Context, query: Value, key: Value, scale: float) -> Value:
    """``scale q k^T``: query [..., i, c], key [..., k, c] -> [..., i, k]."""
    query, key = single_place(query, len(query.axes) - 2), single_place(key, len(key.axes) - 2)
    lead = query.axes[:-2]
    if roles(query.axes[-1]) != {"c"} or roles(key.axes[-1]) != {"c"} or lead != key.axes[:-2]:
        raise CannotFollow("a product of matrices whose inner dimension is not channels")
    q, k = query.one(), key.one()
    width = query.shape[-1]
    shared = place_start(query.axes, len(query.axes) - 2)
    for x in (query, key):
        if roles(x.axes[-2]) != {"p"}:
            raise CannotFollow("a product of two activations over a single position, or over inputs")
    places = (*q.places[:shared], q.places[shared], k.places[shared])
    axes: Axes = (*lead, query.axes[-2], key.axes[-2])
    heads = max(1, size_of(tuple(t for axis in lead for t in axis if t[0] == "c")))
    # Of what one channel holds, a sum over many says nothing: logits share random numbers with other logits alone.
    roots = frozenset(Root(_LOGITS + r.name, r.cuts) for r in q.roots | k.roots)
    logits = Scores(places, roots, q.how | k.how, q, k, scale, width, shared)
    return Value(((heads, certain(context, logits)),), axes)


def certain(context: Context, logits: Scores) -> Field:
    """Logits scaled by 1/d are sums over d channels divided by d: at infinite width their mean."""
    if abs(logits.scale * logits.width - 1) > 1e-6:
        return logits
    mean = context.engine.mean(logits)
    mean = mean.expand(1, *logits.places) if mean.ndim == 0 else mean
    return Known(logits.places, frozenset(), logits.how, mean[:, None])


def softmax(context: Context, x: Value, dim: int, mask: Tensor | None = None) -> Value:
    """Softmax over positions, draw by draw (exactly, where the logits are known)."""
    x = single_place(x, dim)
    if roles(x.axes[dim]) != {"p"}:
        raise CannotFollow("a softmax over channels")
    at = 2 + place_start(x.axes, dim)

    def run(draws: Tensor) -> Tensor:
        return torch.softmax(draws if mask is None else draws + mask, at)

    def change(u: Field) -> Field:
        u = certain(context, u) if isinstance(u, Scores) else u
        if isinstance(u, Known) and not u.own:
            return Known(u.places, u.roots, u.how, run(u.data))
        return Drawn(u.places, u.roots, u.how, (u,), run)

    return x.each(change)


def attended(weights: Value, value: Value) -> Value:
    """``A v``: weights [..., i, k], value [..., k, c] -> [..., i, c]."""
    weights, value = single_place(weights, len(weights.axes) - 2), single_place(value, len(value.axes) - 2)
    weights = single_place(weights, len(weights.axes) - 1)
    a, v = weights.one(), value.one()
    shared = place_start(weights.axes, len(weights.axes) - 2)
    if roles(value.axes[-1]) != {"c"} or not a.independent(v) or weights.axes[:-2] != value.axes[:-2]:
        raise CannotFollow("an average of values that depend on the weights' own random numbers")
    places = (*v.places[:shared], a.places[shared])
    field = Attended(places, a.roots | v.roots, a.how | v.how | _borrowed(a, v), a, v, shared)
    axes = (*weights.axes[:-2], weights.axes[-2], value.axes[-1])
    return Value(((value.channels, field),), axes)


def _borrowed(weights: Field, value: Field) -> How:
    """What is left out where queries or keys are made with the random numbers of the values."""
    both = {name.removeprefix(_LOGITS) for name in weights.names} & value.names
    return (
        assumed("logits and values, which share weights, as independent: so they are of many channels")
        if both
        else EXACT
    )


@rule(aten.scaled_dot_product_attention.default)
def attention(
    context: Context,
    query: Any,
    key: Any,
    value: Any,
    mask: Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    *,
    scale: float | None = None,
    enable_gqa: bool = False,
) -> Value:
    if enable_gqa:
        raise CannotFollow("grouped queries")
    trained = parameters_behind(context, context.node.args[3]) if len(context.node.args) > 3 else []
    context.refuse_ntk([str(p.target) for p in trained], "a mask that is trained")
    factor = scale if scale is not None else 1 / math.sqrt(query.shape[-1])
    logits = scores(context, query, key, factor)
    weights = softmax(context, logits, len(logits.axes) - 1, _mask(logits, mask, is_causal))
    return attended(dropout(context, weights, dropout_p, True), value)


def _mask(logits: Value, mask: Tensor | None, is_causal: bool) -> Tensor | None:
    """An additive mask over [*places] of the logits."""
    size_i, size_k = logits.shape[-2:]
    if is_causal:
        keep = torch.ones(size_i, size_k, dtype=torch.bool).tril()
    elif mask is None:
        return None
    else:
        if any(size != 1 for size in mask.shape[:-2]) and not _same_everywhere(mask):
            raise CannotFollow("an attention mask that differs between inputs or heads")
        keep = mask.reshape(-1, *mask.shape[-2:])[0]
    if keep.dtype != torch.bool:
        return keep.double()
    return torch.zeros(keep.shape, dtype=torch.float64).masked_fill(~keep, -math.inf)


def _same_everywhere(mask: Tensor) -> bool:
    flat = mask.reshape(-1, *mask.shape[-2:])
    return bool((flat == flat[:1]).all())


@rule(aten.softmax.int, aten._softmax.default)
def softmax_rule(context: Context, x: Value, dim: int, *_: object) -> Value:
    return softmax(context, x, dim % len(x.axes))


def _position_product(context: Context, matrix: Tensor, x: Value) -> Value:
    """``matrix @ x`` of a known matrix over positions."""
    behind = parameters_behind(context, context.node.args[0])
    at = len(x.axes) - 2
    if matrix.ndim != 2 or at < 0 or roles(x.axes[at]) != {"p"}:
        raise CannotFollow("a known matrix times a random one")
    context.refuse_ntk([str(p.target) for p in behind], "a matrix over positions that is trained")
    note = assumed(f"{behind[0].target} as it is") if behind else EXACT
    result = mixed(x, at, matrix.detach().double())
    return result.each(lambda u: replace(u, how=u.how | note), result.axes, result.split)


@rule(aten.matmul.default, aten.bmm.default, aten.mm.default)
def matmul(context: Context, x: Any, y: Any) -> Value:
    if isinstance(x, Value) and not isinstance(y, Value):
        return weight_product(context, x, y)
    if isinstance(y, Value) and not isinstance(x, Value):
        return _position_product(context, x, y)
    if roles(x.axes[-1]) == {"c"} and roles(y.axes[-2]) == {"c"}:
        swapped = [*range(len(y.axes) - 2), len(y.axes) - 1, len(y.axes) - 2]
        return scores(context, x, permuted(y, swapped), 1.0)
    if roles(x.axes[-1]) == {"p"} and roles(y.axes[-2]) == {"p"}:
        return attended(x, y)
    raise CannotFollow("a product of random matrices")
