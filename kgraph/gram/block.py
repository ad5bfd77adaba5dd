"""Covariance and NTK of two fields for every row: the values that the engine computes with."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True, eq=False)
class Block:
    """``cov = E[u_a v_b]`` and the NTK's block (None when it is not asked for), laid out by the layout."""

    cov: Tensor
    ntk: Tensor | None = None

    def each(self, function: Callable[[Tensor], Tensor]) -> Block:
        """``function`` of both."""
        return Block(function(self.cov), None if self.ntk is None else function(self.ntk))

    def __add__(self, other: Block) -> Block:
        if self.zero or other.zero:
            return other if self.zero else self
        ntk = None if self.ntk is None or other.ntk is None else self.ntk + other.ntk
        return Block(self.cov + other.cov, ntk)

    def times(self, factor: float | Tensor) -> Block:
        """Both times a number, or times a tensor that broadcasts."""
        if isinstance(factor, float) and factor == 1.0:
            return self
        return self.each(lambda x: x * factor)

    @property
    def zero(self) -> bool:
        """Whether the block is the number 0 (independent terms of mean zero)."""
        return self.cov.ndim == 0 and float(self.cov) == 0.0 and (self.ntk is None or self.ntk.ndim == 0)


def nothing(with_ntk: bool) -> Block:
    """The block of independent fields of mean zero."""
    zero = torch.zeros((), dtype=torch.float64)
    return Block(zero, zero if with_ntk else None)
