"""Runs of a region of the graph at drawn points, and its forward derivatives there.

Points with equal inputs are run once. The others go through every operation together (`torch.func.vmap`), as many
at a time as fit `MOST_ENTRIES`; one by one where an operation draws random numbers or cannot be batched.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx
from torch._C._functorch import _set_vmap_fallback_warning_enabled  # type: ignore[attr-defined]
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils import _pytree as pytree

from kgraph.site import shape_of

MOST_ENTRIES = 2_000_000
"""Entries of the largest tensor of a batch of points."""
_REFUSALS = (NotImplementedError, RuntimeError, ValueError)
"""What PyTorch raises for an operation that has no batching rule or no forward derivative."""

Seed = tuple[int, int]
Forward = Callable[..., Any]
"""Runs the region on the drawn tensors."""


@dataclass(frozen=True, eq=False)
class Point:
    """Where to run: the drawn tensors (trees of them), a direction, the seeds of the draw and of random operations."""

    inputs: tuple[Any, ...]
    seed: Seed
    tangent: tuple[Any, ...] | None = None

    def same(self, other: Point) -> bool:
        """Whether both have the same tensors."""
        mine, others = (pytree.tree_leaves((p.inputs, p.tangent)) for p in (self, other))
        return all(a is b or (isinstance(a, Tensor) and torch.equal(a, b)) for a, b in zip(mine, others, strict=True))


@dataclass(frozen=True, eq=False)
class Outcome:
    """Tensors that come out, and their derivatives along the direction (not a number where there are none)."""

    values: list[Tensor]
    derivatives: list[Tensor]


class Runs:
    """One region, ready to be run.

    Args:
        forward: runs it.
        nodes: what it runs.
    """

    def __init__(self, forward: Forward, nodes: Sequence[fx.Node]) -> None:
        self.forward = forward
        self.random = True
        """Whether a run draws random numbers; known after the first one."""
        self.derivable = True
        """Whether there is a forward derivative."""
        self.tree: pytree.TreeSpec | None = None
        """Structure of the results, known after the first run."""
        largest = max((math.prod(shape_of(node)) for node in nodes), default=1)
        self.together = max(1, MOST_ENTRIES // max(largest, 1))

    def at(self, points: Sequence[Point]) -> list[Outcome]:
        """What comes out at every point; all have a direction or none has."""
        outcomes = [] if self.tree is not None or not points else [self._first(points[0])]
        unique = [*points[: len(outcomes)]]
        places = [*range(len(outcomes)), *(self._place(point, unique) for point in points[len(outcomes) :])]
        while len(outcomes) < len(unique):
            outcomes += self._next(unique[len(outcomes) : len(outcomes) + self.together])
        return [outcomes[place] for place in places]

    def _first(self, point: Point) -> Outcome:
        """A run that tells whether the region draws random numbers: it moves the generator."""
        with torch.random.fork_rng(devices=[]):
            before = torch.default_generator.manual_seed(hash(point.seed)).get_state()
            outcome = self._run(point)
            self.random = not torch.equal(torch.default_generator.get_state(), before)
        if self.random:
            self.together = 1
        return outcome

    def _place(self, point: Point, unique: list[Point]) -> int:
        """Index of the point's equal among those of the same draw, or its own, behind all others."""
        for index in reversed(range(len(unique))):
            other = unique[index]
            if point.seed[0] != other.seed[0]:
                break
            if (not self.random or point.seed == other.seed) and point.same(other):
                return index
        unique.append(point)
        return len(unique) - 1

    def _next(self, points: list[Point]) -> list[Outcome]:
        """Outcomes of the points, or of the first one where they cannot be run together."""
        if len(points) > 1:
            try:
                return self._batched(points)
            except _REFUSALS:
                known = self.derivable
                first = self._one(points[0])
                if known == self.derivable:  # else it was the derivative that failed
                    self.together = 1
                return [first]
        return [self._one(point) for point in points]

    def _batched(self, points: list[Point]) -> list[Outcome]:
        inputs = _stacked([p.inputs for p in points])
        if points[0].tangent is None or not self.derivable:
            with sdpa_kernel(SDPBackend.MATH), _quiet():
                values = self._leaves(torch.func.vmap(self.forward)(*inputs))
            return [self._outcome(point, [v[i] for v in values]) for i, point in enumerate(points)]
        tangents = _stacked([p.tangent for p in points])
        with _quiet():
            results, changes = torch.func.vmap(lambda x, t: _jvp(self.forward, x, t))(inputs, tangents)
        values, derivatives = self._leaves(results), pytree.tree_leaves(changes)
        return [Outcome([v[i] for v in values], [_wide(d[i]) for d in derivatives]) for i in range(len(points))]

    def _one(self, point: Point) -> Outcome:
        with torch.random.fork_rng(devices=[]):
            torch.default_generator.manual_seed(hash(point.seed))
            return self._run(point)

    def _run(self, point: Point) -> Outcome:
        if point.tangent is not None and self.derivable:
            try:
                values, derivatives = _jvp(self.forward, point.inputs, point.tangent)
                return Outcome(self._leaves(values), [_wide(d) for d in pytree.tree_leaves(derivatives)])
            except _REFUSALS:
                self.derivable = False  # recurrent kernels, indices
        return self._outcome(point, self._leaves(self.forward(*point.inputs)))

    def _outcome(self, point: Point, values: list[Tensor]) -> Outcome:
        if point.tangent is None:
            return Outcome(values, [])
        return Outcome(values, [torch.full_like(v, math.nan, dtype=torch.float64) for v in values])

    def _leaves(self, results: Any) -> list[Tensor]:
        leaves, self.tree = pytree.tree_flatten(results)
        return leaves


@contextmanager
def _quiet() -> Iterator[None]:
    """An operation without a batching rule is run once a point by PyTorch itself, which it warns of."""
    _set_vmap_fallback_warning_enabled(False)
    try:
        yield
    finally:
        _set_vmap_fallback_warning_enabled(True)  # PyTorch's default; there is no way to read it


def _jvp(forward: Callable[..., Any], inputs: tuple[Any, ...], tangent: tuple[Any, ...]) -> tuple[Any, Any]:
    with sdpa_kernel(SDPBackend.MATH):  # the fused attention kernels have no forward derivative
        result = torch.func.jvp(forward, inputs, tangent)
    return result[0], result[1]


def _wide(derivative: Tensor) -> Tensor:
    return derivative if derivative.is_complex() else derivative.double()


def _stacked(trees: Sequence[Any]) -> Any:
    return pytree.tree_map(lambda *leaves: torch.stack(leaves), trees[0], *trees[1:])
