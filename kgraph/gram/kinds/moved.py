"""Linear maps of positions, known gains and shifts at every position, and positions read as channels."""

from __future__ import annotations

import torch
from torch import Tensor

from kgraph.gram import field as f
from kgraph.gram import laws
from kgraph.gram.block import Block, Draws
from kgraph.gram.calculus import Calculus, Side
from kgraph.gram.engine import Engine
from kgraph.gram.field import Field
from kgraph.gram.gaps import Gaps
from kgraph.gram.joint import JointDraws
from kgraph.gram.places import apply

laws.mean(f.Moved)(lambda engine, u: apply(u.op, engine.means(u.arg), 1, u.arg.places))
laws.mean(f.Located)(lambda engine, u: engine.means(u.arg) * u.gain + u.shift)
laws.mean(f.Folded)(lambda engine, u: engine.means(u.arg).mean(tuple(1 + axis for axis in u.axes)))
laws.gap.alike(f.Moved)(lambda gaps, u, v: _both_moved(gaps.engine, gaps.gap(u.arg, v.arg), u, v))
laws.gap.alike(f.Folded)(
    lambda gaps, u, v: _folded(gaps.engine, gaps.gap(u.arg, v.arg), u, v) if u.axes == v.axes else None
)


@laws.pair.linear(f.Moved)
def moved_block(e: Side, u: f.Moved, v: Field) -> Block | None:
    """The map on the field's side."""
    if isinstance(v, f.Moved):
        return None
    return e.pair(u.arg, v).each(lambda x: e.move(x, u.op, u.arg.places, v.places))


@laws.pair.alike(f.Moved)
def both_moved_block(engine: Engine, u: f.Moved, v: f.Moved) -> Block:
    return engine.pair(u.arg, v.arg).each(lambda x: _both_moved(engine, x, u, v))


def _both_moved(engine: Calculus, x: Tensor, u: f.Moved, v: f.Moved) -> Tensor:
    """The maps on either side."""
    return engine.layout.move(x, (u.op, v.op), u.arg.places, v.arg.places)


@laws.draw(f.Moved)
def moved_draws(draws: JointDraws, u: f.Moved) -> Draws:
    draws.spread(u)
    return draws.of(u.arg).each(lambda x: apply(u.op, x, 2, u.arg.places))


@laws.pair.linear(f.Located)
def located_block(e: Side, u: f.Located, v: Field) -> Block:
    inner = e.pair(u.arg, v)
    gain = e.gain(u.gain, u, v)
    block = inner if inner.zero else inner.times(gain)
    if not u.shift.any():
        return block
    constant = e.outer(u.shift, e.engine.means(v), u.places, v.places)
    return Block(block.cov + constant, block.tangents)


@laws.gap.linear(f.Located)
def located_gap(gaps: Gaps, u: f.Located, v: Field) -> Tensor:
    """``g_a t_a - g_b t_b = (g_a + g_b) (t_a - t_b) / 2 + (g_a - g_b) (t_a + t_b) / 2``."""
    (gain_a, gain_b), (shift_a, shift_b) = gaps.ends(u.gain), gaps.ends(u.shift)
    total = (gain_a + gain_b) / 2 * gaps.gap(u.arg, v)
    if not torch.equal(gain_a, gain_b):
        total = total + (gain_a - gain_b) / 2 * gaps.skew(u.arg, v)
    if not torch.equal(shift_a, shift_b):
        mean_a, mean_b = gaps.ends(gaps.engine.means(v))
        total = total + (shift_a - shift_b) * (mean_a - mean_b) / 2
    return total


@laws.skew(f.Located)
def located_skew(gaps: Gaps, v: f.Located, t: Field) -> Tensor | None:
    """Of ``g t`` with t itself: ``((g_a + g_b)(q_a - q_b) + (g_a - g_b)(q_a + q_b + 2 cov)) / 4``."""
    if v.arg is not t or v.shift.any():
        return None
    (gain_a, gain_b), (a, b) = gaps.ends(v.gain), gaps.ends(gaps.engine.second(t))
    return ((gain_a + gain_b) * (a - b) + (gain_a - gain_b) * (a + b + 2 * gaps.engine.pair(t, t).cov)) / 4


@laws.draw(f.Located)
def located_draws(draws: JointDraws, u: f.Located) -> Draws:
    scaled = draws.of(u.arg).times(u.gain)
    return Draws(scaled.value + u.shift, scaled.tangents)


@laws.pair.alike(f.Folded)
def folded_block(engine: Engine, u: f.Folded, v: f.Folded) -> Block | None:
    return engine.pair(u.arg, v.arg).each(lambda x: _folded(engine, x, u, v)) if u.axes == v.axes else None


def _folded(engine: Calculus, x: Tensor, u: f.Folded, v: f.Folded) -> Tensor:
    """Average over equal positions of the folded axes."""
    return x if x.ndim == 0 else engine.layout.fold(x, u.axes, u.arg.places, v.arg.places)
