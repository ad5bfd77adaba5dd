"""The check of an exported ONNX file: onnxruntime against the model, at several batch sizes."""

from __future__ import annotations

import inspect
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from kgraph.errors import ExportError, InputError

if TYPE_CHECKING:
    import onnxruntime as ort

ExampleInputs = Tensor | Sequence[Any] | Mapping[str, Any]


@dataclass(frozen=True)
class Call:
    """The arguments of one forward call."""

    args: tuple[Any, ...]
    kwargs: dict[str, Any]

    @classmethod
    def of(cls, example: ExampleInputs) -> Call:
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

    def resized(self, batch: int) -> Call:
        """The same call at another batch size: rows repeated, repeated float rows perturbed by 1%."""
        own, generator = self.batch_size(), torch.Generator().manual_seed(0)

        def resize(leaf: Any) -> Any:
            if not has_batch(leaf, own):
                return leaf
            rows = leaf[torch.arange(batch, device=leaf.device) % own]
            if rows.is_floating_point():  # ids and masks of integers must stay valid: they are only repeated
                noise = 1 + 0.01 * torch.randn(rows[own:].shape, generator=generator)
                rows[own:] *= noise.to(rows)
            return rows

        args, kwargs = pytree.tree_map(resize, (self.args, self.kwargs))
        return Call(args, kwargs)

    def bound(self, model: nn.Module) -> tuple[Call, dict[str, Any]]:
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
        shapes = pytree.tree_map(lambda leaf: dynamic if has_batch(leaf, own) else None, dict(bound))
        return Call(self.args, kwargs), shapes


def has_batch(leaf: Any, batch: int) -> bool:
    return isinstance(leaf, Tensor) and leaf.ndim > 0 and leaf.shape[0] == batch


def reason(error: BaseException) -> str:
    """The first line of the error at the root of a chain: the exporter's own message is a page."""
    while error.__cause__ is not None:
        error = error.__cause__
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return f"{type(error).__name__}: {lines[0] if lines else ''}"


def checked_session(file: Path) -> ort.InferenceSession:
    """An onnxruntime session of a file that onnx's full check accepts."""
    import onnx
    import onnxruntime as ort

    options = ort.SessionOptions()
    options.log_severity_level = 3
    try:
        onnx.checker.check_model(str(file), full_check=True)
        return ort.InferenceSession(str(file), options, providers=["CPUExecutionProvider"])
    except Exception as error:
        raise ExportError(f"The exported file is not valid. {reason(error)}") from error


def parity(
    model: nn.Module, session: ort.InferenceSession, names: list[str | None], call: Call, tolerance: float
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
        raise ExportError(f"The model itself does not run {where}. {reason(error)}") from error
    try:
        found: list[Any] = list(session.run(outputs, feed))
    except Exception as error:
        raise ExportError(f"onnxruntime could not run the file {where}. {reason(error)}") from error
    if len(found) != len(wanted) or not found:
        raise ExportError(f"The file has {len(found)} outputs, the model {len(wanted)}")
    refuse_nan(wanted, where)
    ratios = {
        name: _error(torch.from_numpy(a), b, tolerance) for name, a, b in zip(outputs, found, wanted, strict=True)
    }
    worst = max(ratios, key=lambda name: ratios[name][0] / ratios[name][1])
    error, allowed = ratios[worst]
    if not error <= allowed:
        raise ExportError(f"Output '{worst}' differs by {error:.3g} {where}, more than the {allowed:.3g} allowed")
    return max(error for error, _ in ratios.values())


def refuse_nan(outputs: object, where: str) -> None:
    """An ExportError for outputs of the model itself that no file can be compared with."""
    for i, value in enumerate(pytree.tree_leaves(outputs)):
        if isinstance(value, Tensor) and bool(value.isnan().any()):
            raise ExportError(
                f"Output {i} of the model itself holds nan {where}, which no file can be compared with",
                hint="Pass example_inputs on which the model computes numbers",
            )


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
