"""Weighted sums."""

from __future__ import annotations

import torch
from torch import Tensor

from kgraph.errors import RuleError
from kgraph.gram import field as f
from kgraph.gram import laws
from kgraph.gram.block import Block, Draws, nothing
from kgraph.gram.calculus import Side
from kgraph.gram.engine import Engine
from kgraph.gram.field import Field
from kgraph.gram.gaps import Gaps
from kgraph.gram.joint import JointDraws
from kgraph.how import How, assumed

_ROUNDING = 1e-9
_FEW_DIGITS = 1e-9
"""Of the terms' own q values: a sum of less has lost more than half of its digits."""


@laws.mean(f.Sum)
def sum_mean(engine: Engine, u: f.Sum) -> Tensor:
    total = torch.zeros((), dtype=torch.float64)
    for weight, term in u.terms:
        total = total + weight * engine.mean(term)
    return total


@laws.second(f.Sum)
def checked(engine: Engine, u: f.Sum, q: Tensor) -> Tensor:
    """The q value of a sum, whose terms may cancel.

    Raises:
        RuleError: it is negative by more than rounding.
    """
    sizes = [w * w * engine.second(term) for w, term in u.terms]
    whole = torch.stack(torch.broadcast_tensors(q, *sizes))[1:].sum(0)
    if bool((q < -_ROUNDING * whole).any()):
        what = f"a variance came out negative ({float(q.min()):.2g}): the terms of a sum cancel to the last digit"
        raise RuleError(what, hint="Write the sum as one function of its argument")
    if bool(((q < _FEW_DIGITS * whole) & (q != 0)).any()):
        engine.cancelled.add(u)
    return q.clamp_min(0)


@laws.how(f.Sum)
def sum_how(engine: Engine, u: f.Sum) -> How | None:
    return assumed("its terms cancel, and few digits are left") if u in engine.cancelled else None


@laws.pair.first(f.Sum)
def sum_block(e: Side, u: f.Sum, v: Field) -> Block:
    return sum((e.pair(term, v).times(weight) for weight, term in u.terms), nothing())


@laws.gap.linear(f.Sum)
def sum_gap(gaps: Gaps, u: f.Sum, v: Field) -> Tensor:
    return sum((gaps.gap(term, v) * weight for weight, term in u.terms), torch.zeros((), dtype=torch.float64))


@laws.draw(f.Sum)
def sum_draws(draws: JointDraws, u: f.Sum) -> Draws:
    drawn = draws.together(*(term for _, term in u.terms))
    first, *others = (one.times(weight) for one, (weight, _) in zip(drawn, u.terms, strict=True))
    return sum(others, first)
