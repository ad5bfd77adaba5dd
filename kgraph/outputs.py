"""What a model returns, opened into what a graph can return, and closed again by the emitted module.

torch.export returns tensors, numbers, tuples, dicts and types registered with PyTorch. A dataclass is opened into a
dict of its fields. Anything else (the cache of a decoder) is no activation: None stands in its place.
"""

from __future__ import annotations

import copy
import functools
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, fields, is_dataclass
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.utils import _pytree as pytree

CLOSE = "_kgraph_output"
_PLAIN = (Tensor, bool, int, float, complex, str, type(None), torch.SymInt, torch.SymFloat, torch.SymBool)


@dataclass(frozen=True)
class Fields:
    """A dataclass that was opened: its class, and the form of every field."""

    kind: type
    forms: dict[str, Form]


@dataclass(frozen=True)
class Form:
    """How an output is put together.

    Attributes:
        spec: its structure, as PyTorch sees it.
        leaves: of every leaf of that structure the dataclass it was, or None.
        dropped: class names of the leaves that None stands for.
    """

    spec: pytree.TreeSpec
    leaves: tuple[Fields | None, ...]
    dropped: tuple[str, ...] = ()

    @property
    def plain(self) -> bool:
        """Whether opening changes nothing."""
        return not self.dropped and not self.has_fields

    @property
    def has_fields(self) -> bool:
        return any(leaf is not None for leaf in self.leaves)


def opened(output: Any) -> tuple[Any, Form]:
    """``output`` in plain structures, and how to put it together again."""
    leaves, spec = pytree.tree_flatten(output)
    values: list[Any] = []
    forms: list[Fields | None] = []
    dropped: list[str] = []
    for leaf in leaves:
        own = None
        if is_dataclass(leaf) and not isinstance(leaf, type):
            parts = {field.name: opened(getattr(leaf, field.name)) for field in fields(leaf)}
            own = Fields(type(leaf), {name: form for name, (_, form) in parts.items()})
            dropped += [name for form in own.forms.values() for name in form.dropped]
            leaf = {name: value for name, (value, _) in parts.items()}
        elif not isinstance(leaf, _PLAIN):
            dropped.append(type(leaf).__name__)
            leaf = None
        values.append(leaf)
        forms.append(own)
    return pytree.tree_unflatten(values, spec), Form(spec, tuple(forms), tuple(dropped))


def closed(value: Any, form: Form) -> Any:
    """The inverse of `opened`, with None for what was dropped."""
    pieces = form.spec.flatten_up_to(value)
    leaves = [
        piece if own is None else _made(own, {name: closed(piece[name], sub) for name, sub in own.forms.items()})
        for piece, own in zip(pieces, form.leaves, strict=True)
    ]
    return pytree.tree_unflatten(leaves, form.spec)


def _made(own: Fields, values: dict[str, Any]) -> Any:
    given = {field.name for field in fields(own.kind) if field.init}
    made = own.kind(**{name: value for name, value in values.items() if name in given})
    for name in values.keys() - given:
        object.__setattr__(made, name, values[name])
    return made


def leaves_of(output: Any) -> list[Any]:
    """The plain leaves of an output, opened."""
    return pytree.tree_leaves(opened(output)[0])


@contextmanager
def opening(model: nn.Module, form: Form) -> Iterator[None]:
    """While this lasts, ``model`` returns its output opened; nothing is touched where that is what it does anyway."""
    if form.plain:
        yield
        return
    forward, had_own = model.forward, "forward" in vars(model)

    @functools.wraps(forward)
    def plain(*args: Any, **kwargs: Any) -> Any:
        return opened(forward(*args, **kwargs))[0]

    model.forward = plain
    try:
        yield
    finally:
        if had_own:
            model.forward = forward
        else:
            del model.forward


class Closing(nn.Module):
    """Last node of an emitted module whose model returns dataclasses: makes one of the graph's outputs."""

    def __init__(self, spec: pytree.TreeSpec, form: Form) -> None:
        super().__init__()
        self.spec, self.form = spec, form

    def forward(self, *leaves: Any) -> Any:
        return closed(pytree.tree_unflatten(leaves, self.spec), self.form)


def close_outputs(module: fx.GraphModule, form: Form) -> None:
    """Let ``module``, whose graph returns the opened output, return the output as it was."""
    if not form.has_fields:
        return
    graph: Any = module.graph
    graph._codegen = copy.copy(graph._codegen)  # shared with the captured graph
    info = graph._codegen.pytree_info
    output = next(iter(reversed(graph.nodes)))
    module.add_submodule(CLOSE, Closing(info.out_spec, form))
    with graph.inserting_before(output):
        made = graph.call_module(CLOSE, tuple(output.args[0]))
    output.args = ((made,),)
    graph._codegen.pytree_info = info._replace(out_spec=pytree.treespec_leaf())
    module.recompile()


@contextmanager
def without_cache(model: nn.Module) -> Iterator[bool]:
    """While this lasts, no config of ``model``'s modules asks for a cache; yields whether one did."""
    found = {id(config): config for one in model.modules() if (config := vars(one).get("config")) is not None}
    asking = [config for config in found.values() if getattr(config, "use_cache", False) is True]
    for config in asking:
        config.use_cache = False
    try:
        yield bool(asking)
    finally:
        for config in asking:
            config.use_cache = True
