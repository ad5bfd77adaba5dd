"""One run of the model before it is captured: that it runs at all, what it calls and how, what it returns."""

from __future__ import annotations

import inspect
from contextlib import ExitStack
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.module import register_module_forward_pre_hook
from torch.nn.parameter import is_lazy
from torch.utils import _pytree as pytree

from kgraph.errors import CaptureError, InputError
from kgraph.failures import failed
from kgraph.inputs import Inputs
from kgraph.outputs import Form, opened
from kgraph.watched import drawn_elsewhere, failed_derivative, failed_operator, not_held

REPEATED = 8
"""Tracing pays where calls repeat: a new kind of call costs 10 ms, one more of the same kind half a millisecond."""


class Census:
    """What a forward calls, and what it returns.

    Attributes:
        calls: number of module calls.
        kinds: kinds of calls: class, shapes of inputs and parameters.
        form: of the output.
    """

    form: Form

    def __init__(self) -> None:
        self.calls, self.kinds = 0, set[object]()
        self._bound: set[int] = set()

    def note(self, module: nn.Module, inputs: tuple[object, ...]) -> None:
        own = tuple(p.shape for p in module._parameters.values() if p is not None and not is_lazy(p))
        self.kinds.add((type(module), tuple(v.shape for v in inputs if isinstance(v, Tensor)), own))
        self.calls += 1

    def note_binding(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        if not _is_bare(module, args, kwargs):
            self._bound.add(id(module))

    def pays(self, deep: int) -> bool:
        """Whether symbolic tracing is worth a try."""
        return self.calls >= max(deep, REPEATED * len(self.kinds))

    def bare(self, module: nn.Module) -> bool:
        """Whether every call of ``module`` was ``module(x)``, and none bound other arguments of its forward."""
        return id(module) not in self._bound


def _is_bare(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> bool:
    if len(args) == 1 and not kwargs:
        return True
    try:
        signature = inspect.signature(module.forward)
        bound = signature.bind(*args, **kwargs).arguments
    except (TypeError, ValueError):
        return False
    names = list(signature.parameters.values())
    if not names:  # a constant that follows the mode or the device, as an emitted module has them
        return False
    first, *others = names
    return first.name in bound and all(bound.get(p.name, p.default) is p.default for p in others)


def run_once(model: nn.Module, inputs: Inputs) -> Census:
    """Run ``model`` in eval mode, so that wrong inputs get a plain message.

    Raises:
        InputError: the forward does not take these inputs.
        CaptureError: it returns no tensor.
    """
    census = Census()
    args, kwargs = pytree.tree_map_only(Tensor, Tensor.clone, tuple(inputs))  # a forward may write to its inputs
    with torch.no_grad(), ExitStack() as hooks:
        hooks.callback(register_module_forward_pre_hook(census.note).remove)
        for module in model.modules():
            if next(module.children(), None) is None:
                hooks.callback(module.register_forward_pre_hook(census.note_binding, with_kwargs=True).remove)
        model.eval()
        try:
            output = model(*args, **kwargs)
        except Exception as error:  # whatever the user's forward raises on bad inputs
            known = failed_derivative(model, error) or failed_operator(model, error)
            raise (known or does_not_run(model, inputs, error)) from error
    values, census.form = opened(output)
    if not any(isinstance(value, Tensor) for value in pytree.tree_leaves(values)):
        what = ", ".join(dict.fromkeys(census.form.dropped)) or type(output).__name__
        raise CaptureError(
            f"{type(model).__name__} returns no tensor but {what}",
            hint="Return tensors, or tuples, dicts or dataclasses of tensors",
        )
    return census


def does_not_run(model: nn.Module, inputs: Inputs, error: Exception) -> InputError:
    """What to raise when ``model`` refused ``inputs`` with ``error``."""
    shapes = [tuple(v.shape) for v in pytree.tree_leaves(tuple(inputs)) if isinstance(v, Tensor)]
    return InputError(
        f"{type(model).__name__} does not run on the example inputs of shapes {shapes}: {failed(error)}",
        hint="Pass example_inputs that the model's forward accepts",
    )


def not_reproduced(model: nn.Module, inputs: Inputs) -> CaptureError:
    """The error of a graph that computes something else than its model, and why where that is found."""
    if (reason := not_held(model, inputs)) is not None:
        return reason
    what = "the captured graph does not reproduce the model's output"
    foreign = drawn_elsewhere(model, inputs)
    if foreign is None:
        return CaptureError(what, hint="A forward that depends on hidden state cannot be captured")
    whose, line = foreign
    return CaptureError(
        f"{what}: the forward draws {whose} numbers, which a graph has as constants",
        source=line or None,
        hint="Draw them with torch, as in torch.rand(())",
    )
