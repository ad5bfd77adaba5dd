"""Which pairs of inputs a Gram matrix is about: one row of every block for each pair."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor


@dataclass(frozen=True, eq=False)
class Rows:
    """Pairs (a, b) of inputs, numbered; every input's pair with itself is among them.

    Attributes:
        first, second: indices of a and b, shape [R].
        batches: the ranges of inputs that pass through the model together (batch statistics are theirs).
    """

    first: Tensor
    second: Tensor
    batches: tuple[tuple[int, int], ...]

    @staticmethod
    def square(n: int, batches: tuple[tuple[int, int], ...] | None = None) -> Rows:
        """All pairs a <= b of ``n`` inputs."""
        first, second = torch.triu_indices(n, n).unbind()
        return Rows(first, second, batches or ((0, n),))

    @staticmethod
    def cross(n1: int, n2: int) -> Rows:
        """Pairs of the first ``n1`` inputs with the next ``n2``, and every input with itself."""
        own = torch.arange(n1 + n2)
        a, b = torch.cartesian_prod(torch.arange(n1), n1 + torch.arange(n2)).unbind(1)
        return Rows(torch.cat([own, a]), torch.cat([own, b]), ((0, n1), (n1, n1 + n2)))

    @property
    def inputs(self) -> int:
        return self.batches[-1][1]

    @cached_property
    def own(self) -> Tensor:
        """Row of (a, a) for every input a."""
        return self.table.diagonal()

    @cached_property
    def table(self) -> Tensor:
        """Row of (a, b) by indices [a, b], -1 where the pair is not there (b < a, or not asked for)."""
        table = torch.full((self.inputs, self.inputs), -1)
        table[self.first, self.second] = torch.arange(len(self.first))
        return table

    @cached_property
    def complete(self) -> bool:
        """Whether every pair is there, in one order or the other."""
        return bool((torch.maximum(self.table, self.table.T) >= 0).all())

    @cached_property
    def same(self) -> Tensor:
        """Which rows pair an input with itself, [R]."""
        return self.first == self.second
