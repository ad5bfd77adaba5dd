"""Pairs of inputs with set cosines, and close ones: white noise, or pairs of the user's own examples.

Rows of one pair (a, t), t of a's length and orthogonal to a:

    a,  cos(f) a + sin(f) t  for every cosine cos(f),  cos(ANGLE) a + sin(ANGLE) s

White noise has q = 1 at every location, and t, s are orthogonal to a at every location (over the whole input where
there is one channel only). Of examples, t lies in the plane of a and another one b, which is the first of the rows
itself; s is the part of the difference of two others that is orthogonal to a.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from kgraph.errors import InputError

ANGLE = 2e-3
"""Between two close inputs: a kink then changes the slope by .2 ANGLE at most, and float32 rounds it by 1e-3."""
GROWTH = 2 * (1 - math.cos(ANGLE))
"""Squared distance of two close inputs over the square of one."""
SHARES = (0.0, 0.5, 0.9)
"""Of the way from two inputs (cosine 0, or as they come) to one and the same."""


def white(shape: tuple[int, ...], channel: int, pairs: int, generator: torch.Generator) -> Tensor:
    """White noise ``[pairs, rows, *shape]`` whose channels lie in dimension ``channel`` of ``shape``."""
    z = torch.randn((3, pairs, *shape), generator=generator, dtype=torch.float64)
    dims = [channel + 2] if shape[channel] > 1 else list(range(2, z.ndim))
    a, t, s = _unit(z, dims)
    t, s = (_orthogonal(x, a, [d - 1 for d in dims]) for x in (t, s))
    return torch.stack([*_turned(a, t, SHARES), *_turned(a, s, (math.cos(ANGLE),))[1:]], 1)


def of_examples(x: Tensor, pairs: int, generator: torch.Generator) -> Tensor:
    """Pairs of the examples ``x [n, *shape]``, n at least 2: ``[pairs, rows, *shape]``.

    Raises:
        InputError: examples that are zero or multiples of one another.
    """
    x = x.detach().double().cpu()
    order = torch.stack([torch.randperm(len(x), generator=generator)[[0, 1, -1, -2]] for _ in range(pairs)], 1)
    a, b, f, g = x[order]
    dims = list(range(1, x.ndim))
    close = _orthogonal(f - g, a, dims)
    away = _orthogonal(b, a, dims)
    if not bool((close.isfinite() & away.isfinite()).all()):
        raise InputError(
            "among the inputs are multiples of one another, or zeros", hint="Pass a batch of different ones"
        )
    lengths = (a.square().sum(dims) * b.square().sum(dims)).sqrt()
    base = (a * b).sum(dims) / lengths
    rows = [a, b]
    for share in SHARES[1:]:
        cosine = (base + share * (1 - base)).reshape(-1, *(1 for _ in dims))
        rows.append(cosine * a + (1 - cosine**2).sqrt() * away)
    rows += _turned(a, close, (math.cos(ANGLE),))[1:]
    return torch.stack(rows, 1)


def of_tokens(table: Tensor, ids: tuple[Tensor, Tensor, Tensor]) -> Tensor:
    """Embeddings of three sequences of tokens ``[pairs, *places]`` mixed as pairs are: ``[pairs, rows, *places, C]``.

    ``mean + cos (E_a - mean) + sin (E_b - mean)``: rows of an embedding are independent of one another.
    """
    mean = table.mean()
    a, t, s = (table[one] - mean for one in ids)
    return torch.stack([*_turned(a, t, SHARES), *_turned(a, s, (math.cos(ANGLE),))[1:]], 1) + mean


def _turned(a: Tensor, t: Tensor, cosines: tuple[float, ...]) -> list[Tensor]:
    return [a, *(c * a + math.sqrt(1 - c * c) * t for c in cosines)]


def _unit(x: Tensor, dims: list[int]) -> Tensor:
    return x / x.square().mean(dims, keepdim=True).sqrt()


def _orthogonal(x: Tensor, a: Tensor, dims: list[int]) -> Tensor:
    """The part of x orthogonal to a over ``dims``, of a's length there."""
    size = a.square().sum(dims, keepdim=True)
    x = x - (x * a).sum(dims, keepdim=True) / size * a
    return x * (size / x.square().sum(dims, keepdim=True)).sqrt()


__all__ = ["ANGLE", "GROWTH", "SHARES", "of_examples", "of_tokens", "white"]
