"""Embeddings: rows of a table are independent; the same token has the same row."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from kgraph.canonical import aten
from kgraph.gram.block import Block
from kgraph.gram.engine import Engine
from kgraph.gram.field import Field, Leaf, Located
from kgraph.gram.rules.measured import second_moment
from kgraph.gram.rules.pool import mixed
from kgraph.gram.rules.table import Context, rule
from kgraph.gram.shares import layer_terms
from kgraph.gram.tangents import times
from kgraph.gram.value import Value
from kgraph.roots import Root
from kgraph.rules.weights import real_mean


@rule(aten.embedding.default)
def embedding(context: Context, table: Tensor, ids: Tensor, padding: int = -1, *_: object) -> Value:
    """K = E[w^2] for equal tokens, E[w]^2 for different ones; own term 1 for equal ones. ``padding`` is not trained."""
    _refuse_chosen(context, ids)
    engine, name = context.engine, context.name(0)
    engine.tables.add(table.data_ptr())
    blank = padding >= 0 and not bool(table[padding].any())  # as nn.Embedding makes it: no draw, but zeros
    drawn = torch.cat([table[:padding], table[padding + 1 :]]) if blank else table
    q, mean = second_moment(context, name, drawn, whole=not blank), real_mean(drawn)
    ids = ids.expand(max(len(ids), engine.rows.inputs), *ids.shape[1:]) if len(ids) == 1 else ids
    sizes = tuple(ids.shape[1:])
    places = tuple(s for s in sizes if s > 1)
    ids = ids.reshape(len(ids), *places)
    first, second = ids[engine.rows.first], ids[engine.rows.second]
    if engine.layout.name == "full":
        first = first.reshape(len(first), *places, *(1 for _ in places))
        second = second.reshape(len(second), *(1 for _ in places), *places)
    equal = (first == second).double()
    own = times(layer_terms(context, name), 1.0 if engine.parametrization == "standard" else q)
    if engine.layout.name not in ("full", "diagonal"):  # what stands where is known: its average is too
        equal = _averaged_equality(engine, ids)
    alive = (ids != padding).double()
    moves = equal
    if padding >= 0:
        left, right = engine.layout.sides(engine.rows, alive, alive, places, places)
        moves = equal * left * right
    block = Block(mean**2 + (q - mean**2) * equal, {tangent: term * moves for tangent, term in own.items()})
    leaf: Field = Leaf(places, frozenset({Root(name)}), block=block, mean=mean)
    if blank:
        leaf = Located(places, leaf.roots, leaf.how, leaf, alive, torch.zeros_like(alive))
    width = table.shape[1]
    spatial = tuple((("p", s),) if s > 1 else () for s in sizes)
    return Value(((width, leaf),), ((("b", len(ids)),), *spatial, (("c", width),)))


def _refuse_chosen(context: Context, ids: object) -> None:
    if isinstance(ids, Value):
        raise context.error(
            "a table is looked up by numbers that are computed from activations, and there is no kernel rule for it",
            "Use kgraph.analyze",
        )


def _averaged_equality(engine: Engine, ids: Tensor) -> Tensor:
    """Share of equal tokens in the averages that the layout holds: one known channel a token."""
    tokens = torch.nn.functional.one_hot(ids.unique(return_inverse=True)[1]).double().movedim(-1, 1)
    return engine.layout.known(engine.rows, tokens, tokens) * tokens.shape[1]


@rule(aten.embedding_bag.padding_idx)
def embedding_bag(
    context: Context, table: Tensor, ids: Tensor, offsets: Tensor, _: bool = False, mode: int = 0, *rest: Any
) -> tuple[Value, None, None, None]:
    """Sum (mode 0) or mean (1) of the rows of every input's n tokens; ``padding``'s row has no part in them.

    Args:
        ids: [N n], an input after the other; ``offsets`` [N] are where they begin.
        rest: whether the table's gradient is sparse, weights of the tokens [N n], whether ``offsets`` holds the end
            too, and ``padding``.
    """
    _refuse_chosen(context, ids)
    given: list[Any] = [*rest, *(False, None, False, None)[len(rest) :]]
    _sparse, weights, ended, padding = given
    padding = -1 if padding is None else int(padding)
    bags = len(offsets) - bool(ended)
    if mode > 1 or isinstance(weights, Value):
        what = "the maximum over" if mode > 1 else "sums weighted by an input of"
        hint = "Pool the rows of an nn.Embedding by hand"
        raise context.error(f"there is no kernel rule for {what} an embedding bag", hint)
    if not bags or len(ids) % bags or not torch.equal(offsets[:bags], torch.arange(0, len(ids), len(ids) // bags)):
        raise context.error("there is no kernel rule for bags of unlike length", "Pass ids as [inputs, length], padded")
    ids = ids.reshape(bags, -1)
    shares = (ids != padding).double() if padding >= 0 else torch.ones(ids.shape, dtype=torch.float64)
    if weights is not None:
        shares = shares * weights.detach().double().reshape(ids.shape)
    if mode == 1:
        shares = shares / shares.sum(1, keepdim=True).clamp_min(1.0)
    rows = embedding(context, table, ids, padding)
    each = shares if ids.shape[1] > 1 else shares[:, 0]
    located = rows.each(lambda u: Located(u.places, u.roots, u.how, u, each, torch.zeros_like(each)))
    pooled = mixed(located, 1, torch.ones(1, ids.shape[1], dtype=torch.float64))
    return Value(pooled.groups, (pooled.axes[0], pooled.axes[2])), None, None, None
