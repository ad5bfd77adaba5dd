"""Transformed models on disk: the weights, and what makes the model around them anew.

The file holds tensors, texts and numbers only and is read with ``weights_only=True``: reading it runs nothing.
"""

from __future__ import annotations

import hashlib
import pickle
import warnings
from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields
from os import PathLike
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.utils import _pytree as pytree

from kgraph.api import transform
from kgraph.capture import check_model
from kgraph.emitted import EmittedModule
from kgraph.errors import InputError, ModelError
from kgraph.files import named, placed
from kgraph.inputs import Inputs, resolve_inputs
from kgraph.untouched import untouched

FORMAT = "kgraph-model/1"
_ANEW = "Build the model as it was when it was saved, or transform it again"
_TOLERANCE = 1e-4  # of the outputs' scale, as for ONNX: another machine sums in another order


@dataclass(frozen=True)
class Recipe:
    """How the command line made a model.

    Attributes:
        model, kwargs, seed: the factory as named there, its arguments as JSON, the seed of all weights.
        source: SHA-256 of the factory's file; "" where it has none of its own.
        methods, shortcut_weight: options of `kgraph.transform`.
    """

    model: str
    kwargs: str
    seed: int
    source: str
    methods: tuple[str, ...]
    shortcut_weight: float | None


@dataclass(frozen=True)
class SavedModel:
    """What a file holds: a recipe, the state dict and other buffers, and a probe of what the model computes."""

    recipe: Recipe
    inputs: Inputs
    outputs: tuple[Tensor, ...]
    state: dict[str, Tensor]
    buffers: dict[str, Tensor]
    code: str


def save(shaped: nn.Module, path: str | PathLike[str], recipe: Recipe, example_inputs: object = None) -> None:
    """Write a transformed model so that `read` and `load` bring it back.

    Raises:
        InputError, FileError: see `kgraph.files.placed`.
    """
    inputs = resolve_inputs(shaped, example_inputs)
    data = {
        "format": FORMAT,
        "torch": str(torch.__version__),
        "recipe": asdict(recipe),
        "args": list(inputs.args),
        "kwargs": dict(inputs.kwargs),
        "outputs": _outputs(shaped, inputs),
        "state": dict(shaped.state_dict()),
        "buffers": _transient(shaped),
        "code": _code(shaped),
    }
    write(data, path)


def write(data: object, path: str | PathLike[str]) -> None:
    """``torch.save``, beside the path first.

    Raises:
        InputError, FileError: see `kgraph.files.placed`; ModelError: a part of the model cannot be pickled.
    """
    with placed(path) as made, made.open("wb") as file:
        try:
            torch.save(data, file)
        except (pickle.PicklingError, AttributeError, TypeError, RuntimeError) as error:
            before = error.__context__
            if isinstance(before, OSError | KeyboardInterrupt):  # hidden by torch's writer, which closes in a hurry
                raise before from error
            raise ModelError(f"the model cannot be saved: {error}", hint="Define its classes in a module") from error


def read(path: str | PathLike[str], *, trust: bool = False) -> SavedModel | nn.Module:
    """What a file holds; a whole pickled module only with ``trust``, for reading it runs what it names.

    Raises:
        InputError: no such file, or not one of ours; the message says what to do with it.
    """
    if not Path(named(path)).is_file():
        raise InputError(f"there is no file '{path}'")
    try:
        data = _torch_load(path, safe=True)
    except pickle.UnpicklingError as error:
        if not trust:
            hint = "Pass --trust if you know who made it, or name its factory: path/to/file.py:FACTORY"
            raise InputError(f"'{path}' holds pickled objects, and reading those runs code", hint=hint) from error
        data = _unpickled(path)
    except Exception as error:  # of bytes that are no such file, the reader makes anything
        raise _unreadable(path, error) from error
    if isinstance(data, nn.Module):
        return data
    if not isinstance(data, Mapping) or data.get("format") != FORMAT:
        held = "weights only" if isinstance(data, Mapping) else f"a {type(data).__name__}"
        hint = "Name a factory that loads it: path/to/file.py:FACTORY"
        raise InputError(f"'{path}' holds {held}, not a model that kgraph saved", hint=hint)
    return _parsed(data, path)


def load(path: str | PathLike[str], model: nn.Module) -> EmittedModule:
    """The model that ``kgraph transform --out`` saved, made from ``model``, an untransformed one.

    ``model`` is transformed as it was then and gets the saved weights; no code is taken from the file. Constants and
    outputs for the saved example inputs must come out as they were.

    Args:
        path: the file.
        model: what the factory returned that the command line was given; not touched.

    Raises:
        InputError: not a file of this kind.
        ModelError: another model, or one that is transformed otherwise today; the message says what differs.
    """
    saved = read(path)
    if not isinstance(saved, SavedModel):
        raise InputError(f"'{path}' holds a whole module", hint="Use torch.load(path, weights_only=False)")
    return rebuild(saved, check_model(model))


def rebuild(saved: SavedModel, model: nn.Module) -> EmittedModule:
    """Transform ``model`` as recorded, load the weights, and compare with what was saved.

    Raises:
        ModelError: see `load`.
    """
    recipe = saved.recipe
    shaped = transform(model, recipe.methods, saved.inputs, shortcut_weight=recipe.shortcut_weight, seed=recipe.seed)
    if _code(shaped) != saved.code:
        raise ModelError("the model's graph is not the one that was saved", hint=_ANEW)
    _same_tensors(dict(shaped.state_dict()), saved.state, values=False)
    shaped.load_state_dict(saved.state)
    _same_tensors(_transient(shaped), saved.buffers, values=True)
    outputs = _outputs(shaped, saved.inputs)
    if len(outputs) != len(saved.outputs) or not all(map(_close, outputs, saved.outputs)):
        raise ModelError("the model does not give the outputs that were saved with it", hint=_ANEW)
    return shaped


def _same_tensors(found: dict[str, Tensor], wanted: dict[str, Tensor], *, values: bool) -> None:
    if different := sorted(found.keys() ^ wanted.keys()):
        where = "only in the file" if different[0] in wanted else "not in the file"
        raise ModelError(f"{different[0]} is {where}", hint=_ANEW)
    for name, tensor in wanted.items():
        own = found[name]
        if (own.shape, own.dtype) != (tensor.shape, tensor.dtype):
            described = [f"{tuple(one.shape)} {one.dtype}" for one in (own, tensor)]
            raise ModelError(f"{name} is {described[0]}, and {described[1]} in the file", hint=_ANEW)
        if values and not _close(own, tensor):
            raise ModelError(f"the constant {name} is not the one that was saved", hint=_ANEW)


def _close(found: Tensor, wanted: Tensor) -> bool:
    a, b = (one.detach().cpu() for one in (found, wanted))
    if a.shape != b.shape or a.dtype != b.dtype:
        return False
    if not (a.is_floating_point() or a.is_complex()):
        return torch.equal(a, b)
    finite = b[b.isfinite()].abs()
    scale = max(1.0, float(finite.max())) if finite.numel() else 1.0
    allowed = max(_TOLERANCE, 16 * torch.finfo(a.dtype).eps) * scale
    wide = torch.complex128 if a.is_complex() else torch.float64
    return torch.allclose(a.to(wide), b.to(wide), rtol=0.0, atol=allowed, equal_nan=True)


def _outputs(model: nn.Module, inputs: Inputs) -> list[Tensor]:
    """Tensors that the model returns in eval mode; noise it draws is the same each time."""
    with untouched(model), torch.no_grad():
        torch.manual_seed(0)  # `untouched` puts the generators back
        model.eval()
        leaves = pytree.tree_leaves(model(*inputs.args, **inputs.kwargs))
    return [leaf.detach() for leaf in leaves if isinstance(leaf, Tensor)]


def _transient(model: nn.Module) -> dict[str, Tensor]:
    kept = model.state_dict()
    return {name: buffer.detach() for name, buffer in model.named_buffers() if name not in kept}


def _code(model: nn.Module) -> str:
    """What the graph computes, as a digest: structure and constants that stand in it."""
    return hashlib.sha256(model.code.encode()).hexdigest() if isinstance(model, fx.GraphModule) else ""


def _torch_load(path: str | PathLike[str], *, safe: bool) -> Any:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)  # PyTorch's own, about its pytree leaves
        return torch.load(path, map_location="cpu", weights_only=safe)


def _unpickled(path: str | PathLike[str]) -> Any:
    try:
        return _torch_load(path, safe=False)
    except Exception as error:  # unpickling runs other people's code, which may raise anything
        raise _unreadable(path, error) from error


def _unreadable(path: object, error: Exception) -> InputError:
    first = (str(error).splitlines() or [""])[0]
    return InputError(f"'{path}' cannot be read as a saved model: {type(error).__name__}: {first}")


def _parsed(data: Mapping[str, Any], path: object) -> SavedModel:
    try:
        given = {**data["recipe"], "methods": tuple(data["recipe"]["methods"])}
        recipe = Recipe(**{field.name: given[field.name] for field in fields(Recipe)})
        inputs = Inputs(tuple(data["args"]), dict(data["kwargs"]))
        return SavedModel(
            recipe, inputs, tuple(data["outputs"]), dict(data["state"]), dict(data["buffers"]), str(data["code"])
        )
    except (KeyError, TypeError, ValueError) as error:
        raise InputError(f"'{path}' is damaged: {type(error).__name__}: {error}") from error


__all__ = ["Recipe", "SavedModel", "load", "read", "rebuild", "save", "write"]
