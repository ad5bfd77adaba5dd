"""Checks of arguments that several files make."""

from __future__ import annotations

import math

from kgraph.errors import InputError


def finite(name: str, value: float) -> float:
    """``value`` as a Python float; an InputError unless it is finite."""
    number = float(value)
    if not math.isfinite(number):
        raise InputError(f"{name} must be a finite number, got {number}")
    return number
