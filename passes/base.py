"""What a pass is: options as fields, a rewrite of the graph, and a promise that is checked afterwards."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, fx, nn

from kgraph.analysis import Change, Ledger
from kgraph.capture import Graph
from kgraph.checks import callback, choice, seeded
from kgraph.errors import InputError, PassError
from kgraph.kernel import Kernel
from kgraph.modules import Scale, ShapedActivation, WeightedSum
from kgraph.nonlinear import Region, find_regions
from kgraph.propagate import Propagation, propagate
from kgraph.site import Site, site_of
from kgraph.weight_laws import Law


@dataclass
class Workspace:
    """The graph under rewriting, its current analysis, and the ledger.

    Attributes:
        graph: captured model; its root and parameters belong to the result.
        mode: "train" or "eval", for the analyses between passes.
        seed: of everything random.
        first: kernels of the graph before any pass (in any mode); computed when not given.
        settled: parameters to which a pass gave what it wants them to be, whatever they were.
        laws: how those can be drawn again.
        shaped: what `ShapeActivations` made its calls of, for other constants.
    """

    graph: Graph
    mode: str = "train"
    seed: int = 0
    first: Propagation | None = None
    changes: list[Change] = field(default_factory=list)
    kept: list[Change] = field(default_factory=list)
    unmet: list[str] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    settled: set[str] = field(default_factory=set)
    laws: dict[str, Law] = field(default_factory=dict)
    shaped: dict[fx.Node, Any] = field(default_factory=dict)
    adopted: bool = field(default=False, init=False)
    _propagation: Propagation | None = None
    _random: dict[fx.Node, bool] = field(default_factory=dict)
    _regions: list[Region] | None = None
    _names: dict[tuple[str, bool], int] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if not isinstance(self.graph, Graph):
            raise InputError(
                f"graph is a {type(self.graph).__name__}", hint="Pass what kgraph.capture.capture returned"
            )
        choice("mode", self.mode, ("train", "eval"))
        seeded(self.seed)

    @property
    def nodes(self) -> list[fx.Node]:
        """Nodes in order (a copy: passes insert and erase)."""
        return list(self.graph.module.graph.nodes)

    @property
    def generator(self) -> torch.Generator:
        """A fresh generator of the workspace's seed."""
        return torch.Generator().manual_seed(self.seed)

    def propagation(self) -> Propagation:
        """Kernels of the graph as it is now; computed once after every change."""
        if self._propagation is None:
            self._propagation = propagate(self.graph, mode=self.mode)
            self.first = self.first or self._propagation
        return self._propagation

    def adopt(self, propagation: Propagation) -> None:
        """Take over a pass's own walk: it changed nothing, so these are the kernels of the graph as it leaves it."""
        self._propagation, self.adopted = propagation, True

    def regions(self) -> list[Region]:
        """Nonlinear regions of the graph as it was after the last pass; found once after every change."""
        if self._regions is None:
            self._regions = find_regions(self.graph.module, self.is_random)
        return self._regions

    def kernels(self) -> dict[fx.Node, Kernel]:
        return self.propagation().kernels()

    def before(self) -> Propagation:
        """Kernels of the graph before any pass."""
        return self.first or self.propagation()

    def is_random(self, node: object) -> bool:
        """Whether a node's value is a random tensor. No pass changes that, so it needs no new analysis."""
        if not isinstance(node, fx.Node) or node.op == "output":
            return False
        values = self.before().values
        if node in values:
            return isinstance(values[node], Kernel)
        if node not in self._random:  # made by a pass: random if it reads anything random
            self._random[node] = any(self.is_random(n) for n in node.all_input_nodes)
        return self._random[node]

    def carries_random(self, node: fx.Node) -> bool:
        """The same, counting tuples of random tensors."""
        value = self.before().values.get(node)
        if isinstance(value, (list, tuple)):
            return any(isinstance(v, Kernel) for v in value)
        return self.is_random(node)

    def touch(self) -> None:
        """The graph changed: forget its analysis."""
        self._propagation = self._regions = None

    def record(self, node: fx.Node, what: str, why: str, before: str = "", after: str = "") -> None:
        """Note a change without forgetting the analysis (the pass goes on reading it; `Pass.run` forgets it)."""
        self.changes.append(Change(_label(node), what, why, before, after))

    def keep(self, node: fx.Node, what: str, why: str) -> None:
        self.kept.append(Change(_label(node), what, why, "", ""))

    def ledger(self, method: str) -> Ledger:
        return Ledger(method, tuple(self.changes), tuple(self.kept), tuple(self.unmet), tuple(self.notes))

    def tensor(self, node: fx.Node) -> Tensor:
        """The tensor behind a ``get_attr`` node."""
        value: object = self.graph.module
        for part in str(node.target).split("."):
            value = getattr(value, part)
        assert isinstance(value, Tensor)
        return value

    def module(self, node: fx.Node) -> nn.Module | None:
        """The module a node calls, or None."""
        return self.graph.module.get_submodule(str(node.target)) if node.op == "call_module" else None

    def add_module(self, path: str, module: nn.Module, *, instead: bool = False) -> str:
        """Attach a module to the root and to the graph under a free name near ``path``.

        Args:
            instead: the user's own module at ``path``, which the graph no longer calls, may be replaced.
        """
        name = self._free_name(path, instead)
        module.train(self.graph.root.training)
        for owner in (self.graph.root, self.graph.module):
            _attach(owner, name, module)
        return name

    def _free_name(self, path: str, instead: bool) -> str:
        """``path``, or the first of ``path_1``, ``path_2``, ... that is free; a name once taken stays taken."""
        index = self._names.get((path, instead), 0)
        name = f"{path}_{index}" if index else path
        while _taken(self.graph.module, name) or (not instead and _taken(self.graph.root, name)):
            index += 1
            name = f"{path}_{index}"
        self._names[path, instead] = index
        return name

    def replace_module(self, path: str, module: nn.Module) -> None:
        """Put another module in the place of one a pass attached."""
        for owner in (self.graph.root, self.graph.module):
            _attach(owner, path, module)

    def add_parameter(self, path: str, parameter: nn.Parameter) -> None:
        """Register a parameter under its full name on the root and on the graph."""
        for owner in (self.graph.root, self.graph.module):
            holder, _, name = path.rpartition(".")
            _container(owner, holder).register_parameter(name, parameter)

    def call_after(self, node: fx.Node, module: nn.Module, name: str) -> fx.Node:
        """Insert a call of ``module`` between ``node`` and its readers."""
        path = self.add_module(name, module)
        graph = self.graph.module.graph
        with graph.inserting_after(node):
            call = graph.call_module(path, (node,))
        call.meta = made_here(node)
        node.replace_all_uses_with(call, delete_user_cb=lambda user: user is not call)
        return call

    def scale_after(self, node: fx.Node, module: Scale) -> fx.Node:
        """Insert ``factor * (v + shift)`` between ``node`` and its readers."""
        return self.call_after(node, module, f"{owner_path(self, node)}scale")


def owner_path(work: Workspace, node: fx.Node) -> str:
    """Prefix under which a helper of ``node`` belongs: "" or "layer1.0." (never inside a leaf module)."""
    site = site_of(node)
    module = find_module(work.graph.root, site.path)
    container = module is not None and next(module.children(), None) is not None and type(module) not in _OURS
    path = site.path if container or not site.ancestors else site.ancestors[-1]
    return f"{path}." if path else ""


_OURS = (Scale, ShapedActivation, WeightedSum)


def find_module(root: nn.Module, path: str) -> nn.Module | None:
    """The submodule at ``path``, or None."""
    module: nn.Module | None = root
    for part in filter(None, path.split(".")):
        module = module._modules.get(part) if module is not None else None
    return module


def _taken(root: nn.Module, path: str) -> bool:
    """Whether a module, parameter, buffer or plain attribute has this name."""
    holder, _, name = path.rpartition(".")
    owner = find_module(root, holder)
    if owner is None:
        return False
    own = (owner._modules, owner._parameters, owner._buffers, owner.__dict__)  # dir() would list all children
    return any(name in names for names in own) or hasattr(type(owner), name)


def _label(node: fx.Node) -> str:
    path = str(node.target) if node.op == "call_module" else site_of(node).path
    return f"{path} ({node.name})" if path and path != node.name else node.name


def made_here(node: fx.Node) -> dict[str, object]:
    """Metadata for a node a pass makes: the place and shape of its neighbour, but no module call to lift."""
    site = site_of(node)
    return {
        "val": node.meta.get("val"),
        "site": Site(site.path, site.call, site.ancestors, site.source, site.shape),
    }


def _container(owner: nn.Module, path: str) -> nn.Module:
    for part in filter(None, path.split(".")):
        if part not in owner._modules:
            owner.add_module(part, nn.Module())
        owner = owner.get_submodule(part)
    return owner


def _attach(owner: nn.Module, path: str, module: nn.Module) -> None:
    holder, _, name = path.rpartition(".")
    _container(owner, holder).add_module(name, module)


@dataclass(frozen=True)
class Pass(ABC):
    """A rewrite of the graph. Subclasses are frozen dataclasses; their fields are the options."""

    @property
    def name(self) -> str:
        return type(self).__name__

    @abstractmethod
    def rewrite(self, work: Workspace) -> None:
        """Change ``work.graph`` and record every change, and what was kept and why."""

    def broken(self, work: Workspace) -> str:
        """What the pass promised and did not keep, or ""."""
        return ""

    def run(self, work: Workspace) -> None:
        """Rewrite, clean up, lint, and check the promise; then make the graph's code anew.

        Raises:
            PassError: the graph is malformed or the promise broken; names the pass.
        """
        self.apply(work)
        work.graph.module.recompile()

    def apply(self, work: Workspace) -> None:
        """`run`, but for the graph's code, which no analysis reads: once for all passes of a pipeline is enough."""
        work.adopted = False
        self.rewrite(work)
        if not work.adopted:
            work.touch()
        self._clean(work)
        broken = self.broken(work)
        if broken:
            raise PassError(f"{self.name} broke its promise: {broken}", hint="Report this model")

    def _clean(self, work: Workspace) -> None:
        try:
            work.graph.module.graph.lint()
            tidy(work.graph)
        except RuntimeError as error:
            raise PassError(f"{self.name} left a malformed graph: {error}") from error


@dataclass(frozen=True)
class Pipeline(Pass):
    """Passes in order, itself a pass."""

    passes: tuple[Pass, ...] = ()
    progress: Callable[[str], None] | None = None

    def __post_init__(self) -> None:
        callback("progress", self.progress)
        if not isinstance(self.passes, tuple | list) or not all(isinstance(step, Pass) for step in self.passes):
            raise InputError(f"passes is {self.passes!r}", hint="Pass a tuple of passes such as RemoveNorms()")

    def rewrite(self, work: Workspace) -> None:
        for step in self.passes:
            if self.progress is not None:
                self.progress(step.name)
            step.apply(work)

    def apply(self, work: Workspace) -> None:
        """Every step checks itself."""
        self.rewrite(work)

    def __str__(self) -> str:
        return "\n".join(f"{i + 1}. {step}" for i, step in enumerate(self.passes))


def tidy(graph: Graph) -> None:
    """Drop what nobody reads any more."""
    from kgraph.canonical import is_effect

    graph.module.graph.eliminate_dead_code(is_impure_node=is_effect)
