"""One sweep over a skeleton: the largest value of any subnetwork, whatever the depth.

Every value is an array of columns, one per start, NaN where the start does not dominate. Where a single value is live
(all that follows passes through it) a column that another one exceeds stays below it for good, for every map grows
with its argument: only the largest are kept. So the columns are those of the stretch between two such bottlenecks,
and time and memory grow with the depth, not with its square.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from kgraph.nonlinear import Region
from kgraph.skeleton import Step

Array = NDArray[np.float64]
Value = tuple[Array, ...]
_DIGITS = 13
"""Significant digits to which two slopes are compared: rounding must not keep a column alive."""


class Maps(Protocol):
    """How one kind of quantity passes through nonlinear layers and products.

    Attributes:
        start: value at the start of a subnetwork, one number a component.
        constant: value of a term that is the same for all inputs.
    """

    start: tuple[float, ...]
    constant: tuple[float, ...]

    def nonlinear(self, region: Region, x: Value) -> Value: ...

    def product(self, x: Value, y: Value) -> Value: ...


def combine(step: Step, arguments: list[Value], maps: Maps) -> Value:
    """Value at a step from those it reads."""
    if step.kind == "nonlinear":
        assert step.region is not None
        return maps.nonlinear(step.region, arguments[0])
    if step.kind == "sum":
        constant = 1.0 - sum(step.weights)
        return tuple(
            np.asarray(sum(w * a[i] for w, a in zip(step.weights, arguments, strict=True))) + constant * value
            for i, value in enumerate(maps.constant)
        )
    if step.kind == "product":
        result = arguments[0]
        for other in arguments[1:]:
            result = maps.product(result, other)
        return result
    if step.kind == "largest":
        return tuple(np.maximum.reduce([a[i] for a in arguments]) for i in range(len(maps.start)))
    return arguments[0]


@dataclass(frozen=True)
class _Operation:
    """A step that computes something: its index, what it reads, and what nobody reads after it."""

    index: int
    inputs: tuple[int, ...]
    done: tuple[int, ...]


@dataclass(frozen=True)
class _Stretch:
    """Operations up to the next bottleneck, and the starts among them."""

    operations: tuple[_Operation, ...]
    starts: tuple[int, ...]


@dataclass(frozen=True)
class Program:
    """A skeleton made ready for many sweeps."""

    steps: tuple[Step, ...]
    starts: tuple[int, ...]

    def largest(self, maps: Maps, component: int) -> tuple[float, int, int]:
        """``(value, start, end)`` of the subnetwork whose ``component`` is largest; the first of equals."""
        best, source, target = -np.inf, 0, 0
        for index, values, columns in self._sweep(maps):
            value = float(np.fmax.reduce(values[component]))  # NaN where no start dominates
            if value > best:
                column = int(np.nanargmax(values[component]))
                best, source, target = value, columns[column], index
        return best, source, target

    def _sweep(self, maps: Maps) -> Iterator[tuple[int, Value, list[int]]]:
        """Every operation's index and value, and the starts that its columns stand for."""
        values: dict[int, Value] = {}
        columns: list[int] = []
        for stretch in self._stretches:
            columns = [*_trim(values, columns, len(stretch.starts)), *stretch.starts]
            place = {start: column for column, start in enumerate(columns)}
            for operation in stretch.operations:
                step, arguments = self.steps[operation.index], [values[i] for i in operation.inputs]
                result = combine(step, arguments, maps) if arguments else _missing(len(columns), len(maps.start))
                if operation.index in place:
                    result = tuple(r.copy() for r in result)
                    for r, start in zip(result, maps.start, strict=True):
                        r[place[operation.index]] = start
                values[operation.index] = result
                yield operation.index, result, columns
                for index in operation.done:
                    del values[index]

    @cached_property
    def _stretches(self) -> tuple[_Stretch, ...]:
        started, stretches, live = frozenset(self.starts), list[_Stretch](), set[int]()
        operations: list[_Operation] = []
        for operation in self._operations:
            operations.append(operation)
            live.add(operation.index)
            live.difference_update(operation.done)
            if live == {operation.index} and any(o.index in started for o in operations):  # there is what to trim
                stretches.append(_stretch(operations, started))
                operations = []
        return (*stretches, _stretch(operations, started))

    @cached_property
    def _operations(self) -> list[_Operation]:
        """All steps but those that hand their argument on; what nobody reads is done at once."""
        started, stands_for, last = frozenset(self.starts), dict[int, int](), dict[int, int]()
        read: list[tuple[int, tuple[int, ...]]] = []
        for index, step in enumerate(self.steps):
            inputs = tuple(stands_for[i] for i in step.inputs)
            hands_on = step.kind == "pass" and bool(inputs) and index not in started
            stands_for[index] = inputs[0] if hands_on else index
            if not hands_on:
                read.append((index, inputs))
                last |= dict.fromkeys((*inputs, index), index)
        done: dict[int, list[int]] = {}
        for index, reader in last.items():
            done.setdefault(reader, []).append(index)
        return [_Operation(index, inputs, tuple(done.get(index, ()))) for index, inputs in read]


def _stretch(operations: list[_Operation], started: frozenset[int]) -> _Stretch:
    return _Stretch(tuple(operations), tuple(o.index for o in operations if o.index in started))


def _missing(width: int, components: int) -> Value:
    return (np.full(width, np.nan),) * components


def _trim(values: dict[int, Value], columns: list[int], more: int) -> list[int]:
    """Keep the columns of the one live value that may still become the largest, and make room for ``more``."""
    if not values:
        return columns
    ((index, value),) = values.items()  # a bottleneck
    rows = list(zip(*(component.tolist() for component in value), strict=True))
    kept = _front(rows)
    table = np.array([rows[i] for i in kept] + [(np.nan,) * len(value)] * more)
    values[index] = tuple(table.T.copy())
    return [columns[i] for i in kept]


def _front(rows: list[tuple[float, ...]]) -> list[int]:
    """Rows that no other one exceeds in each of its one or two numbers; negative ones, where maps may fall, too."""
    known = [i for i, row in enumerate(rows) if row[0] == row[0]]  # not NaN
    if len(known) < 2:
        return known
    several = len(rows[0]) > 1
    order = sorted(known, key=lambda i: (-_rounded(rows[i][0]) if several else -rows[i][0], -rows[i][-1]))
    kept, ahead = [], -math.inf  # the sort is stable: the earliest start stands for its equals
    for i in order:
        last = rows[i][-1]
        if last > ahead or last < 0:
            kept.append(i)
        ahead = max(ahead, last)
    return sorted(kept)


def _rounded(x: float) -> float:
    mantissa, exponent = math.frexp(x)
    return math.ldexp(round(mantissa, _DIGITS), exponent)
