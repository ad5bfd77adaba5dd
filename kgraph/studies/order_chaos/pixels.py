"""The kernel between the pixels of an output image: how its border differs from its bulk, and how it repeats.

    checkerboard share = sum over classes c of positions equal modulo s of (1_c^T Theta 1_c) / |c|, over tr Theta

is the part of the trace on fields of period s, the constant among them: about s^d / (number of pixels) where pixels
share nothing, 1 where the output is nothing but a checkerboard.

Source: Jacot, Gabriel, Ged, Hongler 2019, arXiv 1907.05715.
"""

from __future__ import annotations

import itertools
import math
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx

from kgraph.canonical import operation_name

MOST_PIXELS = 4096
"""A kernel between all pairs of so many takes 128 MiB."""


@dataclass(frozen=True)
class Pixels:
    """Kernels between the output pixels of one input.

    Attributes:
        theta, sigma: NTK and NNGP, [p, p].
        places: sizes of the image.
        period: s, the stride of the last transposed convolution; None where there is none.
    """

    theta: Tensor
    sigma: Tensor
    places: tuple[int, ...]
    period: int | None

    @property
    def variances(self) -> Tensor:
        """E f_p^2 of every pixel, in the shape of the image."""
        return self.sigma.diagonal().reshape(self.places)

    @property
    def diagonal(self) -> Tensor:
        """Theta_pp of every pixel, in the shape of the image."""
        return self.theta.diagonal().reshape(self.places)

    @property
    def border_ratio(self) -> float:
        """Theta_pp at the corners over its median inside: 1 without a border artifact."""
        return _corners(self.diagonal) / _bulk(self.diagonal)

    @property
    def variance_ratio(self) -> float:
        """The same of the output's variance, which a finite network shows."""
        return _corners(self.variances) / _bulk(self.variances)

    @property
    def interior_unevenness(self) -> float:
        """Largest over smallest Theta_pp in the middle half: above 1 where the stride does not divide the kernel."""
        inner = self.diagonal[_inner(self.places)]
        return float(inner.max() / inner.min())

    @property
    def checkerboard_share(self) -> float:
        """Part of Theta's trace on fields of period s, the constant among them; nan without a period."""
        return math.nan if self.period is None else period_share(self.theta, self.places, self.period)

    @property
    def constant_share(self) -> float:
        """Part of Theta's trace on the constant image."""
        return period_share(self.theta, self.places, 1)

    def summary(self) -> list[str]:
        """The findings in a sentence each."""
        size = " x ".join(map(str, self.places))
        lines = [
            f"border: NTK {self.border_ratio:.3g}, variance {self.variance_ratio:.3g} of the bulk's ({size} pixels)"
        ]
        if self.period is not None:
            share = self.period ** len(self.places) / math.prod(self.places)
            name = f"checkerboard of period {self.period}"
            lines.append(f"{name}: {self.checkerboard_share:.1%} of the NTK's trace ({share:.1%} for unrelated pixels)")
        return lines

    def to_dict(self) -> dict[str, Any]:
        """The numbers as JSON-ready data."""
        names = ("border_ratio", "variance_ratio", "interior_unevenness", "checkerboard_share", "constant_share")
        numbers = {name: getattr(self, name) for name in names}
        return {"places": list(self.places), "period": self.period, **numbers, "variances": self.variances.tolist()}


def measure_pixels(theta: Tensor, sigma: Tensor, places: tuple[int, ...], period: int | None) -> Pixels:
    """Pixels of one input's kernels, [p, p] each."""
    return Pixels(theta.detach(), sigma.detach(), places, period)


def period_share(theta: Tensor, places: tuple[int, ...], period: int) -> float:
    """Part of the trace of [p, p] on fields of a period in every axis."""
    axes = torch.meshgrid(*(torch.arange(size) % period for size in places), indexing="ij")
    classes = sum((axis * period**i for i, axis in enumerate(axes)), torch.zeros(places, dtype=torch.long)).flatten()
    member = torch.nn.functional.one_hot(classes, period ** len(places)).to(theta)
    member = member[:, member.sum(0) > 0]
    captured = ((theta @ member) * member).sum(0) / member.sum(0)
    return float(captured.sum() / theta.trace())


def transposed_stride(node: fx.Node) -> int:
    """Stride of a transposed convolution along its last axis; 1 for any other node."""
    if not operation_name(node).startswith("conv_transpose"):
        return 1
    stride: Any = node.args[3] if len(node.args) > 3 else 1
    return int(stride) if isinstance(stride, int) else int(list(stride)[-1])


def _corners(field: Tensor) -> float:
    corners = [field[index] for index in itertools.product((0, -1), repeat=field.ndim)]
    return float(torch.stack(corners).mean())


def _bulk(field: Tensor) -> float:
    return float(field[_inner(tuple(field.shape))].median())


def _inner(places: tuple[int, ...]) -> tuple[slice, ...]:
    """The middle half of every axis."""
    return tuple(slice(size // 4, size - size // 4) for size in places)
