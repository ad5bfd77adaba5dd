"""PReLU: leaky relu of a trained slope a, whose own term in tangents is E[min(u, 0) min(u', 0)]."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from kgraph.canonical import aten
from kgraph.gram.block import Block
from kgraph.gram.build import mapped
from kgraph.gram.field import Field, Leaf, Sum
from kgraph.gram.rules.table import Context, rule
from kgraph.gram.value import CannotFollow, Value
from kgraph.how import assumed
from kgraph.roots import Root
from kgraph.rules.pointwise import NEGATIVE_PART, leaky

_ONE_FOR_ALL = assumed("the gradient by one number that all channels share is taken to be independent of them")


@rule(aten.prelu.default)
def prelu(context: Context, x: Any, weight: Any) -> Value:
    if not isinstance(x, Value) or not isinstance(weight, Tensor):
        raise CannotFollow("a random slope")
    slopes = weight.detach().double().flatten()
    if bool((slopes != slopes[0]).any()):
        raise CannotFollow("slopes that differ between channels")
    shaped = x.each(lambda u: mapped(leaky(float(slopes[0])), u))
    name = context.parameter(context.node.args[1])
    if name is None and context.trains(1):
        context.refuse_ntk([context.node.name], "slopes that are computed from a parameter")
    if name is None or not context.moves(context.node.args[1]):
        return shaped
    speed = 1.0 if context.engine.parametrization == "standard" else float(slopes.square().mean())
    terms = context.own({name: speed})

    def with_own(index: int, before: Field, after: Field) -> Field:
        root = Root(f"{name} at {context.node.name}", ((f"groups of {context.node.name}", index, index + 1),))
        negative = mapped(NEGATIVE_PART, before)
        kernel = context.engine.pair(negative, negative).cov
        zero = torch.zeros_like(kernel)
        block = Block(zero, {tangent: kernel * term for tangent, term in terms.items()})
        leaf = Leaf(after.places, frozenset({root}), block=block, gap=zero)
        how = after.how | _ONE_FOR_ALL if len(slopes) == 1 else after.how
        return Sum(after.places, after.roots | leaf.roots, how, ((1.0, after), (1.0, leaf)))

    pairs = enumerate(zip(x.groups, shaped.groups, strict=True))
    return replace(shaped, groups=tuple((size, with_own(i, u, v)) for i, ((size, u), (_, v)) in pairs))
