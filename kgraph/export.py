"""ONNX export that is checked before it is believed.

The file appears only when onnx's full check accepts it and onnxruntime
reproduces the model at two batch sizes.
"""

from __future__ import annotations

import contextlib
import importlib.util
import json
import logging
import os
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from kgraph.checks import whole
from kgraph.errors import ExportError, InputError
from kgraph.failures import failed
from kgraph.files import destination, placed
from kgraph.onnx_check import Call, ExampleInputs, checked_session, has_batch, parity, reason, refuse_nan

if TYPE_CHECKING:
    import onnx_ir

OPSETS = range(18, 24)
"""What torch's exporter writes; an older number is accepted by it and then silently not honoured."""

SINGLE_FILE_LIMIT = 3 << 29
"""Bytes of weights (1.5 GiB) above which they go to ``<name>.data``: protobuf ends at 2 GiB."""

METADATA_KEY = "kgraph"
_LOGGERS = ("torch.onnx", "torch.export", "onnxscript", "onnx_ir")


@dataclass(frozen=True)
class OnnxExport:
    """A written and checked ONNX file.

    Attributes:
        path: the file.
        max_abs_error: largest |onnxruntime - torch| over all outputs and both batch sizes.
        batch_sizes: the batch sizes compared; the batch axis itself is dynamic.
        opset: the ONNX operator set of the file.
        fold_report: which constants of a transformed model the file's weights took up; None where it was not folded.
    """

    path: Path
    max_abs_error: float
    batch_sizes: tuple[int, int]
    opset: int
    fold_report: object = None


def export_onnx(
    model: nn.Module,
    path: str | os.PathLike[str],
    example_inputs: ExampleInputs,
    *,
    opset: int = 20,
    report: Mapping[str, Any] | None = None,
    tolerance: float = 1e-4,
    written: nn.Module | None = None,
) -> OnnxExport:
    """Writes the model in eval mode to an ONNX file with a dynamic batch axis, and checks the file.

    Each output y must agree to ``max(tolerance, 16 eps) * max(1, max|y|)``, eps of the output's dtype, at the
    example's batch size and at another. The file is written beside ``path`` and moved there last: on any
    failure a file that stood there before is untouched; symbolic links are followed. Weights above 1.5 GiB go to
    ``<name>.data``.

    Args:
        model: any module, a captured graph included; its training flags are restored.
        path: the file to write; its directory must exist.
        example_inputs: a tensor, a tuple of positional arguments, or a dict of keyword arguments. Axis 0 of
            the first tensor is the batch; every tensor of that length on axis 0 gets a dynamic one.
        opset: ONNX operator set, 18 to 23.
        report: stored as JSON in the model's metadata under the key "kgraph" (onnxruntime:
            ``session.get_modelmeta().custom_metadata_map``).
        tolerance: relative to the output's scale.
        written: another module of the same function, in eval mode, that is written in the model's place. The file is
            compared with ``model``.

    Raises: InputError for an argument outside its domain; FileError where the file cannot be written; ExportError
        where the model cannot be exported, or the file does not reproduce it (the message names the worst output).
    """
    _check_arguments(model, opset, tolerance)
    _refuse_bfloat16(model)
    target = destination(path)
    call, shapes = Call.of(example_inputs).bound(model)
    metadata = {} if report is None else {METADATA_KEY: _as_json(report)}
    _require_onnx()
    with placed(target) as file, _evaluating(model), _quiet(), torch.no_grad():
        _try(model, call)
        # Traced at two or more: torch.export takes an axis of length 1 for a constant.
        traced = call.resized(max(2, call.batch_size()))
        names = _write(model if written is None else written, file, traced, shapes, opset, metadata)
        session = checked_session(file)
        sizes = (call.batch_size(), 2 if call.batch_size() == 3 else 3)
        error = max(parity(model, session, names, call.resized(n), tolerance) for n in sizes)
    return OnnxExport(Path(path), error, sizes, opset)


def checked_opset(opset: object) -> int:
    """An operator set that kgraph exports; an InputError for another."""
    if (given := whole("opset", opset)) not in OPSETS:
        raise InputError(f"opset must be {OPSETS[0]} to {OPSETS[-1]}, got {opset}")
    return given


def _check_arguments(model: nn.Module, opset: int, tolerance: float) -> None:
    if not isinstance(model, nn.Module):
        raise InputError(f"export_onnx takes an nn.Module, got {type(model).__name__}")
    checked_opset(opset)
    if not tolerance > 0:
        raise InputError(f"tolerance must be positive, got {tolerance}")


def _refuse_bfloat16(model: nn.Module) -> None:
    """ONNX has the type, but onnxruntime's CPU kernels do not, and a file that is not run is not believed."""
    if any(tensor.dtype == torch.bfloat16 for tensor in (*model.parameters(), *model.buffers())):
        raise InputError(
            "the model is in bfloat16, in which onnxruntime computes nothing on a CPU, so no file could be checked",
            hint="Export model.float() or model.half(); quantize or convert the file afterwards",
        )


def _try(model: nn.Module, call: Call) -> None:
    """One run: the exporter would try every way it has, and print what goes wrong in each."""
    try:
        outputs = model(*call.args, **call.kwargs)
    except Exception as error:  # whatever the user's forward raises
        raise InputError(
            f"{type(model).__name__} does not run on the example inputs: {failed(error)}",
            hint="Pass example_inputs that the model's forward accepts",
        ) from error
    refuse_nan(outputs, "on the example inputs")


def _as_json(report: Mapping[str, Any]) -> str:
    try:
        return json.dumps(dict(report))
    except (TypeError, ValueError) as error:
        raise InputError(f"report cannot be written as JSON: {error}") from error


def _require_onnx() -> None:
    for name in ("onnx", "onnxscript", "onnxruntime"):
        if importlib.util.find_spec(name) is None:
            raise ExportError(f"{name} is not installed", hint="Run: pip install 'kgraph[onnx]'")


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
    call: Call,
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
        program.rename_axes(_batch_axes(graph, [n for n, y in pairs if has_batch(y, call.batch_size())]))
        _clean(graph)
        graph.metadata_props.update(metadata)
    except ExportError:
        raise
    except Exception as error:
        raise ExportError(f"The model could not be exported to ONNX. {reason(error)}") from error
    _save(program, file, _bytes(model) > SINGLE_FILE_LIMIT)
    return names


def _save(program: torch.onnx.ONNXProgram, file: Path, external: bool) -> None:
    """What the system refuses (an OSError) is for `placed` to name."""
    try:
        program.save(file, external_data=external)
    except OSError:
        raise
    except Exception as error:
        raise ExportError(f"The model could not be written as ONNX. {reason(error)}") from error


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
