"""The position model "stationary": one number per displacement d, the mean over positions i of K(a, i; b, i + d).

A linear map M of one axis acts on it by its own averages,

    K'(d') = sum_d T(d', d) K(d),    T(d', d) = sum_ij M(i, j) M(i + d', j + d) / (m - |d'|)

exact for fields whose kernel depends on the displacement alone, and for averages over all positions. What differs
from position to position (borders, position-wise gains, the pixels of one image) enters by its average.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from kgraph.gram.axis_maps import Ops, averages, pair_of_matrices, same_kind, tap_matrix
from kgraph.gram.layout import NeedsFull, Run, by_input
from kgraph.gram.places import Insert, Places, Relabel, apply, total_places
from kgraph.gram.rows import Rows


@dataclass(frozen=True)
class Stationary:
    """One number per displacement, 1 - n to n - 1 along every axis: blocks are [R, *(2 n - 1)], 0 in the middle."""

    name: str = "stationary"
    by_axis: bool = True

    def shape(self, pu: Places, pv: Places) -> Places:
        if pu != pv:
            raise NeedsFull
        return _spread(pu)

    def sides(self, rows: Rows, x: Tensor, y: Tensor, px: Places, py: Places) -> tuple[Tensor, Tensor]:
        self.shape(px, py)
        axes = tuple(range(1, 1 + len(px)))
        x, y = ((t.mean(axes, keepdim=True) if axes else t) for t in (x, y))
        return by_input(rows, rows.first, x), by_input(rows, rows.second, y)

    def outer(self, rows: Rows, x: Tensor, y: Tensor, px: Places, py: Places) -> Tensor:
        return self.known(rows, x[:, None], y[:, None])

    def own(self, rows: Rows, block: Tensor, places: Places) -> Tensor:
        whole = block.expand(len(rows.first), *_spread(places)) if block.ndim == 0 else block
        picked = whole.expand(rows.inputs, *whole.shape[1:]) if len(whole) == 1 else whole[rows.own.to(block.device)]
        for axis, size in enumerate(places):
            picked = picked.narrow(1 + axis, size - 1, 1)
        return picked.expand(-1, *places)

    def move(self, block: Tensor, ops: Ops, pu: Places, pv: Places) -> Tensor:
        if block.ndim == 0:
            return block
        self.shape(pu, pv)
        same = same_kind(ops)
        if isinstance(same, Insert):
            return apply(Insert(same.axis, 2 * same.size - 1), block, 1, _spread(pu))
        if isinstance(same, Relabel):
            if [s for s in same.view if s > 1] != [s for s in pu if s > 1]:
                raise NeedsFull  # axes are merged or cut
            return apply(Relabel(_spread(same.view), same.order), block, 1, _spread(pu))
        axis, left, right, drop = pair_of_matrices(ops, pu, pv)
        moved = _along(block, 1 + axis, _displaced(left, right))
        return moved.squeeze(1 + axis) if drop else moved

    def fold(self, block: Tensor, axes: tuple[int, ...], pu: Places, pv: Places) -> Tensor:
        self.shape(pu, pv)
        for axis in sorted(axes, reverse=True):
            block = block.select(1 + axis, pu[axis] - 1)
        return block

    def taps(self, block: Tensor, terms: Sequence[tuple[float, Sequence[Run]]], sizes: Places, p: Places) -> Tensor:
        lead = len(p) - len(sizes)
        tables: dict[tuple[int, str], Tensor] = {}
        total: Tensor | None = None
        for weight, runs in terms:
            part = block
            for axis, (run, size) in enumerate(zip(runs, sizes, strict=True)):
                key = (axis, str(run))
                if key not in tables:
                    matrix = tap_matrix(run, size, p[lead + axis])
                    tables[key] = _displaced(matrix, matrix)
                part = _along(part, 1 + lead + axis, tables[key])
            total = part * weight if total is None else total.add_(part, alpha=weight)
        assert total is not None
        return total

    def known(self, rows: Rows, x: Tensor, y: Tensor) -> Tensor:
        """Correlation of known tensors [N or 1, C, *places], averaged over channels and pairs of positions."""
        left, right = averages(rows, x, y)
        places = tuple(left.shape[2:])
        if not places:
            return (left * right).mean(1)
        total = _correlated(left, right, tuple(range(2, left.ndim))).mean(1)
        for axis, size in enumerate(places):
            total = total / _pairs(size).reshape(-1, *(1 for _ in places[axis + 1 :]))
        return total

    def moment(self, rows: Rows, x: Tensor, y: Tensor) -> Tensor:
        """The same of draws [S, N, *places]: they take the place of the channels."""
        return self.known(rows, x.transpose(0, 1), y.transpose(0, 1))

    def alike(self, places: Places) -> Tensor:
        one = torch.zeros(1, *_spread(places), dtype=torch.float64)
        one[(0, *(size - 1 for size in places))] = 1.0
        return one

    def identity(self, rows: Rows, places: Places) -> Tensor:
        return rows.same.double().reshape(-1, *(1 for _ in places)) * self.alike(places)

    def matrices(self, rows: Rows, uv: Tensor, vu: Tensor, pu: Places, pv: Places) -> Tensor:
        """Toeplitz matrices, [1, N * P, N * P]."""
        n, count, shape = rows.inputs, total_places(pu), self.shape(pu, pv)
        at = displacements(pu)
        whole = uv.new_zeros(n, n, count, count)
        forth, back = (x.expand(len(rows.first), *shape).reshape(len(rows.first), -1)[:, at] for x in (uv, vu))
        whole[rows.second, rows.first] = back
        whole[rows.first, rows.second] = forth
        return whole.permute(0, 2, 1, 3).reshape(1, n * count, n * count)

    def draws_shape(self, places: Places) -> tuple[int, int]:
        return 1, total_places(places)

    def join(self, blocks: list[list[Tensor]], axis: int, rows: Rows, places: list[Places]) -> Tensor:
        raise NeedsFull

    def turned(self, block: Tensor, places: Places) -> Tensor:
        """K(b, a) from K(a, b): displacements change their sign."""
        return block.flip(tuple(range(1, 1 + len(places))))

    def read(self, block: Tensor, places: Places) -> Tensor:
        return block


def _spread(places: Places) -> Places:
    return tuple(2 * size - 1 for size in places)


def _pairs(size: int) -> Tensor:
    """Pairs of positions at every displacement."""
    return size - torch.arange(1 - size, size).abs().double()


def _along(block: Tensor, dim: int, table: Tensor) -> Tensor:
    return (block.movedim(dim, -1) @ table.T).movedim(-1, dim)


def _correlated(x: Tensor, y: Tensor, axes: tuple[int, ...]) -> Tensor:
    """``sum_i x(i) y(i + d)`` along some axes, d from 1 - n to n - 1, by Fourier transforms."""
    sizes = [2 * x.shape[axis] - 1 for axis in axes]
    product = torch.fft.fftn(x, sizes, axes).conj() * torch.fft.fftn(y, sizes, axes)
    return torch.fft.fftshift(torch.fft.ifftn(product, dim=axes).real, axes)


def _displaced(left: Tensor, right: Tensor) -> Tensor:
    """``T(d', d) = sum_ij L(i, j) R(i + d', j + d)`` per pair of outputs, [2 m - 1, 2 n - 1]."""
    return _correlated(left, right, (0, 1)) / _pairs(len(left))[:, None]


def displacements(places: Places) -> Tensor:
    """Index of the displacement from position i to position j, [P, P]."""
    count = total_places(places)
    at = torch.unravel_index(torch.arange(count), places) if places else ()
    index = torch.zeros(count, count, dtype=torch.long)
    for axis, size in enumerate(places):
        index = index * (2 * size - 1) + at[axis][None] - at[axis][:, None] + size - 1
    return index
