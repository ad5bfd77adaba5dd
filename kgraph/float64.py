"""Running a model in float64 that makes float32 tensors of its own: first states, masks, constants."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils import _pytree as pytree

_IN_PLACE = "_"


class InFloat64(TorchFunctionMode):
    """Float32 means float64: in what a model's forward makes, casts to, and meets of its own attributes.

    ``torch.zeros(n, width)`` is float64, so is ``x.float()``, and a float32 tensor that the model keeps outside its
    parameters and buffers is read as float64. Operations in place keep the tensor that they write to.
    """

    def __torch_function__(self, func: Callable[..., Any], types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is Tensor.float:
            func = Tensor.double
        name = getattr(func, "__name__", "")
        if not _writes(name):
            args, kwargs = pytree.tree_map(_double, (args, kwargs or {}))
        result = func(*args, **(kwargs or {}))
        return result if _writes(name) or name == "__get__" else pytree.tree_map_only(Tensor, _double, result)


def _writes(name: str) -> bool:
    """Whether an operation of that name writes to its first tensor."""
    return name == "__set__" or name == "__setitem__" or (name.endswith(_IN_PLACE) and not name.endswith("__"))


def _double(x: Any) -> Any:
    if isinstance(x, Tensor):
        return x.double() if x.dtype == torch.float32 else x
    return torch.float64 if x is torch.float32 else x
