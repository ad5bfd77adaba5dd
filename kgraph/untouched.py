"""What a run of somebody else's model may advance, kept: generators, buffers, attributes, modes."""

from __future__ import annotations

import random
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import Any, cast

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.parameter import is_lazy


@contextmanager
def untouched(model: nn.Module, *, parameters: bool = False) -> Iterator[None]:
    """Leave ``model`` and the global generators as they are, whatever its forward does to them.

    Args:
        parameters: the values of parameters, too, of which a copy is held meanwhile (on the CPU).
    """
    with ExitStack() as stack:
        for kept in (_modes(model), _tensors(model, parameters), _generators()):
            stack.enter_context(kept)
        if not is_uninitialized(model):  # else it is a copy, and becomes what its first run makes of it
            stack.enter_context(_attributes(model))
        yield


def is_uninitialized(model: nn.Module) -> bool:
    """Whether a first run would make parameters (torch's lazy modules), which nothing could take back."""
    return any(is_lazy(tensor) for tensor in (*model.parameters(), *model.buffers()))


@contextmanager
def _generators() -> Iterator[None]:
    """PyTorch's (of the CPU and, where CUDA is in use, of every device), Python's and NumPy's."""
    devices = list(range(torch.cuda.device_count())) if torch.cuda.is_initialized() else []
    python, numpy = random.getstate(), np.random.get_state()
    try:
        with torch.random.fork_rng(devices=devices):
            yield
    finally:
        random.setstate(python)
        np.random.set_state(numpy)


def host_state() -> tuple[object, ...]:
    """State of Python's and NumPy's generators, to be compared: a forward that reads them leaves another one."""
    name, keys, *rest = np.random.get_state()
    return random.getstate(), name, bytes(np.asarray(keys)), *rest


@contextmanager
def _modes(model: nn.Module) -> Iterator[None]:
    modes = [(module, module.training) for module in model.modules()]
    try:
        yield
    finally:
        for module, training in modes:
            if module.training != training:
                module.training = training


@contextmanager
def _tensors(model: nn.Module, parameters: bool) -> Iterator[None]:
    """Values of buffers: counters, moving averages, the power iteration of a spectral norm; and of plain attributes.

    A write through ``.data`` leaves no trace on a parameter but its values.
    """
    plain = [value for module in model.modules() for value in vars(module).values() if type(value) is Tensor]
    trained = list(model.parameters()) if parameters else []
    own = [tensor for tensor in (*model.buffers(), *plain) if not tensor.is_meta and not is_lazy(tensor)]
    before = [(buffer, buffer.detach().clone(), _version(buffer)) for buffer in own]
    before += [(p, p.detach().to("cpu", copy=True), _version(p)) for p in trained if not p.is_meta and not is_lazy(p)]
    try:
        yield
    finally:
        with torch.no_grad():
            for buffer, value, version in before:
                if _written(buffer, value, version):
                    buffer.copy_(value)


def _written(buffer: Tensor, value: Tensor, version: int) -> bool:
    """Whether a buffer's values changed; of layouts that nothing compares (sparse): whether it was written to."""
    plain = buffer.layout is torch.strided and not buffer.is_nested
    return not torch.equal(buffer.to(value.device), value) if plain else _version(buffer) != version


def _version(tensor: Tensor) -> int:
    """How often it was written to; tensors made in inference mode do not count."""
    return 0 if tensor.is_inference() else tensor._version


@contextmanager
def _attributes(model: nn.Module) -> Iterator[None]:
    """What a forward stores on its modules: under a tracer, tensors without values that would break the next run."""
    spaces = [(space, dict(space)) for module in model.modules() for space in _spaces(module)]
    lists = [(value, list(value)) for _, space in spaces for value in space.values() if type(value) is list]
    try:
        yield
    finally:
        for space, before in spaces:
            if space.keys() != before.keys() or any(space[key] is not before[key] for key in before):
                space.clear()
                space.update(before)
        for value, items in lists:
            if len(value) != len(items) or any(one is not other for one, other in zip(value, items, strict=True)):
                value[:] = items


def _spaces(module: nn.Module) -> list[dict[str, Any]]:
    """The module's attributes, its parameters, buffers and children, and dictionaries it keeps."""
    own = vars(module)
    plain = [value for name, value in own.items() if type(value) is dict and not name.startswith("_forward")]
    registered = [cast(dict[str, Any], s) for s in (module._parameters, module._buffers, module._modules)]
    return [own, *registered, *(one for one in plain if all(one is not other for other in registered))]


__all__ = ["host_state", "is_uninitialized", "untouched"]
