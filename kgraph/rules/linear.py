"""Linear layers: K' = sw2 K + sb2, with the weight variances measured on the tensors themselves."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

from torch import Tensor, fx

from kgraph.biases import bias_law
from kgraph.canonical import aten, operation_name
from kgraph.draws import uneven
from kgraph.entries import once, said
from kgraph.how import EXACT, How, assumed
from kgraph.kernel import DIFF, Axes, Bias, Gaussian, Kernel, Part, Unknown
from kgraph.roots import Root, Roots
from kgraph.rules.speeds import same_tensor
from kgraph.rules.table import TURNED, Context, parameter_of, rule
from kgraph.rules.weights import (
    UNEVEN_COLUMNS,
    assumed_of,
    mean_square,
    off_centre,
    real_mean,
    repeats,
    uneven_columns,
    uneven_rows,
)
from kgraph.rules.zero_sums import OF_POSITIONS, ZeroSums, zero_sums


@dataclass(frozen=True)
class Affine:
    """Second moments of an affine layer's parameters.

    Attributes:
        weight: sw2 = fan_in E[W^2], the factor on K.
        bias: sb2 = E[b^2].
        bias_mean: E[b].
        fan_in: inputs of one output unit, over positions their mean.
        root: name of the weight.
        speeds: how fast weight and bias move, as a factor on their own parts of the NTK: 0 for what is not trained.
        law: of the biases, where it is no Gaussian's.
    """

    weight: float
    bias: float
    bias_mean: float
    fan_in: float
    has_bias: bool
    root: str
    speeds: tuple[float, float] = (1.0, 1.0)
    law: Bias | None = None

    def ntk_gains(self, parametrization: str) -> tuple[float, float]:
        """Factors of K and 1 in the NTK's own term: (fan_in, 1) as PyTorch trains, (sw2, sb2) in NTK form."""
        own_weight, own_bias = self.speeds
        if parametrization == "ntk":
            return own_weight * self.weight, own_bias * self.bias
        return own_weight * self.fan_in, own_bias * self.has_bias


def bias_moments(bias: Tensor | None) -> tuple[float, float]:
    """(E[b^2], E[b])."""
    if bias is None or bias.is_meta:
        return 0.0, 0.0
    return mean_square(bias), real_mean(bias)


def of_rows(context: Context, index: int, weight: Tensor, x: Kernel) -> How:
    """What is assumed of the rows of a weight that reads ``x``: that they are draws of their own, and of no other use.

    A head that is the embedding's table adds, to the logit of the token itself, the square of its row.
    """
    source = context.node.args[index]
    readers = [user for n in (same_tensor(source) if isinstance(source, fx.Node) else ()) for user in n.users]
    if any(operation_name(user).startswith("embedding") for user in readers):
        return assumed("a head tied to the embedding, whose logit of the token itself is not counted")
    if repeats(weight):
        return assumed("independent channels, though rows of the weight repeat")
    own = assumed_of(source if isinstance(source, fx.Node) else None, off_centre(weight), uneven_rows(weight))
    apart = own is EXACT and (len(x.parts) > 1 or uneven(x.merged)) and uneven_columns(weight)
    return UNEVEN_COLUMNS if apart else own


FEW = 32
"""Inputs of a sum below which it is not taken for Gaussian without saying so, where its weights are shared."""


def affine_part(context: Context, part: Part, layer: Affine, size: int, taps: int = 1) -> Part:
    """K' = sw2 K + sb2; T' = g_w K + g_b + sw2 T over so many positions; a fresh Gaussian, exact at infinite width."""
    own_weight, own_bias = layer.ntk_gains(context.parametrization)
    return Part(
        size=size,
        cov=layer.weight * part.cov + layer.bias,
        slope=layer.weight * part.slope,
        ntk=own_weight * part.cov + own_bias + layer.weight * part.ntk,
        mean=layer.bias_mean,
        roots=Roots({Root(layer.root)}),
        expr=Gaussian(layer.law),
        how=part.how,
        scatter=part.scatter and part.scatter.layer(layer.weight, own_weight, taps),
    )


def without_shared_channels(part: Part) -> Part:
    """Channels that stay while positions are summed become positions of their own: K_diff = m^2.

    This is a token-mixing layer: it contracts positions, so what was a channel is now a place.
    """
    cov, slope, ntk = part.cov.clone(), part.slope.clone(), part.ntk.clone()
    cov[:, DIFF], slope[:, DIFF], ntk[:, DIFF] = part.mean**2, 0.0, 0.0
    return replace(part, cov=cov, slope=slope, ntk=ntk, scatter=None)


def contract(
    context: Context, x: Kernel, dims: tuple[int, ...], layer: Affine, axes: Axes, zero: ZeroSums | None = None
) -> Kernel:
    """Apply an affine layer that sums over ``dims`` of ``x``; ``axes`` are those of the result."""
    kept = [factor for i, axis in enumerate(x.axes) if i not in dims for factor in axis]
    read = math.prod(s for i in dims for role, s in x.axes[i] if role == "p")
    mixes = any(role == "c" for role, _ in kept)
    size = math.prod(s for axis in axes for role, s in axis if role == "c")

    def summed(part: Part) -> Part:
        result = affine_part(context, without_shared_channels(part) if mixes else part, layer, size, read)
        if zero is not None and mixes:
            result = replace(result, how=result.how | OF_POSITIONS)
        elif zero is not None:
            result = zero.applied(context, part, result, layer.weight, layer.speeds[0])
        if not mixes or layer.fan_in >= FEW:
            return result
        # all channels share the few weights of a unit, whose sum of squares is a number of its own
        return replace(result, expr=Unknown(f"Gaussian sums over {layer.fan_in:g} positions each"))

    return Kernel((once(x.merged, context.signature, summed),), axes)


def to_positions(axis: tuple[tuple[str, int], ...]) -> tuple[tuple[str, int], ...]:
    """Dimensions that a layer does not sum over index positions from here on."""
    return tuple(("p" if role == "c" else role, size) for role, size in axis)


def both_ways(context: Context, index: int, turned: bool) -> tuple[str, str]:
    """Roots of the weight that is argument ``index``: as it is read, and turned around."""
    source = context.node.args[index]
    if not isinstance(source, fx.Node):
        return context.argument_name(index), context.argument_name(index) + TURNED
    base, own = parameter_of(source)
    return (base + TURNED, base) if own ^ turned else (base, base + TURNED)


def last_dim(
    context: Context, x: Kernel, weight: Tensor, bias: Tensor | None, out: int, index: int, *, turned: bool = False
) -> Kernel:
    """An affine layer over the last dimension; W^T f(W u) is no fresh Gaussian: it holds a multiple of u itself."""
    name, other = both_ways(context, index, turned)
    if any(part.roots.named(other) for part in x.parts):
        return context.sample()
    fan_in = weight.numel() // max(out, 1)
    sb2, mean = bias_moments(bias)
    speeds = context.speed(index), context.speed("self" if turned else "bias") if bias is not None else 0.0
    layer = Affine(
        fan_in * mean_square(weight), sb2, mean, fan_in, bias is not None, name, speeds, bias_law(bias, mean)
    )
    axes = (*(to_positions(axis) for axis in x.axes[:-1]), (("c", out),))
    by_unit = weight.T if turned and weight.ndim == 2 else weight
    rows = of_rows(context, index, by_unit, x)
    zero = zero_sums(context, context.node.args[index], by_unit)
    result = contract(context, x, (len(x.axes) - 1,), layer, axes, zero)
    return result if rows is EXACT else said(result, rows)


@rule(aten.linear.default)
def linear(context: Context, x: Kernel, weight: Tensor, bias: Tensor | None = None) -> Kernel:
    if any(isinstance(a, Kernel) != (a is x) for a in (x, weight, bias)):
        return context.sample()
    return last_dim(context, x, weight, bias, weight.shape[0], 1)


@rule(aten.addmm.default)
def addmm(context: Context, bias: Tensor, x: Kernel, weight: Tensor, **scales: float) -> Kernel:
    if scales or any(isinstance(a, Kernel) != (a is x) for a in (bias, x, weight)):
        return context.sample()
    return last_dim(context, x, weight, bias, weight.shape[1], 2, turned=True)
