"""Checks of arguments that several files make."""

from __future__ import annotations

import math

from torch import nn

from kgraph.errors import InputError, ModelError


def finite(name: str, value: float) -> float:
    """``value`` as a Python float; an InputError unless it is finite."""
    number = float(value)
    if not math.isfinite(number):
        raise InputError(f"{name} must be a finite number, got {number}")
    return number


def with_values(model: nn.Module) -> None:
    """A ModelError if parameters or buffers are on the meta device: nothing can be measured then."""
    meta = [name for name, tensor in (*model.named_parameters(), *model.named_buffers()) if tensor.is_meta]
    if meta:
        raise ModelError(
            f"{meta[0]} is on the meta device and has no values to measure with",
            hint="Build the model on a real device, or use model.to_empty(device='cpu') and initialize it",
        )
