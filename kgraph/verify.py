"""Verification: does the module that a captured graph stands for compute what the model computes?"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.module import register_module_forward_hook
from torch.utils import _pytree as pytree

from kgraph.inputs import Inputs, batch_size
from kgraph.outputs import leaves_of
from kgraph.untouched import untouched

Layers = list[tuple[int, float]]
"""Identity of every called module with the mean size of what it returned."""


def reproduces(emitted: nn.Module, model: nn.Module, inputs: Inputs) -> bool:
    """Whether ``emitted`` gives the model's output in eval mode (True on the meta device, where nothing can be run).

    Both are left in eval mode.
    """
    if any(parameter.is_meta for parameter in model.parameters()):
        return True
    _set_mode(False, emitted, model)
    return _alike(emitted, model, inputs)


def reproduces_everywhere(emitted: nn.Module, model: nn.Module, inputs: Inputs) -> bool:
    """The same at two other batch sizes, and in train mode at every module that both call.

    The output of a very deep chain hardly depends on its first layers, so it alone would prove little.
    """
    size = batch_size(inputs)
    try:
        _set_mode(True, emitted, model)
        if not _trains_alike(emitted, model, inputs):
            return False
        _set_mode(False, emitted, model)
        return all(_alike(emitted, model, _resized(inputs, size, other)) for other in (1, size + 1))
    except Exception:  # a model that runs at one batch size only, or whose buffers cannot be put back
        return False


def another_batch(emitted: nn.Module, model: nn.Module, inputs: Inputs) -> int | None:
    """A number of inputs of which both run in eval mode, to other outputs: the forward asks how many there are."""
    size = batch_size(inputs)
    if any(parameter.is_meta for parameter in model.parameters()):
        return None
    _set_mode(False, emitted, model)
    for other in (1, size + 1):
        resized = _resized(inputs, size, other)
        try:
            with torch.no_grad():
                expected, actual = (seeded_run(module, resized) for module in (model, emitted))
        except Exception:  # a model of one batch size: whoever calls it with another is told
            continue
        if not _same(actual, expected):
            return other
    return None


def _set_mode(training: bool, *modules: nn.Module) -> None:
    for module in modules:
        module.train(training)


def _alike(emitted: nn.Module, model: nn.Module, inputs: Inputs) -> bool:
    """Whether both give one output from one seed: a forward may draw noise in eval mode too."""
    with torch.no_grad():
        expected = seeded_run(model, inputs)
        try:
            actual = seeded_run(emitted, inputs)
        except Exception:  # a graph that does not run is a mismatch
            return False
    return _same(actual, expected)


def seeded_run(module: nn.Module, inputs: Inputs) -> list[Tensor]:
    """Outputs of a run from a set seed; buffers are put back, written to or assigned: the next run starts alike."""
    with untouched(module):
        torch.manual_seed(0)
        return [tensor.clone() for tensor in _run(module, inputs)]


def _trains_alike(emitted: nn.Module, model: nn.Module, inputs: Inputs) -> bool:
    expected, layers = _training_run(model, inputs)
    actual, own_layers = _training_run(emitted, inputs)
    both = {module for module, _ in own_layers} & {module for module, _ in layers}
    layers, own_layers = ([layer for layer in one if layer[0] in both] for one in (layers, own_layers))
    alike = [a[0] for a in layers] == [a[0] for a in own_layers]
    return alike and _same(actual, expected) and _close(_sizes(own_layers), _sizes(layers))


def _sizes(layers: Layers) -> Tensor:
    return torch.tensor([size for _, size in layers], dtype=torch.float64)


def _training_run(module: nn.Module, inputs: Inputs) -> tuple[list[Tensor], Layers]:
    """Outputs and layers of a run in train mode from a set seed; running statistics are put back."""
    layers: Layers = []

    def note(called: nn.Module, _: Any, output: Any) -> None:
        if isinstance(output, Tensor) and output.is_floating_point() and called is not module:
            layers.append((id(called), float(output.double().abs().mean())))

    hook = register_module_forward_hook(note)
    try:
        with torch.no_grad():
            return seeded_run(module, inputs), layers
    finally:
        hook.remove()


def _resized(inputs: Inputs, size: int, other: int) -> Inputs:
    def resize(value: Any) -> Any:
        batched = isinstance(value, Tensor) and value.ndim > 0 and value.shape[0] == size
        return torch.cat([value] * (other // size + 1))[:other] if batched else value

    return Inputs(*pytree.tree_map(resize, tuple(inputs)))


def _run(module: nn.Module, inputs: Inputs) -> list[Tensor]:
    """Output tensors; the module gets copies, for it may write to its inputs."""
    args, kwargs = pytree.tree_map_only(Tensor, Tensor.clone, tuple(inputs))
    return [leaf for leaf in leaves_of(module(*args, **kwargs)) if isinstance(leaf, Tensor)]


def _same(actual: list[Tensor], expected: list[Tensor]) -> bool:
    return len(expected) == len(actual) and all(map(_close, actual, expected))


def _close(actual: Tensor, expected: Tensor) -> bool:
    """Equal up to rounding; a value that overflows must overflow alike."""
    if actual.shape != expected.shape:
        return False
    if expected.is_complex():
        return actual.is_complex() and _close(torch.view_as_real(actual), torch.view_as_real(expected))
    if not expected.is_floating_point():
        return bool(torch.equal(actual, expected))
    finite = expected.nan_to_num(0.0, 0.0, 0.0)
    scale = float(finite.abs().max().clamp(min=1e-6)) if expected.numel() else 1.0
    rounding = max(1e-4, 8 * torch.finfo(expected.dtype).eps)  # half precision rounds at every operation
    return bool(torch.allclose(actual, expected, rtol=rounding, atol=rounding * scale, equal_nan=True))
