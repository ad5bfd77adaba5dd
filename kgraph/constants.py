"""Tensors that are known (parameters used entrywise, masks, position tables) meeting random ones.

A known tensor is described by its measured moments: E[x], E[x^2], and E[x_i x_j] over different positions.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from kgraph import algebra
from kgraph.alignment import broadcast_axes
from kgraph.draws import CONSTANTS_APART, uneven
from kgraph.how import assumed
from kgraph.kernel import DIFF, SAME, Apply, Axes, Channel, Gaussian, Kernel, Part, Product, Sum
from kgraph.maps import Pointwise
from kgraph.roots import Root, Roots

_MOST_VALUES = 1024


@dataclass(frozen=True)
class Moments:
    """E[x], E[x^2], the mean of x_i x_j over pairs of different positions (one channel), and sorted entries."""

    mean: float
    same: float
    different: float
    varies: bool
    values: Tensor | None = None


def _full_axes(tensor: Tensor, axes: Axes) -> tuple[Tensor, Axes]:
    """The tensor with as many dimensions as the kernel (leading ones added)."""
    padded = tensor.detach().double().reshape((1,) * (len(axes) - tensor.ndim) + tuple(tensor.shape))
    return padded, axes


def moments(tensor: Tensor, axes: Axes) -> Moments:
    """Moments of a known tensor as it broadcasts against a kernel's axes."""
    x, axes = _full_axes(tensor, axes)
    over = [i for i, axis in enumerate(axes) if x.shape[i] > 1 and any(role == "p" for role, _ in axis)]
    positions = 1
    for dim in over:
        positions *= x.shape[dim]
    same = float(x.square().mean())
    if positions == 1:
        return Moments(float(x.mean()), same, same, bool(x.numel() > 1), _quantiles(x))
    total = x.sum(over).square().mean() - x.square().sum(over).mean()
    return Moments(float(x.mean()), same, float(total) / (positions * (positions - 1)), True, _quantiles(x))


def _quantiles(x: Tensor) -> Tensor | None:
    """Entries in order, thinned out evenly where they are many; None for numbers without values."""
    if x.is_meta or not any(x.stride()):
        return None
    ordered = x.flatten().sort()[0]
    return ordered[torch.linspace(0, len(ordered) - 1, min(len(ordered), _MOST_VALUES)).round().long()]


def axes_with(kernel: Kernel, tensor: Tensor) -> Axes:
    """Axes after broadcasting; a dimension only the tensor has counts as channel (last) or position."""
    new = tuple((("p", size),) if size > 1 else () for size in tensor.shape)
    return broadcast_axes(kernel.axes, new)


def _per_part(kernel: Kernel, tensor: Tensor) -> list[Tensor]:
    """The slice of the tensor that meets each part."""
    if kernel.split is None:
        return [tensor]
    dim = kernel.split - len(kernel.axes)
    if tensor.ndim < -dim or tensor.shape[dim] == 1:
        return [tensor] * len(kernel.parts)
    return list(tensor.split([part.size for part in kernel.parts], dim))


def _as_tensor(value: object) -> Tensor:
    return value if isinstance(value, Tensor) else torch.tensor(float(value), dtype=torch.float64)  # type: ignore[arg-type]


def multiply_constant(kernel: Kernel, value: object) -> Kernel:
    """``x * constant``: K_same times E[c^2], K_diff times E[c_i c_j]."""
    tensor = _as_tensor(value)
    if tensor.numel() == 1:
        factor = float(tensor)
        parts = [algebra.scale(part, factor) for part in kernel.parts]
        return replace(kernel.with_parts(*parts), axes=axes_with(kernel, tensor))
    axes = axes_with(kernel, tensor)
    parts = [
        _times(part, moments(piece, axes)) for part, piece in zip(kernel.parts, _per_part(kernel, tensor), strict=True)
    ]
    return replace(kernel.with_parts(*parts), axes=axes)


def _times(part: Part, c: Moments) -> Part:
    if not c.varies or (c.same == c.different and c.mean**2 >= c.same * (1 - 1e-12)):
        return algebra.scale(part, c.mean)
    gains = torch.empty(2, dtype=torch.float64)
    gains[SAME], gains[DIFF] = c.same, c.different
    fields = {name: getattr(part, name) * gains for name in ("cov", "slope", "ntk")}
    own = known_part(part, c, "factor")  # known, not random: it has no root that a later sum could meet
    law = Product(replace(own, roots=Roots()), part)
    how = part.how | assumed(CONSTANTS_APART) if uneven(own) and uneven(part) else part.how
    return replace(part, **fields, mean=part.mean * c.mean, expr=law, how=how)


def by_channel(part: Part, gains: Tensor | None, shifts: Tensor | None, name: str) -> Part:
    """``g_k v + s_k`` in channel k: K' = E[g^2] K + 2 E[g s] m + E[s^2]; g and s may depend on each other."""
    g = None if gains is None else gains.detach().double().flatten()
    s = None if shifts is None else shifts.detach().double().flatten()
    if (g is None or _constant(g)) and (s is None or _constant(s)):
        scaled = part if g is None else algebra.scale(part, float(g[0]))
        return scaled if s is None else algebra.shift(scaled, float(s[0]))
    g = torch.ones_like(s) if g is None and s is not None else g
    assert g is not None
    s = torch.zeros_like(g) if s is None else s
    square, crossed, constant = (float((a * b).mean()) for a, b in ((g, g), (g, s), (s, s)))
    channel = _channels(part, name)
    law = Sum(((1.0, algebra.multiply(_looked_up(channel, g), part)), (1.0, _looked_up(channel, s))))
    return replace(
        part,
        cov=square * part.cov + 2 * crossed * part.mean + constant,
        slope=square * part.slope,
        ntk=square * part.ntk,
        mean=float(g.mean()) * part.mean + float(s.mean()),
        expr=law,
    )


def _constant(x: Tensor) -> bool:
    return bool((x == x[0]).all())


def _channels(like: Part, name: str, *, by_position: bool = False) -> Part:
    """A normal number for every channel (and position), the same for all inputs: it says which entry is read."""
    cov = torch.ones_like(like.cov)
    cov[:, DIFF] = float(not by_position)
    zero = torch.zeros_like(cov)
    return Part(like.size, cov, zero, zero, 0.0, Roots({Root(name)}), Gaussian() if by_position else Channel())


def _looked_up(channel: Part, values: Tensor) -> Part:
    """The entry of ``values`` at the quantile of ``channel``."""

    def entry(u: Tensor) -> Tensor:
        return values[(torch.special.ndtr(u) * len(values)).long().clamp(0, len(values) - 1)]

    square = torch.full_like(channel.cov, float(values.square().mean()))
    return replace(channel, cov=square, mean=float(values.mean()), expr=Apply(Pointwise(entry), channel))


def add_constant(kernel: Kernel, value: object, weight: float, name: str) -> Kernel:
    """``x + weight * constant``: a number shifts; a tensor adds its own second moments to every input pair."""
    tensor = _as_tensor(value) * weight
    if tensor.numel() == 1:
        parts = [algebra.shift(part, float(tensor)) for part in kernel.parts]
        return replace(kernel.with_parts(*parts), axes=axes_with(kernel, tensor))
    axes = axes_with(kernel, tensor)
    parts = [
        _plus(part, moments(piece, axes), name)
        for part, piece in zip(kernel.parts, _per_part(kernel, tensor), strict=True)
    ]
    return replace(kernel.with_parts(*parts), axes=axes)


def _plus(part: Part, c: Moments, name: str) -> Part:
    if c.same == 0:
        return part
    return algebra.add(part, known_part(part, c, name))


def known_part(like: Part, c: Moments, name: str) -> Part:
    """A known tensor as a part: the same for every input, so its covariance is its second moment."""
    cov = torch.empty_like(like.cov)
    cov[:, SAME], cov[:, DIFF] = c.same, c.different
    zero = torch.zeros_like(cov)
    known = Part(like.size, cov, zero, zero, c.mean, Roots({Root(name)}))
    if c.values is None or not c.varies:
        return known
    channel = _channels(like, name, by_position=c.same != c.different)
    return replace(known, expr=_looked_up(channel, c.values).expr)
