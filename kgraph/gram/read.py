"""Reading Gram matrices off fields: blocks of rows become matrices of inputs."""

from __future__ import annotations

import torch
from torch import Tensor

from kgraph.gram.engine import Engine
from kgraph.gram.field import Field
from kgraph.gram.gaps import one_minus_c
from kgraph.gram.result import NodeGram
from kgraph.gram.rows import Rows
from kgraph.gram.rules.affine import averaged, fold
from kgraph.gram.value import Axes, Value, place_start, places_of, roles


def gram_of(engine: Engine, name: str, value: Value, n1: int, n2: int | None) -> NodeGram:
    """Matrices of one node's value: [n1, n1], or [n1, n2] for two sets of inputs."""
    u = averaged([(size, fold(field, _read_as_channels(value.axes))) for size, field in value.groups])
    layout, rows = engine.layout, engine.rows
    shape = layout.shape(u.places, u.places)

    def matrix(x: Tensor) -> Tensor:
        wide = x.expand(len(rows.first), *shape) if x.ndim == 0 or len(x) == 1 else x
        forth, back = (layout.read(block, u.places) for block in (wide, layout.turned(wide, u.places)))
        return _matrix(rows, forth, back, n1, n2)

    engine.second(u)  # a negative q value is an error
    block = engine.pair(u, u)
    tangents = {name: matrix(block.tangent(name)) for name in engine.seeds}
    apart = None
    if not u.places or layout.name == "diagonal":
        differs = _one_minus_c(engine, u)
        apart = _matrix(rows, differs, differs, n1, n2)
    return NodeGram(name, matrix(block.cov), tangents, u.places, engine.how(u).name, apart)


def _one_minus_c(engine: Engine, u: Field) -> Tensor:
    """1 - c of every row: from the gap where it is carried, else a difference."""
    rows, q = engine.rows, engine.second(u)
    q1, q2 = q[rows.first], q[rows.second]
    if engine.gaps is not None:
        gap = engine.gaps.gap(u, u)
    else:
        cov = engine.pair(u, u).cov
        gap = (q1 + q2) / 2 - (engine.layout.read(cov, u.places) if cov.ndim else cov)
    apart = one_minus_c(q1, q2, gap.expand_as(q1))
    return torch.where((q1 > 0) & (q2 > 0), apart, torch.nan)


def _read_as_channels(axes: Axes) -> tuple[int, ...]:
    """Place axes that share a dimension with channels (after a flatten): the kernel is their average."""
    mixed = [d for d, axis in enumerate(axes) if {"c", "p"} <= roles(axis)]
    return tuple(place_start(axes, d) + i for d in mixed for i in range(len(places_of((axes[d],)))))


def _matrix(rows: Rows, forth: Tensor, back: Tensor, n1: int, n2: int | None) -> Tensor:
    """[R, ...] of (a, b) and of (b, a) -> [n1, n2, ...]."""
    n = rows.inputs
    whole = forth.new_full((n, n, *forth.shape[1:]), float("nan"))
    whole[rows.second, rows.first] = back
    whole[rows.first, rows.second] = forth
    return whole[:n1, :n1] if n2 is None else whole[:n1, n1 : n1 + n2]
