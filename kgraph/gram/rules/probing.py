"""What the dimensions of an unknown operation's result mean: seen by running it, not guessed from sizes.

Entries of one channel are changed; where the result changes is where that channel went. An operation whose result
at a channel depends on other channels has no kernel that draws of channels could show. The same for inputs, except
that joint draws hold all of them: an operation may mix inputs as long as it keeps them apart in the result.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from itertools import permutations
from typing import Any

import torch
from torch import Tensor

from kgraph.gram.device import normal
from kgraph.gram.joint import NeedsAllPairs
from kgraph.gram.rules.table import Context
from kgraph.gram.value import Axes, Axis, Value, roles, size_of

_TRIES = 3
Call = Callable[..., Any]


def as_tensor(x: Tensor, axes: Axes) -> Tensor:
    """[C, N, *places] -> the tensor those axes describe."""
    factors = [factor for axis in axes for factor in axis]
    order: list[int] = []
    sizes = {role: [s for r, s in factors if r == role] for role in "cbp"}
    starts = {"c": 0, "b": len(sizes["c"]), "p": len(sizes["c"]) + len(sizes["b"])}
    for role, _ in factors:
        order.append(starts[role])
        starts[role] += 1
    split = x.reshape(*sizes["c"], *sizes["b"], *sizes["p"])
    return split.permute(order).reshape([size_of(axis) for axis in axes])


def as_draws(y: Tensor, axes: Axes) -> Tensor:
    """The tensor those axes describe -> [C, N, *places]."""
    factors = [factor for axis in axes for factor in axis]
    order = [i for want in "cbp" for i, (role, _) in enumerate(factors) if role == want]
    split = y.reshape([s for _, s in factors]).permute(order)
    sizes = {role: [s for r, s in factors if r == role] for role in "cbp"}
    return split.reshape(size_of(tuple(("c", s) for s in sizes["c"])), -1, *sizes["p"])


def result_axes(context: Context, call: Call, values: list[Value], reason: str) -> Axes:
    """Axes of the result.

    Raises:
        RuleError: it does not run on draws, is not one tensor, or mixes channels or loses the inputs.
    """
    try:
        with torch.random.fork_rng(devices=[]):
            probe = call(*(torch.zeros(v.shape, dtype=torch.float64) for v in values))
    except (RuntimeError, TypeError, ValueError, IndexError) as error:
        raise context.error(f"no exact kernel rule ({reason}), and it does not run on draws: {error}") from error
    if not isinstance(probe, Tensor):
        raise context.error(
            f"no exact kernel rule ({reason}), and its result is not one tensor", "Use kgraph.analyze for this model"
        )
    moved = {role: _changes(call, values, role) for role in "cb"}
    for axes in _candidates(values, tuple(probe.shape)):
        if all(_confined(moved[role], axes, role) for role in "cb"):
            return axes
    for axes in _of_operands(values, tuple(probe.shape)):
        if _confined(moved["c"], axes, "c"):  # inputs are mixed, and stay apart: joint draws hold all of them
            if not context.engine.rows.complete:
                raise NeedsAllPairs
            if len(context.engine.rows.batches) > 1:
                raise context.error("its result mixes inputs, and x1 and x2 are two batches of them", "Pass x1 alone")
            return axes
    raise context.error(
        f"no exact kernel rule ({reason}), and its result mixes channels or inputs", "Use kgraph.analyze"
    )


def _changes(call: Call, values: list[Value], role: str) -> Tensor:
    """Entries of the result that change when the operands' first channel (or input) does."""
    generator = torch.Generator("cpu").manual_seed(0)
    changed: Tensor | None = None
    for _ in range(_TRIES):
        base, other = ([normal(v.shape, generator) for v in values] for _ in range(2))
        # Contiguous, as the others are: random numbers are laid out as memory is.
        firsts = (_first(v.axes, role).contiguous() for v in values)
        swapped = [torch.where(first, y, x) for first, x, y in zip(firsts, base, other, strict=True)]
        one, two = (_run(call, tensors) for tensors in (base, swapped))
        differs = ~torch.isclose(one, two, rtol=1e-12, atol=0, equal_nan=True)
        changed = differs if changed is None else changed | differs
    assert changed is not None
    return changed


def _run(call: Call, tensors: list[Tensor]) -> Tensor:
    """The operation's result, with the same random numbers in every call."""
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(0)
        return call(*tensors).double()


def _first(axes: Axes, role: str) -> Tensor:
    """Which entries of a tensor of these axes belong to the first channel ("c") or input ("b")."""
    sizes = {r: [s for axis in axes for q, s in axis if q == r] for r in "cbp"}
    count = {r: size_of(tuple((r, s) for s in sizes[r])) for r in "cb"}
    x = torch.zeros(count["c"], count["b"], *sizes["p"], dtype=torch.bool)
    if role == "c":
        x[0] = True
    else:
        x[:, 0] = True
    return as_tensor(x, axes)


def _confined(changed: Tensor, axes: Axes, role: str) -> bool:
    return not bool((changed & ~_first(axes, role)).any())


def _candidates(values: list[Value], shape: tuple[int, ...]) -> Iterator[Axes]:
    """The operands' own layouts first; then every place where inputs and channels could have gone."""
    yield from _of_operands(values, shape)
    inputs = size_of(tuple(t for axis in values[0].axes for t in axis if t[0] == "b"))
    channels = size_of(tuple(t for axis in values[0].axes for t in axis if t[0] == "c"))
    for b, c in permutations(range(len(shape)), 2):
        if shape[b] == inputs and shape[c] == channels:
            special: dict[int, Axis] = {b: (("b", inputs),), c: (("c", channels),)}
            yield tuple(special.get(d, (("p", size),) if size > 1 else ()) for d, size in enumerate(shape))


def _of_operands(values: list[Value], shape: tuple[int, ...]) -> Iterator[Axes]:
    for v in values:
        if len(v.axes) != len(shape):
            continue
        axes = tuple(
            axis if size_of(axis) == size else ((("p", size),) if size > 1 else ())
            for axis, size in zip(v.axes, shape, strict=True)
        )
        if {"b", "c"} <= {role for axis in axes for role in roles(axis)}:
            yield axes


__all__ = ["as_draws", "as_tensor", "result_axes"]
