"""The calls people make: `analyze`, `transform`, `shaping_targets`, `export_onnx`."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace
from os import PathLike

from torch import nn

from kgraph.analysis import Ledger
from kgraph.calibration import calibrate
from kgraph.capture import Graph, capture, check_model, unread
from kgraph.casts import follow_types
from kgraph.certificate import Certificate
from kgraph.channel_dims import channel_dim
from kgraph.checks import choice, flag, mode_of, seeded, weight_of_shortcut, with_finite_values
from kgraph.copies import copied
from kgraph.emitted import EmittedModule
from kgraph.errors import InputError
from kgraph.export import OnnxExport
from kgraph.export import export_onnx as _export_onnx
from kgraph.gradients import read_gradients
from kgraph.gram.stops import not_followed
from kgraph.input_moments import InputMoments, neighbours, plainly_not_white, plainly_smooth
from kgraph.inputs import resolve_inputs
from kgraph.log_determinants import false_log_determinants, find_log_determinants
from kgraph.methods import DKS, TAT, Auto, Method
from kgraph.modes import depends_on_mode
from kgraph.opaque import unseen
from kgraph.passes.fold import fold as _fold
from kgraph.passes.fold_parametrizations import constraints, fold_hooks, fold_parametrizations, has_hooks
from kgraph.passes.remove_norms import NORMS
from kgraph.promised import places_only
from kgraph.propagate import Propagation, probes_of, propagate, real_inputs
from kgraph.recipe import Outcome, Plan, is_free, prepare, rewrite
from kgraph.record import LoadWatch, TransformRecord
from kgraph.report import Report
from kgraph.selection import choose
from kgraph.side_results import lost_results, stored_results
from kgraph.subnetworks import find_subnetworks
from kgraph.summarize import summarize
from kgraph.systems import AnyMethod, System, compose, resolve_methods
from kgraph.targets import ShapingTargets, solve_targets
from kgraph.untouched import is_uninitialized

_OTHER_MODE = (
    "before and after are of train mode, where dropout raises q and lowers c; what was planned holds without that "
    "noise: kgraph.analyze(shaped, mode='eval')"
)


def analyze(
    model: nn.Module,
    example_inputs: object = None,
    *,
    positions: str = "exchangeable",
    mode: str | None = None,
    parametrization: str = "standard",
    count_frozen: bool = False,
    inputs: str | InputMoments = "white",
) -> Report:
    """Kernel report of a model as it is: q, c, slope and NTK at every node.

    Args:
        model: any bare module; left as it was.
        example_inputs: tensor, tuple or dict; inferred when None.
        positions: position model.
        mode: "train" (batch statistics, dropout) or "eval"; the model's own when None.
        parametrization: of the NTK: "standard" (the parameters as PyTorch trains them) or "ntk".
        count_frozen: whether parameters with ``requires_grad=False`` have their part in the NTK too; else they have
            none.
        inputs: what they are taken for: "white" noise (q = 1, positions unrelated), "data" (the second moments of
            ``example_inputs``, a batch as the model will see it: at one position and at two, of one input and of two)
            or `InputMoments`. Pairs of inputs then lie between two of the batch and one with itself.

    Raises:
        ModelError, InputError, CaptureError: see `kgraph.errors`.
    """
    check_model(model)
    if not isinstance(inputs, InputMoments):
        choice("inputs", inputs, ("white", "data"))
    flag("count_frozen", count_frozen)
    mode = mode_of(model, mode)
    choice("positions", positions, ("exchangeable",))
    choice("parametrization", parametrization, ("standard", "ntk"))
    graph = _captured(model, example_inputs)
    pairs = probes_of(graph, inputs)
    graph.notes += _of_inputs(graph, inputs)
    result = propagate(
        graph, mode=mode, pairs=pairs, positions=positions, parametrization=parametrization, count_frozen=count_frozen
    )
    return _report(graph, result, not_followed(graph)[1])


def _of_inputs(graph: Graph, inputs: str | InputMoments) -> list[str]:
    """Where inputs are plainly no white noise and are taken for it, or are token ids and have no moments."""
    real = real_inputs(graph)
    if inputs == "data" and not real:
        return ["the inputs are no numbers: tokens are taken to differ, whatever inputs= says"]
    if inputs != "white":
        return []
    lines = []
    for node, x in real.items():
        channel = channel_dim(node, x.ndim)
        try:
            moments = InputMoments.of(x, channel)
        except InputError:  # examples that give the shapes alone
            continue
        if plainly_not_white(moments, x.numel()):
            lines.append(f"{node.name} is analysed as white noise and has {moments}: inputs='data' takes it as it is")
        elif plainly_smooth(x, channel):
            near = f"{neighbours(x, channel):.2g}"
            lines.append(f"{node.name} is analysed as white noise, and its neighbouring positions correlate by {near}")
    return lines


def _captured(model: nn.Module, example_inputs: object) -> Graph:
    """The model's graph; of a copy with plain weights where forward hooks compute them, which none can capture."""
    if not has_hooks(model) and not is_uninitialized(model):
        return capture(model, example_inputs)
    owned = copied(model)
    names = ", ".join(fold_hooks(owned))
    graph = capture(owned, example_inputs)
    if names:
        graph.notes.append(f"{names}: computed by a forward hook, analysed at the present value as a plain weight")
    return graph


def _mode(model: nn.Module) -> str:
    return "train" if model.training else "eval"


def _report(graph: Graph, result: Propagation, no_ntk: str = "") -> Report:
    analysis = summarize(graph, result)
    if no_ntk:
        rows = tuple(replace(row, ntk=math.nan) for row in analysis.nodes)
        analysis = replace(analysis, nodes=rows, notes=(*analysis.notes, no_ntk))
    subnetworks = find_subnetworks(graph, result)
    if subnetworks.regions and _maps_hold(graph):
        extreme = subnetworks.max_slope()
        analysis = replace(analysis, max_slope=extreme.value, max_slope_at=str(extreme))
    return Report(analysis)


def _noting(report: Report, lines: tuple[str, ...]) -> Report:
    return Report(replace(report.analysis, notes=(*report.analysis.notes, *lines))) if lines else report


def _maps_hold(graph: Graph) -> bool:
    """Subnetwork maps are made of local maps at q = 1; normalization layers change c by themselves."""
    return not any(node.target in NORMS for node in graph.module.graph.nodes)


def transform(
    model: nn.Module,
    method: AnyMethod | str | Sequence[AnyMethod | str] = "auto",
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
        method: "auto" (the one that trained better: DKS; a note says why), "dks", "tat",
            `DKS(zeta=...)`, `TAT(eta=..., tau=...)`, another method, or a list of methods that set different things.
        example_inputs: tensor, tuple or dict; inferred when None. Of a batch of at least 8 that is plainly no white
            noise the constants behind averages over positions are measured, where white noise tells nothing.
        shortcut_weight: weight of shortcuts in [0, 1]; 0 removes them; None: .8, raised where the targets need it.
        seed: of the re-drawn weights.
        inplace: let the result own the model's own submodules and parameters instead of copies.
        distribution: "suo" (orthogonal) or "gaussian" weights.
        per_location_norm: normalize every input location to q = 1 in front of the model.

    ``shortcut_weight``, ``distribution`` and ``per_location_norm`` are options of DKS and TAT.

    Raises:
        ModelError, InputError, CaptureError, PassError: see `kgraph.errors`. A target that no local value meets
            is no error here: the nearest is built and ``result.kgraph.ledger.unmet`` says what is missing.
    """
    check_model(model)
    chosen, seed = resolve_methods(method), seeded(seed)
    flag("inplace", inplace)
    plan = _plan(chosen, Plan(TAT(), shortcut_weight, seed, distribution, per_location_norm))
    inputs = resolve_inputs(model, example_inputs)
    mode = _mode(model)
    owned = model if inplace else copied(model)
    constrained = [f"{name} is held by a parametrization, which is folded and lost" for name in constraints(owned)]
    folded = fold_parametrizations(owned)
    graph = capture(owned, inputs)
    follow_types(graph)
    left_out, flows = unread(graph), find_log_determinants(owned, inputs)
    stored = stored_results(owned, inputs)
    first = propagate(graph, mode=mode)
    gradients = read_gradients(graph)
    why: tuple[str, ...] = ()
    if plan is not None and isinstance(chosen[0], Auto):
        suited, reason = choose()
        chosen, plan, why = (suited,), replace(plan, method=suited), (reason,)
    before = _report(graph, first, gradients.no_ntk)
    outcome = rewrite(graph, plan, first) if plan is not None else _by_systems(graph, chosen, seed, first)
    ledger = _with_lost(
        _with_notes(replace(outcome.ledger, notes=(*why, *outcome.ledger.notes)), folded, left_out, graph.left_out),
        graph,
    )
    found = _in_mode(outcome.graph, outcome.propagation, mode)
    if plan is not None and found.values is not outcome.propagation.values:
        ledger = replace(ledger, notes=(*ledger.notes, _OTHER_MODE))
    after = evaluated = _report(outcome.graph, found, gradients.no_ntk)
    planned = _in_mode(outcome.graph, outcome.propagation, "eval")
    if planned.values is not found.values:
        evaluated = Report(summarize(outcome.graph, planned))
    shaped = outcome.graph.emit()
    _out_of_place(shaped)
    _set_modes(shaped, model)
    lost = (*constrained, *unseen(outcome.graph.module), *lost_results(stored, model, shaped, inputs))
    lost += (*gradients.lost, *gradients.lost_by(shaped))
    ledger = replace(ledger, unmet=(*ledger.unmet, *lost, *false_log_determinants(shaped, inputs, flows)))
    measured = calibrate(shaped, inputs, outcome.promise.channels)
    ledger = replace(ledger, changes=(*ledger.changes, *measured.changes), notes=(*ledger.notes, *measured.notes))
    after, evaluated = _noting(after, measured.notes), _noting(evaluated, measured.notes)
    watch = LoadWatch().over(shaped)
    used = chosen[0] if len(chosen) == 1 else chosen
    results = (outcome.shortcut_weight, outcome.targets, ledger, before, after, evaluated)
    shaped.meta["kgraph"] = TransformRecord(used, *results, outcome.promise, outcome.laws, watch)
    return shaped


def _plan(chosen: tuple[AnyMethod, ...], plan: Plan) -> Plan | None:
    """The plan of DKS or TAT (which stand alone: they set everything), or None for systems, which have no options."""
    if isinstance(chosen[0], Auto):
        return plan
    if isinstance(chosen[0], (DKS, TAT)):
        return replace(plan, method=chosen[0])
    plain = Plan(plan.method, seed=plan.seed)
    for name in ("shortcut_weight", "distribution", "per_location_norm"):
        if getattr(plan, name) != getattr(plain, name):
            raise InputError(f"{name} is an option of DKS and TAT", hint="Leave it out")
    return None


def _out_of_place(shaped: nn.Module) -> None:
    """A dropout in place would write over what the shaped activation before it keeps for the gradient."""
    for module in shaped.modules():
        if isinstance(module, nn.modules.dropout._DropoutNd):
            module.inplace = False


def _in_mode(graph: Graph, found: Propagation, mode: str) -> Propagation:
    """The kernels of a mode: as found, where the graph computes the same in both."""
    if found.mode == mode:
        return found
    return propagate(graph, mode=mode) if depends_on_mode(graph.module.graph) else replace(found, mode=mode)


def _by_systems(graph: Graph, chosen: tuple[AnyMethod, ...], seed: int, first: Propagation) -> Outcome:
    work = compose(graph, [one for one in chosen if isinstance(one, System)], seed, first)
    title = " + ".join(repr(one) for one in chosen)
    return Outcome(graph, None, None, work.ledger(title), work.propagation(), places_only(work), dict(work.laws))


def _set_modes(shaped: nn.Module, model: nn.Module) -> None:
    """Every module as in ``model`` (a frozen BatchNorm stays in eval mode); new ones as the whole."""
    shaped.train(model.training)
    modes = {name: module.training for name, module in model.named_modules(remove_duplicate=False)}
    for name, module in shaped.named_modules(remove_duplicate=False):
        module.training = modes.get(name, module.training)


def _with_notes(ledger: Ledger, folded: list[str], left_out: list[str], output: tuple[str, ...]) -> Ledger:
    notes = list(output)
    if folded:
        notes.append(f"parametrizations folded into plain weights: {', '.join(folded)}")
    if left_out:
        names = ", ".join(left_out[:5]) + (f" and {len(left_out) - 5} more" if len(left_out) > 5 else "")
        notes.append(f"not read by the captured forward, and left out: {names}")
    return replace(ledger, notes=(*notes, *ledger.notes)) if notes else ledger


def _with_lost(ledger: Ledger, graph: Graph) -> Ledger:
    """What the graph does not do and the model does is no shape of the kernel, and yet not what was asked for."""
    mode = f"train mode: what the model does there and not in eval mode is not kept: {graph.lost}" if graph.lost else ""
    return replace(ledger, unmet=(*filter(None, (mode, graph.path)), *ledger.unmet))


def shaping_targets(
    model: nn.Module,
    method: Method | Auto | str = "auto",
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
    chosen = resolve_methods(method)[0]
    if isinstance(chosen, System):
        raise InputError(f"{chosen!r} has no shaping targets", hint="Pass 'dks' or 'tat'")
    owned = copied(model)
    fold_parametrizations(owned)
    weight = 0.8 if shortcut_weight is None else weight_of_shortcut(shortcut_weight)
    if isinstance(chosen, Auto):
        chosen, _ = choose()
    work = prepare(capture(owned, example_inputs, verify=False), weight)
    found = find_subnetworks(work.graph, work.propagation(), free=is_free)
    if not found.free and (lines := unseen(work.graph.module)):
        raise InputError(f"no activation is left to shape: {lines[0]}")
    return solve_targets(found, chosen)


def export_onnx(
    model: nn.Module,
    path: str | PathLike[str],
    example_inputs: object = None,
    *,
    opset: int = 20,
    certificate: Certificate | None = None,
    fold: bool = True,
) -> OnnxExport:
    """Export to ONNX, check it, run it in onnxruntime at two batch sizes, and store the kernel report inside.

    Args:
        certificate: of a transformed model, to be stored too.
        fold: write a transformed model's constants into its weights (`kgraph.fold`); the file is checked against the
            model as it is.

    Raises:
        ExportError, InputError: see `kgraph.export`.
    """
    with_finite_values(check_model(model))
    if certificate is not None and not isinstance(certificate, Certificate):
        raise InputError(f"certificate is {certificate!r}", hint="Pass what shaped.kgraph.certificate() returned")
    inputs = resolve_inputs(model, example_inputs)
    record = model.kgraph if isinstance(model, EmittedModule) else None
    report = None
    if isinstance(record, TransformRecord):
        known = not record.stale and record.emitted.analysis.mode == "eval"  # the mode of the file
        current = record.emitted if known else analyze(model, inputs, mode="eval")
        report = current.to_dict()
    if certificate is not None:
        report = {**(report or {}), "certificate": certificate.to_dict()}
    folded = _fold(model) if flag("fold", fold) and isinstance(model, EmittedModule) else None
    result = _export_onnx(model, path, inputs.args or inputs.kwargs, opset=opset, report=report, written=folded)
    return result if folded is None else replace(result, fold_report=folded.fold_report)


__all__ = ["TransformRecord", "analyze", "export_onnx", "shaping_targets", "transform"]
