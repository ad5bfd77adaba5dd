"""What emission makes: a GraphModule that keeps through copies and files what GraphModule forgets."""

from __future__ import annotations

import warnings
from abc import ABC, abstractmethod
from collections import defaultdict
from typing import Any, NamedTuple

from torch import fx, nn

NAMES = "kgraph_names"
"""Key under which ``meta`` keeps the names of nodes that are others than in the flat graph: flat name -> own."""

FOLD = "kgraph_fold"
"""Key under which ``meta`` keeps what folding did."""


class Bound(ABC):
    """A record that can speak about the module that carries it."""

    @abstractmethod
    def _of(self, module: EmittedModule) -> Bound:
        """The same record, knowing its module."""


class EmittedModule(fx.GraphModule):
    """The standard module kgraph emits: a GraphModule over the user's submodules.

    ``module.kgraph`` is what the transform recorded (None for a plain emission).
    """

    @property
    def kgraph(self) -> Any:
        record = self.meta.get("kgraph")
        return record._of(self) if isinstance(record, Bound) else record

    @property
    def fold_report(self) -> Any:
        """What `kgraph.fold` folded and what it kept; None for a module that was not folded."""
        return self.meta.get(FOLD)

    def __reduce__(self) -> Any:
        rebuild, arguments = super().__reduce__()
        return _revive, (rebuild, arguments, dict(self.meta), Layout.of(self), type(self).__name__)

    def __copy__(self) -> EmittedModule:
        return _dressed(super().__copy__(), self.meta, Layout.of(self), type(self).__name__)

    def __deepcopy__(self, memo: dict[int, Any]) -> EmittedModule:
        with warnings.catch_warnings():  # PyTorch warns about its own pytree leaves
            warnings.filterwarnings("ignore", ".*LeafSpec.*", FutureWarning)
            plain = super().__deepcopy__(memo)
        return _dressed(plain, plain.meta, Layout.of(self), type(self).__name__)


class EmittedTracer(fx.Tracer):
    """Reads the code again when a module is loaded; buffers stay what they are, not values of that moment."""

    proxy_buffer_attributes = True


class Layout(NamedTuple):
    """What GraphModule forgets when it is built from another module.

    Attributes:
        transient: names of non-persistent buffers.
        tied: groups of names that share one parameter.
        evaluated: names of modules in eval mode.
        order: names of modules, then parameters, then buffers, each in the order of registration. A GraphModule
            registers them as its graph reads them, but averages and optimizer states go by the order of parameters.
        nodes: names of the graph's nodes: code that is read again numbers them anew.
    """

    transient: tuple[str, ...]
    tied: tuple[tuple[str, ...], ...]
    evaluated: tuple[str, ...]
    order: tuple[str, ...] = ()
    nodes: tuple[str, ...] = ()

    @classmethod
    def of(cls, module: nn.Module) -> Layout:
        persistent = set(module.state_dict(keep_vars=True))
        buffers = dict(module.named_buffers(remove_duplicate=False))
        parameters = dict(module.named_parameters(remove_duplicate=False))
        groups: dict[int, list[str]] = defaultdict(list)
        for name, parameter in parameters.items():
            groups[id(parameter)].append(name)
        tied = tuple(tuple(names) for names in groups.values() if len(names) > 1)
        modules = dict(module.named_modules(remove_duplicate=False))
        evaluated = tuple(name for name, one in modules.items() if not one.training)
        transient = tuple(name for name in buffers if name not in persistent)
        nodes = tuple(node.name for node in module.graph.nodes) if isinstance(module, EmittedModule) else ()
        return cls(transient, tied, evaluated, (*modules, *parameters, *buffers), nodes)

    def apply(self, module: nn.Module) -> None:
        buffers = dict(module.named_buffers(remove_duplicate=False))
        for name in filter(buffers.__contains__, self.transient):
            owner, _, field = name.rpartition(".")
            module.get_submodule(owner)._non_persistent_buffers_set.add(field)
        parameters = dict(module.named_parameters(remove_duplicate=False))
        for names in self.tied:
            present = [name for name in names if name in parameters]
            for name in names if present else ():
                if name not in parameters:
                    _register(module, name, parameters[present[0]])
        self._sort(module)
        for name, one in module.named_modules(remove_duplicate=False):
            one.training = name not in self.evaluated

    def _sort(self, module: nn.Module) -> None:
        """Members of every module in the order of registration; those that were made since come last."""
        rank = {name: place for place, name in enumerate(self.order)}
        last = len(rank)
        for path, one in list(module.named_modules(remove_duplicate=False)):
            prefix = f"{path}." if path else ""
            for members in (one._modules, one._parameters, one._buffers):
                ordered = sorted(members, key=lambda name: rank.get(prefix + name, last))
                if ordered != list(members):
                    held = {name: members.pop(name) for name in ordered}
                    members.update(held)  # pyright: ignore[reportArgumentType, reportCallIssue]


def _register(module: nn.Module, name: str, parameter: nn.Parameter) -> None:
    path, _, field = name.rpartition(".")
    for part in filter(None, path.split(".")):
        if part not in dict(module.named_children()):
            module.add_module(part, nn.Module())
        module = module.get_submodule(part)
    module.register_parameter(field, parameter)


def _revive(rebuild: Any, arguments: tuple[Any, ...], meta: dict[str, Any], layout: Layout, name: str) -> EmittedModule:
    return _dressed(rebuild(*arguments), meta, layout, name)


def _dressed(plain: fx.GraphModule, meta: dict[str, Any], layout: Layout, name: str) -> EmittedModule:
    module = EmittedModule(plain, plain.graph, name)
    layout.apply(module)
    module.meta.update(meta)
    found = [node.name for node in module.graph.nodes]
    if len(found) == len(layout.nodes) and found != list(layout.nodes):
        renamed = dict(zip(layout.nodes, found, strict=True))
        known = module.meta.get(NAMES, {})
        module.meta[NAMES] = renamed | {flat: renamed.get(name, name) for flat, name in known.items()}
    return module
