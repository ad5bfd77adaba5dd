"""Elementwise maps of large broadcast tensors, in pieces whose temporaries stay in the processor's cache."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator

import torch
from torch import Tensor

ENTRIES = 1 << 14
"""Half of what torch splits among threads: on a busy machine waiting for them costs more than the work."""
Pair = tuple[Tensor, Tensor]
_Index = tuple[slice, ...]


def pieces(shape: tuple[int, ...], entries: int = ENTRIES) -> Iterator[_Index]:
    """Boxes of at most ``entries`` that tile ``shape``, cut along the leading axes."""
    if not shape or math.prod(shape) <= entries:
        yield (slice(None),) * len(shape)
        return
    inner = math.prod(shape[1:])
    if inner > entries:
        for i in range(shape[0]):
            for rest in pieces(shape[1:], entries):
                yield (slice(i, i + 1), *rest)
        return
    step = max(1, entries // inner)
    for low in range(0, shape[0], step):
        yield (slice(low, low + step), *(slice(None),) * (len(shape) - 1))


def part(x: Tensor, index: _Index) -> Tensor:
    """``x`` at a box of the shape it broadcasts to: axes of size one stay whole."""
    own = index[len(index) - x.ndim :]
    return x[tuple(cut if size > 1 else slice(None) for cut, size in zip(own, x.shape, strict=True))]


def in_pieces(function: Callable[..., Pair], q1: Tensor, q2: Tensor, cov: Tensor) -> Pair:
    """``function(q1, q2, cov)`` piece by piece; ``cov`` has the full shape, ``q1`` and ``q2`` broadcast to it."""
    if cov.numel() <= ENTRIES:
        return function(q1, q2, cov)
    value = torch.empty(cov.shape, dtype=torch.float64, device=cov.device)
    slope = torch.empty_like(value)
    for index in pieces(tuple(cov.shape)):
        value[index], slope[index] = function(part(q1, index), part(q2, index), cov[index])
    return value, slope
