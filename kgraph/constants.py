"""Tensors that are known (parameters used entrywise, masks, position tables) meeting random ones.

A known tensor is described by its measured moments: E[x], E[x^2], and E[x_i x_j] over different positions.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from kgraph import algebra
from kgraph.alignment import broadcast_axes
from kgraph.kernel import DIFF, SAME, Axes, Kernel, Part, Root


@dataclass(frozen=True)
class Moments:
    """E[x], E[x^2] and the mean of x_i x_j over pairs of different positions (one channel)."""

    mean: float
    same: float
    different: float
    varies: bool


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
        return Moments(float(x.mean()), same, same, bool(x.numel() > 1))
    total = x.sum(over).square().mean() - x.square().sum(over).mean()
    return Moments(float(x.mean()), same, float(total) / (positions * (positions - 1)), True)


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
    # per channel still Gaussian, each with its own scale: second moments are exact, the law a scale mixture
    base = algebra.scale(part, c.same**0.5)
    return replace(base, **fields, mean=part.mean * c.mean)


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
    return Part(like.size, cov, zero, zero, c.mean, frozenset({Root(name)}))
