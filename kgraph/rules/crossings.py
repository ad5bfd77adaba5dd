"""Whether a region of the graph jumps: where(a > b, ..), entries picked by their size, ranks.

Shifted by a small d, what is continuous and differentiable almost everywhere changes by d^2 in the mean square, and
what jumps by d, the chance that a jump lies between. Its slope at c = 1 is infinite, and no derivative shows it.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import torch
from torch import fx
from torch.utils import _pytree as pytree

from kgraph.canonical import operation_name
from kgraph.rules.runs import Outcome, Point

SHIFTS = (0.0, 1e-2, 1e-3)
"""Of the inputs, in units of their own derivative by the angle between two inputs."""
_LEAST = 40.0
"""Ratio of the mean square changes: 100 of what is continuous, 10 of what jumps."""
_STEPS = frozenset(
    """sign sgn round floor ceil trunc frac fix heaviside floor_divide remainder fmod bucketize searchsorted
    atan2 angle""".split()  # noqa: SIM905
)
"""Angles jump by 2 pi where they are cut."""
_COUNTING = (torch.bool, torch.uint8, torch.int8, torch.int16, torch.int32, torch.int64)


def may_jump(nodes: Iterable[fx.Node]) -> bool:
    """Whether any operation makes truth values, indices or steps; all others are continuous."""
    return any(operation_name(node) in _STEPS or _counts(node) for node in nodes)


def of_an_angle(node: fx.Node) -> bool:
    """Whether a node reads an angle: its sine does not jump where the angle is cut, which runs of both show."""
    return any(operation_name(n) in ("atan2", "angle") for n in node.all_input_nodes)


def shifted(point: Point) -> list[Point]:
    """The point by all `SHIFTS` along its direction."""
    along = [pytree.tree_map(lambda x, t, d=d: x + d * t, point.inputs, point.tangent) for d in SHIFTS]
    return [Point(inputs, point.seed) for inputs in along]


def jumped(outcomes: Sequence[Outcome]) -> list[bool]:
    """For every tensor that comes out of `shifted` points, whether it changed as what jumps does."""
    groups = [outcomes[i : i + len(SHIFTS)] for i in range(0, len(outcomes), len(SHIFTS))]
    found = []
    for tensors in zip(*(zip(*(one.values for one in group), strict=True) for group in groups), strict=True):
        large, small = (sum(_change(own, moved[i]) for own, *moved in tensors) for i in range(2))
        found.append(small > 0 and large < _LEAST * small)
    return found


def _change(own: torch.Tensor, moved: torch.Tensor) -> float:
    own, moved = (t if t.is_complex() else t.double() for t in (own, moved))
    return float((moved - own).abs().square().mean())


def _counts(node: fx.Node) -> bool:
    """Whether a node makes truth values or indices."""
    values = pytree.tree_leaves(node.meta.get("val"))
    return any(isinstance(value, torch.Tensor) and value.dtype in _COUNTING for value in values)
