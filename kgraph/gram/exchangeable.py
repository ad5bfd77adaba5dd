"""The position model "exchangeable": two numbers, the mean of K over equal and over different positions.

Exact for fields whose positions are all alike, such as those of a network without convolutions; what is not alike
enters by its average.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from kgraph.gram.axis_maps import Ops, averages, pair_of_matrices, same_kind, tap_matrix
from kgraph.gram.layout import NeedsFull, Run, by_input
from kgraph.gram.places import Insert, Places, total_places
from kgraph.gram.rows import Rows


@dataclass(frozen=True)
class Exchangeable:
    """Two numbers, equal and different positions: blocks are [R, 2]."""

    name: str = "exchangeable"
    by_axis: bool = False

    def shape(self, pu: Places, pv: Places) -> Places:
        if pu != pv:
            raise NeedsFull
        return (2,)

    def sides(self, rows: Rows, x: Tensor, y: Tensor, px: Places, py: Places) -> tuple[Tensor, Tensor]:
        self.shape(px, py)
        x, y = (t.reshape(len(t), -1).mean(1, keepdim=True) for t in (x, y))
        return by_input(rows, rows.first, x), by_input(rows, rows.second, y)

    def outer(self, rows: Rows, x: Tensor, y: Tensor, px: Places, py: Places) -> Tensor:
        return self.known(rows, x[:, None], y[:, None])

    def own(self, rows: Rows, block: Tensor, places: Places) -> Tensor:
        whole = block.expand(len(rows.first), 2) if block.ndim == 0 else block
        picked = whole.expand(rows.inputs, 2) if whole.shape[0] == 1 else whole[rows.own.to(block.device)]
        return picked[:, 0].reshape(-1, *(1 for _ in places)).expand(-1, *places)

    def move(self, block: Tensor, ops: Ops, pu: Places, pv: Places) -> Tensor:
        if block.ndim == 0:
            return block
        same = same_kind(ops)
        if isinstance(same, Insert):
            return _copied(block, total_places(pu), same.size)
        if same is not None:
            return block
        axis, left, right, _ = pair_of_matrices(ops, pu, pv)
        return block @ _two_numbers([(left, right)], total_places(pu) // pu[axis]).T

    def fold(self, block: Tensor, axes: tuple[int, ...], pu: Places, pv: Places) -> Tensor:
        return block

    def taps(self, block: Tensor, terms: Sequence[tuple[float, Sequence[Run]]], sizes: Places, p: Places) -> Tensor:
        lead = len(p) - len(sizes)
        others, before = total_places(p[:lead]), p[lead:]
        table = torch.zeros(2, 2, dtype=torch.float64)
        for weight, runs in terms:
            matrices = [tap_matrix(*each) for each in zip(runs, sizes, before, strict=True)]
            table += weight * _two_numbers([(m, m) for m in matrices], others)
        return block @ table.T

    def known(self, rows: Rows, x: Tensor, y: Tensor) -> Tensor:
        left, right = (t.flatten(2) if t.ndim > 2 else t[..., None] for t in averages(rows, x, y))
        count = left.shape[2]
        same = (left * right).mean((1, 2))
        every = (left.mean(2) * right.mean(2)).mean(1)
        different = (count * every - same) / (count - 1) if count > 1 else same
        return torch.stack([same, different], 1)

    def moment(self, rows: Rows, x: Tensor, y: Tensor) -> Tensor:
        return self.known(rows, x.transpose(0, 1), y.transpose(0, 1))

    def alike(self, places: Places) -> Tensor:
        return torch.tensor([[1.0, 0.0]], dtype=torch.float64)

    def identity(self, rows: Rows, places: Places) -> Tensor:
        return rows.same.double()[:, None] * self.alike(places)

    def matrices(self, rows: Rows, uv: Tensor, vu: Tensor, pu: Places, pv: Places) -> Tensor:
        """Matrices of two numbers, [1, N * P, N * P]."""
        self.shape(pu, pv)
        n, count = rows.inputs, total_places(pu)
        which = (~torch.eye(count, dtype=torch.bool)).long()
        whole = uv.new_zeros(n, n, count, count)
        forth, back = (x.expand(len(rows.first), 2)[:, which] for x in (uv, vu))
        whole[rows.second, rows.first] = back
        whole[rows.first, rows.second] = forth
        return whole.permute(0, 2, 1, 3).reshape(1, n * count, n * count)

    def draws_shape(self, places: Places) -> tuple[int, int]:
        return 1, total_places(places)

    def join(self, blocks: list[list[Tensor]], axis: int, rows: Rows, places: list[Places]) -> Tensor:
        raise NeedsFull

    def turned(self, block: Tensor, places: Places) -> Tensor:
        return block

    def read(self, block: Tensor, places: Places) -> Tensor:
        """One number where there is one position."""
        return block if places else block[:, 0]


def _two_numbers(matrices: Sequence[tuple[Tensor, Tensor]], others: int) -> Tensor:
    """(same, different) after linear maps L, R of some axes, beside ``others`` more positions: a table [2, 2].

    All pairs of outputs (i, j) together have ``sum_st L_is R_jt K(s, t)``, of which s = t takes K_same.
    """
    same = same_sums = every_sums = 1.0
    crossed, outputs = 1.0 / others, others
    for left, right in matrices:
        sums, other_sums = left.sum(1), right.sum(1)
        same *= float((left * right).sum(1).mean())
        same_sums *= float((sums * other_sums).mean())
        crossed *= float((left.mean(0) * right.mean(0)).sum())
        every_sums *= float(sums.mean() * other_sums.mean())
        outputs *= len(left)
    first = torch.tensor([same, same_sums - same], dtype=torch.float64)
    every = torch.tensor([crossed, every_sums - crossed], dtype=torch.float64)
    return torch.stack([first, (outputs * every - first) / (outputs - 1) if outputs > 1 else first])


def _copied(block: Tensor, count: int, copies: int) -> Tensor:
    """``copies`` of every position, alike: some different positions are now equal ones."""
    same, different = block.unbind(1)
    pairs, alike = count * copies - 1, copies - 1
    mixed = (alike * same + (pairs - alike) * different) / pairs if pairs else same
    return torch.stack([same, mixed], 1)
