"""Products: entry by entry, and of all channels with all channels."""

from __future__ import annotations

import torch
from torch import Tensor

from kgraph.gram import field as f
from kgraph.gram import laws
from kgraph.gram.block import Block, Draws
from kgraph.gram.calculus import Side
from kgraph.gram.engine import Engine
from kgraph.gram.field import Field
from kgraph.gram.gaps import Gaps
from kgraph.gram.joint import JointDraws

laws.mean(f.Product)(lambda e, u: e.mean(u.left) * e.mean(u.right) if u.left.independent(u.right) else None)
laws.mean(f.Crossed)(lambda e, u: e.mean(u.left) * e.mean(u.right))
laws.gap.alike(f.Product)(lambda gaps, u, v: _gap(gaps, u) if u is v and u.left.independent(u.right) else None)
laws.gap.alike(f.Crossed)(lambda gaps, u, v: _gap(gaps, u) if u is v else None)


def _gap(gaps: Gaps, u: f.Product | f.Crossed) -> Tensor:
    """``E[l_a l_b] E[r_a r_b]`` with each factor as its middle minus its gap."""
    middles, inner, apart = [], [], torch.full((), 0.25, dtype=torch.float64)
    for side in (u.left, u.right):
        a, b = gaps.ends(gaps.engine.second(side))
        middles.append((a + b) / 2)
        inner.append(gaps.gap(side, side))
        apart = apart * (a - b)
    return apart + middles[0] * inner[1] + middles[1] * inner[0] - inner[0] * inner[1]


def _factor(u: f.Product) -> float | None:
    """The one number that the field multiplies, if it is untrained."""
    return u.right.constant if isinstance(u.right, f.Known) and not u.right.own else None


@laws.pair.linear(f.Product)
def scaled_block(e: Side, u: f.Product, v: Field) -> Block | None:
    factor = _factor(u)
    return None if factor is None else e.pair(u.left, v).times(factor)


@laws.gap.linear(f.Product)
def scaled_gap(gaps: Gaps, u: f.Product, v: Field) -> Tensor | None:
    factor = _factor(u)
    return None if factor is None else gaps.gap(u.left, v) * factor


@laws.pair.alike(f.Product)
def products_block(engine: Engine, u: f.Product, v: f.Product) -> Block | None:
    """A product of blocks where each factor shares random numbers with one of the other product's at most."""
    for pairs in (((u.left, v.left), (u.right, v.right)), ((u.left, v.right), (u.right, v.left))):
        if all(a.independent(b) for a in pairs[0] for b in pairs[1]):
            one, two = (engine.pair(*pair) for pair in pairs)
            return one.product(two, torch.mul)
    return None


@laws.pair.against(f.Product)
def known_factor_block(e: Side, u: f.Product, v: Field) -> Block | None:
    """``E[l k v]`` for known k and v and an independent field l: its mean times the pair of k and v."""
    if not (isinstance(v, f.Known) and isinstance(u.right, f.Known)):
        return None
    if not (u.left.independent(u.right) and u.left.independent(v)):
        return None
    one = torch.ones(1, *v.places, dtype=torch.float64)
    return e.pair(u.right, v).times(e.outer(e.engine.means(u.left), one, u.places, v.places))


@laws.draw(f.Product)
def product_draws(draws: JointDraws, u: f.Product) -> Draws:
    left, right = draws.together(u.left, u.right)
    return left.product(right, torch.mul)


@laws.pair.alike(f.Crossed)
def crossed_block(engine: Engine, u: f.Crossed, v: f.Crossed) -> Block:
    """Every channel of one factor meets every one of the other: averages factorize, whatever they share."""
    return engine.pair(u.left, v.left).product(engine.pair(u.right, v.right), torch.mul)
