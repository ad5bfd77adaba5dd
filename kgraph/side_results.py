"""What a forward leaves on its modules besides its output: an emitted module, a graph of the output, leaves nothing.

A module that stores an auxiliary loss, an attention map or a count does so anew in every run. Two runs on different
inputs tell it from a cache: what the second run leaves as the first made it (a mask built once, the sizes of the
input) holds no result of a batch, and the graph computes what it needs of it by itself.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import fields, is_dataclass
from numbers import Number
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from kgraph.inputs import Inputs
from kgraph.untouched import untouched

_DEEPEST = 4
_LONGEST = 1000
Place = tuple[str, str]
"""Path of a module and name of an attribute."""
Leaf = tuple[object, int]
"""A value and, of a tensor, how often it was written to."""


def lost_results(stored: dict[Place, str], model: nn.Module, emitted: nn.Module, inputs: Inputs) -> tuple[str, ...]:
    """Lines for what every run of ``model`` stores on its modules (`stored_results`) and no run of ``emitted`` does."""
    if not stored:
        return ()
    kept = stored_results(emitted, inputs, buffers=True).keys()  # a tensor that a forward writes to becomes a buffer
    return tuple(_line(model, *place, what) for place, what in stored.items() if place not in kept)


def stored_results(model: nn.Module, inputs: Inputs, *, buffers: bool = False) -> dict[Place, str]:
    """Module path and attribute of what depends on the run, and what it is; the model is left as it was.

    Args:
        buffers: whether buffers count: an emitted module keeps them, or the ledger says that they are left out.
    """
    if any(tensor.is_meta for tensor in (*model.parameters(), *model.buffers())):
        return {}
    for training in (True, False):
        with untouched(model):
            model.train(training)
            try:
                return _compared(model, inputs, buffers)
            except _RAISED:  # a batch too small for the statistics of train mode, inputs that may not be reordered
                continue
    return {}


_RAISED = (ArithmeticError, AssertionError, AttributeError, LookupError, RuntimeError, TypeError, ValueError)


def _compared(model: nn.Module, inputs: Inputs, buffers: bool) -> dict[Place, str]:
    before = _attributes(model, buffers)
    _run(model, inputs)
    first = _attributes(model, buffers)
    changed = [place for place in first if not _same(before.get(place), first[place])]
    if not changed:
        return {}
    try:
        _run(model, _reordered(inputs))
    except _RAISED:
        _run(model, inputs)
    second = _attributes(model, buffers)
    lost = [p for p in changed if p in second and not _equal(first[p], second[p])]
    return {place: _what(second[place]) for place in lost}


def _run(model: nn.Module, inputs: Inputs) -> None:
    args, kwargs = pytree.tree_map_only(Tensor, Tensor.clone, tuple(inputs))  # a forward may write to its inputs
    with torch.enable_grad():
        model(*args, **kwargs)


def _reordered(inputs: Inputs) -> Inputs:
    """The same numbers in other places: whatever range a forward asks of them is kept."""

    def turned(value: Tensor) -> Tensor:
        return value.flatten().roll(1).reshape(value.shape) if value.is_floating_point() or value.ndim > 1 else value

    return Inputs(*pytree.tree_map_only(Tensor, turned, tuple(inputs)))


def _attributes(model: nn.Module, buffers: bool) -> dict[Place, list[Leaf]]:
    """The values in every attribute of every module, but parameters and children."""
    registered = {"_parameters", "_buffers", "_modules", "training"}
    return {
        (path, name): list(_leaves(value, 0))
        for path, module in model.named_modules()
        for name, value in (*vars(module).items(), *(module._buffers.items() if buffers else ()))
        if name not in registered
    }


def _leaves(value: object, depth: int) -> Iterator[Leaf]:
    """Tensors, numbers and words in containers and plain objects; anything else by itself."""
    if isinstance(value, Tensor):
        yield value, value._version
        return
    inner = _inside(value) if depth < _DEEPEST else None
    if inner is None:
        yield value, 0
        return
    yield type(value), len(inner)
    for one in inner[:_LONGEST]:
        yield from _leaves(one, depth + 1)


def _inside(value: object) -> list[Any] | None:
    if isinstance(value, nn.Module | str | Number | type):
        return None
    if isinstance(value, Mapping):
        return [one for item in value.items() for one in item]
    if isinstance(value, list | tuple):
        return list(value)
    if is_dataclass(value):
        return [getattr(value, f.name, None) for f in fields(value)]
    return list(vars(value).values()) if _is_plain(value) else None


def _is_plain(value: object) -> bool:
    """Whether a value is an object of somebody's own class that holds others."""
    own = isinstance(getattr(value, "__dict__", None), dict) and not callable(value)
    return own and not type(value).__module__.startswith(("torch.", "kgraph."))


def _same(one: list[Leaf] | None, other: list[Leaf]) -> bool:
    """Whether two looks found the very same tensors, unwritten, and equal numbers."""
    return one is not None and len(one) == len(other) and all(map(_alike, one, other))


def _alike(one: Leaf, other: Leaf) -> bool:
    (a, written), (b, again) = one, other
    plain = isinstance(a, str | Number) and isinstance(b, str | Number)
    return written == again and (a is b or (plain and a == b))


def _equal(one: list[Leaf], other: list[Leaf]) -> bool:
    """The same, or new tensors of the same values; objects that say nothing of what they hold are no results."""
    same_form = len(one) == len(other)
    return same_form and all(_alike(a, b) or _of_one_value(a[0], b[0]) for a, b in zip(one, other, strict=True))


def _of_one_value(a: object, b: object) -> bool:
    if isinstance(a, Tensor) and isinstance(b, Tensor):
        return a is not b and a.shape == b.shape and a.dtype == b.dtype and torch.allclose(a, b, 0, 0, equal_nan=True)
    if isinstance(a, np.ndarray) and isinstance(b, np.ndarray):
        return np.array_equal(a, b)
    return not isinstance(a, Tensor | str | Number) and type(a) is type(b)


def _what(leaves: list[Leaf]) -> str:
    if not any(isinstance(value, Tensor) for value, _ in leaves):
        return "another number"
    return "a result of its own"


def _line(model: nn.Module, path: str, name: str, what: str) -> str:
    place, owner = f"{path}{'.' if path else ''}{name}", type(model.get_submodule(path)).__name__
    stays = "a run of an emitted module stores nothing: return it as an output"
    return f"{place}: every run stores {what} there (on {owner}), and {stays}"


__all__ = ["lost_results", "stored_results"]
