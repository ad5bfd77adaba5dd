"""Known tensors: inputs, and parameters used entry by entry."""

from __future__ import annotations

import torch
from torch import Tensor

from kgraph.gram import field as f
from kgraph.gram import laws
from kgraph.gram.block import Block, nothing
from kgraph.gram.calculus import Side
from kgraph.gram.device import normal
from kgraph.gram.field import Field
from kgraph.gram.gaps import Gaps
from kgraph.gram.joint import JointDraws
from kgraph.gram.laws import Draws

laws.mean(f.Known)(lambda engine, u: u.data.mean(1))


@laws.pair.outright(f.Known)
def known_block(e: Side, u: f.Known, v: Field) -> Block | None:
    """<x, y> / C; a trained parameter's own NTK is 1 (times its gain)."""
    if not isinstance(v, f.Known):
        return None
    engine, channels = e.engine, max(u.data.shape[1], v.data.shape[1])
    if u.data.shape[1] != v.data.shape[1] and 1 not in (u.data.shape[1], v.data.shape[1]):
        return e.apart(u, v)
    x, y = (t.expand(t.shape[0], channels, *t.shape[2:]) for t in (u.data, v.data))
    ntk = nothing(engine.with_ntk).ntk
    if engine.with_ntk and u.roots and u.roots == v.roots and u.gain:
        ntk = u.gain * engine.layout.alike(u.places)
    return Block(engine.layout.known(engine.rows, x, y), ntk)


@laws.gap.outright(f.Known)
def known_gap(gaps: Gaps, u: f.Known, v: Field) -> Tensor | None:
    if not isinstance(v, f.Known):
        return None
    if u.data.shape[1] != v.data.shape[1]:
        return gaps.difference(u, v)
    (xa, xb), (ya, yb) = gaps.ends(u.data), gaps.ends(v.data)
    return ((xa - xb) * (ya - yb)).mean(1) / 2


@laws.draw(f.Known)
def known_draws(draws: JointDraws, u: f.Known) -> Draws:
    """Channels in turn (the same ones of every known tensor), all equally often; evenly spread if too many."""
    inputs, channels = draws.engine.rows.inputs, u.data.shape[1]
    turn = torch.arange(draws.count)
    chosen = turn % channels if channels <= draws.count else turn * channels // draws.count
    value = u.data[:, chosen].transpose(0, 1).expand(-1, inputs, *u.places)
    if not draws.engine.with_ntk:
        return value, None
    shape = (draws.count, 1, *u.places)  # one direction for a parameter, however often it is read
    direction = draws.once((u.roots, u.places), lambda: normal(shape, draws.generator()))
    return value, (u.gain**0.5 * direction).expand(-1, inputs, *u.places)
