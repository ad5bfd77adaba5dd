"""Moments of drawn outputs: second moments at one position and at two, and draws of single entries."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from kgraph.draws import COUNT
from kgraph.kernel import DIFF, SAME, Axes, Kernel, Pairs

Derivatives = dict[int, tuple[Tensor, Tensor]]


class Measured:
    """Outputs of one joint draw: at a [...], at b of every pair [P, ...], and their derivatives.

    ``slope`` and ``ntk`` hold, by row of the pairs, the derivatives at a and at b along one direction. Moments of
    complex outputs are E|z|^2 and Re E[z conj(z')]; nothing draws such outputs: what reads them is run with them.
    """

    def __init__(self, first: Tensor, second: Tensor, slope: Derivatives, ntk: Derivatives) -> None:
        wide = torch.complex128 if first.is_complex() else torch.float64
        self.first, self.second, self.slope, self.ntk = first.to(wide), second.to(wide), slope, ntk

    def narrow(self, dim: int, start: int, length: int) -> Measured:
        """A range of the entries along ``dim``."""

        def cut(x: Tensor, at: int = dim) -> Tensor:
            return x.narrow(at, start, length)

        slope, ntk = ({row: (cut(a), cut(b)) for row, (a, b) in of.items()} for of in (self.slope, self.ntk))
        return Measured(cut(self.first), cut(self.second, dim + 1), slope, ntk)

    def moments(self, axes: Axes) -> dict[str, Tensor]:
        """cov, slope, ntk as [P, 2], and the mean."""
        places = [i for i, axis in enumerate(axes) if any(role == "p" for role, _ in axis)]
        first = self.first.expand(self.second.shape)
        return {
            "cov": pair_moments(first, self.second, places),
            "slope": self._rows(self.slope, places),
            "ntk": self._rows(self.ntk, places),
            "mean": self.first.mean().real,
        }

    def _rows(self, derivatives: Derivatives, places: list[int]) -> Tensor:
        """Products of the derivatives in the rows that have them; the others are not a number."""
        table = torch.full((len(self.second), 2), float("nan"), dtype=torch.float64)
        for row, (at_a, at_b) in derivatives.items():
            table[row] = pair_moments(at_a[None], at_b[None], places)[0]
        return table

    def law(self, axes: Axes, count: int = COUNT) -> tuple[Tensor, Tensor]:
        """Draws of single entries: at a [S]; at b in the same and in another position [P, 2, S]."""
        places = [i + 1 for i, axis in enumerate(axes) if any(role == "p" for role, _ in axis)]
        shifts = [1 if self.second.shape[i] > 1 else 0 for i in places]
        other = self.second.roll(shifts, places) if places else self.second
        pick = torch.arange(count) * 7919 % self.first.numel()
        flat = [t.reshape(len(t), -1)[:, pick] for t in (self.second, other)]
        return self.first.real.reshape(-1)[pick], torch.stack(flat, 1).real


def pair_moments(first: Tensor, second: Tensor, places: list[int]) -> Tensor:
    """Mean of first * second at the same position, and at two different ones; shape [P, 2]."""
    dims = [i + 1 for i in places]
    result = torch.empty(len(second), 2, dtype=torch.float64)
    product = (first * second.conj()).real
    result[:, SAME] = product.reshape(len(product), -1).mean(1)
    count = math.prod(tuple(second.shape[d] for d in dims))
    if count == 1:
        result[:, DIFF] = result[:, SAME]
        return result
    crossed = ((first.sum(dims) * second.sum(dims).conj()).real - product.sum(dims)) / (count * (count - 1))
    result[:, DIFF] = crossed.flatten(1).mean(1) if crossed.ndim > 1 else crossed
    return result


def result_axes(shape: tuple[int, ...], inputs: list[Kernel], declared: tuple[int, ...]) -> Axes:
    """Meaning of the result's dimensions: an input's where the layout is kept, else batch, positions, channels last."""
    for kernel in inputs:
        if len(kernel.axes) == len(shape):
            return tuple(_resized(axis, size) for axis, size in zip(kernel.axes, shape, strict=True))
    roles = ["b", *("p" for _ in shape[1:-1]), "c"]
    return tuple(((role, size),) if size > 1 else () for role, size in zip(roles[: len(shape)], shape, strict=False))


def _resized(axis: tuple[tuple[str, int], ...], size: int) -> tuple[tuple[str, int], ...]:
    if math.prod(tuple(s for _, s in axis)) == size:
        return axis
    return ((axis[0][0] if axis else "p", size),) if size > 1 else ()


def matched(first: Tensor, second: Tensor, cov: Tensor, mean: float) -> tuple[Tensor, Tensor]:
    """Draws whose own mean and covariances are those given: a linear correction of the sampling error."""
    centred = first - first.mean()
    variance = (cov[Pairs.SELF, SAME] - mean**2).clamp_min(0)
    centred = centred * (variance / centred.square().mean().clamp_min(1e-300)).sqrt()
    other = second - second.mean(-1, keepdim=True)
    lacking = (cov - mean**2) - (centred * other).mean(-1)
    other = other + (lacking / variance.clamp_min(1e-300))[..., None] * centred
    return centred + mean, other + mean
