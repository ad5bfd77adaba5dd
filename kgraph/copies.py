"""A copy of somebody else's model to work on, and plain words where there can be none."""

from __future__ import annotations

import copy
from collections.abc import Iterator

import torch
from torch import Tensor, nn

from kgraph.errors import ModelError


def copied(model: nn.Module) -> nn.Module:
    """A deep copy of ``model``.

    Tensors that a forward or its hook computed (the older weight_norm) are copied as values, and so are those of the
    layouts that have no storage to copy (sparse rows).

    Raises:
        ModelError: something that a module holds has no copy (a lock, a file, a generator); names it.
    """
    tensors = [value for module in model.modules() for _, value in _held(module) if isinstance(value, Tensor)]
    values = [tensor for tensor in tensors if not tensor.is_leaf or tensor.layout is not torch.strided]
    try:
        return copy.deepcopy(model, {id(tensor): tensor.detach().clone() for tensor in values})
    except RecursionError as error:
        raise ModelError(
            f"{type(model).__name__} is nested too deeply for Python to copy",
            hint="Raise sys.setrecursionlimit, or put its layers side by side in one container",
        ) from error
    except Exception as error:  # whatever the copy of an attribute raises
        raise _not_copied(model, error) from error


def _held(module: nn.Module) -> Iterator[tuple[str, object]]:
    """What a module holds besides its children, by name."""
    registered = ("_parameters", "_buffers", "_modules")
    for space in (vars(module), module._parameters, module._buffers):
        yield from ((name, value) for name, value in space.items() if name not in registered)


def _not_copied(model: nn.Module, error: Exception) -> ModelError:
    hint = (
        "Make it where it is used, or take it off the model meanwhile; kgraph.transform(..., inplace=True) makes no "
        "copy of a model that may be rewritten itself"
    )
    others = {id(module): module for module in model.modules()}  # what leads to a module is not at fault for it
    for path, module in model.named_modules():
        for name, value in _held(module):
            try:
                copy.deepcopy(value, dict(others))
            except Exception as reason:  # the same again, of this attribute alone
                what = f"attribute {name!r} of {type(module).__name__} cannot be copied ({_first_line(reason)})"
                return ModelError(what, node=path or None, hint=hint)
    return ModelError(f"{type(model).__name__} cannot be copied ({_first_line(error)})", hint=hint)


def _first_line(error: Exception) -> str:
    return f"{type(error).__name__}: {(str(error).strip().splitlines() or ['no message'])[0]}"


__all__ = ["copied"]
