"""The calls people make: `analyze`, `transform`, `shaping_targets`, `export_onnx`."""

from __future__ import annotations

import copy
from dataclasses import dataclass, replace
from os import PathLike

from torch import Tensor, nn

from kgraph.analysis import Ledger
from kgraph.capture import Graph, capture, check_model
from kgraph.export import OnnxExport
from kgraph.export import export_onnx as _export_onnx
from kgraph.inputs import resolve_inputs
from kgraph.lift import EmittedModule
from kgraph.methods import Method, resolve_method
from kgraph.passes.fold_parametrizations import fold_parametrizations
from kgraph.passes.remove_norms import NORMS
from kgraph.propagate import Propagation, propagate, summarize
from kgraph.recipe import Plan, is_free, prepare, rewrite
from kgraph.report import Comparison, Report
from kgraph.subnetworks import find_subnetworks
from kgraph.targets import ShapingTargets, solve_targets


@dataclass(frozen=True)
class TransformRecord:
    """What a transform did; `shaped.kgraph`.

    Attributes:
        method: the options used.
        shortcut_weight: weight of shortcuts, as given or chosen.
        targets: local targets, None where none could be solved.
        ledger: every change, what was kept and why, what is unmet.
        before, after: reports of the model as given (in its own mode) and as emitted (in eval mode: without norms
            the modes differ by dropout only, whose noise is no part of the kernel's shape).
    """

    method: Method
    shortcut_weight: float
    targets: ShapingTargets | None
    ledger: Ledger
    before: Report
    after: Report

    @property
    def comparison(self) -> Comparison:
        """Before and after side by side."""
        return Comparison(self.before, self.after, self.ledger)


def analyze(
    model: nn.Module,
    example_inputs: object = None,
    *,
    positions: str = "exchangeable",
    mode: str | None = None,
) -> Report:
    """Kernel report of a model as it is: q, c and slope at every node.

    Args:
        model: any bare module; left as it was.
        example_inputs: tensor, tuple or dict; inferred when None.
        positions: position model.
        mode: "train" (batch statistics, dropout) or "eval"; the model's own when None.

    Raises:
        ModelError, InputError, CaptureError: see `kgraph.errors`.
    """
    check_model(model)
    graph = capture(model, example_inputs)
    return _report(graph, propagate(graph, mode=mode or _mode(model), positions=positions))


def _mode(model: nn.Module) -> str:
    return "train" if model.training else "eval"


def _report(graph: Graph, result: Propagation) -> Report:
    analysis = summarize(graph, result)
    subnetworks = find_subnetworks(graph, result)
    if subnetworks.regions and _maps_hold(graph):
        extreme = subnetworks.max_slope()
        analysis = replace(analysis, max_slope=extreme.value, max_slope_at=str(extreme))
    return Report(analysis)


def _maps_hold(graph: Graph) -> bool:
    """Subnetwork maps are made of local maps at q = 1; normalization layers change c by themselves."""
    return not any(node.target in NORMS for node in graph.module.graph.nodes)


def transform(
    model: nn.Module,
    method: Method | str = "tat",
    example_inputs: object = None,
    *,
    shortcut_weight: float | None = None,
    seed: int = 0,
    inplace: bool = False,
    distribution: str = "suo",
    per_location_norm: bool = False,
) -> EmittedModule:
    """Rewrite a model so that its network-wide kernel has the shape that trains well.

    Norms are removed, residual sums weighted, affine layers re-drawn, activations shaped. The result is a standard
    module over (a copy of) the model's own submodules and state-dict keys; ``result.kgraph`` is the record.

    Args:
        model: any bare module; never touched unless ``inplace``.
        method: "dks", "tat", `DKS(zeta=...)` or `TAT(eta=..., tau=...)`.
        example_inputs: tensor, tuple or dict; inferred when None.
        shortcut_weight: weight of shortcuts in [0, 1]; 0 removes them; None: .8, raised where the targets need it.
        seed: of the re-drawn weights.
        inplace: let the result own the model's own submodules and parameters instead of copies.
        distribution: "suo" (orthogonal) or "gaussian" weights.
        per_location_norm: normalize every input location to q = 1 in front of the model.

    Raises:
        ModelError, InputError, CaptureError, PassError: see `kgraph.errors`. A target that no local value meets
            is no error here: the nearest is built and ``result.kgraph.ledger.unmet`` says what is missing.
    """
    check_model(model)
    chosen = resolve_method(method)
    inputs = resolve_inputs(model, example_inputs)
    mode = _mode(model)
    owned = model if inplace else _copied(model)
    folded = fold_parametrizations(owned)
    graph = capture(owned, inputs)
    first = propagate(graph, mode=mode)
    before = _report(graph, first)
    plan = Plan(chosen, shortcut_weight, seed, distribution, per_location_norm)
    outcome = rewrite(graph, plan, first)
    ledger = _with_folded(outcome.ledger, folded)
    record = TransformRecord(
        chosen,
        outcome.shortcut_weight,
        outcome.targets,
        ledger,
        before,
        after=_report(outcome.graph, outcome.propagation),
    )
    shaped = outcome.graph.emit()
    shaped.train(model.training)
    shaped.meta["kgraph"] = record
    return shaped


def _copied(model: nn.Module) -> nn.Module:
    """A copy to rewrite; tensors that a forward hook computed (the older weight_norm) are copied as values."""
    attributes = [value for module in model.modules() for value in vars(module).values()]
    computed = [value for value in attributes if isinstance(value, Tensor) and not value.is_leaf]
    return copy.deepcopy(model, {id(tensor): tensor.detach().clone() for tensor in computed})


def _with_folded(ledger: Ledger, names: list[str]) -> Ledger:
    if not names:
        return ledger
    note = f"parametrizations folded into plain weights: {', '.join(names)}"
    return replace(ledger, notes=(note, *ledger.notes))


def shaping_targets(
    model: nn.Module,
    method: Method | str = "tat",
    example_inputs: object = None,
    shortcut_weight: float | None = None,
) -> ShapingTargets:
    """Local slope, curvature and negative slope that a model's graph affords under a method.

    Args:
        shortcut_weight: None means .8.

    Raises:
        TargetError: no local value meets the target; names the binding subnetwork and its minimum.
    """
    check_model(model)
    chosen = resolve_method(method)
    owned = _copied(model)
    fold_parametrizations(owned)
    weight = 0.8 if shortcut_weight is None else shortcut_weight
    work = prepare(capture(owned, example_inputs, verify=False), weight)
    return solve_targets(find_subnetworks(work.graph, work.propagation(), free=is_free), chosen)


def export_onnx(
    model: nn.Module, path: str | PathLike[str], example_inputs: object = None, *, opset: int = 20
) -> OnnxExport:
    """Export to ONNX, check it, run it in onnxruntime at two batch sizes, and store the kernel report inside.

    Raises:
        ExportError, InputError: see `kgraph.export`.
    """
    check_model(model)
    inputs = resolve_inputs(model, example_inputs)
    record = model.kgraph if isinstance(model, EmittedModule) else None
    report = record.after.to_dict() if isinstance(record, TransformRecord) else None
    return _export_onnx(model, path, inputs.args or inputs.kwargs, opset=opset, report=report)


__all__ = ["TransformRecord", "analyze", "export_onnx", "shaping_targets", "transform"]
