"""ONNX export that is checked before it is believed.

The file appears only when onnx's full check accepts it and onnxruntime
reproduces the model at two batch sizes.
"""

from __future__ import annotations

import contextlib
import importlib.util
import inspect
import json
import logging
import os
import tempfile
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from kgraph.errors import ExportError, InputError

if TYPE_CHECKING:
    import onnx_ir
    import onnxruntime as ort

OPSETS = range(18, 24)
"""What torch's exporter writes; an older number is accepted by it and then silently not honoured."""

SINGLE_FILE_LIMIT = 3 << 29
"""Bytes of weights (1.5 GiB) above which they go to ``<name>.data``: protobuf ends at 2 GiB."""

METADATA_KEY = "kgraph"
_LOGGERS = ("torch.onnx", "torch.export", "onnxscript", "onnx_ir")

ExampleInputs = Tensor | Sequence[Any] | Mapping[str, Any]


@dataclass(frozen=True)
class OnnxExport:
    """A written and checked ONNX file.

    Attributes:
        path: the file.
        max_abs_error: largest |onnxruntime - torch| over all outputs and both batch sizes.
        batch_sizes: the batch sizes compared; the batch axis itself is dynamic.
        opset: the ONNX operator set of the file.
    """

    path: Path
    max_abs_error: float
    batch_sizes: tuple[int, int]
    opset: int


@dataclass(frozen=True)
class _Call:
    """The arguments of one forward call."""

    args: tuple[Any, ...]
    kwargs: dict[str, Any]

    @classmethod
    def of(cls, example: ExampleInputs) -> _Call:
        if isinstance(example, Tensor):
            return cls((example,), {})
        if isinstance(example, Mapping):
            return cls((), dict(example))
        return cls(tuple(example), {})

    def leaves(self) -> list[Any]:
        return pytree.tree_leaves((self.args, self.kwargs))

    def batch_size(self) -> int:
        """Axis 0 of the first tensor that has one."""
        for leaf in self.leaves():
            if isinstance(leaf, Tensor) and leaf.ndim and leaf.shape[0]:
                return leaf.shape[0]
        raise InputError("example_inputs must hold a tensor of one or more rows")

    def resized(self, batch: int) -> _Call:
        """The same call at another batch size: rows repeated, repeated float rows perturbed by 1%."""
        own, generator = self.batch_size(), torch.Generator().manual_seed(0)

        def resize(leaf: Any) -> Any:
            if not _has_batch(leaf, own):
                return leaf
            rows = leaf[torch.arange(batch, device=leaf.device) % own]
            if rows.is_floating_point():  # ids and masks of integers must stay valid: they are only repeated
                noise = 1 + 0.01 * torch.randn(rows[own:].shape, generator=generator)
                rows[own:] *= noise.to(rows)
            return rows

        args, kwargs = pytree.tree_map(resize, (self.args, self.kwargs))
        return _Call(args, kwargs)

    def bound(self, model: nn.Module) -> tuple[_Call, dict[str, Any]]:
        """The call with its keywords in forward's order, and ``{parameter: {0: DYNAMIC}}``.

        torch.export pairs inputs with dynamic shapes by order, so both must have forward's.
        """
        signature = inspect.signature(model.forward)
        try:
            bound = signature.bind(*self.args, **self.kwargs).arguments
        except TypeError as error:
            raise InputError(f"example_inputs do not fit the model's forward: {error}") from error
        rank = {name: i for i, name in enumerate(signature.parameters)}
        kwargs = dict(sorted(self.kwargs.items(), key=lambda item: rank.get(item[0], len(rank))))
        own, dynamic = self.batch_size(), {0: torch.export.Dim.DYNAMIC}
        shapes = pytree.tree_map(lambda leaf: dynamic if _has_batch(leaf, own) else None, dict(bound))
        return _Call(self.args, kwargs), shapes


def _has_batch(leaf: Any, batch: int) -> bool:
    return isinstance(leaf, Tensor) and leaf.ndim > 0 and leaf.shape[0] == batch


def export_onnx(
    model: nn.Module,
    path: str | os.PathLike[str],
    example_inputs: ExampleInputs,
    *,
    opset: int = 20,
    report: Mapping[str, Any] | None = None,
    tolerance: float = 1e-4,
) -> OnnxExport:
    """Writes the model in eval mode to an ONNX file with a dynamic batch axis, and checks the file.

    Each output y must agree to ``max(tolerance, 16 eps) * max(1, max|y|)``, eps of the output's dtype, at the
    example's batch size and at another. The file is written beside ``path`` and moved there last: on any
    failure a file that stood there before is untouched. Weights above 1.5 GiB go to ``<name>.data``.

    Args:
        model: any module, a captured graph included; its training flags are restored.
        path: the file to write; its directory must exist.
        example_inputs: a tensor, a tuple of positional arguments, or a dict of keyword arguments. Axis 0 of
            the first tensor is the batch; every tensor of that length on axis 0 gets a dynamic one.
        opset: ONNX operator set, 18 to 23.
        report: stored as JSON in the model's metadata under the key "kgraph" (onnxruntime:
            ``session.get_modelmeta().custom_metadata_map``).
        tolerance: relative to the output's scale.

    Raises: InputError for an argument outside its domain; ExportError where the file cannot be written, the
        model cannot be exported, or the file does not reproduce it (the message names the worst output).
    """
    target = Path(path)
    _check_arguments(model, target, opset, tolerance)
    call, shapes = _Call.of(example_inputs).bound(model)
    metadata = {} if report is None else {METADATA_KEY: _as_json(report)}
    _require_onnx()
    with _scratch(target) as scratch, _evaluating(model), _quiet(), torch.no_grad():
        file = scratch / target.name
        # Traced at two or more: torch.export takes an axis of length 1 for a constant.
        traced = call.resized(max(2, call.batch_size()))
        names = _write(model, file, traced, shapes, opset, metadata)
        session = _checked_session(file)
        sizes = (call.batch_size(), 2 if call.batch_size() == 3 else 3)
        error = max(_parity(model, session, names, call.resized(n), tolerance) for n in sizes)
        _publish(scratch, target)
    return OnnxExport(target, error, sizes, opset)


def _check_arguments(model: nn.Module, target: Path, opset: int, tolerance: float) -> None:
    if not isinstance(model, nn.Module):
        raise InputError(f"export_onnx takes an nn.Module, got {type(model).__name__}")
    if opset not in OPSETS:
        raise InputError(f"opset must be {OPSETS[0]} to {OPSETS[-1]}, got {opset}")
    if not tolerance > 0:
        raise InputError(f"tolerance must be positive, got {tolerance}")
    if target.is_dir():
        raise ExportError(f"'{target}' is a directory", hint="Give the path of the file to write")
    if not target.parent.is_dir():
        raise ExportError(f"The directory '{target.parent}' does not exist", hint="Create it first")


def _as_json(report: Mapping[str, Any]) -> str:
    try:
        return json.dumps(dict(report))
    except (TypeError, ValueError) as error:
        raise InputError(f"report cannot be written as JSON: {error}") from error


def _require_onnx() -> None:
    for name in ("onnx", "onnxscript", "onnxruntime"):
        if importlib.util.find_spec(name) is None:
            raise ExportError(f"{name} is not installed", hint="Run: pip install 'kgraph[onnx]'")


@contextlib.contextmanager
def _scratch(target: Path) -> Iterator[Path]:
    """A temporary directory beside the target (one file system, so that the final move is atomic)."""
    try:
        folder = tempfile.TemporaryDirectory(prefix=".kgraph-", dir=target.parent)
    except OSError as error:
        raise ExportError(f"Cannot write to '{target.parent}': {error.strerror}") from error
    with folder as name:
        yield Path(name)


def _set_training(model: nn.Module, mode: bool) -> None:
    try:
        model.train(mode)
    except NotImplementedError:  # what torch.export's own graph modules do
        for module in model.modules():
            module.training = mode


@contextlib.contextmanager
def _evaluating(model: nn.Module) -> Iterator[None]:
    """The model in eval mode; every submodule's own training flag afterwards as before."""
    flags = {module: module.training for module in model.modules()}
    try:
        _set_training(model, False)
        yield
    finally:
        _set_training(model, flags[model])
        for module, flag in flags.items():
            module.training = flag


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Mutes the exporter's log lines and warnings."""
    levels = {logging.getLogger(name): logging.getLogger(name).level for name in _LOGGERS}
    try:
        for logger in levels:
            logger.setLevel(logging.CRITICAL)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        for logger, level in levels.items():
            logger.setLevel(level)


def _reason(error: BaseException) -> str:
    """The first line of the error at the root of a chain: the exporter's own message is a page."""
    while error.__cause__ is not None:
        error = error.__cause__
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return f"{type(error).__name__}: {lines[0] if lines else ''}"


def _translations() -> dict[Callable[..., Any], Callable[..., Any]]:
    """One ONNX node for softplus, which the exporter writes as five (it branches at the threshold)."""
    import onnxscript

    op: Any = onnxscript.opset18

    def softplus(self: Any, beta: Any = 1.0, threshold: float = 20.0) -> Any:
        # Beyond the threshold log(1 + e^x) - x < e^-threshold (2e-9): the branch is not needed.
        return op.Softplus(self) if beta == 1.0 else op.Div(op.Softplus(op.Mul(self, beta)), beta)

    return {torch.ops.aten.softplus.default: softplus}


def _write(
    model: nn.Module,
    file: Path,
    call: _Call,
    shapes: dict[str, Any],
    opset: int,
    metadata: Mapping[str, str],
) -> list[str | None]:
    """Exports to ``file``; the ONNX input name of each leaf of a call (None where it is no input)."""
    try:
        program = torch.onnx.export(
            model,
            call.args,
            kwargs=call.kwargs,
            dynamo=True,
            opset_version=opset,
            dynamic_shapes=shapes,
            custom_translation_table=_translations(),
            verbose=False,
        )
        assert program is not None and program.exported_program is not None
        graph, inputs = program.model, program.exported_program.graph_signature.user_inputs
        written = graph.opset_imports.get("")
        if written != opset:
            raise ExportError(f"The exporter wrote opset {written} instead of {opset}")
        pairs = list(zip(inputs, call.leaves(), strict=True))
        names = [str(name) if isinstance(leaf, Tensor) else None for name, leaf in pairs]
        program.rename_axes(_batch_axes(graph, [n for n, y in pairs if _has_batch(y, call.batch_size())]))
        _clean(graph)
        graph.metadata_props.update(metadata)
        program.save(file, external_data=_bytes(model) > SINGLE_FILE_LIMIT)
    except ExportError:
        raise
    except Exception as error:
        raise ExportError(f"The model could not be exported to ONNX. {_reason(error)}") from error
    return names


def _batch_axes(model: onnx_ir.Model, batched: Sequence[Any]) -> dict[Any, str]:
    """The exporter's own name (``s52``) of the batch axis -> "batch"."""
    found = [value.shape[0] for value in model.graph.inputs if value.name in batched and value.shape]
    return {axis.value: "batch" for axis in found if not isinstance(axis, int) and axis.value}


def _bytes(model: nn.Module) -> int:
    return sum(t.nbytes for t in (*model.parameters(), *model.buffers()))


def _items(model: onnx_ir.Model) -> Iterator[Any]:
    """What carries doc strings and metadata: model, graphs (of functions, branches), nodes, values."""
    yield model
    functions = [graph for f in model.functions.values() for graph in (f.graph, *f.subgraphs())]
    for graph in (*model.graphs(), *functions):
        yield from (graph, *graph.inputs, *graph.initializers.values())
        for node in graph:
            yield from (node, *node.outputs)


def _clean(model: onnx_ir.Model) -> None:
    """Drops what leaks local paths (stack traces, doc strings); keeps the ``namespace`` viewers group by."""
    for item in _items(model):
        item.doc_string = None
        for key in item.metadata_props.keys() - {"namespace"}:
            del item.metadata_props[key]


def _checked_session(file: Path) -> ort.InferenceSession:
    """An onnxruntime session of a file that onnx's full check accepts."""
    import onnx
    import onnxruntime as ort

    options = ort.SessionOptions()
    options.log_severity_level = 3
    try:
        onnx.checker.check_model(str(file), full_check=True)
        return ort.InferenceSession(str(file), options, providers=["CPUExecutionProvider"])
    except Exception as error:
        raise ExportError(f"The exported file is not valid. {_reason(error)}") from error


def _parity(
    model: nn.Module, session: ort.InferenceSession, names: list[str | None], call: _Call, tolerance: float
) -> float:
    """The largest absolute difference between onnxruntime and the model on one call."""
    present = {entry.name for entry in session.get_inputs()}
    pairs = zip(names, call.leaves(), strict=True)
    feed = {name: leaf.detach().cpu().numpy() for name, leaf in pairs if name in present}
    outputs = [entry.name for entry in session.get_outputs()]
    where = f"at batch size {call.batch_size()}"
    try:
        wanted = [y for y in pytree.tree_leaves(model(*call.args, **call.kwargs)) if isinstance(y, Tensor)]
    except Exception as error:
        raise ExportError(f"The model itself does not run {where}. {_reason(error)}") from error
    try:
        found: list[Any] = list(session.run(outputs, feed))
    except Exception as error:
        raise ExportError(f"onnxruntime could not run the file {where}. {_reason(error)}") from error
    if len(found) != len(wanted) or not found:
        raise ExportError(f"The file has {len(found)} outputs, the model {len(wanted)}")
    ratios = {
        name: _error(torch.from_numpy(a), b, tolerance)
        for name, a, b in zip(outputs, found, wanted, strict=True)
    }
    worst = max(ratios, key=lambda name: ratios[name][0] / ratios[name][1])
    error, allowed = ratios[worst]
    if not error <= allowed:
        raise ExportError(
            f"Output '{worst}' differs by {error:.3g} {where}, more than the {allowed:.3g} allowed"
        )
    return max(error for error, _ in ratios.values())


def _error(found: Tensor, wanted: Tensor, tolerance: float) -> tuple[float, float]:
    """(largest absolute difference, allowed difference); infinite for another shape or other nan and inf."""
    epsilon = torch.finfo(wanted.dtype).eps if wanted.is_floating_point() else 0.0
    a, b = found.double(), wanted.detach().cpu().double()
    if a.shape != b.shape:
        return float("inf"), tolerance
    finite = b.isfinite()
    scale = max(1.0, b[finite].abs().max().item()) if finite.any() else 1.0
    allowed = max(tolerance, 16 * epsilon) * scale
    if not torch.equal(a[~finite].nan_to_num(), b[~finite].nan_to_num()) or not a[finite].isfinite().all():
        return float("inf"), allowed
    return ((a - b)[finite].abs().max().item() if finite.any() else 0.0), allowed


def _publish(scratch: Path, target: Path) -> None:
    """Moves the written files to the target's directory, the weights before what refers to them."""
    try:
        for file in sorted(scratch.iterdir(), key=lambda file: file.name == target.name):
            os.replace(file, target.parent / file.name)
    except OSError as error:
        raise ExportError(f"Cannot write '{target}': {error.strerror}") from error
