"""Gradients that are not those of a captured graph: stopped on their way (``detach``, ``no_grad``,
``inference_mode``), or written by hand (the ``backward`` of an ``autograd.Function``)."""

from __future__ import annotations

import weakref
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.func import functional_call
from torch.overrides import TorchFunctionMode
from torch.utils import _pytree as pytree
from torch.utils.checkpoint import CheckpointFunction

from kgraph.canonical import aten
from kgraph.capture import Graph
from kgraph.errors import RuleError
from kgraph.gradient_stops import inference_as_no_grad
from kgraph.inputs import Inputs
from kgraph.rules.sampled import for_mode
from kgraph.untouched import untouched
from kgraph.written_buffers import writes, writes_buffer, written

_STOPS = {
    *(torch.detach, Tensor.detach, Tensor.detach_, Tensor.register_hook),
    torch._C._set_grad_enabled,
    Tensor.data.__get__,  # type: ignore[attr-defined]
}
NOISE = 1e-2
"""Relative difference of two gradients: far over float32 rounding, far under what a stop takes away."""


class Watch(TorchFunctionMode):
    """Notes whether anything that stops or changes gradients is called."""

    seen = False

    def __torch_function__(self, func: Callable[..., Any], types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.seen |= func in _STOPS
        return func(*args, **(kwargs or {}))


def refuse_stops(graph: Graph, multipliers: Mapping[str, object]) -> None:
    """Raise if the model's gradients are not those of its graph, by parameters whose multiplier is not 0.

    Raises:
        RuleError: a parameter's gradient is stopped somewhere, or another one is written by hand: its part in the NTK
            is not what the graph says.
    """
    for name, why in _cached(graph).items():
        if multipliers.get(name, 1.0) != 0.0:
            what = f"the model {why.format(name)}, which kernels do not follow"
            raise RuleError(what, hint="kgraph.nngp leaves the NTK out, kgraph.empirical_ntk measures it")


def _cached(graph: Graph) -> dict[str, str]:
    if graph.module not in _unlike:
        _unlike[graph.module] = _differing(graph)
    return _unlike[graph.module]


_unlike: weakref.WeakKeyDictionary[nn.Module, dict[str, str]] = weakref.WeakKeyDictionary()
"""What was found of every graph, by its module."""
_STOPPED = "stops gradients on the way to {!r} (detach, no_grad or inference_mode)"
_BY_HAND = "has a backward written by hand (an autograd.Function) on the way to {!r}"


def _differing(graph: Graph) -> dict[str, str]:
    """Names of the parameters whose gradient is not that of the graph, and why."""
    model, inputs = graph.root, graph.inputs
    if any(p.is_meta for p in model.parameters()):
        return {}
    state = state_of(model)
    with evaluated(model), torch.enable_grad():
        with Watch() as watch:
            output = _output(model, state, inputs)
        by_hand = output is not None and bool(written_by_hand(output))
        if output is None or not (watch.seen or by_hand):
            return {}
        own, told = _gradients(model, inputs), _gradients(model, inputs, graph)
    why = _BY_HAND if by_hand else _STOPPED
    found = {}
    for name, mine in own.items():
        said = told.get(name, mine)  # a tied parameter may go by another name
        if float((mine - said).norm()) > NOISE * max(float(mine.norm()), float(said.norm())):
            found[name] = why
    return found


def written_by_hand(output: Tensor) -> Counter[type]:
    """The ``autograd.Function`` s between an output and what it is computed from, as often as they are called."""
    queue, seen, found = [output.grad_fn], {None, output.grad_fn}, Counter[type]()
    for at in queue:
        if isinstance(at, torch.autograd.function.BackwardCFunction) and not _is_checkpoint(type(at)):
            found[type(at)] += 1
        new = {before for before, _ in at.next_functions} - seen if at is not None else set()
        seen |= new
        queue += new
    return found


def _is_checkpoint(backward: type) -> bool:
    return getattr(backward, "_forward_cls", None) is CheckpointFunction


def not_followed(graph: Graph) -> tuple[dict[str, str], str]:
    """Names of the parameters whose gradient is not that of the graph, and what stands before each; what to say."""
    found = _cached(graph)
    if not found:
        return {}, ""
    by_hand = _BY_HAND in found.values()
    what = (
        "a backward written by hand stands"
        if by_hand
        else "a stop of gradients (detach, no_grad or inference_mode) stands"
    )
    return found, f"no NTK: {what} before {', '.join(list(found)[:3])} (kgraph.empirical_ntk)"


@contextmanager
def evaluated(model: nn.Module) -> Iterator[None]:
    """The model in eval mode, where both forwards draw no random numbers; all that a run advances is put back."""
    with untouched(model), inference_as_no_grad():
        model.eval()
        yield


def state_of(model: nn.Module) -> dict[str, Tensor]:
    """Copies of parameters (to be differentiated by, and parameters still: a forward may ask) and buffers."""
    own = model.named_parameters()
    copies = {name: nn.Parameter(p.detach().clone(), requires_grad=p.is_floating_point()) for name, p in own}
    return {**copies, **{name: b.detach().clone() for name, b in model.named_buffers()}}


def _output(model: nn.Module, state: dict[str, Tensor], inputs: Inputs, graph: Graph | None = None) -> Tensor | None:
    """A random sum of the output's entries, of the graph if one is given; None where it does not run this way."""
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(0)
        try:
            args, kwargs = pytree.tree_map_only(Tensor, Tensor.clone, tuple(inputs))  # a forward may write to them
            if graph is None:
                output = functional_call(model, state, args, kwargs)
            else:
                leaves = pytree.tree_leaves((args, kwargs))
                output = _Operations(graph.module, state).run(*leaves, enable_io_processing=False)
            return random_sum(pytree.tree_leaves(output))
        except RuntimeError:
            return None


class _Operations(fx.Interpreter):
    """The graph operation by operation, in eval mode: whatever a module of the user's would do backwards."""

    def __init__(self, module: fx.GraphModule, state: dict[str, Tensor]) -> None:
        super().__init__(module, garbage_collect_values=True)
        self.state = state

    def fetch_attr(self, target: str) -> Any:
        return self.state[target] if target in self.state else super().fetch_attr(target)

    def run_node(self, n: fx.Node) -> Any:
        if n.op != "call_function":
            return super().run_node(n)
        args, kwargs = self.fetch_args_kwargs_from_env(n)
        if writes_buffer(n):
            return written(n, tuple(args), kwargs, self.env)
        if writes(n) or n.target is aten.detach.default:  # which rules take for a copy
            return args[0]
        args = for_mode(n, tuple(args), "eval")
        if n.target is aten.batch_norm.default:
            args = (*args[:5], args[3] is None, *args[6:])
        return self.call_function(n.target, args, kwargs)  # type: ignore[arg-type]


def _gradients(model: nn.Module, inputs: Inputs, graph: Graph | None = None) -> dict[str, Tensor]:
    """Gradient of that sum by every parameter; nothing where there is none."""
    state = state_of(model)
    total = _output(model, state, inputs, graph)
    wanted = {name: state[name] for name, _ in model.named_parameters() if state[name].requires_grad}
    if total is None or not wanted:
        return {}
    return differentiated(total, wanted)


def differentiated(total: Tensor, wanted: dict[str, Tensor]) -> dict[str, Tensor]:
    """Gradients of a sum; nothing where autograd refuses (reentrant checkpoints, which run the forward once more)."""
    if not total.requires_grad:
        return {name: torch.zeros_like(p) for name, p in wanted.items()}
    try:
        found = torch.autograd.grad(total, list(wanted.values()), materialize_grads=True)
    except RuntimeError:
        return {}
    return dict(zip(wanted, found, strict=True))


def random_sum(outputs: Iterable[Any]) -> Tensor:
    generator = torch.Generator().manual_seed(1)
    total = torch.zeros(())
    for x in outputs:
        if isinstance(x, Tensor) and x.is_floating_point():
            total = total + (x * torch.randn(x.shape, generator=generator, dtype=x.dtype).to(x.device)).sum()
    return total
