"""Functions of fields: of one Gaussian, of two, against what is Gaussian.

pair(f(u), f(v)) = E[f f],  NTK = E[f' f'] NTK(u, v)
pair(f(u), v)    = E[f'(u)] cov(u, v) + E[f] E[v]        (Stein's lemma)
"""

from __future__ import annotations

from functools import cache

import torch
from torch import Tensor

from kgraph.gram import field as f
from kgraph.gram import laws
from kgraph.gram.block import Block
from kgraph.gram.calculus import Calculus, Side
from kgraph.gram.engine import Engine
from kgraph.gram.factors import holds_factor, trained_factor, unresolved
from kgraph.gram.field import Field
from kgraph.gram.gaps import Gaps
from kgraph.gram.joint import JointDraws
from kgraph.gram.laws import Draws
from kgraph.how import QUADRATURE, How, assumed
from kgraph.maps import Pointwise
from kgraph.maps.cross import cross
from kgraph.maps.quadrature import line_rule, value_and_slope
from kgraph.maps.tangent import correction

_CLOSE = 1e-3


def centred(fn: Pointwise, shift: float) -> Pointwise:
    """``u -> fn(u + shift)``; made once."""
    return fn if shift == 0.0 else _shifted(fn, shift)


@cache
def _shifted(fn: Pointwise, shift: float) -> Pointwise:
    return fn.affine(input_shift=shift)


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
    return centred(u.fn, engine.level(u.arg)).mean(engine.variance(u.arg)) if u.arg.gaussian else None


@laws.how(f.Mapped)
def mapped_how(engine: Engine, u: f.Mapped) -> How | None:
    if engine.with_ntk and unresolved(u.arg):
        return assumed("the gradient by a factor in front of a nonlinearity is taken to be independent of it")
    return QUADRATURE if u.fn.how == "quadrature" or u in engine.crossed else None


@laws.pair.alike(f.Mapped)
def mapped_block(engine: Engine, u: f.Mapped, v: f.Mapped) -> Block | None:
    if not (u.arg.gaussian and v.arg.gaussian):
        return None
    return _one_function(engine, u, v) if u.fn is v.fn else _two_functions(engine, u, v)


def _variances(engine: Engine, u: f.Mapped, v: f.Mapped) -> tuple[Tensor, Tensor]:
    """Those of the arguments on either side of a block."""
    q1, q2 = engine.variance(u.arg), engine.variance(v.arg)
    return engine.layout.sides(engine.rows, q1, q2, u.arg.places, v.arg.places)


def _one_function(engine: Engine, u: f.Mapped, v: f.Mapped) -> Block | None:
    shift = engine.level(u.arg)
    if shift != engine.level(v.arg):
        return None
    fn, inner, variances = centred(u.fn, shift), engine.pair(u.arg, v.arg), _variances(engine, u, v)
    around = inner.cov - shift**2 if shift else inner.cov
    cov, slope = fn.dual(*variances, around)
    if inner.ntk is None:
        return Block(cov)
    factor = trained_factor(u.arg)
    if factor is not None and u.arg.roots == v.arg.roots and factor == trained_factor(v.arg):
        more = correction(fn, shift, factor, variances, around, (cov, slope))
        return Block(cov, slope * inner.ntk + more)
    if engine.gaps is not None and u is v:
        slope = _sharper(engine.gaps, u, slope, cov)
    if torch.is_grad_enabled() or slope.shape != inner.ntk.shape:
        return Block(cov, slope * inner.ntk)
    return Block(cov, slope.mul_(inner.ntk))  # the slope is ours, and as large as kernels get


def _sharper(gaps: Gaps, u: f.Mapped, slope: Tensor, cov: Tensor) -> Tensor:
    """A kink's slope goes as sqrt(1 - c): from the gap where that is small, for 1 - c has lost half its digits."""
    near = _near(gaps, u)
    if near is None:
        return slope
    apart, exact = near
    close = (apart > 0) & (apart < _CLOSE * cov.abs())
    return torch.where(close, exact, slope)


def _two_functions(engine: Engine, u: f.Mapped, v: f.Mapped) -> Block | None:
    """None where a trained factor stands in front of them."""
    engine.crossed.update((u, v))
    inner = engine.pair(u.arg, v.arg)
    if inner.ntk is not None and (holds_factor(u.arg) or holds_factor(v.arg)):
        return None
    one, two = engine.level(u.arg), engine.level(v.arg)
    cov, slope = cross(centred(u.fn, one), centred(v.fn, two), *_variances(engine, u, v), inner.cov - one * two)
    return Block(cov, None if inner.ntk is None else slope * inner.ntk)


@laws.pair.against(f.Mapped)
def stein_block(e: Side, u: f.Mapped, v: Field) -> Block | None:
    """``E[f(u) v] = E[f'(u)] cov(u, v) + E[f] E[v]``."""
    if not (u.arg.gaussian and v.gaussian):
        return None
    engine, slope, inner = e.engine, _slope(e.engine, u), e.pair(u.arg, v)
    factor, level = e.gain(slope, u, v), engine.level(v)
    cov = (inner.cov - engine.level(u.arg) * level) * factor
    if level:
        cov = cov + e.outer(engine.means(u), engine.means(v), u.places, v.places)
    return Block(cov, None if inner.ntk is None else inner.ntk * factor)


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
        fn, inner = centred(u.fn, gaps.engine.level(u.arg)), gaps.gap(u.arg, u.arg)
        q1, q2 = gaps.ends(gaps.engine.variance(u.arg))
        if inner.ndim == 0:
            inner = inner.expand(torch.broadcast_shapes(q1.shape, q2.shape))
        gaps.near[u] = fn.near(q1, q2, inner.clamp_min(0))
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
    value, direction = draws.of(u.arg)
    out, slope = value_and_slope(u.fn.fn, value)
    return out, None if direction is None else slope * direction
