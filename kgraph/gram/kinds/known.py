"""Known tensors: inputs, and parameters used entry by entry."""

from __future__ import annotations

import torch
from torch import Tensor

from kgraph.gram import field as f
from kgraph.gram import laws
from kgraph.gram.block import Block, Draws
from kgraph.gram.calculus import Side
from kgraph.gram.field import Field
from kgraph.gram.gaps import Gaps
from kgraph.gram.joint import JointDraws

laws.mean(f.Known)(lambda engine, u: u.data.mean(1))


@laws.pair.outright(f.Known)
def known_block(e: Side, u: f.Known, v: Field) -> Block | None:
    """<x, y> / C; what moves has own terms between equal positions of itself."""
    if not isinstance(v, f.Known):
        return None
    engine, channels = e.engine, max(u.data.shape[1], v.data.shape[1])
    if u.data.shape[1] != v.data.shape[1] and 1 not in (u.data.shape[1], v.data.shape[1]):
        return e.apart(u, v)
    x, y = (t.expand(t.shape[0], channels, *t.shape[2:]) for t in (u.data, v.data))
    own = u.own if u.roots == v.roots else {}
    tangents = {name: term * engine.layout.alike(u.places) for name, term in own.items()}
    return Block(engine.layout.known(engine.rows, x, y), tangents)


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
    if not draws.engine.seeds:
        return Draws(value)
    shape = (1, *u.places)  # one direction for a parameter, however often it is read
    direction = draws.once((u.roots, u.places), lambda: draws.normal(*shape))
    tangents = {name: (term**0.5 * direction).expand(-1, inputs, *u.places) for name, term in u.own.items()}
    return Draws(value, tangents)
