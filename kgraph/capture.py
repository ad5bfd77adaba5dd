"""Capture: any PyTorch model as a flat torch.fx graph of canonical ATen operations.

The graph's parameters are the model's own tensors; every node knows its module call, source line and shape.
Front ends, in order: torch.export in train mode (so that ``training`` flags are visible and can be driven),
strict export, then eval mode with a note. The captured graph's eval output is checked against the model's.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.utils import _pytree as pytree

from kgraph.canonical import canonicalize
from kgraph.errors import CaptureError, InputError, ModelError
from kgraph.inputs import RECORD, Inputs, batch_size, record_of, resolve_inputs
from kgraph.lift import EmittedModule, emit
from kgraph.site import read_site, source_line

DYNAMIC = torch.export.Dim.DYNAMIC


@dataclass
class Graph:
    """A captured model.

    Attributes:
        module: the flat graph; its parameters are those of ``root``.
        root: the module the parameters and submodules belong to.
        inputs: example ``(args, kwargs)`` that gave the shapes.
        notes: what a reader of a report should know about the capture.
    """

    module: fx.GraphModule
    root: nn.Module
    inputs: Inputs
    notes: list[str] = field(default_factory=list)

    @property
    def name(self) -> str:
        return type(self.root).__name__

    def emit(self) -> EmittedModule:
        """The standard module this graph stands for."""
        module = emit(self.module, self.root)
        module.meta[RECORD] = record_of(self.inputs)
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
    for kind in type(model).__mro__:
        if kind.__name__ in wrappers:
            wrapper = wrappers[kind.__name__]
            raise ModelError(
                f"the model is already wrapped by {wrapper}",
                hint=f"Transform the bare model first, then wrap the result with {wrapper}",
            )
    return model


def capture(model: nn.Module, example_inputs: object = None, *, verify: bool = True) -> Graph:
    """Capture ``model`` as a flat graph; the model itself is left as it was.

    Args:
        model: any bare module.
        example_inputs: tensor, tuple of positional or dict of keyword arguments; inferred when None.
        verify: compare the graph's eval output with the model's (skipped on the meta device).

    Raises:
        ModelError, InputError, CaptureError: see those classes; a CaptureError names the line.
    """
    model = check_model(model)
    inputs = resolve_inputs(model, example_inputs)
    _check_forward(model, inputs)
    notes: list[str] = []
    with _modes_kept(model):
        graph = _captured(model, inputs, notes, training=True)
        if verify and not _matches(graph):
            notes.append("captured in eval mode: in train mode the forward takes another path")
            graph = _captured(model, inputs, notes, training=False)
            if not _matches(graph):
                raise CaptureError(
                    "the captured graph does not reproduce the model's output",
                    hint="A forward that draws python random numbers or depends on hidden state cannot be captured",
                )
    return graph


@contextmanager
def _modes_kept(model: nn.Module) -> Iterator[None]:
    modes = [(module, module.training) for module in model.modules()]
    try:
        yield
    finally:
        for module, training in modes:
            module.training = training


def _check_forward(model: nn.Module, inputs: Inputs) -> None:
    """Run the model once (without touching its buffers) so that wrong inputs get a plain message."""
    with _modes_kept(model), torch.no_grad():
        model.eval()
        try:
            model(*inputs[0], **inputs[1])
        except Exception as error:  # whatever the user's forward raises on bad inputs
            shapes = [tuple(v.shape) for v in pytree.tree_leaves(inputs) if isinstance(v, Tensor)]
            first = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
            raise InputError(
                f"{type(model).__name__} does not run on the example inputs of shapes {shapes}: {first}",
                hint="Pass example_inputs that the model's forward accepts",
            ) from error


def _captured(model: nn.Module, inputs: Inputs, notes: list[str], *, training: bool) -> Graph:
    model.train(training)
    program = _export(model, inputs, notes)
    flat = program.module(check_guards=False)
    assert isinstance(flat, fx.GraphModule)
    _refuse_data_dependence(flat.graph, model)
    for node in flat.graph.nodes:
        node.meta["site"] = read_site(node)
    canonicalize(flat)
    _index_sites(flat.graph)
    _share_tensors(flat, model)
    flat.recompile()
    return Graph(flat, model, inputs, notes)


def _export(model: nn.Module, inputs: Inputs, notes: list[str]) -> torch.export.ExportedProgram:
    args, kwargs = inputs
    size = batch_size(inputs)

    def dynamic(value: Any) -> Any:
        batched = isinstance(value, Tensor) and value.ndim > 0 and value.shape[0] == size
        return {0: DYNAMIC} if batched else None

    shapes = (pytree.tree_map(dynamic, args), pytree.tree_map(dynamic, kwargs))
    named = {**dict(zip(_positional_names(model, len(args)), shapes[0], strict=True)), **shapes[1]}
    attempts = [(named, False), (None, False), (named, True)]
    first: Exception | None = None
    for dynamic_shapes, strict in attempts:
        try:
            with _quiet():
                program = torch.export.export(model, args, kwargs, dynamic_shapes=dynamic_shapes, strict=strict)
            if dynamic_shapes is None:
                notes.append(f"the batch size is fixed at {size}: the model's forward depends on it")
            return program
        except Exception as error:  # torch.export raises many kinds; all mean that this front end failed
            first = first or error
    assert first is not None
    raise _capture_error(model, first)


@contextmanager
def _quiet() -> Iterator[None]:
    """torch.export logs at length what the error raised afterwards says in one line."""
    logger = logging.getLogger("torch")
    before, logger.disabled = logger.level, False
    logger.setLevel(logging.CRITICAL)
    try:
        yield
    finally:
        logger.setLevel(before)


def _positional_names(model: nn.Module, count: int) -> list[str]:
    import inspect

    parameters = inspect.signature(model.forward).parameters.values()
    names: list[str] = []
    for parameter in parameters:
        if parameter.kind is parameter.VAR_POSITIONAL:
            raise CaptureError("forward takes *args", hint="Wrap the model in a module with named arguments")
        names.append(parameter.name)
    return names[:count]


def _refuse_data_dependence(graph: fx.Graph, model: nn.Module) -> None:
    """torch.export accepts sizes that depend on a tensor's value; a kernel has no such thing."""
    for node in graph.nodes:
        value = node.meta.get("val")
        unknown = isinstance(value, torch.SymInt) and value.node.hint is None
        if unknown or (node.target is torch.ops.aten.item.default and _sizes_follow(node)):
            raise CaptureError(
                f"{type(model).__name__}.forward turns a tensor's value into a size",
                node=node.name,
                source=source_line(node.meta.get("stack_trace") or "") or None,
                hint="Replace the data-dependent branch or .item() by tensor operations such as torch.where",
            )


def _sizes_follow(node: fx.Node) -> bool:
    return any(isinstance(user.meta.get("val"), torch.SymInt) for user in node.users)


def _capture_error(model: nn.Module, error: Exception) -> CaptureError:
    line = source_line(_user_trace(error))
    reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
    return CaptureError(
        f"{type(model).__name__}.forward branches on a tensor's value or cannot be exported: {reason}",
        source=line or None,
        hint="Replace the data-dependent branch or .item() by tensor operations such as torch.where",
    )


def _user_trace(error: BaseException) -> str:
    import traceback

    frames = traceback.extract_tb(error.__traceback__)
    lines = [f'File "{f.filename}", line {f.lineno}, in {f.name}' for f in frames]
    inside = [line for line in lines if "/torch/" not in line and "kgraph/" not in line]
    return "\n".join(inside)


def _index_sites(graph: fx.Graph) -> None:
    """Remember how many nodes each module call has, so that emission sees which calls are untouched."""
    sizes: dict[tuple[str, int], int] = {}
    nodes = [n for n in graph.nodes if n.op == "call_function" and "site" in n.meta]
    for node in nodes:
        sizes[node.meta["site"].key] = sizes.get(node.meta["site"].key, 0) + 1
    for node in nodes:
        node.meta["group_size"] = sizes[node.meta["site"].key]


def _share_tensors(flat: fx.GraphModule, model: nn.Module) -> None:
    """Make the flat graph's attributes the model's very tensors (export may copy buffers)."""
    tensors: dict[str, Tensor] = dict(model.named_parameters(remove_duplicate=False))
    tensors.update(dict(model.named_buffers(remove_duplicate=False)))
    for node in flat.graph.nodes:
        if node.op == "get_attr" and node.target in tensors:
            owner, _, field_name = node.target.rpartition(".")
            setattr(flat.get_submodule(owner), field_name, tensors[node.target])


def _matches(graph: Graph) -> bool:
    args, kwargs = graph.inputs
    if any(p.is_meta for p in graph.root.parameters()):
        return True
    graph.root.eval()
    emitted = graph.emit().eval()
    with torch.no_grad():
        expected = [t for t in pytree.tree_leaves(graph.root(*args, **kwargs)) if isinstance(t, Tensor)]
        try:
            actual = [t for t in pytree.tree_leaves(emitted(*args, **kwargs)) if isinstance(t, Tensor)]
        except Exception:  # a graph that does not run is a mismatch
            return False
    return len(expected) == len(actual) and all(map(_close, actual, expected))


def _close(actual: Tensor, expected: Tensor) -> bool:
    if actual.shape != expected.shape:
        return False
    if not expected.is_floating_point():
        return bool(torch.equal(actual, expected))
    scale = float(expected.abs().max().clamp(min=1e-6)) if expected.numel() else 1.0
    return bool(torch.allclose(actual, expected, rtol=1e-4, atol=1e-4 * scale))
