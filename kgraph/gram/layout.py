"""Position models of a block: which pairs of positions it holds, and how maps of positions act on it.

``Full`` holds every pair of positions, [R, *places of u, *places of v]; borders are exact. ``Diagonal`` holds
equal positions only, [R, *places]: enough until something averages positions, or moves one side only, and then
it raises `NeedsFull`.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from kgraph.gram.places import PlaceMap, Places, apply, total_places
from kgraph.gram.rows import Rows

Run = tuple[slice, slice]
"""Where one tap's output lies, and which input positions it reads, along one axis."""


class NeedsFull(Exception):
    """The graph needs covariances of different positions."""


class Layout(Protocol):
    """What the engine asks of a position model."""

    @property
    def name(self) -> str: ...
    @property
    def by_axis(self) -> bool: ...
    def shape(self, pu: Places, pv: Places) -> Places: ...
    def outer(self, rows: Rows, x: Tensor, y: Tensor, px: Places, py: Places) -> Tensor: ...
    def sides(self, rows: Rows, x: Tensor, y: Tensor, px: Places, py: Places) -> tuple[Tensor, Tensor]: ...
    def own(self, rows: Rows, block: Tensor, places: Places) -> Tensor: ...
    def move(self, block: Tensor, ops: tuple[PlaceMap | None, PlaceMap | None], pu: Places, pv: Places) -> Tensor: ...
    def fold(self, block: Tensor, axes: tuple[int, ...], pu: Places, pv: Places) -> Tensor: ...
    def taps(self, block: Tensor, terms: Sequence[tuple[float, Sequence[Run]]], sizes: Places, p: Places) -> Tensor: ...
    def known(self, rows: Rows, x: Tensor, y: Tensor) -> Tensor: ...
    def identity(self, rows: Rows, places: Places) -> Tensor: ...
    def alike(self, places: Places) -> Tensor: ...
    def matrices(self, rows: Rows, uv: Tensor, vu: Tensor, pu: Places, pv: Places) -> Tensor: ...
    def draws_shape(self, places: Places) -> tuple[int, int]: ...
    def join(self, blocks: list[list[Tensor]], axis: int, rows: Rows, places: list[Places]) -> Tensor: ...
    def moment(self, rows: Rows, x: Tensor, y: Tensor) -> Tensor: ...
    def turned(self, block: Tensor, places: Places) -> Tensor: ...
    def read(self, block: Tensor, places: Places) -> Tensor: ...


def _ones(count: int) -> tuple[int, ...]:
    return (1,) * count


def by_input(rows: Rows, side: Tensor, x: Tensor) -> Tensor:
    """[N, ...] or [1, ...] -> [R, ...] (or [1, ...])."""
    return x if x.shape[0] == 1 else x[side.to(x.device)]


Cut = tuple[slice, ...]


def _add_up(block: Tensor, shape: tuple[int, ...], terms: list[tuple[float, tuple[Cut, ...]]]) -> Tensor:
    """``result[out] += weight * block[read]`` for every (weight, (out, read)).

    A term that writes everywhere goes first: it saves filling the result with zeros.
    """
    result = block.new_empty(shape)
    start = next((i for i, (_, (out, _)) in enumerate(terms) if result[out].shape == result.shape), None)
    if start is None:
        result.zero_()
    else:
        weight, (_, read) = terms[start]
        result = block[read] * weight
    for i, (weight, (out, read)) in enumerate(terms):
        if i != start:
            result[out].add_(block[read], alpha=weight)
    return result


@dataclass(frozen=True)
class Full:
    """Every pair of positions."""

    name: str = "full"
    by_axis: bool = True

    def shape(self, pu: Places, pv: Places) -> Places:
        """Axes of a block behind the rows'."""
        return (*pu, *pv)

    def sides(self, rows: Rows, x: Tensor, y: Tensor, px: Places, py: Places) -> tuple[Tensor, Tensor]:
        """``x`` at a and ``y`` at b of every row, ready to broadcast against a block."""
        left = by_input(rows, rows.first, x)
        right = by_input(rows, rows.second, y)
        left = left.reshape(len(left), *x.shape[1:], *_ones(len(py)))
        right = right.reshape(len(right), *_ones(len(px)), *y.shape[1:])
        return left, right

    def outer(self, rows: Rows, x: Tensor, y: Tensor, px: Places, py: Places) -> Tensor:
        left, right = self.sides(rows, x, y, px, py)
        return left * right

    def own(self, rows: Rows, block: Tensor, places: Places) -> Tensor:
        """Block of (a, a) at equal positions, [N, *places]."""
        count = total_places(places)
        whole = block.expand(len(rows.first), *places, *places) if block.ndim == 0 else block
        picked = whole[rows.own.to(block.device)] if whole.shape[0] > 1 else whole.expand(rows.inputs, *whole.shape[1:])
        return picked.reshape(-1, count, count).diagonal(dim1=1, dim2=2).reshape(-1, *places)

    def move(self, block: Tensor, ops: tuple[PlaceMap | None, PlaceMap | None], pu: Places, pv: Places) -> Tensor:
        left, right = ops
        if block.ndim == 0:
            return block
        if left is not None:
            block = apply(left, block, 1, pu)
            pu = left.places(pu)
        if right is not None:
            block = apply(right, block, 1 + len(pu), pv)
        return block

    def fold(self, block: Tensor, axes: tuple[int, ...], pu: Places, pv: Places) -> Tensor:
        """Mean over equal positions along ``axes``: what a layer that sums over them sees."""
        for axis in sorted(axes, reverse=True):
            block = block.diagonal(dim1=1 + axis, dim2=1 + len(pu) + axis).mean(-1)
            pu = (*pu[:axis], *pu[axis + 1 :])
        return block

    def taps(self, block: Tensor, terms: Sequence[tuple[float, Sequence[Run]]], sizes: Places, p: Places) -> Tensor:
        """``sum of weight * block at the tap's input positions, both sides``; the last axes of each side."""
        dims = len(sizes)
        lead = len(p) - dims
        shape = (len(block), *p[:lead], *sizes, *p[:lead], *sizes)
        every = (slice(None),) * (1 + lead)
        cuts = [
            (weight, tuple((*every, *cut, *every[1:], *cut) for cut in zip(*runs, strict=True)))
            for weight, runs in terms
        ]
        return _add_up(block, shape, cuts)

    def known(self, rows: Rows, x: Tensor, y: Tensor) -> Tensor:
        """<x, y> / C of known tensors [N, C, *places]."""
        left, right = by_input(rows, rows.first, x), by_input(rows, rows.second, y)
        count = max(len(left), len(right))
        left, right = (t.expand(count, *t.shape[1:]).reshape(count, t.shape[1], -1) for t in (left, right))
        gram = torch.bmm(left.transpose(1, 2), right) / x.shape[1]
        return gram.reshape(count, *x.shape[2:], *y.shape[2:])

    def alike(self, places: Places) -> Tensor:
        """1 where the positions are the same, else 0, for any input: [1, *places, *places]."""
        return torch.eye(total_places(places), dtype=torch.float64).reshape(1, *places, *places)

    def identity(self, rows: Rows, places: Places) -> Tensor:
        """1 where input and position are one and the same, else 0."""
        return rows.same.double().reshape(-1, *_ones(2 * len(places))) * self.alike(places)

    def matrices(self, rows: Rows, uv: Tensor, vu: Tensor, pu: Places, pv: Places) -> Tensor:
        """Covariance of all of u with all of v, [1, N * P_u, N * P_v], from pair(u, v) and pair(v, u)."""
        n, nu, nv = rows.inputs, total_places(pu), total_places(pv)
        upper = uv.expand(len(rows.first), *pu, *pv).reshape(-1, nu, nv)
        lower = vu.expand(len(rows.first), *pv, *pu).reshape(-1, nv, nu)
        whole = uv.new_zeros(n, n, nu, nv)
        whole[rows.second, rows.first] = lower.transpose(1, 2)
        whole[rows.first, rows.second] = upper
        return whole.permute(0, 2, 1, 3).reshape(1, n * nu, n * nv)

    def draws_shape(self, places: Places) -> tuple[int, int]:
        """(independent batches of positions, positions of one batch)."""
        return 1, total_places(places)

    def join(self, blocks: list[list[Tensor]], axis: int, rows: Rows, places: list[Places]) -> Tensor:
        """Blocks of fields laid side by side along a position axis: [[pair(u_i, v_j)]]."""
        lines = []
        for i, line in enumerate(blocks):
            wide = [
                block.expand(len(rows.first), *places[i], *places[j]) if block.ndim == 0 else block
                for j, block in enumerate(line)
            ]
            lines.append(torch.cat(_same_rows(wide), dim=1 + len(places[i]) + axis))
        return torch.cat(_same_rows(lines), dim=1 + axis)

    def moment(self, rows: Rows, x: Tensor, y: Tensor) -> Tensor:
        """Mean over draws [S, N, *places] of the product of every row's two inputs."""
        first, second = x[:, rows.first], y[:, rows.second]
        left = first.reshape(*first.shape[:2], -1).permute(1, 2, 0)
        right = second.reshape(*second.shape[:2], -1).permute(1, 0, 2)
        return (torch.bmm(left, right) / len(x)).reshape(len(rows.first), *x.shape[2:], *y.shape[2:])

    def turned(self, block: Tensor, places: Places) -> Tensor:
        """K(b, a) from K(a, b), [R, *places, *places]."""
        count = total_places(places)
        return block.reshape(len(block), count, count).transpose(1, 2).reshape(block.shape)

    def read(self, block: Tensor, places: Places) -> Tensor:
        """What a caller gets of a block."""
        return block


def _same_rows(blocks: list[Tensor]) -> list[Tensor]:
    rows = max(len(block) for block in blocks)
    return [block.expand(rows, *block.shape[1:]) for block in blocks]


@dataclass(frozen=True)
class Diagonal:
    """Equal positions only."""

    name: str = "diagonal"
    by_axis: bool = True

    def shape(self, pu: Places, pv: Places) -> Places:
        self._check(pu, pv)
        return pu

    def _check(self, px: Places, py: Places) -> None:
        if px != py:
            raise NeedsFull

    def sides(self, rows: Rows, x: Tensor, y: Tensor, px: Places, py: Places) -> tuple[Tensor, Tensor]:
        self._check(px, py)
        return by_input(rows, rows.first, x), by_input(rows, rows.second, y)

    def outer(self, rows: Rows, x: Tensor, y: Tensor, px: Places, py: Places) -> Tensor:
        left, right = self.sides(rows, x, y, px, py)
        return left * right

    def own(self, rows: Rows, block: Tensor, places: Places) -> Tensor:
        whole = block.expand(len(rows.first), *places) if block.ndim == 0 else block
        if whole.shape[0] == 1:
            return whole.expand(rows.inputs, *whole.shape[1:])
        return whole[rows.own.to(block.device)]

    def move(self, block: Tensor, ops: tuple[PlaceMap | None, PlaceMap | None], pu: Places, pv: Places) -> Tensor:
        left, right = ops
        if block.ndim == 0:
            return block
        if left is None or right is None or left.mixes or not (left is right or left.same_as(right)):
            raise NeedsFull
        return apply(left, block, 1, pu)

    def fold(self, block: Tensor, axes: tuple[int, ...], pu: Places, pv: Places) -> Tensor:
        self._check(pu, pv)
        return block.mean(tuple(1 + axis for axis in axes))

    def taps(self, block: Tensor, terms: Sequence[tuple[float, Sequence[Run]]], sizes: Places, p: Places) -> Tensor:
        every = (slice(None),) * (1 + len(p) - len(sizes))
        cuts = [(weight, tuple((*every, *cut) for cut in zip(*runs, strict=True))) for weight, runs in terms]
        return _add_up(block, (*block.shape[: len(every)], *sizes), cuts)

    def known(self, rows: Rows, x: Tensor, y: Tensor) -> Tensor:
        self._check(tuple(x.shape[2:]), tuple(y.shape[2:]))
        return (by_input(rows, rows.first, x) * by_input(rows, rows.second, y)).mean(1)

    def alike(self, places: Places) -> Tensor:
        return torch.ones(1, *places, dtype=torch.float64)

    def identity(self, rows: Rows, places: Places) -> Tensor:
        return rows.same.double().reshape(-1, *_ones(len(places))).expand(-1, *places)

    def matrices(self, rows: Rows, uv: Tensor, vu: Tensor, pu: Places, pv: Places) -> Tensor:
        """Covariances between inputs at every position, [P, N, N]."""
        self._check(pu, pv)
        n, count = rows.inputs, total_places(pu)
        whole = uv.new_zeros(n, n, count)
        whole[rows.second, rows.first] = vu.expand(len(rows.first), *pv).reshape(-1, count)
        whole[rows.first, rows.second] = uv.expand(len(rows.first), *pu).reshape(-1, count)
        return whole.permute(2, 0, 1)

    def draws_shape(self, places: Places) -> tuple[int, int]:
        return total_places(places), 1

    def join(self, blocks: list[list[Tensor]], axis: int, rows: Rows, places: list[Places]) -> Tensor:
        own = [
            blocks[i][i].expand(len(rows.first), *place) if blocks[i][i].ndim == 0 else blocks[i][i]
            for i, place in enumerate(places)
        ]
        return torch.cat(_same_rows(own), dim=1 + axis)

    def moment(self, rows: Rows, x: Tensor, y: Tensor) -> Tensor:
        self._check(tuple(x.shape[2:]), tuple(y.shape[2:]))
        return (x[:, rows.first] * y[:, rows.second]).mean(0)

    def turned(self, block: Tensor, places: Places) -> Tensor:
        return block

    def read(self, block: Tensor, places: Places) -> Tensor:
        return block
