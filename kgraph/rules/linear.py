"""Linear layers: K' = sw2 K + sb2, with the weight variances measured on the tensors themselves."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from functools import lru_cache

import torch
from scipy.special import ndtr, stdtrit
from torch import Tensor, fx

from kgraph.biases import bias_law
from kgraph.canonical import aten, operation_name
from kgraph.entries import once, said
from kgraph.how import EXACT, How, assumed
from kgraph.kernel import DIFF, Axes, Bias, Gaussian, Kernel, Part, Unknown
from kgraph.roots import Root, Roots
from kgraph.rules.speeds import same_tensor
from kgraph.rules.table import TURNED, Context, parameter_of, rule


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


def mean_square(tensor: Tensor) -> float:
    """E[x^2] over all entries, accumulated in float64; a meta tensor has no values and counts as variance 1/fan."""
    if tensor.is_meta:
        return tensor.shape[0] / max(tensor.numel(), 1)
    if tensor.numel() > 1 and not any(tensor.stride()):
        return float(tensor[(0,) * tensor.ndim]) ** 2  # one number, expanded
    real = torch.view_as_real(tensor.detach()) if tensor.is_complex() else tensor.detach()
    return float(torch.linalg.vector_norm(real, dtype=torch.float64)) ** 2 / max(tensor.numel(), 1)


def bias_moments(bias: Tensor | None) -> tuple[float, float]:
    """(E[b^2], E[b])."""
    if bias is None or bias.is_meta:
        return 0.0, 0.0
    return mean_square(bias), real_mean(bias)


def real_mean(x: Tensor) -> float:
    """E[x], taken as 0 where it differs from it by no more than sampling noise (five standard errors).

    A bias drawn around 0 has a mean of its size over sqrt(n); as a shift it would cost every closed form after it. The
    standard error is that of the entries' own spread, by Student's law where they are few; one entry alone is noise.
    """
    values = (x.real if x.is_complex() else x).detach().double()
    if values.numel() < 2:
        return 0.0
    mean = values.mean()
    noise = _five_sigma(values.numel() - 1) * values.std() / math.sqrt(values.numel())
    return float(mean) if bool(mean.abs() > noise) else 0.0


def of_rows(context: Context, index: int, weight: Tensor) -> How:
    """What is assumed of a weight's rows: that they are draws of their own, and of no other use.

    A head that is the embedding's table adds, to the logit of the token itself, the square of its row.
    """
    source = context.node.args[index]
    readers = [user for n in (same_tensor(source) if isinstance(source, fx.Node) else ()) for user in n.users]
    if any(operation_name(user).startswith("embedding") for user in readers):
        return assumed("a head tied to the embedding, whose logit of the token itself is not counted")
    if repeats(weight):
        return assumed("independent channels, though rows of the weight repeat")
    if isinstance(source, fx.Node) and source.op != "get_attr":
        return _of_computed(source, weight)
    return EXACT


def _of_computed(source: fx.Node, weight: Tensor) -> How:
    """What is assumed of a weight that the forward computes: entries about zero, and not their own mirror images."""
    mean, square = (0.0, 0.0) if weight.is_meta else (real_mean(weight), mean_square(weight))
    if mean**2 * weight[0].numel() > _SHARE_OF_MEAN * square:
        return assumed("weights about zero, though the mean of what the forward computes is not")
    queue, found = [source], set[fx.Node]()
    while queue:
        one = queue.pop()
        if one not in found:
            found.add(one)
            queue += one.all_input_nodes
    sums = any(operation_name(one) in ("add", "sub", "rsub") for one in found)
    if sums and any(operation_name(one) in _MIRRORS for one in found):
        return assumed("a weight and its mirror image taken as new weights")
    return EXACT


FEW = 32
"""Inputs of a sum below which it is not taken for Gaussian without saying so, where its weights are shared."""
_SHARE_OF_MEAN = 5e-3
"""Of a unit's q in the mean of its weights: (sum_j w_j)^2 against the sum of their squares."""
_MIRRORS = {"t", "transpose", "permute", "numpy_T", "mT", "flip", "rot90", "roll"}


def repeats(weight: Tensor) -> bool:
    """Whether two rows are one and the same, other than zero (a pixel shuffle's ICNR initialization)."""
    if weight.is_meta or weight.is_complex() or weight.ndim < 2 or not any(weight.stride()):
        return False
    rows = weight.detach().flatten(1)
    rows = rows[(rows != 0).any(1)]
    if rows.shape[1] < 2 or not _same_marks(rows.float()):  # cheap; rounding may make two rows look alike
        return False
    return _same_marks(rows.double())


def _same_marks(rows: Tensor) -> bool:
    marks = rows @ torch.arange(1, rows.shape[1] + 1, dtype=rows.dtype, device=rows.device).sqrt()
    return bool((marks.sort()[0].diff() == 0).any())


@lru_cache
def _five_sigma(freedom: int) -> float:
    """Quantile of Student's law that a normal variable's five standard deviations are."""
    return float(stdtrit(freedom, ndtr(5.0)))


def affine_part(context: Context, part: Part, layer: Affine, size: int) -> Part:
    """K' = sw2 K + sb2; T' = g_w K + g_b + sw2 T; a fresh Gaussian, exact at infinite width."""
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
    )


def without_shared_channels(part: Part) -> Part:
    """Channels that stay while positions are summed become positions of their own: K_diff = m^2.

    This is a token-mixing layer: it contracts positions, so what was a channel is now a place.
    """
    cov, slope, ntk = part.cov.clone(), part.slope.clone(), part.ntk.clone()
    cov[:, DIFF], slope[:, DIFF], ntk[:, DIFF] = part.mean**2, 0.0, 0.0
    return replace(part, cov=cov, slope=slope, ntk=ntk)


def contract(context: Context, x: Kernel, dims: tuple[int, ...], layer: Affine, axes: Axes) -> Kernel:
    """Apply an affine layer that sums over ``dims`` of ``x``; ``axes`` are those of the result."""
    kept = [factor for i, axis in enumerate(x.axes) if i not in dims for factor in axis]
    mixes = any(role == "c" for role, _ in kept)
    size = math.prod(s for axis in axes for role, s in axis if role == "c")

    def summed(part: Part) -> Part:
        result = affine_part(context, without_shared_channels(part) if mixes else part, layer, size)
        if not mixes or layer.fan_in >= FEW:
            return result
        # all channels share the few weights of a unit, whose sum of squares is a number of its own
        return replace(result, expr=Unknown(f"Gaussian sums over {layer.fan_in:g} positions each"))

    return Kernel((once(x.merged, context.signature, summed),), axes)


def to_positions(axis: tuple[tuple[str, int], ...]) -> tuple[tuple[str, int], ...]:
    """Dimensions that a layer does not sum over index positions from here on."""
    return tuple(("p" if role == "c" else role, size) for role, size in axis)


def last_dim(
    context: Context, x: Kernel, weight: Tensor, bias: Tensor | None, out: int, index: int, *, turned: bool = False
) -> Kernel:
    """An affine layer over the last dimension; W^T f(W u) is no fresh Gaussian: it holds a multiple of u itself."""
    name = context.argument_name(index)
    source = context.node.args[index]
    if isinstance(source, fx.Node):
        base, own = parameter_of(source)
        name, other = (base + TURNED, base) if own ^ turned else (base, base + TURNED)
        if any(part.roots.named(other) for part in x.parts):
            return context.sample()
    fan_in = weight.numel() // max(out, 1)
    sb2, mean = bias_moments(bias)
    speeds = context.speed(index), context.speed("self" if turned else "bias") if bias is not None else 0.0
    layer = Affine(
        fan_in * mean_square(weight), sb2, mean, fan_in, bias is not None, name, speeds, bias_law(bias, mean)
    )
    axes = (*(to_positions(axis) for axis in x.axes[:-1]), (("c", out),))
    rows = of_rows(context, index, weight.T if turned and weight.ndim == 2 else weight)
    result = contract(context, x, (len(x.axes) - 1,), layer, axes)
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
