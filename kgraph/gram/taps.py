"""Taps of a convolution: where each reads and writes, how much it weighs, and its action on a block."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from kgraph.gram.field import Geometry
from kgraph.gram.layout import Layout, Run
from kgraph.gram.places import Places


def axis_runs(
    size_in: int, size_out: int, taps: int, stride: int, padding: int, dilation: int, transposed: bool
) -> list[Run]:
    """For every tap of one axis: the output positions at which it meets an input, and those inputs.

    Convolution: out i reads in ``i stride + tap dilation - padding``; transposed, the other way about.
    """
    few, many = (size_in, size_out) if transposed else (size_out, size_in)
    runs = []
    for tap in range(taps):
        offset = tap * dilation - padding
        low = max(0, -(offset // stride)) if offset < 0 else 0
        high = min(few, (many - 1 - offset) // stride + 1)
        high = max(high, low)
        small = slice(low, high)
        start = low * stride + offset
        large = slice(start, start + max(0, (high - low - 1) * stride + 1) if high > low else start, stride)
        if high <= low:
            small, large = slice(0, 0), slice(0, 0)
        runs.append((large, small) if transposed else (small, large))
    return runs


def tap_sums(x: Tensor, geometry: Geometry) -> Tensor:
    """Sum over the taps that meet an input, [..., *places] -> [..., *sizes]."""
    total = x.new_zeros(*x.shape[: x.ndim - len(geometry.sizes)], *geometry.sizes)
    for _, runs in geometry.terms:
        to, source = zip(*runs, strict=True)
        total[(..., *to)] += x[(..., *source)]
    return total


def tap_shares(weight: Tensor) -> tuple[Tensor, bool]:
    """E[W_o^2] of every tap, and whether they are taken as equal.

    Taps whose measured variances differ by no more than sampling noise (five standard errors of the mean square of
    n Gaussian entries, sqrt(2 / n)) are equal: then the whole kernel's variance is spread evenly.
    """
    moments = weight.detach().double().square().mean((0, 1))
    mean = moments.mean()
    entries = weight.shape[0] * weight.shape[1]
    equal = bool(((moments - mean).abs() <= 5 * mean * math.sqrt(2 / max(entries, 1))).all())
    return (mean.expand_as(moments) if equal else moments), equal


def geometry_of(
    taps: Tensor, equal: bool, runs: list[list[Run]], sizes: tuple[int, ...], channels: int, key: tuple[Any, ...]
) -> Geometry:
    """Terms of all taps; with equal taps also one pass an axis."""
    index = torch.cartesian_prod(*(torch.arange(len(r)) for r in runs)).reshape(-1, len(runs)).tolist()
    flat = taps.reshape(-1).tolist()
    terms = tuple((channels * flat[i], tuple(runs[d][at[d]] for d in range(len(runs)))) for i, at in enumerate(index))
    if not equal or len(runs) == 1:
        return Geometry(terms, sizes, channels, key)
    whole: Run = (slice(None), slice(None))
    passes = []
    for d in range(len(runs)):
        factor = channels * flat[0] if d == 0 else 1.0
        passes.append(tuple((factor, tuple(run if e == d else whole for e in range(len(runs)))) for run in runs[d]))
    return Geometry(terms, sizes, channels, key, tuple(passes))


def convolve(layout: Layout, x: Tensor, geometry: Geometry, places: Places) -> Tensor:
    """Every tap's variance times the block where the tap reads, both sides; ``places`` are those that it reads."""
    if x.ndim == 0:  # nothing comes in
        return x
    stages = geometry.passes if geometry.passes and layout.by_axis else (geometry.terms,)
    for stage in stages:
        sizes = _stage_sizes(stage, geometry, places)
        x = layout.taps(x, stage, sizes, places)
        places = (*places[: len(places) - len(sizes)], *sizes)
    return x


def _stage_sizes(stage: object, geometry: Geometry, places: Places) -> Places:
    """Sizes of the convolved axes after one pass: an axis that the pass leaves alone keeps its own."""
    dims = len(geometry.sizes)
    before = places[len(places) - dims :]
    runs = stage[0][1]  # type: ignore[index]
    return tuple(before[i] if runs[i][0] == slice(None) else geometry.sizes[i] for i in range(dims))


def count_taps(layout: Layout, x: Tensor, summed: Tensor, geometry: Geometry, places: Places) -> tuple[Tensor, float]:
    """As `convolve`, each tap weighing 1 (the gradient by a weight sums inputs): a tensor and a factor of it."""
    weight = geometry.terms[0][0]
    if weight and all(w == weight for w, _ in geometry.terms):
        return summed, 1 / weight
    ones = tuple((1.0, runs) for _, runs in geometry.terms)
    return layout.taps(x, ones, geometry.sizes, places), 1.0
