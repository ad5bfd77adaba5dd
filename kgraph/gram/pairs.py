"""Blocks of two fields of known make, one function a pair of kinds. The engine chooses among them."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor

from kgraph.errors import RuleError
from kgraph.gram import field as f
from kgraph.gram.block import Block, nothing
from kgraph.gram.factors import holds_factor, trained_factor
from kgraph.gram.field import Field
from kgraph.gram.gaps import Gaps
from kgraph.gram.layout import NeedsFull
from kgraph.gram.means import centred, mean_slope, shaped
from kgraph.gram.taps import convolve, count_taps
from kgraph.maps.cross import cross
from kgraph.maps.tangent import correction

if TYPE_CHECKING:
    from kgraph.gram.engine import Engine


def located_block(engine: Engine, u: f.Located, v: Field, swapped: bool) -> Block:
    one = torch.ones(1, *v.places, dtype=torch.float64)
    sides = (one, u.gain) if swapped else (u.gain, one)
    inner = engine.pair(v, u.arg) if swapped else engine.pair(u.arg, v)
    places = (v.places, u.places) if swapped else (u.places, v.places)
    left, right = engine.layout.sides(engine.rows, *sides, *places)
    block = inner if inner.zero else inner.times(left * right)
    if not u.shift.any():
        return block
    mean = shaped(engine.mean(v), v.places)
    first, second = (mean, u.shift) if swapped else (u.shift, mean)
    constant = engine.layout.outer(engine.rows, first, second, *places)
    return Block(block.cov + constant, block.ntk)


def joined_block(engine: Engine, u: f.Joined, v: Field, swapped: bool) -> Block:
    """Parts on one side only: the layout must hold every pair of positions."""
    parts = [engine.pair(v, arg) if swapped else engine.pair(arg, v) for arg in u.args]

    def join(name: str) -> Tensor | None:
        tensors = [getattr(part, name) for part in parts]
        if tensors[0] is None:
            return None
        start = 1 + (len(v.places) if swapped else 0) + u.axis
        shapes = [(*v.places, *arg.places) if swapped else (*arg.places, *v.places) for arg in u.args]
        count = len(engine.rows.first)
        wide = [
            (t.expand(count, *s) if t.ndim == 0 else t.expand(count, *t.shape[1:]))
            for t, s in zip(tensors, shapes, strict=True)
        ]
        return torch.cat(wide, start)

    cov = join("cov")
    assert cov is not None
    if engine.layout.name != "full":
        raise NeedsFull
    return Block(cov, join("ntk"))


def folded_block(engine: Engine, u: f.Folded, v: f.Folded) -> Block:
    """Average over equal positions of the folded axes."""
    inner = engine.pair(u.arg, v.arg)
    places = u.arg.places, v.arg.places
    return inner.each(lambda x: x if x.ndim == 0 else engine.layout.fold(x, u.axes, *places))


def grouped_block(engine: Engine, u: f.Grouped, v: f.Grouped) -> Block:
    """Channel-weighted average of the groups' blocks."""
    total = sum(size for size, _ in u.args)
    pairs = zip(u.args, v.args, strict=True)
    blocks = [engine.pair(a, b).times(size / total) for (size, a), (_, b) in pairs]
    return sum(blocks[1:], blocks[0])


def known_block(engine: Engine, u: f.Known, v: f.Known) -> Block:
    """<x, y> / C; a trained parameter's own NTK is 1 (times its gain)."""
    if u.data.shape[1] != v.data.shape[1] and 1 not in (u.data.shape[1], v.data.shape[1]):
        return engine.outer_means(u, v)
    channels = max(u.data.shape[1], v.data.shape[1])
    x, y = (t.expand(t.shape[0], channels, *t.shape[2:]) for t in (u.data, v.data))
    zero = nothing(engine.with_ntk)
    ntk = zero.ntk
    if engine.with_ntk and u.roots and u.roots == v.roots and u.gain:
        ntk = u.gain * engine.layout.alike(u.places)
    return Block(engine.layout.known(engine.rows, x, y), ntk)


def sliced_block(engine: Engine, u: f.Sliced, v: f.Sliced) -> Block:
    """Same range of the channels: the pair of the whole. Another range: other random numbers."""
    mine = {(cut[0], cut[1]) for root in u.roots for cut in root.cuts}
    theirs = {(cut[0], cut[1]) for root in v.roots for cut in root.cuts}
    return engine.pair(u.arg, v.arg) if mine == theirs else engine.outer_means(u, v)


def affine_block(engine: Engine, u: f.Affine, v: f.Affine) -> Block:
    one, two = u.layer, v.layer
    if one.root != two.root:
        return engine.outer_means(u, v)
    same = (one.geometry is None and two.geometry is None) or (
        one.geometry is not None and two.geometry is not None and one.geometry.key == two.geometry.key
    )
    if not same:
        raise RuleError(
            f"the convolution {one.root!r} is used with several strides, paddings, dilations or output sizes, and what "
            "they give is compared",
            hint="There is no rule for the kernel between them; kgraph.analyze does not need it",
        )
    return _through_layer(engine, engine.pair(u.arg, v.arg), u, v)


def both_joined_block(engine: Engine, u: f.Joined, v: f.Joined) -> Block:
    places = [arg.places for arg in u.args]
    if places != [arg.places for arg in v.args]:
        return joined_block(engine, u, v, False)
    if engine.layout.name == "diagonal":
        grid = [
            [engine.pair(a, b) if i == j else nothing(engine.with_ntk) for j, b in enumerate(v.args)]
            for i, a in enumerate(u.args)
        ]
    else:
        grid = [[engine.pair(a, b) for b in v.args] for a in u.args]
    cov = engine.layout.join([[b.cov for b in line] for line in grid], u.axis, engine.rows, places)
    if not engine.with_ntk:
        return Block(cov)
    ntk = [[b.ntk for b in line] for line in grid]
    return Block(cov, engine.layout.join(ntk, u.axis, engine.rows, places))  # type: ignore[arg-type]


def masked_block(engine: Engine, u: f.Masked, v: f.Masked) -> Block | None:
    if u.mask.name != v.mask.name:
        return engine.pair(u.arg, v.arg)
    if u.places != v.places:
        return None
    inner = engine.pair(u.arg, v.arg)
    growth = 1 + (1 / u.keep - 1) * _one_mask(engine, u)
    return inner if inner.zero else inner.times(growth)


def _one_mask(engine: Engine, u: f.Masked) -> Tensor:
    """1 where one draw of the mask serves both sides, else 0."""
    if not u.whole:
        return engine.layout.identity(engine.rows, u.places)
    shape = engine.layout.shape(u.places, u.places)
    return engine.rows.same.double().reshape(-1, *(1 for _ in shape)).expand(-1, *shape)


def products_block(engine: Engine, u: f.Product, v: f.Product) -> Block | None:
    groups = ((u.left, v.left), (u.right, v.right))
    if not all(a.independent(b) for a in groups[0] for b in groups[1]):
        groups = ((u.left, v.right), (u.right, v.left))
        if not all(a.independent(b) for a in groups[0] for b in groups[1]):
            return None
    return _times(*(engine.pair(*group) for group in groups))


def all_channels_block(engine: Engine, u: f.Crossed, v: f.Crossed) -> Block:
    """Every channel of one factor meets every one of the other: averages factorize, whatever they share."""
    return _times(engine.pair(u.left, v.left), engine.pair(u.right, v.right))


def _times(one: Block, two: Block) -> Block:
    ntk = None if one.ntk is None or two.ntk is None else one.ntk * two.cov + one.cov * two.ntk
    return Block(one.cov * two.cov, ntk)


def known_factor_block(engine: Engine, u: f.Product, v: f.Known, swapped: bool) -> Block | None:
    """``E[l k v]`` for known k and v and an independent field l: its mean times the pair of k and v."""
    if not isinstance(u.right, f.Known) or not (u.left.independent(u.right) and u.left.independent(v)):
        return None
    inner = engine.pair(v, u.right) if swapped else engine.pair(u.right, v)
    one = torch.ones(1, *v.places, dtype=torch.float64)
    mean = shaped(engine.mean(u.left), u.places)
    sides, places = ((one, mean), (v.places, u.places)) if swapped else ((mean, one), (u.places, v.places))
    return inner.times(engine.layout.outer(engine.rows, *sides, *places))


def mapped_block(engine: Engine, u: f.Mapped, v: f.Mapped) -> Block | None:
    if not (u.arg.gaussian and v.arg.gaussian):
        return None
    mean_u, mean_v = engine.mean(u.arg), engine.mean(v.arg)
    shift = float(mean_u.reshape(-1)[0])
    if shift != float(mean_v.reshape(-1)[0]):
        return None
    fn = centred(u.fn, shift)
    inner = engine.pair(u.arg, v.arg)
    q1, q2 = engine.layout.sides(
        engine.rows, engine.variance(u.arg), engine.variance(v.arg), u.arg.places, v.arg.places
    )
    around = inner.cov - shift**2 if shift else inner.cov
    cov, slope = fn.dual(q1, q2, around)
    if inner.ntk is None:
        return Block(cov)
    factor = trained_factor(u.arg)
    if factor is not None and u.arg.roots == v.arg.roots and factor == trained_factor(v.arg):
        more = correction(fn, shift, factor, (q1, q2), around, (cov, slope))
        return Block(cov, slope * inner.ntk + more)
    if engine.gaps is not None and u is v:
        slope = _sharper(engine.gaps, u, slope, cov)
    if torch.is_grad_enabled() or slope.shape != inner.ntk.shape:
        return Block(cov, slope * inner.ntk)
    return Block(cov, slope.mul_(inner.ntk))  # the slope is ours, and as large as kernels get


def crossed_block(engine: Engine, u: f.Mapped, v: f.Mapped) -> Block | None:
    """Two functions of Gaussian fields; None where a trained factor stands in front of them."""
    inner = engine.pair(u.arg, v.arg)
    if inner.ntk is not None and (holds_factor(u.arg) or holds_factor(v.arg)):
        return None
    means = [float(engine.mean(w.arg).reshape(-1)[0]) for w in (u, v)]
    q1, q2 = engine.layout.sides(
        engine.rows, engine.variance(u.arg), engine.variance(v.arg), u.arg.places, v.arg.places
    )
    cov, slope = cross(centred(u.fn, means[0]), centred(v.fn, means[1]), q1, q2, inner.cov - means[0] * means[1])
    return Block(cov, None if inner.ntk is None else slope * inner.ntk)


_CLOSE = 1e-3


def _sharper(gaps: Gaps, u: f.Mapped, slope: Tensor, cov: Tensor) -> Tensor:
    """A kink's slope goes as sqrt(1 - c): from the gap where that is small, for 1 - c has lost half its digits."""
    near = gaps.near(u)
    if near is None:
        return slope
    apart, exact = near
    close = (apart > 0) & (apart < _CLOSE * cov.abs())
    return torch.where(close, exact, slope)


def stein_block(engine: Engine, u: f.Mapped, v: Field, swapped: bool) -> Block | None:
    """``E[f(u) v] = E[f'(u)] cov(u, v) + E[f] E[v]``."""
    if not u.arg.gaussian:
        return None
    shift = float(engine.mean(u.arg).reshape(-1)[0])
    slope = mean_slope(centred(u.fn, shift), engine.variance(u.arg))
    inner = engine.pair(v, u.arg) if swapped else engine.pair(u.arg, v)
    one = torch.ones(1, *v.places, dtype=torch.float64)
    sides = (one, slope) if swapped else (slope, one)
    places = (v.places, u.places) if swapped else (u.places, v.places)
    left, right = engine.layout.sides(engine.rows, *sides, *places)
    factor = left * right
    mean_v = float(engine.mean(v).reshape(-1)[0])
    cov = (inner.cov - shift * mean_v) * factor
    if mean_v:
        means = (engine.mean(v), engine.mean(u)) if swapped else (engine.mean(u), engine.mean(v))
        wide = [shaped(m, p) for m, p in zip(means, places, strict=True)]
        cov = cov + engine.layout.outer(engine.rows, wide[0], wide[1], *places)
    return Block(cov, None if inner.ntk is None else inner.ntk * factor)


def _through_layer(engine: Engine, inner: Block, u: f.Affine, v: f.Affine) -> Block:
    """K' = sum_o sw2_o K at tap o + sb2; T' = own K + own + sum_o sw2_o T at tap o."""
    layer = u.layer
    weight_own, bias_own = layer.own
    if inner.cov.ndim == 0:
        shape = engine.layout.shape(u.arg.places, v.arg.places)
        inner = Block(inner.cov.expand(len(engine.rows.first), *shape), inner.ntk)
    geometry = layer.geometry
    if geometry is None:
        summed, counted = inner.times(layer.weight), (inner.cov, 1.0)
    else:
        summed = inner.each(lambda x: convolve(engine.layout, x, geometry, u.arg.places))
        counted = (summed.cov, 1.0)
    cov = summed.cov + layer.bias if layer.bias else summed.cov
    if summed.ntk is None:
        return Block(cov)
    if engine.parametrization == "ntk":
        return Block(cov, _own(summed.cov, weight_own, bias_own * layer.bias, summed.ntk))
    if geometry is not None:
        counted = count_taps(engine.layout, inner.cov, summed.cov, geometry, u.arg.places)
    return Block(cov, _own(counted[0], weight_own * counted[1], bias_own, summed.ntk))


def _own(kernel: Tensor, weight: float | Tensor, bias: float | Tensor, ntk: Tensor) -> Tensor:
    """``weight kernel + bias + ntk`` with one new tensor: these are as large as kernels get."""
    total = kernel * weight
    total = total.add_(ntk) if total.shape == torch.broadcast_shapes(total.shape, ntk.shape) else total + ntk
    return total.add_(bias) if isinstance(bias, Tensor) or bias else total
