"""Gradients that a model stops on their way (``detach``, ``no_grad``): a captured graph does not show where."""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call
from torch.overrides import TorchFunctionMode
from torch.utils import _pytree as pytree

from kgraph.capture import Graph
from kgraph.errors import RuleError
from kgraph.inputs import Inputs

_STOPS = {torch.detach, Tensor.detach, Tensor.detach_, torch._C._set_grad_enabled, Tensor.data.__get__}  # type: ignore[attr-defined]
_NOISE = 1e-2
"""Relative difference of two gradients: far over float32 rounding, far under what a stop takes away."""


class _Watch(TorchFunctionMode):
    """Notes whether anything that stops gradients is called."""

    seen = False

    def __torch_function__(self, func: Callable[..., Any], types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.seen |= func in _STOPS
        return func(*args, **(kwargs or {}))


def refuse_stops(graph: Graph) -> None:
    """Raise if the model's gradients are not those of its graph.

    Raises:
        RuleError: a parameter's gradient is stopped somewhere: its part in the NTK is not what the graph says.
    """
    if graph.module not in _stopped:
        _stopped[graph.module] = _first_stopped(graph)
    if name := _stopped[graph.module]:
        what = f"the model stops gradients on the way to {name!r} (detach or no_grad), which kernels do not follow"
        raise RuleError(what, hint="kgraph.nngp leaves the NTK out, kgraph.empirical_ntk measures it")


_stopped: weakref.WeakKeyDictionary[nn.Module, str] = weakref.WeakKeyDictionary()
"""What was found of every graph, by its module."""


def _first_stopped(graph: Graph) -> str:
    """Name of a parameter whose gradient is not that of the graph, or ""."""
    model, inputs = graph.root, graph.inputs
    if any(p.is_meta for p in model.parameters()):
        return ""
    with _evaluated(model), torch.enable_grad():
        with _Watch() as watch:
            output = _output(model, {name: b.detach().clone() for name, b in model.named_buffers()}, inputs)
        if output is None or not watch.seen:
            return ""
        own, told = (_gradients(each, inputs) for each in (model, graph.emit().eval()))
    for name, mine in own.items():
        said = told.get(name, mine)  # a tied parameter may go by another name
        if float((mine - said).norm()) > _NOISE * max(float(mine.norm()), float(said.norm())):
            return name
    return ""


@contextmanager
def _evaluated(model: nn.Module) -> Iterator[None]:
    """The model in eval mode, where both forwards draw no random numbers; put back afterwards."""
    modes = [(module, module.training) for module in model.modules()]
    try:
        model.eval()
        yield
    finally:
        for module, training in modes:
            module.training = training


def _state(model: nn.Module) -> dict[str, Tensor]:
    """Copies of parameters (to be differentiated by) and buffers."""
    tensors = {name: p.detach().clone().requires_grad_(p.is_floating_point()) for name, p in model.named_parameters()}
    return {**tensors, **{name: b.detach().clone() for name, b in model.named_buffers()}}


def _output(model: nn.Module, state: dict[str, Tensor], inputs: Inputs) -> Tensor | None:
    """A random sum of the output's entries; None where the model does not run this way."""
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(0)
        try:
            return _random_sum(pytree.tree_leaves(functional_call(model, state, inputs.args, inputs.kwargs)))
        except RuntimeError:
            return None


def _gradients(model: nn.Module, inputs: Inputs) -> dict[str, Tensor]:
    """Gradient of that sum by every parameter; nothing where there is none."""
    state = _state(model)
    total = _output(model, state, inputs)
    wanted = {name: state[name] for name, _ in model.named_parameters() if state[name].requires_grad}
    if total is None or not wanted:
        return {}
    if not total.requires_grad:
        return {name: torch.zeros_like(p) for name, p in wanted.items()}
    return dict(zip(wanted, torch.autograd.grad(total, list(wanted.values()), materialize_grads=True), strict=True))


def _random_sum(outputs: Iterable[Any]) -> Tensor:
    generator = torch.Generator().manual_seed(1)
    total = torch.zeros(())
    for x in outputs:
        if isinstance(x, Tensor) and x.is_floating_point():
            total = total + (x * torch.randn(x.shape, generator=generator, dtype=x.dtype).to(x.device)).sum()
    return total
