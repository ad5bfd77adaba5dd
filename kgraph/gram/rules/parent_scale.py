"""``M u + b`` behind a convolution: a known factor a position, and a bias that is no function of the input."""

from __future__ import annotations

import torch
from torch import Tensor

from kgraph.gram import field as f
from kgraph.gram.field import Affine, Field, Layer
from kgraph.gram.rules.measured import second_moment
from kgraph.gram.rules.table import Context, rule
from kgraph.gram.value import Value
from kgraph.parent_scale import PARENT_SCALE, ParentScale
from kgraph.roots import Root
from kgraph.rules.weights import real_mean


@rule(PARENT_SCALE)
def parent_scale(context: Context, x: Value, scale: Tensor, bias: Tensor | None = None) -> Value:
    """K' = M M^T K + sb2; T' = M M^T T + own: Gaussian as u is, the bias of a root of its own."""

    def scaled(u: Field) -> Field:
        gain = scale.detach().double().reshape(1, *u.places)
        located = f.Located(u.places, u.roots, u.how, u, gain, torch.zeros_like(gain))
        return located if bias is None else _plus_bias(context, located, bias)

    return x.each(scaled)


@rule(ParentScale)
def parent_scale_module(
    context: Context, module: ParentScale, x: Value, like: Value, bias: Tensor | None = None
) -> Value:
    dims = len(module.taps.kernel)
    return parent_scale(context, x, module.factors(like.shape[-dims:]), bias)


def _plus_bias(context: Context, u: Field, bias: Tensor) -> Field:
    """The bias is an affine layer of a zero input: the engine knows how two of them meet."""
    name = context.name(2)
    moment = second_moment(context, name, bias)
    mean = 0.0 if name in context.variances else real_mean(bias)
    layer = Layer(name, 0.0, moment, mean, own_bias=context.own({name: 1.0}))
    zero = f.Known(u.places, data=torch.zeros(1, 1, *u.places, dtype=torch.float64))
    roots = frozenset({Root(name)})
    added = Affine(u.places, roots, arg=zero, layer=layer)
    return f.Sum(u.places, u.roots | roots, u.how, ((1.0, u), (1.0, added)))
