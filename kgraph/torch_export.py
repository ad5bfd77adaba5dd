"""The general front end: torch.export of the model in its present mode, as a flat graph over the model's tensors."""

from __future__ import annotations

import io
import logging
import sys
import traceback
from collections.abc import Iterator
from contextlib import contextmanager, redirect_stderr
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.distributions import Distribution
from torch.utils import _pytree as pytree
from torch.utils.checkpoint import CheckpointFunction

from kgraph.canonical import aten, canonicalize
from kgraph.errors import CaptureError
from kgraph.gradient_stops import inference_as_no_grad
from kgraph.inputs import Inputs, batch_size
from kgraph.site import is_library_file, read_site, source_line
from kgraph.watched import not_held

_TRANSFORMED = "torch._functorch.predispatch"
"""Where the calls are defined that torch.export writes in place of a transform of torch.func."""
DYNAMIC = torch.export.Dim.DYNAMIC


def export_flat(
    model: nn.Module, inputs: Inputs, names: list[str], notes: list[str], *, by_mode: bool = True
) -> fx.GraphModule:
    """Export ``model`` with a dynamic batch, or with a fixed one and a note; every node knows its site.

    Args:
        names: parameter names of ``forward`` for the positional inputs.
        by_mode: whether masks that the forward draws by hand are dropout.

    Raises:
        CaptureError: no attempt succeeds; names the line.
    """
    program = _export(model, inputs, names, notes)
    transformed = any(getattr(n.target, "__module__", "") == _TRANSFORMED for n in program.graph.nodes)
    if transformed and (reason := not_held(model, inputs)) is not None:
        raise reason
    try:
        flat = program.module(check_guards=False)
    except RuntimeError as error:  # a submodule called as an attribute of every GraphModule
        raise CaptureError(
            f"torch.export cannot rebuild {type(model).__name__}: {error}",
            hint="Rename submodules and parameters called meta, graph or code",
        ) from error
    except SyntaxError as error:  # the code of a GraphModule spells names as attributes
        odd = [name for name, _ in model.named_modules() if not name.replace(".", "_").replace("_", "a").isalnum()]
        raise CaptureError(
            f"torch.export cannot write code for {type(model).__name__}: {error.msg}",
            node=next(filter(None, odd), None),
            hint="Rename submodules and parameters whose names are no Python identifiers",
        ) from error
    assert isinstance(flat, fx.GraphModule)
    _refuse_data_dependence(flat.graph, model)
    for node in flat.graph.nodes:
        node.meta["site"] = read_site(node)
    canonicalize(flat, lambda node: source_line(node.meta.get("stack_trace") or ""), by_mode=by_mode)
    for node in flat.graph.nodes:  # of regions without gradients, which are inlined: they belong to their module's call
        if "site" not in node.meta and "nn_module_stack" in node.meta:
            node.meta["site"] = read_site(node)
    _share_tensors(flat, model)
    flat.recompile()
    return flat


def _export(model: nn.Module, inputs: Inputs, names: list[str], notes: list[str]) -> torch.export.ExportedProgram:
    size = batch_size(inputs)

    def dynamic(value: Any) -> Any:
        batched = isinstance(value, Tensor) and value.ndim > 0 and value.shape[0] == size
        return {0: DYNAMIC} if batched else None

    shapes = (pytree.tree_map(dynamic, inputs.args), pytree.tree_map(dynamic, inputs.kwargs))
    named = {**dict(zip(names, shapes[0], strict=True)), **shapes[1]}
    attempts = [(named, False), (named, True), (None, False)]  # a batch of any size first
    first: Exception | None = None
    for dynamic_shapes, strict in attempts:
        # torch marks the tensors it is given as dynamic: neither the caller's nor those of the next attempt
        args, kwargs = pytree.tree_map_only(Tensor, Tensor.detach, tuple(inputs))
        try:
            with (
                _quiet(),
                _unvalidated(),
                _without_checkpoints(),
                inference_as_no_grad(),
                torch.enable_grad(),
            ):  # else a region without gradients is none
                program = torch.export.export(model, args, kwargs, dynamic_shapes=dynamic_shapes, strict=strict)
            fixed = f"the batch size is fixed at {size}: the model's forward depends on it"
            if dynamic_shapes is None and fixed not in notes:  # of an earlier capture of the same model
                notes.append(fixed)
            return program
        except Exception as error:  # torch.export raises many kinds; all mean that this front end failed
            first = first or error
    assert first is not None
    raise not_held(model, inputs) or _capture_error(model, first)


@contextmanager
def _quiet() -> Iterator[None]:
    """torch.export logs and prints at length what the error raised afterwards says in one line."""
    logger = logging.getLogger("torch")
    before, logger.disabled = logger.level, False
    logger.setLevel(logging.CRITICAL)
    printed = io.StringIO()
    try:
        with redirect_stderr(printed):
            yield
        sys.stderr.write(printed.getvalue())  # of an export that succeeds: warnings, what the forward prints
    finally:
        logger.setLevel(before)


@contextmanager
def _unvalidated() -> Iterator[None]:
    """torch.distributions checks the values of its arguments, which a trace has not."""
    before = Distribution._validate_args
    Distribution.set_default_validate_args(False)
    try:
        yield
    finally:
        Distribution.set_default_validate_args(before)


@contextmanager
def _without_checkpoints() -> Iterator[None]:
    """A reentrant checkpoint runs its function without gradients, and again backwards: traced, it is the function."""
    CheckpointFunction.apply = lambda function, _, *args: function(*args)  # type: ignore[method-assign]
    try:
        yield
    finally:
        del CheckpointFunction.apply


def _refuse_data_dependence(graph: fx.Graph, model: nn.Module) -> None:
    """torch.export accepts sizes that depend on a tensor's value; a kernel has no such thing."""
    for node in graph.nodes:
        value = node.meta.get("val")
        unknown = isinstance(value, torch.SymInt) and value.node.hint is None
        if unknown or (node.target is aten.item.default and _sizes_follow(node)):
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
        node=_failing_module(model, error),
        source=line or None,
        hint="Replace the data-dependent branch or .item() by tensor operations such as torch.where",
    )


def _failing_module(model: nn.Module, error: BaseException) -> str | None:
    """Path of the innermost submodule whose forward was running when ``error`` was raised."""
    names = {id(module): name for name, module in model.named_modules() if name}
    frames = [frame for frame, _ in traceback.walk_tb(error.__traceback__) if frame.f_code.co_name == "forward"]
    running = [id(frame.f_locals.get("self")) for frame in frames]
    return next((names[one] for one in reversed(running) if one in names), None)


def _user_trace(error: BaseException) -> str:
    frames = traceback.extract_tb(error.__traceback__)
    lines = [f'File "{f.filename}", line {f.lineno}, in {f.name}' for f in frames]
    return "\n".join(line for frame, line in zip(frames, lines, strict=True) if not is_library_file(frame.filename))


def _share_tensors(flat: fx.GraphModule, model: nn.Module) -> None:
    """Make the flat graph's attributes the model's very tensors (export may copy buffers)."""
    tensors: dict[str, Tensor] = dict(model.named_parameters(remove_duplicate=False))
    tensors.update(dict(model.named_buffers(remove_duplicate=False)))
    for node in flat.graph.nodes:
        if node.op == "get_attr" and node.target in tensors:
            owner, _, field_name = node.target.rpartition(".")
            setattr(flat.get_submodule(owner), field_name, tensors[node.target])
