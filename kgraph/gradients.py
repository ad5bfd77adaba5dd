"""Gradients of a transformed model beside those of the model as given: what a capture or a rewrite loses is named.

``detach`` and ``no_grad`` are kept (`kgraph.gradient_stops`). A backward written by hand stays as long as the module
that calls it does; a hook on a tensor is in no graph. One random sum of the outputs is differentiated by all parameters
and inputs, in eval mode, where both forwards draw no random numbers.
"""

from __future__ import annotations

import inspect
from collections import Counter
from collections.abc import Iterable
from contextlib import ExitStack, nullcontext
from dataclasses import dataclass, field
from pathlib import PurePath

import torch
from torch import Tensor, nn
from torch.func import functional_call
from torch.utils import _pytree as pytree

from kgraph.capture import Graph
from kgraph.gram.stops import (
    NOISE,
    Watch,
    differentiated,
    evaluated,
    not_followed,
    random_sum,
    state_of,
    written_by_hand,
)
from kgraph.inputs import Inputs
from kgraph.outputs import leaves_of, without_cache

_OTHER = "a hook on a tensor, a write through a detached one, or a stop in one mode only is not kept"


@dataclass(frozen=True)
class Gradients:
    """What a model does to its gradients that no graph of operations says.

    Attributes:
        inputs: that it was run on.
        no_ntk: why the NTK is not known, in words; "" where it is.
        by_hand: backwards written by hand that its modules still call, and that change gradients.
        lost: lines for the ledger: gradients that are not those of the captured graph.
    """

    inputs: Inputs
    no_ntk: str = ""
    by_hand: Counter[type] = field(default_factory=Counter)
    lost: tuple[str, ...] = ()

    def lost_by(self, shaped: nn.Module) -> tuple[str, ...]:
        """Lines for the backwards written by hand that ``shaped`` does not call any more."""
        if not self.by_hand:
            return ()
        with evaluated(shaped), torch.enable_grad():
            total = _total(shaped, state_of(shaped), self.inputs)
        left = self.by_hand - (written_by_hand(total) if total is not None else Counter())
        return (f"{_named(left)} not kept: what is built in its place is differentiated as it stands",) if left else ()


def read_gradients(graph: Graph) -> Gradients:
    """Compare a captured graph, as it would be emitted, with its model."""
    model, inputs = graph.root, graph.inputs
    if any(p.is_meta for p in model.parameters()):
        return Gradients(inputs)
    with evaluated(model), torch.enable_grad(), _without_cache(graph):
        with Watch() as watch:
            total = _total(model, state_of(model), inputs)
        by_hand = written_by_hand(total) if total is not None else Counter()
        if total is None or not (watch.seen or by_hand):
            return Gradients(inputs)
        own = _gradients(model, inputs)
    emitted = graph.emit()
    with evaluated(emitted), torch.enable_grad():
        told = _gradients(emitted, inputs)
    names, no_ntk = not_followed(graph)
    if other := _different(own, told):
        return Gradients(inputs, no_ntk, lost=(_line(other, own, told, by_hand),))
    return Gradients(inputs, no_ntk, by_hand if names else Counter())


def _without_cache(graph: Graph) -> ExitStack | nullcontext[None]:
    if not graph.left_out:
        return nullcontext()
    stack = ExitStack()
    stack.enter_context(without_cache(graph.root))
    return stack


def _total(module: nn.Module, state: dict[str, Tensor], inputs: Inputs) -> Tensor | None:
    """A random sum of the outputs' entries; None where the module does not run this way."""
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(0)
        try:
            given = pytree.tree_map_only(Tensor, Tensor.clone, tuple(inputs))  # a forward may write to them
            return random_sum(leaves_of(functional_call(module, state, *given)))
        except RuntimeError:
            return None


def _gradients(module: nn.Module, inputs: Inputs) -> dict[str, Tensor]:
    """Gradient of that sum by every parameter and every floating input."""
    state = state_of(module)
    leaves, structure = pytree.tree_flatten(tuple(inputs))
    leaves = [leaf.detach().clone() if isinstance(leaf, Tensor) else leaf for leaf in leaves]
    floating = [leaf.requires_grad_() for leaf in leaves if isinstance(leaf, Tensor) and leaf.is_floating_point()]
    total = _total(module, state, Inputs(*pytree.tree_unflatten(leaves, structure)))
    wanted = {name: state[name] for name, _ in module.named_parameters() if state[name].requires_grad}
    wanted |= {f"input {index}": leaf for index, leaf in enumerate(floating)}
    return differentiated(total, wanted) if total is not None else {}


def _different(own: dict[str, Tensor], told: dict[str, Tensor]) -> list[str]:
    pairs = [(name, mine, told[name]) for name, mine in own.items() if name in told]
    return [name for name, *both in pairs if _norm(both[0] - both[1]) > NOISE * max(map(_norm, both))]


def _norm(x: Tensor) -> float:
    return float(x.norm())


def _line(names: list[str], own: dict[str, Tensor], told: dict[str, Tensor], by_hand: Counter[type]) -> str:
    what = f"{_named(by_hand)} not kept" if by_hand else _OTHER
    first, more = names[0], f" and of {len(names) - 1} more" if len(names) > 1 else ""
    norms = f"norm {_norm(told[first]):.3g} where the model has {_norm(own[first]):.3g}"
    return f"{what}: the gradient of {first}{more} is not the model's ({norms}, as captured)"


def _named(classes: Iterable[type]) -> str:
    names = [_place(getattr(one, "_forward_cls", one)) for one in dict.fromkeys(classes)]
    return f"the backward of {', '.join(names[:3])}, written by hand, is"


def _place(cls: type) -> str:
    try:
        file, (_, line) = inspect.getsourcefile(cls), inspect.getsourcelines(cls)
    except (OSError, TypeError):  # a class made in an interpreter
        return cls.__name__
    return f"{cls.__name__} ({PurePath(file or '').name}:{line})"


__all__ = ["Gradients", "read_gradients"]
