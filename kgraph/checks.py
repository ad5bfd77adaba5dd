"""Checks of arguments that several files make."""

from __future__ import annotations

import math
from collections.abc import Sequence
from numbers import Integral, Real

from torch import nn

from kgraph.errors import InputError, ModelError


def number(name: str, value: object) -> float:
    """``value`` as a Python float; an InputError unless it is a number."""
    if not isinstance(value, Real):
        raise InputError(f"{name} is {value!r}", hint="Pass a number")
    return float(value)


def numbers(options: object, *names: str) -> None:
    """An InputError unless the attributes ``names`` of ``options`` are numbers, or None."""
    for name in names:
        value = getattr(options, name)
        if value is not None:
            number(name, value)


def whole(name: str, value: object) -> int:
    """``value`` as a Python int; an InputError unless it is a whole number."""
    if not isinstance(value, Integral):
        raise InputError(f"{name} is {value!r}", hint="Pass a whole number")
    return int(value)


def seeded(value: object) -> int:
    """A seed that PyTorch takes; an InputError unless it is a whole number of 64 bits."""
    seed = whole("seed", value)
    if not -(2**63) <= seed < 2**63:
        raise InputError(f"seed is {seed}", hint="Pass a whole number of at most 63 bits")
    return seed


def cosines_of(values: object) -> tuple[float, ...]:
    """Cosines as Python floats; an InputError unless all lie in [-1, 1]."""
    if isinstance(values, str) or not isinstance(values, Sequence):
        raise InputError(f"cosines is {values!r}", hint="Pass a tuple of numbers in [-1, 1]")
    found = tuple(number("a cosine", value) for value in values)
    if not all(-1 <= value <= 1 for value in found):
        raise InputError(f"cosines is {values!r}", hint="Pass numbers in [-1, 1]")
    return found


def finite(name: str, value: float) -> float:
    """``value`` as a Python float; an InputError unless it is finite."""
    given = number(name, value)
    if not math.isfinite(given):
        raise InputError(f"{name} must be a finite number, got {given}")
    return given


def with_values(model: nn.Module) -> None:
    """A ModelError if parameters or buffers are on the meta device: nothing can be measured then."""
    meta = [name for name, tensor in (*model.named_parameters(), *model.named_buffers()) if tensor.is_meta]
    if meta:
        raise ModelError(
            f"{meta[0]} is on the meta device and has no values to measure with",
            hint="Build the model on a real device, or use model.to_empty(device='cpu') and initialize it",
        )
