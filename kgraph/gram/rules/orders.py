"""Entries of a dimension in another order: positions are gathered, channels keep their law.

A channel then meets, at its new place, what is made of other channels: of other random numbers. So the reordered field
is independent of the one before, channel by channel, and still alike in law and in all sums over channels.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence

import torch

from kgraph.canonical import aten
from kgraph.gram.build import is_reordered, reordered
from kgraph.gram.field import Field
from kgraph.gram.rules.reindex import positions_only
from kgraph.gram.rules.table import Context, rule
from kgraph.gram.value import CannotFollow, Value, gathered, roles


@rule(aten.flip.default)
def flip(context: Context, x: Value, dims: Sequence[int]) -> Value:
    for d in dims:
        x = _permuted_along(x, d % len(x.axes), list(range(x.shape[d]))[::-1])
    return x


@rule(aten.roll.default)
def roll(context: Context, x: Value, shifts: Sequence[int], dims: Sequence[int] = ()) -> Value:
    if not dims:
        raise CannotFollow("a roll of the flattened tensor")
    for shift, d in zip(shifts, dims, strict=True):
        size = x.shape[d]
        x = _permuted_along(x, d % len(x.axes), [(i - shift) % size for i in range(size)])
    return x


def _permuted_along(x: Value, dim: int, order: Sequence[int]) -> Value:
    if "c" in roles(x.axes[dim]):
        return _channels_in_order(x, dim, order)
    positions_only(x, dim)
    return gathered(x, dim, order)


@rule(aten.channel_shuffle.default)
def channel_shuffle(context: Context, x: Value, groups: int) -> Value:
    order = torch.arange(x.shape[1]).reshape(groups, -1).T.flatten()
    return _channels_in_order(x, 1, order.tolist())


_MOST_KEPT = 4
"""Channels that a new order may leave where they are: among many, they do not count."""


def _channels_in_order(x: Value, dim: int, order: Sequence[int]) -> Value:
    """Channels ``order`` along a dimension that holds nothing else, each group of them in one piece."""
    if roles(x.axes[dim]) != {"c"} or x.channels != x.shape[dim] or x.split not in (None, dim):
        raise CannotFollow("channels in another order, and among positions or inputs")
    starts = [0, *itertools.accumulate(size for size, _ in x.groups)]
    of = [g for g, (size, _) in enumerate(x.groups) for _ in range(size)]
    runs = [list(run) for _, run in itertools.groupby(order, lambda channel: of[channel])]
    if len(runs) != len(x.groups):
        raise CannotFollow("groups of channels that an order mixes")
    places = ((of[run[0]], torch.tensor(run) - starts[of[run[0]]]) for run in runs)
    groups = tuple((x.groups[g][0], _in_order(x.groups[g][1], own)) for g, own in places)
    return Value(groups, x.axes, x.split)


def _in_order(u: Field, order: torch.Tensor) -> Field:
    kept = int((order == torch.arange(len(order))).sum())
    if kept == len(order):
        return u
    if kept > _MOST_KEPT or is_reordered(u):
        raise CannotFollow("an order that leaves channels where they are, or brings them back")
    return reordered(u, order)
