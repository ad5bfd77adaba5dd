"""Linear maps of positions: gathers, averages, relabellings. They act alike on kernels, means and draws.

A field lives on *places*: one axis for every position factor of the tensor. A map takes the places of its
argument to new ones; ``apply`` acts on any tensor whose axes ``start, start + 1, ...`` are the places.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

Places = tuple[int, ...]


@dataclass(frozen=True, eq=False)
class Gather:
    """``y[i] = x[index[i]]`` along one axis, 0 where the index is -1; one entry drops the axis if ``drop``."""

    axis: int
    index: Tensor
    drop: bool = False
    mixes = False

    def places(self, places: Places) -> Places:
        kept = () if self.drop else (len(self.index),)
        return (*places[: self.axis], *kept, *places[self.axis + 1 :])

    @cached_property
    def _holes(self) -> bool:
        return bool((self.index < 0).any())

    @property
    def keeps_constants(self) -> bool:
        """Whether a field that is one number everywhere stays it."""
        return not self._holes

    def apply(self, x: Tensor, start: int) -> Tensor:
        dim = start + self.axis
        if self.drop:
            return x.select(dim, int(self.index[0]))
        y = x.index_select(dim, self.index.clamp_min(0).to(x.device))
        if self._holes:
            keep = (self.index >= 0).to(y).reshape(-1, *(1 for _ in range(y.ndim - dim - 1)))
            y = y * keep
        return y

    def same_as(self, other: object) -> bool:
        return (
            isinstance(other, Gather)
            and (self.axis, self.drop) == (other.axis, other.drop)
            and torch.equal(self.index, other.index)
        )


@dataclass(frozen=True, eq=False)
class Mix:
    """``y[i] = sum_j matrix[i, j] x[j]`` along one axis; a single row drops the axis if ``drop``."""

    axis: int
    matrix: Tensor
    drop: bool = False
    mixes = True

    def places(self, places: Places) -> Places:
        kept = () if self.drop else (len(self.matrix),)
        return (*places[: self.axis], *kept, *places[self.axis + 1 :])

    @cached_property
    def keeps_constants(self) -> bool:
        sums = self.matrix.double().sum(1)
        return bool((sums - 1).abs().max() < 1e-12)

    def apply(self, x: Tensor, start: int) -> Tensor:
        dim = start + self.axis
        matrix = self.matrix.to(x)
        if self.drop:
            return x.movedim(dim, -1) @ matrix[0]
        return (x.movedim(dim, -1) @ matrix.T).movedim(-1, dim)

    def same_as(self, other: object) -> bool:
        return (
            isinstance(other, Mix)
            and (self.axis, self.drop) == (other.axis, other.drop)
            and torch.equal(self.matrix, other.matrix)
        )


@dataclass(frozen=True)
class Relabel:
    """View the places as ``view`` and permute them by ``order``: every entry keeps its value."""

    view: Places
    order: tuple[int, ...]
    mixes = False
    keeps_constants = True

    def places(self, places: Places) -> Places:
        return tuple(self.view[i] for i in self.order)

    def count(self, places: int) -> int:
        return places

    def apply_to(self, x: Tensor, start: int, count: int) -> Tensor:
        viewed = x.reshape(*x.shape[:start], *self.view, *x.shape[start + count :])
        width = len(self.view)
        tail = range(start + width, viewed.ndim)
        return viewed.permute(*range(start), *(start + i for i in self.order), *tail)

    def same_as(self, other: object) -> bool:
        return self == other


@dataclass(frozen=True)
class Insert:
    """A new axis of ``size`` copies."""

    axis: int
    size: int
    mixes = False
    keeps_constants = True

    def places(self, places: Places) -> Places:
        return (*places[: self.axis], self.size, *places[self.axis :])

    def apply(self, x: Tensor, start: int) -> Tensor:
        dim = start + self.axis
        shape = list(x.shape)
        return x.unsqueeze(dim).expand(*shape[:dim], self.size, *shape[dim:])

    def same_as(self, other: object) -> bool:
        return self == other


PlaceMap = Gather | Mix | Relabel | Insert


def apply(op: PlaceMap, x: Tensor, start: int, places: Places) -> Tensor:
    """``op`` on the axes of ``x`` from ``start`` on that are ``places``."""
    return op.apply_to(x, start, len(places)) if isinstance(op, Relabel) else op.apply(x, start)


def window_matrix(size: int, out: int, width: int, stride: int, padding: int, *, count_pad: bool = True) -> Tensor:
    """Rows average windows of ``width`` (zeros counted in when ``count_pad``), as PyTorch's average pooling does.

    A window that runs over the far end (ceil_mode) is cut at ``size + padding``, as PyTorch cuts it.
    """
    starts = torch.arange(out)[:, None] * stride - padding
    at = torch.arange(size)[None]
    inside = ((at >= starts) & (at < starts + width)).double()
    ends = (starts + width).clamp_max(size + padding)
    divisor = (ends - starts).double() if count_pad else inside.sum(1, keepdim=True)
    return inside / divisor.clamp_min(1)


def adaptive_matrix(size: int, out: int) -> Tensor:
    """Rows average positions floor(i n / m) to ceil((i + 1) n / m), as PyTorch's adaptive pooling does."""
    i = torch.arange(out)[:, None]
    low, high = i * size // out, -((-(i + 1) * size) // out)
    at = torch.arange(size)[None]
    inside = ((at >= low) & (at < high)).double()
    return inside / inside.sum(1, keepdim=True)


def total_places(places: Sequence[int]) -> int:
    count = 1
    for size in places:
        count *= size
    return count
