"""Fields side by side: along a position axis, and as channel groups that a layer reads together."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial

import torch
from torch import Tensor

from kgraph.gram import field as f
from kgraph.gram import laws
from kgraph.gram.block import Block, Draws, names_of, nothing
from kgraph.gram.calculus import Side
from kgraph.gram.engine import Engine
from kgraph.gram.field import Field
from kgraph.gram.gaps import Gaps
from kgraph.gram.joint import JointDraws
from kgraph.gram.layout import NeedsFull


@laws.mean(f.Joined)
def joined_mean(engine: Engine, u: f.Joined) -> Tensor:
    wide = [engine.means(arg) for arg in u.args]
    count = max(len(x) for x in wide)
    return torch.cat([x.expand(count, *x.shape[1:]) for x in wide], 1 + u.axis)


@laws.pair.linear(f.Joined)
def joined_block(e: Side, u: f.Joined, v: Field) -> Block | None:
    """Parts on one side only: the layout must hold every pair of positions."""
    if isinstance(v, f.Joined):
        return None
    return _one_side(e, u, v)


def _one_side(e: Side, u: f.Joined, v: Field) -> Block:
    parts = [e.pair(arg, v) for arg in u.args]
    if e.engine.layout.name != "full":
        raise NeedsFull
    count = len(e.engine.rows.first)
    shapes = [(*v.places, *arg.places) if e.swapped else (*arg.places, *v.places) for arg in u.args]

    def join(tensors: Sequence[Tensor]) -> Tensor:
        wide = [
            t.expand(count, *shape) if t.ndim == 0 else t.expand(count, *t.shape[1:])
            for t, shape in zip(tensors, shapes, strict=True)
        ]
        return torch.cat(wide, 1 + (len(v.places) if e.swapped else 0) + u.axis)

    tangents = {name: join([part.tangent(name) for part in parts]) for name in names_of(parts)}
    return Block(join([part.cov for part in parts]), tangents)


@laws.pair.alike(f.Joined)
def both_joined_block(engine: Engine, u: f.Joined, v: f.Joined) -> Block | None:
    if u.axis != v.axis:
        return None
    places = [arg.places for arg in u.args]
    if places != [arg.places for arg in v.args]:
        return _one_side(Side(engine, False), u, v)
    apart = engine.layout.name == "diagonal"
    grid = [
        [nothing() if apart and i != j else engine.pair(a, b) for j, b in enumerate(v.args)]
        for i, a in enumerate(u.args)
    ]

    def join(number: Callable[[Block], Tensor]) -> Tensor:
        return engine.layout.join([[number(b) for b in line] for line in grid], u.axis, engine.rows, places)

    names = names_of(block for line in grid for block in line)
    return Block(join(lambda b: b.cov), {name: join(partial(Block.tangent, name=name)) for name in names})


@laws.draw(f.Joined)
def joined_draws(draws: JointDraws, u: f.Joined) -> Draws:
    draws.spread(u)
    drawn = draws.together(*u.args)
    tangents = {name: torch.cat([x.along(name) for x in drawn], 2 + u.axis) for name in names_of(drawn)}
    return Draws(torch.cat([x.value for x in drawn], 2 + u.axis), tangents)


@laws.mean(f.Grouped)
def grouped_mean(engine: Engine, u: f.Grouped) -> Tensor:
    total = sum(size for size, _ in u.args)
    return sum((size / total * engine.mean(arg) for size, arg in u.args), torch.zeros((), dtype=torch.float64))


@laws.pair.alike(f.Grouped)
def grouped_block(engine: Engine, u: f.Grouped, v: f.Grouped) -> Block | None:
    """Channel-weighted average of the groups' blocks."""
    if len(u.args) != len(v.args):
        return None
    blocks = [engine.pair(a, b).times(share) for share, a, b in _shares(u, v)]
    return sum(blocks[1:], blocks[0])


@laws.gap.alike(f.Grouped)
def grouped_gap(gaps: Gaps, u: f.Grouped, v: f.Grouped) -> Tensor | None:
    if len(u.args) != len(v.args):
        return None
    return sum((gaps.gap(a, b) * share for share, a, b in _shares(u, v)), torch.zeros((), dtype=torch.float64))


def _shares(u: f.Grouped, v: f.Grouped) -> list[tuple[float, Field, Field]]:
    """Share of the channels, and both fields, of every group."""
    total = sum(size for size, _ in u.args)
    return [(size / total, a, b) for (size, a), (_, b) in zip(u.args, v.args, strict=True)]
