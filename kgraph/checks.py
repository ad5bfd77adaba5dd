"""Checks of arguments that several files make."""

from __future__ import annotations

import math
from collections.abc import Sequence
from numbers import Integral, Real

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.parameter import is_lazy
from torch.utils import _pytree as pytree

from kgraph.errors import InputError, ModelError
from kgraph.suggestions import meant


def number(name: str, value: object) -> float:
    """``value`` (a tensor of one number, too) as a Python float; an InputError unless it is a number."""
    if isinstance(value, Tensor) and value.ndim == 0 and not value.is_complex() and value.dtype != torch.bool:
        value = value.item()
    if not isinstance(value, Real) or isinstance(value, bool):
        raise InputError(f"{name} is {value!r}", hint="Pass a number")
    return float(value)


def positive(name: str, value: object) -> float:
    """A finite number above 0."""
    if not 0 < (given := number(name, value)) < math.inf:
        raise InputError(f"{name} is {given}", hint="Pass a finite number above 0")
    return given


def not_negative(name: str, value: object) -> float:
    """A finite number of at least 0."""
    if not 0 <= (given := number(name, value)) < math.inf:
        raise InputError(f"{name} is {given}", hint="Pass a finite number of at least 0")
    return given


def weight_of_shortcut(value: object) -> float:
    """A number in [0, 1]."""
    if not 0 <= (given := number("shortcut_weight", value)) <= 1:
        raise InputError(f"shortcut_weight is {given}", hint="Pass a number in [0, 1]")
    return given


def count(name: str, value: object, least: int = 1, hint: str = "") -> int:
    """A whole number of at least ``least``, and of 31 bits."""
    if not least <= (given := whole(name, value)) < 2**31:
        raise InputError(f"{name} is {given}", hint=hint or f"Pass a whole number of at least {least}")
    return given


def flag(name: str, value: object) -> bool:
    """True or False, and nothing that Python takes for them."""
    if not isinstance(value, bool | np.bool_):
        raise InputError(f"{name} is {value!r}", hint="Pass True or False")
    return bool(value)


def choice(name: str, value: object, known: Sequence[str]) -> str:
    """One of a few words."""
    if not isinstance(value, str) or value not in known:
        near = meant(value, known)
        hint = f"{f'{near}? ' if near else ''}Choose one of {', '.join(map(repr, known))}"
        raise InputError(f"{name} is {value!r}", hint=hint)
    return value


def mode_of(model: nn.Module, mode: object) -> str:
    """ "train" or "eval"; the model's own where ``mode`` is None."""
    if mode is None:
        return "train" if model.training else "eval"
    return choice("mode", mode, ("train", "eval"))


def device_named(value: object) -> torch.device:
    """A device, by itself or by name."""
    if isinstance(value, torch.device):
        return value
    try:
        return torch.device(value)  # pyright: ignore[reportArgumentType, reportCallIssue]
    except (RuntimeError, TypeError) as error:
        raise InputError(f"device is {value!r}", hint="Pass a torch.device or its name, such as 'cpu'") from error


def callback(name: str, value: object) -> None:
    """A function, or None."""
    if value is not None and not callable(value):
        raise InputError(f"{name} is {value!r}", hint="Pass a function, or None")


def numbers(options: object, *names: str) -> None:
    """An InputError unless the attributes ``names`` of ``options`` are numbers, or None."""
    for name in names:
        value = getattr(options, name)
        if value is not None:
            number(name, value)


def whole(name: str, value: object) -> int:
    """``value`` as a Python int; an InputError unless it is a whole number."""
    if not isinstance(value, Integral) or isinstance(value, bool):
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
    if isinstance(values, str) or not isinstance(values, Sequence) or not values:
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


def dense_inputs(inputs: object, *, with_values: bool = False) -> None:
    """An InputError if a tensor among the inputs is no plain array of numbers: sparse, nested, quantized.

    Args:
        with_values: whether one on the meta device, which has a shape alone, is refused too.
    """
    for leaf in pytree.tree_leaves(inputs):
        if not isinstance(leaf, Tensor):
            continue
        if leaf.layout is not torch.strided or leaf.is_nested:
            kind = "nested tensor" if leaf.is_nested else f"tensor of layout {leaf.layout}"
            hint = "Pass a padded tensor" if leaf.is_nested else "Pass x.to_dense()"
            raise InputError(f"an input is a {kind}, and kernels are of dense ones", hint=hint)
        if leaf.is_quantized:
            raise InputError(f"an input of shape {tuple(leaf.shape)} is quantized", hint="Pass x.dequantize()")
        if with_values and leaf.is_meta:
            raise InputError(
                f"an input of shape {tuple(leaf.shape)} is on the meta device and has no values",
                hint="Pass one on a real device",
            )


def finite_inputs(inputs: object) -> None:
    """An InputError if a tensor among the inputs holds nan or infinities."""
    for leaf in pytree.tree_leaves(inputs):
        if isinstance(leaf, Tensor) and not leaf.is_meta and not bool(leaf.detach().isfinite().all()):
            shape = tuple(leaf.shape)
            raise InputError(f"an input of shape {shape} holds nan or infinite values", hint="Pass finite numbers")


def with_finite_values(model: nn.Module) -> None:
    """A ModelError that names a parameter or buffer with nan in it, or a parameter with infinities (a mask may)."""
    for kind, tensors in (("parameter", model.named_parameters()), ("buffer", model.named_buffers())):
        for name, tensor in tensors:
            if is_lazy(tensor) or tensor.is_meta or not (tensor.is_floating_point() or tensor.is_complex()):
                continue
            if bool(tensor.detach().sum().isfinite()):  # one pass, without a copy; it may overflow where none is there
                continue
            bad = tensor.isnan() if kind == "buffer" else ~tensor.isfinite()
            if many := int(bad.sum()):
                raise ModelError(
                    f"the {kind} {name} has {many} of {tensor.numel()} values that are nan or infinite",
                    hint="Initialize the model again, or load other weights",
                )


def with_values(model: nn.Module) -> None:
    """A ModelError if parameters or buffers are on the meta device: nothing can be measured then."""
    meta = [name for name, tensor in (*model.named_parameters(), *model.named_buffers()) if tensor.is_meta]
    if meta:
        raise ModelError(
            f"{meta[0]} is on the meta device and has no values to measure with",
            hint="Build the model on a real device, or use model.to_empty(device='cpu') and initialize it",
        )
