"""GroupNorm and InstanceNorm: statistics over some channels and all positions of one input.

Where a concatenation has put several laws side by side, each group is normalized by its own.
"""

from __future__ import annotations

import itertools
from dataclasses import replace

import torch
from torch import Tensor

from kgraph.alignment import cut
from kgraph.canonical import aten
from kgraph.how import assumed
from kgraph.kernel import Kernel, Pairs, Part, merge
from kgraph.rules.norm import Removed, by_running_statistics, gain_and_bias, normalized, position_mean
from kgraph.rules.table import Context, rule

_MANY = 128
"""Entries of a group from which on its variance is as good as its mean: c is off by about c (1 - c^2) / entries."""


@rule(aten.group_norm.default)
def group_norm(
    context: Context,
    x: Kernel,
    groups: int,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    eps: float = 1e-5,
    *_: object,
) -> Kernel:
    if not isinstance(x, Kernel):
        return context.sample()
    return gain_and_bias(context, _grouped(x, groups, eps), weight, bias)


def _grouped(x: Kernel, groups: int, eps: float) -> Kernel:
    """Statistics over ``channels / groups`` channels and all positions of one input, group by group."""
    channels = next((size for axis in x.axes for role, size in axis if role == "c"), 1)
    per_group = max(channels // groups, 1)
    if x.split is None or sum(part.size for part in x.parts) != channels:
        return x.with_parts(*_of_group((x.merged,), per_group, x.positions, eps))
    parts: list[Part] = []
    for low, high in _runs(x, per_group):
        inside = tuple(cut(x, *_meeting(x, at, high), x.split - len(x.axes)) for at in _starts(x, low, high))
        parts += _of_group(inside, per_group, x.positions, eps)
    return x.with_parts(*parts)


def _runs(x: Kernel, per_group: int) -> list[tuple[int, int]]:
    """Ranges of channels: whole groups that lie in one part go together, others one by one."""
    ends = _ends(x)
    runs, at = [], 0
    while at < ends[-1]:
        end = next(e for e in ends if e > at)
        whole = (end - at) // per_group * per_group
        runs.append((at, at + (whole or per_group)))
        at = runs[-1][1]
    return runs


def _ends(x: Kernel) -> list[int]:
    return list(itertools.accumulate(part.size for part in x.parts))


def _starts(x: Kernel, low: int, high: int) -> list[int]:
    return [low, *(end for end in _ends(x) if low < end < high)]


def _meeting(x: Kernel, at: int, high: int) -> tuple[int, int]:
    return at, min(high, next(end for end in _ends(x) if end > at))


def _of_group(parts: tuple[Part, ...], per_group: int, positions: int, eps: float) -> list[Part]:
    """The parts of one group (or of several alike), normalized by the group's mean and variance.

    The mean over g channels and n positions has second moment m^2 + (K_positions - m^2) / g: zero fluctuation for
    many channels (LayerNorm), the channel's own position mean for one (InstanceNorm). Of a part with mean m_k in a
    group of mean m, K - 2 (m_k m + F_k / g) + m^2 + F / g stays, F being the averages of K_positions - m_k^2.
    """
    whole, positions = merge(parts) if parts[1:] else parts[0], max(positions, 1)
    weights = [part.size / whole.size for part in parts]
    fields = [[position_mean(getattr(part, name), positions) for part in parts] for name in ("cov", "slope", "ntk")]
    own = [fields[0][k] - part.mean**2 for k, part in enumerate(parts)]
    shared = [torch.stack([w * f for w, f in zip(weights, field, strict=True)]).sum(0) for field in (own, *fields[1:])]
    removed = [
        Removed(
            2 * (part.mean * whole.mean + own[k] / per_group) - whole.mean**2 - shared[0] / per_group,
            (2 * fields[1][k] - shared[1]) / per_group,
            (2 * fields[2][k] - shared[2]) / per_group,
        )
        for k, part in enumerate(parts)
    ]
    rest = zip(parts, removed, weights, strict=True)
    variance = sum(w * float(part.q - gone.cov[Pairs.SELF]) for part, gone, w in rest) + eps
    results = [normalized(part, gone, variance, whole.mean) for part, gone in zip(parts, removed, strict=True)]
    few = per_group * positions
    if few >= _MANY:
        return results
    how = assumed(f"the variance of {few} entries counts as its mean")
    return [replace(part, how=part.how | how) for part in results]


@rule(aten.instance_norm.default)
def instance_norm(
    context: Context,
    x: Kernel,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    running_mean: Tensor | None = None,
    running_var: Tensor | None = None,
    use_input_stats: bool = True,
    momentum: float = 0.1,
    eps: float = 1e-5,
    *_: object,
) -> Kernel:
    if not isinstance(x, Kernel):
        return context.sample()
    if running_mean is not None and running_var is not None and context.mode == "eval":
        return by_running_statistics(context, x, running_mean, running_var, eps, weight, bias)
    channels = next((size for axis in x.axes for role, size in axis if role == "c"), 1)
    return gain_and_bias(context, _grouped(x, channels, eps), weight, bias)
