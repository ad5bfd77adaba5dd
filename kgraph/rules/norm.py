"""Normalization layers: subtract a mean, divide by a standard deviation, then gain and bias.

    K' = gain^2 (K - M) / (q - M_self + eps) + bias^2

with M the second moment of what is subtracted: of the mean over channels (LayerNorm), over a group of channels and
all positions (GroupNorm, InstanceNorm), over the batch (BatchNorm in train mode), nothing (RMSNorm).
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

import torch
from torch import Tensor, fx

from kgraph import algebra
from kgraph.canonical import aten, operation_name
from kgraph.constants import by_channel
from kgraph.entries import said
from kgraph.how import assumed
from kgraph.kernel import DIFF, SAME, Gaussian, Kernel, Pairs, Part, Unknown
from kgraph.maps.tangent import TrainedFactor
from kgraph.modules import PerLocationNorm
from kgraph.rules.speeds import is_parameter
from kgraph.rules.table import Context, rule
from kgraph.rules.weights import mean_square, one_number
from kgraph.site import shape_of

_MIXING = ("conv", "linear", "addmm", "matmul", "mm", "bmm", "baddbmm", "einsum", "embedding", "bilinear")
"""Layers: behind them a gain is one of many parameters of every channel."""
_EVEN = 1e-3
"""Share of the variance in a subtracted mean's own fluctuation up to which channels count as alike."""
_ONE_VARIANCE = assumed("channels of many variances normalized by one")
_SMALL = 0.05
"""Largest share of the variance in a subtracted mean's own fluctuation that leaves the law as it was."""


_UNDONE = assumed("one number for all channels in front of a norm, which undoes it, counted in the NTK")
_FEW_WEIGHTS = 20.0
"""NTK over q below which no layer of many weights stands behind a tensor."""


@dataclass(frozen=True)
class Removed:
    """Kernel of the mean that a norm subtracts, [P] each: second moment, its slope, and its NTK."""

    cov: Tensor
    slope: Tensor
    ntk: Tensor


def normalized(part: Part, removed: Removed, variance: float, mean: float) -> Part:
    """(K - M) / variance for every pair; an affine function of the entries where M = mean^2.

    The subtracted mean depends on the parameters too, so that the NTK loses its own average T_M: (T - T_M) /
    variance. How the variance depends on them adds nothing: its average over centred entries is 0.

    Where the subtracted mean varies from channel to channel (BatchNorm with correlated inputs, InstanceNorm),
    a Gaussian stays Gaussian, and all its channels have one variance. Of another law the variance varies with the
    mean (a relu's channels are dead or alive): that of all channels together stands for it, and that is assumed.
    """
    inverse = 1.0 / max(variance, 1e-300)
    plain = algebra.scale(algebra.shift(part, -mean), inverse**0.5)
    fields = {
        name: (getattr(part, name) - getattr(removed, name)[:, None]) * inverse for name in ("cov", "slope", "ntk")
    }
    if torch.allclose(plain.cov, fields["cov"], rtol=1e-12, atol=1e-14):
        return replace(plain, **fields)
    if part.gaussian:
        return replace(part, **fields, mean=0.0, expr=Gaussian())
    ratio = float(fields["cov"][Pairs.SELF, SAME] / plain.cov[Pairs.SELF, SAME].clamp_min(1e-300))
    how = part.how if abs(ratio - 1) < _EVEN else part.how | _ONE_VARIANCE
    if abs(ratio - 1) < _SMALL:  # the law of what is hardly more than shifted
        return replace(algebra.scale(plain, ratio**0.5), **fields, how=how)
    return replace(part, **fields, mean=0.0, expr=Unknown("Gaussian after subtracting a mean that varies"), how=how)


def gain_and_bias(context: Context, x: Kernel, weight: Tensor | None, bias: Tensor | None) -> Kernel:
    """Entrywise gain and bias, measured; both are trained, so the NTK gains K_normalized and 1."""
    per_part = [_slices(t, x) for t in (weight, bias)]
    parts = []
    for index, part in enumerate(x.parts):
        own_weight, own_bias = (pieces[index] if pieces else None for pieces in per_part)
        parts.append(_affine(context, part, own_weight, own_bias))
    return x.with_parts(*parts)


def _slices(tensor: Tensor | None, x: Kernel) -> list[Tensor] | None:
    if tensor is None:
        return None
    flat = tensor.detach()
    sizes = [part.size for part in x.parts]
    return list(flat.split(sizes)) if len(sizes) > 1 and sum(sizes) == len(flat) else [flat] * len(sizes)


def _affine(context: Context, part: Part, weight: Tensor | None, bias: Tensor | None) -> Part:
    result = by_channel(part, weight, bias, f"{context.node.name}.gain")
    gained = weight is not None and bool(_speed(context, "weight", weight))
    own = _speed(context, "weight", weight) * part.cov + _speed(context, "bias", bias)
    result = algebra.trained(result, own, of_itself=gained)
    return _remembered(context, result, weight, bias) if part.gaussian else result


def _speed(context: Context, name: str, tensor: Tensor | None) -> float:
    """Factor on the own part of a parameter: 1 as PyTorch trains it, E[p^2] of a unit parameter times its size."""
    if tensor is None:
        return 0.0
    return context.speed(name) * (1.0 if context.parametrization == "standard" else mean_square(tensor))


def _remembered(context: Context, result: Part, weight: Tensor | None, bias: Tensor | None) -> Part:
    """A trained gain of a Gaussian that is one number in all channels is a factor in front of what follows."""
    shift = 0.0 if bias is None else one_number(bias)
    gain = 1.0 if weight is None else one_number(weight)
    if not gain or shift is None:
        return result
    return result.times(TrainedFactor(_speed(context, "weight", weight) / gain**2, shift))


@rule(aten.layer_norm.default)
def layer_norm(
    context: Context,
    x: Kernel,
    shape: list[int],
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    eps: float = 1e-5,
    *_: object,
) -> Kernel:
    if not isinstance(x, Kernel):
        return context.sample()
    roles = {role for axis in x.axes[len(x.axes) - len(shape) :] for role, _ in axis}
    if "c" not in roles:
        return context.sample()
    everything = x.merged
    others = [axis for axis in x.axes[: len(x.axes) - len(shape)] if any(role == "c" for role, _ in axis)]
    if others:
        return context.sample()
    return _channel_norm(context, x, everything.mean, weight, bias, eps)


def _channel_norm(
    context: Context, x: Kernel, mean: float, weight: Tensor | None, bias: Tensor | None, eps: float
) -> Kernel:
    """Statistics over so many entries that they are numbers: one mean and one variance for all channel groups."""
    variance = float(x.merged.q) - mean**2 + eps
    # what is subtracted is one number for all channels: each group keeps its own mean relative to it
    parts = [algebra.scale(algebra.shift(part, -mean), max(variance, 1e-300) ** -0.5) for part in x.parts]
    result = x.with_parts(*parts)
    return gain_and_bias(context, said(result, _UNDONE) if _undoes_a_number(context, x) else result, weight, bias)


@rule(aten.rms_norm.default)
def rms_norm(
    context: Context, x: Kernel, shape: list[int], weight: Tensor | None = None, eps: float | None = None
) -> Kernel:
    if not isinstance(x, Kernel):
        return context.sample()
    q = float(x.merged.q) + (eps or 0.0)
    parts = [algebra.scale(part, max(q, 1e-300) ** -0.5) for part in x.parts]
    result = x.with_parts(*parts)
    return gain_and_bias(context, said(result, _UNDONE) if _undoes_a_number(context, x) else result, weight, None)


@rule(PerLocationNorm)
def per_location_norm(context: Context, module: PerLocationNorm, x: Kernel) -> Kernel:
    return context.sample() if module.append_constant else rms_norm(context, x, [])


def position_mean(field: Tensor, positions: int) -> Tensor:
    """Average over all pairs of positions, shape [P]."""
    return field[:, SAME] / positions + field[:, DIFF] * (1 - 1 / positions)


@rule(aten.batch_norm.default)
def batch_norm(
    context: Context,
    x: Kernel,
    weight: Tensor | None,
    bias: Tensor | None,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    training: bool,
    momentum: float,
    eps: float,
    *_: object,
) -> Kernel:
    if not isinstance(x, Kernel):
        return context.sample()
    if running_mean is not None and running_var is not None and (context.mode == "eval" or not training):
        return by_running_statistics(context, x, running_mean, running_var, eps, weight, bias)
    result = _by_batch_statistics(x, eps)
    if _gain_before(context.node, of_all=False):
        result = said(result, assumed("gains in front of a norm over the batch, which undoes them, counted in the NTK"))
    return gain_and_bias(context, result, weight, bias)


def _undoes_a_number(context: Context, x: Kernel) -> bool:
    """Whether the NTK is that of numbers which multiply all channels, and which a norm over channels undoes.

    Behind a layer of many weights such a number's part is one among as many, and nothing in the limit.
    """
    q, ntk = (float(field[Pairs.SELF, SAME]) for field in (x.merged.cov, x.merged.ntk))
    return 0 < ntk < _FEW_WEIGHTS * q and _gain_before(context.node, of_all=True)


def _gain_before(node: fx.Node, *, of_all: bool) -> bool:
    """Whether a parameter (``of_all``: one number) multiplies entries that reach a norm without a layer between."""
    queue, seen = [node.all_input_nodes[0]], set[fx.Node]()
    while queue:
        one = queue.pop()
        name = operation_name(one)
        if one in seen or one.op == "get_attr" or name.startswith(_MIXING):
            continue
        seen.add(one)
        others = one.all_input_nodes[1:] if name.endswith("norm") else one.all_input_nodes
        if (name in ("mul", "div", "prelu") or name.endswith("norm")) and any(
            is_parameter(n) and not (of_all and math.prod(shape_of(n)) > 1) for n in others
        ):
            return True
        queue += one.all_input_nodes
    return False


def by_running_statistics(
    context: Context, x: Kernel, mean: Tensor, variance: Tensor, eps: float, weight: Tensor | None, bias: Tensor | None
) -> Kernel:
    """The affine map of the stored statistics, then gain and bias: one map, for trained ones go together."""
    gain = (variance.detach().double() + eps).rsqrt()
    shift = -mean.detach().double() * gain
    total_gain = gain if weight is None else gain * weight.detach().double()
    total_shift = shift if weight is None else shift * weight.detach().double()
    total_shift = total_shift if bias is None else total_shift + bias.detach().double()
    pieces = [_slices(t, x) or [] for t in (gain, shift, total_gain, total_shift)]
    parts = []
    for part, g, s, gains, shifts in zip(x.parts, *pieces, strict=True):
        result = by_channel(part, gains, shifts, "running statistics")
        own = torch.zeros_like(part.cov) + _speed(context, "bias", bias)
        if weight is not None:
            own = own + _speed(context, "weight", weight) * by_channel(part, g, s, "running statistics").cov
        result = algebra.trained(result, own, of_itself=weight is not None)
        parts.append(_remembered(context, result, weight, bias) if part.gaussian else result)
    return x.with_parts(*parts)


def _by_batch_statistics(x: Kernel, eps: float) -> Kernel:
    """Each channel minus its mean over an infinite batch and all positions: kbar of the background pair."""
    parts = []
    for part in x.parts:
        positions, rows = max(x.positions, 1), part.cov.shape[0]
        cov, ntk = (position_mean(field, positions)[Pairs.BACKGROUND].expand(rows) for field in (part.cov, part.ntk))
        removed = Removed(cov, torch.zeros_like(cov), ntk)  # the batch does not move with the pair
        parts.append(normalized(part, removed, float(part.q - cov[0]) + eps, part.mean))
    return x.with_parts(*parts)
