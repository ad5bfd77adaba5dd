"""Gaussian leaves: outputs of affine layers, fields whose block is given, and ranges of their channels.

    pair(W u + b, W v + b) = sum over taps of sw2 pair(u, v) at the tap + sb2

None of them has a law for its draws: leaves are drawn from their covariance.
"""

from __future__ import annotations

import torch
from torch import Tensor

from kgraph.errors import RuleError
from kgraph.gram import field as f
from kgraph.gram import laws
from kgraph.gram.block import Block
from kgraph.gram.calculus import Side
from kgraph.gram.engine import Engine
from kgraph.gram.field import Field
from kgraph.gram.gaps import Gaps
from kgraph.gram.taps import convolve, count_taps
from kgraph.gram.unseen import unseen_gap, unseen_means

laws.mean(f.Affine)(lambda engine, u: torch.tensor(u.layer.bias_mean, dtype=torch.float64))
laws.mean(f.Leaf)(lambda engine, u: torch.tensor(u.mean, dtype=torch.float64))
laws.mean(f.Sliced)(lambda engine, u: engine.mean(u.arg))
laws.pair.alike(f.Leaf)(lambda engine, u, v: u.block if u is v else None)
laws.gap.alike(f.Leaf)(lambda gaps, u, v: u.gap if u is v else None)
laws.gap.alike(f.Sliced)(lambda gaps, u, v: gaps.gap(u.arg, v.arg) if u.roots == v.roots else None)


@laws.pair.alike(f.Affine)
def affine_block(engine: Engine, u: f.Affine, v: f.Affine) -> Block:
    one, two = u.layer, v.layer
    if one.root != two.root:
        return engine.outer_means(u, v)
    keys = [None if layer.geometry is None else (layer.geometry.key,) for layer in (one, two)]
    if keys[0] != keys[1]:
        raise RuleError(
            f"the convolution {one.root!r} is used with several strides, paddings, dilations or output sizes, and what "
            "they give is compared",
            hint="There is no rule for the kernel between them; kgraph.analyze does not need it",
        )
    return _through_layer(engine, engine.pair(u.arg, v.arg), u, v)


def _through_layer(engine: Engine, inner: Block, u: f.Affine, v: f.Affine) -> Block:
    """K' = sum_o sw2_o K at tap o + sb2; T' = own K + own + sum_o sw2_o T at tap o."""
    layer = u.layer
    if inner.cov.ndim == 0:
        shape = engine.layout.shape(u.arg.places, v.arg.places)
        inner = Block(inner.cov.expand(len(engine.rows.first), *shape), inner.tangents)
    geometry = layer.geometry
    if geometry is None:
        summed = inner.times(layer.weight)
    else:
        summed = inner.each(lambda x: convolve(engine.layout, x, geometry, u.arg.places))
    unseen = None if layer.zero_sums is None else unseen_means(engine, u, v)
    arrives = summed.cov if unseen is None else (summed.cov - unseen.cov) * unseen.spread
    cov = arrives + layer.bias if layer.bias else arrives
    if not (layer.own or layer.own_bias):
        return Block(cov, summed.tangents)
    kernel, factor = _counted(engine, inner.cov, summed.cov, u)
    if unseen is not None and not unseen.stored:
        less = unseen.cov if engine.parametrization == "ntk" else unseen.counted / factor
        kernel = (kernel - less) * unseen.spread
    unit = layer.bias if engine.parametrization == "ntk" else 1.0
    tangents = dict(summed.tangents)
    for name in {**layer.own, **layer.own_bias}:
        weight, bias = layer.own.get(name, 0.0) * factor, layer.own_bias.get(name, 0.0) * unit
        tangents[name] = _own(kernel, weight, bias, summed.tangent(name))
    return Block(cov, tangents)


def _counted(engine: Engine, inner: Tensor, summed: Tensor, u: f.Affine) -> tuple[Tensor, float | Tensor]:
    """The kernel that the weight's own term is a multiple of, and by what: of what it reads, all entries alike."""
    if engine.parametrization == "ntk":
        return summed, 1.0
    geometry = u.layer.geometry
    return (inner, 1.0) if geometry is None else count_taps(engine.layout, inner, summed, geometry, u.arg.places)


def _own(kernel: Tensor, weight: float | Tensor, bias: float | Tensor, tangent: Tensor) -> Tensor:
    """``weight kernel + bias + tangent`` with one new tensor: these are as large as kernels get."""
    total = kernel * weight
    alike = total.shape == torch.broadcast_shapes(total.shape, tangent.shape)
    total = total.add_(tangent) if alike else total + tangent
    return total.add_(bias) if isinstance(bias, Tensor) or bias else total


@laws.gap.alike(f.Affine)
def affine_gap(gaps: Gaps, u: f.Affine, v: f.Affine) -> Tensor | None:
    """The weight's share of `affine_block`: biases cancel."""
    if u.layer is not v.layer:
        return None
    inner, geometry = gaps.gap(u.arg, v.arg), u.layer.geometry
    summed = inner * u.layer.weight if geometry is None else convolve(gaps.engine.layout, inner, geometry, u.arg.places)
    return summed if u.layer.zero_sums is None else unseen_gap(gaps, summed, u, v)


@laws.pair.outright(f.Sliced)
def sliced_block(e: Side, u: f.Sliced, v: Field) -> Block | None:
    """Same range of the channels: the pair of the whole. Another range: other random numbers.

    A channel among some of a layer's and one among all of them are hardly ever the same one.
    """
    if isinstance(v, f.Sliced):
        mine, theirs = ({(cut[0], cut[1]) for root in w.roots for cut in root.cuts} for w in (u, v))
        return e.pair(u.arg, v.arg) if mine == theirs else e.apart(u, v)
    return e.apart(u, v) if isinstance(v, (f.Affine, f.Leaf, f.Scores)) else None
