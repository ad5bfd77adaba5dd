"""The calls people make: `analyze`, `transform`, `shaping_targets`, `export_onnx`."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from os import PathLike

import torch
from torch import Tensor, nn

from kgraph.analysis import Ledger
from kgraph.capture import Graph, capture, check_model
from kgraph.export import OnnxExport
from kgraph.export import export_onnx as _export_onnx
from kgraph.inputs import resolve_inputs
from kgraph.lift import EmittedModule
from kgraph.methods import Method, resolve_method
from kgraph.passes.fold_parametrizations import fold_hooks, fold_parametrizations, has_hooks
from kgraph.passes.remove_norms import NORMS
from kgraph.propagate import Propagation, propagate, summarize
from kgraph.recipe import Plan, is_free, prepare, rewrite
from kgraph.report import Comparison, Report
from kgraph.subnetworks import find_subnetworks
from kgraph.targets import ShapingTargets, solve_targets

STALE = (
    "a state dict was loaded after the transform: the report describes the module as it was emitted; "
    "kgraph.analyze(module) describes it as it is"
)


class LoadWatch:
    """A post hook of ``load_state_dict`` that remembers that it was called."""

    def __init__(self) -> None:
        self.loaded = False

    def __call__(self, module: nn.Module, incompatible_keys: object) -> None:
        self.loaded = True

    def over(self, emitted: EmittedModule) -> LoadWatch:
        """Watch a module and the modules that it calls: copies and pickles of it keep the hooks of the latter only."""
        called = {str(node.target) for node in emitted.graph.nodes if node.op == "call_module"}
        for module in (emitted, *(emitted.get_submodule(path) for path in sorted(called))):
            module.register_load_state_dict_post_hook(self)
        return self


@dataclass(frozen=True)
class TransformRecord:
    """What a transform did; `shaped.kgraph`.

    Attributes:
        method: the options used.
        shortcut_weight: weight of shortcuts, as given or chosen.
        targets: local targets, None where none could be solved.
        ledger: every change, what was kept and why, what is unmet.
        before, emitted: reports of the model as given (in its own mode) and as emitted (in eval mode: without norms
            the modes differ by dropout only, whose noise is no part of the kernel's shape).
        watch: whether a state dict was loaded since.
    """

    method: Method
    shortcut_weight: float
    targets: ShapingTargets | None
    ledger: Ledger
    before: Report
    emitted: Report
    watch: LoadWatch = field(default_factory=LoadWatch, compare=False, repr=False)

    @property
    def stale(self) -> str:
        """Why the report no longer describes the module, or ""."""
        return STALE if self.watch.loaded else ""

    @property
    def after(self) -> Report:
        """The module as it was emitted; with a note where a state dict was loaded since."""
        if not self.stale:
            return self.emitted
        analysis = self.emitted.analysis
        return Report(replace(analysis, notes=(self.stale, *analysis.notes)))

    @property
    def comparison(self) -> Comparison:
        """Before and after side by side."""
        notes = (self.stale, *self.ledger.notes) if self.stale else self.ledger.notes
        return Comparison(self.before, self.after, replace(self.ledger, notes=notes))


def analyze(
    model: nn.Module,
    example_inputs: object = None,
    *,
    positions: str = "exchangeable",
    mode: str | None = None,
    parametrization: str = "standard",
) -> Report:
    """Kernel report of a model as it is: q, c, slope and NTK at every node.

    Args:
        model: any bare module; left as it was.
        example_inputs: tensor, tuple or dict; inferred when None.
        positions: position model.
        mode: "train" (batch statistics, dropout) or "eval"; the model's own when None.
        parametrization: of the NTK: "standard" (the parameters as PyTorch trains them) or "ntk".

    Raises:
        ModelError, InputError, CaptureError: see `kgraph.errors`.
    """
    check_model(model)
    graph = _captured(model, example_inputs)
    result = propagate(graph, mode=mode or _mode(model), positions=positions, parametrization=parametrization)
    return _report(graph, result)


def _captured(model: nn.Module, example_inputs: object) -> Graph:
    """The model's graph; of a copy with plain weights where forward hooks compute them, which none can capture."""
    if not has_hooks(model):
        with _buffers_kept(model):
            return capture(model, example_inputs)
    owned = _copied(model)
    names = ", ".join(fold_hooks(owned))
    graph = capture(owned, example_inputs)
    graph.notes.append(f"{names}: computed by a forward hook, analysed at the present value as a plain weight")
    return graph


@contextmanager
def _buffers_kept(model: nn.Module) -> Iterator[None]:
    """Put back what a run of the model advances even in eval mode (spectral norm's power iteration, in export)."""
    before = [(buffer, buffer.clone()) for buffer in model.buffers() if not buffer.is_meta]
    try:
        yield
    finally:
        for buffer, value in before:
            if not torch.equal(buffer, value):
                buffer.copy_(value)


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
    after = _report(outcome.graph, outcome.propagation)
    shaped = outcome.graph.emit()
    shaped.train(model.training)
    watch = LoadWatch().over(shaped)
    shaped.meta["kgraph"] = TransformRecord(
        chosen, outcome.shortcut_weight, outcome.targets, ledger, before, after, watch
    )
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
    report = None
    if isinstance(record, TransformRecord):
        current = analyze(model, inputs, mode="eval") if record.stale else record.emitted
        report = current.to_dict()
    return _export_onnx(model, path, inputs.args or inputs.kwargs, opset=opset, report=report)


__all__ = ["TransformRecord", "analyze", "export_onnx", "shaping_targets", "transform"]
