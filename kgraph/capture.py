"""Capture: any PyTorch model as a flat torch.fx graph of canonical ATen operations.

The graph's parameters are the model's own tensors; every node knows its module call, source line and shape.
Front ends, in order: symbolic tracing for very deep models (see `kgraph.tracing`), kept only where the result is
verified; torch.export in train mode (so that ``training`` flags are visible and can be driven), strict export, then
eval mode with a note. The captured graph's eval output is checked against the model's.
"""

from __future__ import annotations

import gc
import inspect
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from typing import Literal

import torch
from torch import Tensor, fx, nn
from torch.export import UnflattenedModule
from torch.utils import _pytree as pytree

from kgraph.checks import with_finite_values
from kgraph.drop_path import BY_HAND
from kgraph.emitted import EmittedModule
from kgraph.errors import CaptureError, ModelError
from kgraph.first_run import Census, not_reproduced, run_once
from kgraph.inputs import RECORD, Inputs, batch_size, record_of, resolve_inputs
from kgraph.lift import emit
from kgraph.lowering import Untraceable
from kgraph.outputs import Form, close_outputs, opening, without_cache
from kgraph.torch_export import export_flat
from kgraph.tracing import trace
from kgraph.train_path import adopt_modes, adopt_noise, lost_in_eval, note_noise
from kgraph.untouched import host_state, untouched
from kgraph.verify import another_batch, reproduces, reproduces_everywhere

FrontEnd = Literal["auto", "trace", "export"]
DEEP = 300
"""Module calls from which on symbolic tracing is tried first: torch.export takes 3 to 15 ms for each."""


@dataclass
class Graph:
    """A captured model.

    Attributes:
        module: the flat graph; its parameters are those of ``root``.
        root: the module the parameters and submodules belong to.
        inputs: example ``(args, kwargs)`` that gave the shapes.
        notes: what a reader of a report should know about the capture.
        form: how the model's output is put together, where the graph returns it opened.
        left_out: what of the output an emitted module does not return, in words.
        lost: what the model does in train mode only and this graph does not; "" where it does all.
        path: what batch sizes take another path than this graph; "" where none is known to.
        training: whether the forward is that of train mode (its dropout and norms follow either mode).
    """

    module: fx.GraphModule
    root: nn.Module
    inputs: Inputs
    notes: list[str] = field(default_factory=list)
    form: Form | None = None
    left_out: tuple[str, ...] = ()
    lost: str = ""
    path: str = ""
    training: bool = True

    @property
    def name(self) -> str:
        return type(self.root).__name__

    def emit(self) -> EmittedModule:
        """The standard module this graph stands for."""
        module = emit(self.module, self.root)
        module.meta[RECORD] = record_of(self.inputs)
        if self.form is not None:
            close_outputs(module, self.form)
        return module


def check_model(model: object) -> nn.Module:
    """Refuse what is not a bare module.

    Raises:
        ModelError: not a module, or wrapped (DDP, FSDP, compiled, scripted); names the order to use.
    """
    if not isinstance(model, nn.Module):
        raise ModelError(f"expected a torch.nn.Module, got {type(model).__name__}", hint="Pass the model itself")
    wrappers = {
        "DistributedDataParallel": "DDP",
        "DataParallel": "DataParallel",
        "FullyShardedDataParallel": "FSDP",
        "FSDPModule": "FSDP2",
        "OptimizedModule": "torch.compile",
        "ScriptModule": "TorchScript",
    }
    if isinstance(model, fx.GraphModule) and "train" in vars(model):  # torch.export replaces train() and eval()
        raise ModelError(
            "the model came out of torch.export: it has one mode for good, and nothing of its class",
            hint="Pass the module that was exported",
        )
    if any(isinstance(module, UnflattenedModule) for module in model.modules()):
        raise ModelError(
            "the model came out of torch.export.unflatten: its graphs hold traces, which no copy can be made of",
            hint="Pass the module that was exported",
        )
    for name, module in model.named_modules():
        if name and isinstance(module, torch.jit.ScriptModule):
            hint = "Use the module it was scripted from: TorchScript has no graph that can be captured"
            raise ModelError("a submodule is TorchScript", node=name, hint=hint)
    for kind in type(model).__mro__:
        if kind.__name__ in wrappers:
            wrapper = wrappers[kind.__name__]
            raise ModelError(
                f"the model is already wrapped by {wrapper}",
                hint=f"Transform the bare model first, then wrap the result with {wrapper}",
            )
    return model


def capture(
    model: nn.Module,
    example_inputs: object = None,
    *,
    verify: bool = True,
    front_end: FrontEnd = "auto",
    deep: int = DEEP,
) -> Graph:
    """Capture ``model`` as a flat graph; the model itself is left as it was.

    Args:
        model: any bare module.
        example_inputs: tensor, tuple of positional or dict of keyword arguments; inferred when None.
        verify: compare the graph's eval output with the model's (skipped on the meta device).
        front_end: "auto" traces a model of many module calls of few kinds (``deep``, `Census`), and exports the
            others and what tracing cannot follow.
        deep: module calls from which on tracing is tried first.

    Raises:
        ModelError, InputError, CaptureError: see those classes; a CaptureError names the line.
    """
    with_finite_values(check_model(model))
    inputs = _distinct(resolve_inputs(model, example_inputs))
    notes, left_out = _mixed_modes(model), list[str]()
    with untouched(model, parameters=True), ExitStack() as stack:
        census = run_once(model, inputs)
        if census.form.dropped and stack.enter_context(without_cache(model)):
            left_out.append(
                "captured with use_cache=False: a cache is no activation, and an emitted module returns none"
            )
            census = run_once(model, inputs)
        if census.form.dropped:
            left_out.append(f"the output holds {', '.join(census.form.dropped)}: no tensor, and left out")
        stack.enter_context(opening(model, census.form))
        graph = _by_front_end(model, inputs, [*notes, *left_out], census, verify, front_end, census.pays(deep))
    graph.left_out = tuple(left_out)
    return graph


def _by_front_end(
    model: nn.Module, inputs: Inputs, notes: list[str], census: Census, verify: bool, front_end: FrontEnd, deep: bool
) -> Graph:
    if front_end == "trace" or (front_end == "auto" and deep):
        try:
            return _traced(model, inputs, notes, census)
        except Untraceable as error:
            if front_end == "trace":
                raise CaptureError(f"{type(model).__name__} cannot be traced symbolically: {error}") from error
            notes.append(f"captured by torch.export, for symbolic tracing failed: {error}")
    return _exported(model, inputs, notes, census, verify)


def unread(graph: Graph) -> list[str]:
    """Keys of the model's state dict whose tensors the graph does not read: no emitted module has them."""
    root, read = graph.root, {str(node.target) for node in graph.module.graph.nodes if node.op == "get_attr"}
    state = root.state_dict(keep_vars=True)
    known = {id(state[name]) for name in read & state.keys()}
    # a counter belongs to its norm, and goes or stays with it
    return [n for n, t in state.items() if id(t) not in known and not n.endswith("num_batches_tracked")]


def _mixed_modes(model: nn.Module) -> list[str]:
    """A remark where norms are in another mode than the model."""
    norms = [
        (name, module) for name, module in model.named_modules() if isinstance(module, nn.modules.batchnorm._NormBase)
    ]
    other = [name for name, module in norms if module.training != model.training]
    if not other:
        return []
    own, theirs = ("train", "eval") if model.training else ("eval", "train")
    return [f"{', '.join(other)}: in {theirs} mode, analysed as the rest of the model ({own} mode unless told)"]


def _distinct(inputs: Inputs) -> Inputs:
    """One tensor given for two arguments is two inputs; a tracer, which goes by identity, would take it for one."""
    seen: set[int] = set()

    def once(tensor: Tensor) -> Tensor:
        again = id(tensor) in seen
        seen.add(id(tensor))
        return tensor.clone() if again else tensor

    return Inputs(*pytree.tree_map_only(Tensor, once, tuple(inputs)))


@contextmanager
def _collector_paused() -> Iterator[None]:
    """A trace makes a million objects and no garbage; walking them again and again takes a third of the time."""
    enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if enabled:
            gc.enable()


@_collector_paused()
def _traced(model: nn.Module, inputs: Inputs, notes: list[str], census: Census) -> Graph:
    """Capture by symbolic tracing; only a graph verified against the model is good."""
    if any(parameter.is_meta for parameter in model.parameters()):
        raise Untraceable("parameters without values, which leave nothing to verify")
    model.train()
    flat = trace(model, inputs, _positional_names(model, len(inputs.args)))
    _index_sites(flat.graph, model, census)
    graph = Graph(flat, model, inputs, list(notes), census.form)
    if not reproduces_everywhere(graph.emit(), model, inputs):
        raise Untraceable("another output than the model's")
    return graph


def _exported(model: nn.Module, inputs: Inputs, notes: list[str], census: Census, verify: bool) -> Graph:
    """The export's graph, which is that of the example's batch size: where that makes a difference, it is said."""
    graph = _by_export(model, inputs, notes, census, verify)
    other = another_batch(graph.emit(), model, inputs) if verify else None
    if other is not None:
        graph.path = (
            f"of a batch of {other} the forward takes another path than of {batch_size(inputs)}, and only the latter "
            "was followed"
        )
        graph.notes.append(graph.path)
    return graph


def _by_export(model: nn.Module, inputs: Inputs, notes: list[str], census: Census, verify: bool) -> Graph:
    """Capture by torch.export: in train mode, or in eval mode where nothing else fits, and say what is lost."""
    drawn = host_state()
    try:
        graph = _captured(model, inputs, notes, census, training=True)
    except CaptureError as error:
        return _fallen_back(model, inputs, notes, census, error)
    if host_state() != drawn:
        graph.lost = "a decision by random numbers of Python or NumPy, which the capture made once"
    if not verify or _matches(graph):
        if graph.lost:
            graph.notes.append(f"in train mode the forward makes {graph.lost}: its other ways are not in this report")
        return graph
    if any(node.meta.get(BY_HAND) for node in graph.module.graph.nodes):  # masks that belong to no mode
        graph = _captured(model, inputs, notes, census, training=True, by_mode=False)
        if _matches(graph):
            return graph
    evaluated = _evaluated(model, inputs, notes, census, graph)
    if not _matches(evaluated):
        raise not_reproduced(model, inputs)
    return evaluated


def _evaluated(model: nn.Module, inputs: Inputs, notes: list[str], census: Census, trained: Graph) -> Graph:
    graph = _captured(model, inputs, notes, census, training=False, by_mode=False)
    if adopt_noise(trained.module.graph, graph.module.graph) and _matches(trained):  # that was all
        return trained
    adopt_modes(graph.module.graph, trained.module.graph)
    graph.lost = lost_in_eval(trained.module.graph, graph.module.graph)
    notes.append(f"captured in eval mode: in train mode the forward takes another path ({graph.lost})")
    return graph


def _fallen_back(model: nn.Module, inputs: Inputs, notes: list[str], census: Census, error: CaptureError) -> Graph:
    """The eval capture of a model whose train forward cannot be captured; the error, where that fails too."""
    try:
        graph = _captured(model, inputs, notes, census, training=False, by_mode=False)
    except CaptureError:
        raise error from None
    if not _matches(graph):
        raise error
    graph.lost = f"all that train mode does: its forward cannot be captured, {error.what}"
    notes.append(f"captured in eval mode: in train mode the forward cannot be captured ({error.what})")
    return graph


def _matches(graph: Graph) -> bool:
    graph.root.eval()
    return reproduces(graph.emit(), graph.root, graph.inputs)


def _captured(
    model: nn.Module, inputs: Inputs, notes: list[str], census: Census, *, training: bool, by_mode: bool = True
) -> Graph:
    model.train(training)
    flat = export_flat(model, inputs, _positional_names(model, len(inputs.args)), notes, by_mode=by_mode)
    _index_sites(flat.graph, model, census)
    if not training:
        note_noise(flat.graph)
    return Graph(flat, model, inputs, notes, census.form, training=training)


def _positional_names(model: nn.Module, count: int) -> list[str]:
    parameters = inspect.signature(model.forward).parameters.values()
    names: list[str] = []
    for parameter in parameters:
        if parameter.kind is parameter.VAR_POSITIONAL:
            raise CaptureError(
                f"{type(model).__name__}.forward takes *{parameter.name}, whose number a graph cannot leave open",
                hint="Wrap it in a module that names them: def forward(self, x, y): return self.model(x, y)",
            )
        names.append(parameter.name)
    return names[:count]


def _index_sites(graph: fx.Graph, model: nn.Module, census: Census) -> None:
    """Remember how many nodes each module call has, so that emission sees which calls are untouched.

    Not where a call bound other arguments than the first: emission would call the module with the first alone.
    """
    sizes: dict[tuple[str, int], int] = {}
    nodes = [n for n in graph.nodes if n.op == "call_function" and "site" in n.meta]
    for node in nodes:
        sizes[node.meta["site"].key] = sizes.get(node.meta["site"].key, 0) + 1
    bare = {path for path, _ in sizes if census.bare(model.get_submodule(path))}
    for node in nodes:
        if node.meta["site"].path in bare:
            node.meta["group_size"] = sizes[node.meta["site"].key]
