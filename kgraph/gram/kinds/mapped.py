"""Functions of fields: of one Gaussian, of two, against what is Gaussian.

pair(f(u), f(v)) = E[f f],  tangents E[f' f'] T(u, v)
pair(f(u), v)    = E[f'(u)] cov(u, v) + E[f] E[v]        (Stein's lemma)
"""

from __future__ import annotations

from itertools import product

import torch
from torch import Tensor

from kgraph.gram import field as f
from kgraph.gram import laws
from kgraph.gram.biased import About, about, about_both, averages, centred, of_few, shows
from kgraph.gram.block import Block, Draws, added
from kgraph.gram.calculus import Calculus, Side
from kgraph.gram.engine import Engine
from kgraph.gram.factors import Factor, factors
from kgraph.gram.field import Field
from kgraph.gram.gaps import Gaps
from kgraph.gram.joint import JointDraws
from kgraph.how import QUADRATURE, How, assumed
from kgraph.maps import Pointwise
from kgraph.maps.cross import cross
from kgraph.maps.quadrature import line_rule, value_and_slope
from kgraph.maps.tangent import by_factor

_CLOSE = 1e-3


def mean_slope(fn: Pointwise, q: Tensor) -> Tensor:
    """``E[fn'(z)]`` for z ~ N(0, q)."""
    flat = q.reshape(-1)
    plan = fn.plan(float(flat.max()), flat.device)
    root = flat.sqrt()
    x, weight = line_rule(plan, root)
    _, slope = value_and_slope(fn.fn, root[:, None] * x)
    return (weight * slope).sum(-1).reshape(q.shape)


@laws.mean(f.Mapped)
def mapped_mean(engine: Engine, u: f.Mapped) -> Tensor | None:
    if not u.arg.gaussian:
        return None
    variance, level = engine.variance(u.arg), engine.level(u.arg)
    if not averages(u.fn):
        return centred(u.fn, level).mean(variance)
    means = [one.weight * one.of(u.fn, level).mean(one.left(variance)) for one in about(engine, u.arg)]
    return torch.stack(means).sum(0)


@laws.how(f.Mapped)
def mapped_how(engine: Engine, u: f.Mapped) -> How | None:
    if factors(u.arg) is None:
        return assumed("the gradient by a factor in front of a nonlinearity is taken to be independent of it")
    if of_few(u.arg):
        return assumed("few weights of no Gaussian law count as Gaussians")
    if u in engine.rounded:
        return assumed("biases of no Gaussian law count as Gaussians")
    return QUADRATURE if u.fn.how == "quadrature" or u in engine.crossed else None


@laws.pair.alike(f.Mapped)
def mapped_block(engine: Engine, u: f.Mapped, v: f.Mapped) -> Block | None:
    """None for one function at two levels, and for two where factors in front of them cannot be told apart."""
    if not (u.arg.gaussian and v.arg.gaussian):
        return None
    (x, mine), (y, theirs), resolved = _still(u.arg, v.arg)
    levels = engine.level(x), engine.level(y)
    if u.fn is not v.fn:
        engine.crossed.update((u, v))
        if not resolved:
            return None
    elif levels[0] != levels[1]:
        return None
    one, two, inner = centred(u.fn, levels[0]), centred(v.fn, levels[1]), engine.pair(x, y)
    variances = engine.layout.sides(engine.rows, engine.variance(x), engine.variance(y), x.places, y.places)
    around = inner.cov - levels[0] * levels[1] if all(levels) else inner.cov
    cov, slope = _about_biases(engine, (u, v), (x, y), variances, around)
    if engine.gaps is not None and inner.tangents and u is v:
        slope = _sharper(engine.gaps, u, slope, cov)
    block = _through(inner, cov, slope)
    for a, b in product(mine, theirs):
        shared = engine.pair(a.known, b.known).tangents
        if shared:
            psi = by_factor(one, levels[0] - a.shift), by_factor(two, levels[1] - b.shift)
            kernel = cov if psi == (one, two) else _dual(*psi, variances, around)[0]
            own = {name: kernel * (t / (a.size * b.size)) for name, t in shared.items()}
            block = Block(cov, added(block.tangents, own))
    return block


_Side = tuple[Field, tuple[Factor, ...]]


def _still(u: Field, v: Field) -> tuple[_Side, _Side, bool]:
    """Both with factors that do not move, and those; as they are, and False, where factors cannot be told apart."""
    one, two = factors(u), factors(v)
    if one is None or two is None:
        return (u, ()), (v, ()), False
    return (one.still, one.each), (two.still, two.each), True


def _about_biases(
    engine: Engine, maps: tuple[f.Mapped, f.Mapped], args: tuple[Field, Field], variances: _Sides, cov: Tensor
) -> tuple[Tensor, Tensor]:
    """``(E[f g], E[f' g'])``, over the biases; as Gaussians count those of which only some are shared."""
    (u, v), (x, y) = maps, args
    values = about_both(engine, x, y) if averages(u.fn) and averages(v.fn) else None
    if values is None:
        engine.rounded.update(one for one, arg in zip(maps, args, strict=True) if shows(engine, arg))
        values = [(About(), About(), 0.0)]
    found = []
    for a, b, less in values:
        one, two = a.of(u.fn, engine.level(x)), b.of(v.fn, engine.level(y))
        sides = a.left(variances[0]), b.left(variances[1])
        own = _dual(one, two, sides, cov - less if less else cov)
        if len(values) == 1:
            return own
        weight = a.weight if less else a.weight * b.weight
        found.append((weight * own[0], weight * own[1]))
    cov, slope = (torch.stack(terms).sum(0) for terms in zip(*found, strict=True))
    return cov, slope


_Sides = tuple[Tensor, Tensor]


def _dual(one: Pointwise, two: Pointwise, variances: tuple[Tensor, Tensor], cov: Tensor) -> tuple[Tensor, Tensor]:
    """``(E[f g], E[f' g'])``."""
    return one.dual(*variances, cov) if one is two else cross(one, two, *variances, cov)


def _through(inner: Block, cov: Tensor, slope: Tensor) -> Block:
    """The block behind a function; in the slope's memory where that is enough, for it is as large as kernels get."""
    if len(inner.tangents) == 1 and not torch.is_grad_enabled():
        ((name, tangent),) = inner.tangents.items()
        if slope.shape == tangent.shape:
            return Block(cov, {name: slope.mul_(tangent)})
    return inner.mapped(cov, slope)


def _sharper(gaps: Gaps, u: f.Mapped, slope: Tensor, cov: Tensor) -> Tensor:
    """A kink's slope goes as sqrt(1 - c): from the gap where that is small, for 1 - c has lost half its digits."""
    near = _near(gaps, u)
    if near is None:
        return slope
    apart, exact = near
    close = (apart > 0) & (apart < _CLOSE * cov.abs())
    return torch.where(close, exact, slope)


@laws.pair.against(f.Mapped)
def stein_block(e: Side, u: f.Mapped, v: Field) -> Block | None:
    """``E[f(u) v] = E[f'(u)] cov(u, v) + E[f] E[v]``."""
    if not (u.arg.gaussian and v.gaussian):
        return None
    if shows(e.engine, u.arg):
        e.engine.rounded.add(u)
    engine, slope, inner = e.engine, _slope(e.engine, u), e.pair(u.arg, v)
    factor, level = e.gain(slope, u, v), engine.level(v)
    cov = (inner.cov - engine.level(u.arg) * level) * factor
    if level:
        cov = cov + e.outer(engine.means(u), engine.means(v), u.places, v.places)
    return inner.mapped(cov, factor)


def _slope(engine: Calculus, u: f.Mapped) -> Tensor:
    """E[fn'] at every input and position."""
    return mean_slope(centred(u.fn, engine.level(u.arg)), engine.variance(u.arg))


@laws.gap.alike(f.Mapped)
def mapped_gap(gaps: Gaps, u: f.Mapped, v: f.Mapped) -> Tensor | None:
    near = _near(gaps, u) if u.fn is v.fn and u.arg is v.arg and u.arg.gaussian else None
    return None if near is None else near[0]


def _near(gaps: Gaps, u: f.Mapped) -> tuple[Tensor, Tensor] | None:
    """The gap of ``fn(arg)`` and ``E[fn' fn']`` from the gap of its argument, where `Pointwise.near` has them."""
    if u not in gaps.near:
        inner = gaps.gap(u.arg, u.arg)
        q1, q2 = gaps.ends(gaps.engine.variance(u.arg))
        if inner.ndim == 0:
            inner = inner.expand(torch.broadcast_shapes(q1.shape, q2.shape))
        level, inner = gaps.engine.level(u.arg), inner.clamp_min(0)
        values = about(gaps.engine, u.arg) if averages(u.fn) else (About(),)
        pieces = [(one, one.of(u.fn, level)) for one in values]
        near = [(one.weight, fn.near(one.left(q1), one.left(q2), inner)) for one, fn in pieces]
        known = [(weight * found[0], weight * found[1]) for weight, found in near if found is not None]
        totals = [torch.stack(terms).sum(0) for terms in zip(*known, strict=True)]
        gaps.near[u] = (totals[0], totals[1]) if len(known) == len(near) else None
    return gaps.near[u]


@laws.gap.against(f.Mapped)
def stein_gap(gaps: Gaps, u: f.Mapped, v: Field) -> Tensor | None:
    """``E[f(u) v] = E[f'(u)] cov(u, v)``: its slope at each input is a gain."""
    if not (u.arg.gaussian and v.gaussian):
        return None
    a, b = gaps.ends(_slope(gaps.engine, u))
    total = (a + b) / 2 * gaps.gap(u.arg, v)
    return total if torch.equal(a, b) else total + (a - b) / 2 * gaps.skew(u.arg, v)


@laws.draw(f.Mapped)
def mapped_draws(draws: JointDraws, u: f.Mapped) -> Draws:
    inner = draws.of(u.arg)
    return inner.mapped(*value_and_slope(u.fn.fn, inner.value))
