"""Dropout: fields times masks of zeros and ones."""

from __future__ import annotations

from torch import Tensor

from kgraph.gram import field as f
from kgraph.gram import laws
from kgraph.gram.block import Block, Draws
from kgraph.gram.calculus import Side
from kgraph.gram.device import uniform
from kgraph.gram.engine import Engine
from kgraph.gram.field import Field
from kgraph.gram.joint import JointDraws

laws.mean(f.Masked)(lambda engine, u: engine.mean(u.arg))


@laws.pair.linear(f.Masked)
def masked_block(e: Side, u: f.Masked, v: Field) -> Block | None:
    """With a field that knows nothing of the mask, whose mean is 1."""
    return None if any(root.name == u.mask.name for root in v.roots) else e.pair(u.arg, v)


@laws.pair.alike(f.Masked)
def both_masked_block(engine: Engine, u: f.Masked, v: f.Masked) -> Block | None:
    if u.mask.name != v.mask.name:
        return engine.pair(u.arg, v.arg)
    if u.places != v.places:
        return None
    inner = engine.pair(u.arg, v.arg)
    growth = 1 + (1 / u.keep - 1) * _one_mask(engine, u)
    return inner if inner.zero else inner.times(growth)


def _one_mask(engine: Engine, u: f.Masked) -> Tensor:
    """1 where one draw of the mask serves both sides, else 0."""
    if not u.whole:
        return engine.layout.identity(engine.rows, u.places)
    shape = engine.layout.shape(u.places, u.places)
    return engine.rows.same.double().reshape(-1, *(1 for _ in shape)).expand(-1, *shape)


@laws.draw(f.Masked)
def masked_draws(draws: JointDraws, u: f.Masked) -> Draws:
    shape = (draws.count, draws.engine.rows.inputs, *((1,) * len(u.places) if u.whole else u.places))
    factor = draws.once(u.mask.name, lambda: (uniform(shape, draws.generator()) < u.keep).double() / u.keep)
    return draws.of(u.arg).times(factor)
