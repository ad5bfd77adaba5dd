"""The recipe of DKS and TAT as passes, and the check of what came out."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, field

import torch
from torch import fx

from kgraph.analysis import Ledger
from kgraph.canonical import operation_name
from kgraph.capture import Graph
from kgraph.checks import choice, flag, weight_of_shortcut
from kgraph.errors import TargetError
from kgraph.kernel import SAME, Kernel, Pairs
from kgraph.methods import DKS, TAT, Method
from kgraph.modules import ShapedActivation
from kgraph.nonlinear import Region, find_regions
from kgraph.passes.base import Pass, Pipeline, Workspace
from kgraph.passes.per_location_norm import InsertPerLocationNorm
from kgraph.passes.reinitialize import Reinitialize
from kgraph.passes.remove_norms import RemoveNorms
from kgraph.passes.rescale import Rescale
from kgraph.passes.scale_residuals import ScaleResiduals, reweight
from kgraph.passes.shape_activations import ShapeActivations, is_kinked, is_leaky, keep_unshaped, kept_reason
from kgraph.products import bounding_weight, unbounded
from kgraph.propagate import Propagation
from kgraph.subnetworks import Subnetworks, find_subnetworks
from kgraph.targets import ShapingTargets, solve_kind, solve_targets

DEFAULT_WEIGHT = 0.8
SHAPED_MODE = "eval"
"""Without norms the modes differ by dropout only, whose noise is no part of the kernel's shape."""
_RAISED = (DEFAULT_WEIGHT, 0.9, 0.95, 0.98)
_Q_TOLERANCE = 1e-6
_SAMPLED_TOLERANCE = 0.05
_PLAN_TOLERANCE = 0.01


@dataclass(frozen=True)
class Plan:
    """Options of a transform."""

    method: Method
    shortcut_weight: float | None = None
    seed: int = 0
    distribution: str = "suo"
    per_location_norm: bool = False
    progress: Callable[[str], None] | None = field(default=None, repr=False)

    def __post_init__(self) -> None:
        flag("per_location_norm", self.per_location_norm)
        choice("distribution", self.distribution, ("suo", "gaussian"))
        if self.shortcut_weight is not None:
            weight_of_shortcut(self.shortcut_weight)

    def structure(self) -> Pipeline:
        """Passes before the targets are known: norms, residual sums, weights."""
        weight = DEFAULT_WEIGHT if self.shortcut_weight is None else self.shortcut_weight
        first: tuple[Pass, ...] = (InsertPerLocationNorm(),) if self.per_location_norm else ()
        steps = (*first, RemoveNorms(), ScaleResiduals(weight), Reinitialize(self.distribution))
        return Pipeline(steps, self.progress)

    def shaping(self, method: Method, targets: ShapingTargets) -> Pipeline:
        """Passes that need them: activations, then the constants that restore q = 1."""
        return Pipeline((ShapeActivations(method, targets), Rescale()), self.progress)


@dataclass(frozen=True)
class Outcome:
    """A rewritten graph and how it came about."""

    graph: Graph
    shortcut_weight: float | None
    targets: ShapingTargets | None
    ledger: Ledger
    propagation: Propagation


def is_free(region: Region) -> bool:
    """Whether the recipe shapes this nonlinear layer."""
    return not kept_reason(region)


def prepare(graph: Graph, shortcut_weight: float) -> Workspace:
    """Remove norms and weight residual sums: the graph whose subnetworks the targets are about."""
    work = Workspace(graph, SHAPED_MODE)
    Pipeline((RemoveNorms(), ScaleResiduals(shortcut_weight))).run(work)
    return work


def rewrite(graph: Graph, plan: Plan, first: Propagation | None = None) -> Outcome:
    """Run the whole recipe on ``graph``, in place; ``first`` is its analysis, where there is one already."""
    work = Workspace(graph, SHAPED_MODE, plan.seed, first)
    plan.structure().apply(work)
    method = _suited(work, plan.method)
    weight, targets = _solve(work, plan, method)
    if targets is not None:
        plan.shaping(method, targets).apply(work)
    else:
        keep_unshaped(work, work.regions())
        Rescale().apply(work)
    graph.module.recompile()
    _check(work, method)
    if targets is not None:
        _compare(work, method)
    return Outcome(graph, weight, targets, work.ledger(repr(plan.method)), work.propagation())


def _suited(work: Workspace, method: Method) -> Method:
    """TAT needs activations of one kind: all leaky relus, or all smooth. A mixture uses DKS throughout."""
    if isinstance(method, DKS):
        return method
    regions = [r for r in work.regions() if is_free(r)]
    leaky = [is_leaky(r) for r in regions]
    kinked = [r for r, own in zip(regions, leaky, strict=True) if not own and is_kinked(r)]
    if all(leaky) or (not any(leaky) and not kinked):
        return method
    names = sorted({operation_name(r.end) for r in regions})
    reason = "kinks other than a leaky relu's" if kinked and not any(leaky) else "leaky relus and other activations"
    work.notes.append(f"TAT does not cover {reason} ({', '.join(names)}) in one network: DKS is used throughout")
    return DKS()


def _solve(work: Workspace, plan: Plan, method: Method) -> tuple[float, ShapingTargets | None]:
    """Targets at the given shortcut weight, or at the smallest of a few that meets them."""
    given = plan.shortcut_weight
    weights = _planned_weights(work) if given is None else (given,)
    found = find_subnetworks(work.graph, work.propagation(), free=is_free)
    if not found.free:
        work.unmet.append("the model has no activation to shape")
        return weights[0], None
    failure: TargetError | None = None
    for weight in weights:
        if weight != weights[0]:
            if not reweight(work, weight):
                break
            found = find_subnetworks(work.graph, work.propagation(), free=is_free)
        try:
            targets = _targets(found, method)
        except TargetError as error:
            failure = failure or error
            continue
        if weight != weights[0]:
            work.notes.append(f"shortcut_weight raised to {weight}: {failure}")
        return weight, targets
    reweight(work, weights[0])
    assert failure is not None
    return weights[0], _without_products(work, method, failure)


def _planned_weights(work: Workspace) -> tuple[float, ...]:
    """Weights to try, from the one that bounds what products do to q."""
    first, why = bounding_weight(work, DEFAULT_WEIGHT, is_free)
    if why:
        work.notes.append(f"shortcut_weight raised to {first}: {why}")
    return (first, *(weight for weight in _RAISED if weight > first))


def _targets(found: Subnetworks, method: Method) -> ShapingTargets:
    targets = solve_targets(found, method)
    _require_kind(found, method, targets)
    return targets


def _require_kind(found: Subnetworks, method: Method, targets: ShapingTargets) -> None:
    """TAT solves for both kinds of activation; the one the network has must have a solution."""
    if isinstance(method, DKS):
        return
    leaky = any(is_leaky(region) for region in found.free)
    if (targets.negative_slope if leaky else targets.kappa) is None:
        solve_kind(found, method, leaky=leaky)  # raises, saying what binds


def _without_products(work: Workspace, method: Method, failure: TargetError) -> ShapingTargets | None:
    """What can be met when a product counts as the larger of its two branches; the rest is unmet, and said so."""
    work.unmet.append(str(failure))
    try:
        return _targets(find_subnetworks(work.graph, work.propagation(), free=is_free, products_add=False), method)
    except TargetError as error:
        work.unmet.append(str(error))
        return None


def _check(work: Workspace, method: Method) -> None:
    """Say where q is not 1 at a nonlinear layer's input, and which node is the cause; check the maximal slope."""
    kernels = work.kernels()
    regions = find_regions(work.graph.module, kernels.__contains__)
    gates = {node for region in regions if region.gate for node in region.nodes}
    cause = _Causes(work, gates)
    causes: dict[fx.Node, list[Region]] = {}
    for region in regions:
        if region.source in kernels and not region.gate and _off(work, region.source):
            causes.setdefault(cause.of(region.source), []).append(region)
    for node, found in causes.items():
        q = float(kernels[node].merged.q) if node in kernels else float("nan")
        first = float(kernels[found[0].source].merged.q)
        listed = ", ".join(r.end.name for r in found[:3]) + (f" and {len(found) - 3} more" if len(found) > 3 else "")
        work.unmet.append(
            f"q is not 1 at the input of {listed} (q = {first:.4g}): {node.name} ({operation_name(node)}) "
            f"has q = {q:.4g}, {_reason(node)}"
        )
    own = find_subnetworks(work.graph, work.propagation(), free=is_free)
    if line := unbounded(own):
        work.unmet.append(line)
    if isinstance(method, DKS):
        largest = own.max_slope()
        if largest.value > method.zeta * (1 + 1e-6):
            work.unmet.append(f"max slope is {largest.value:.6g} > zeta = {method.zeta:g} in the subnetwork {largest}")


def _compare(work: Workspace, method: Method) -> None:
    """Say what the local maps promise at the output and what the propagation finds there, where they differ.

    The targets are about local maps at q = 1 of Gaussian inputs, and pooling counts as keeping c.
    """
    own = find_subnetworks(work.graph, work.propagation(), free=lambda region: False)
    leaky = isinstance(method, TAT) and any(is_leaky(region) for region in own.regions if is_free(region))
    planned = own.c_values() if leaky else own.slopes()
    found = {node: _measure(kernel, leaky) for node, kernel in work.kernels().items()}
    apart = {node for node in planned if node in found and _differ(planned[node], found[node])}
    output = next(node for node in work.nodes if node.op == "output")
    final = next((node for node in output.all_input_nodes if node in apart), None)
    if final is None:
        return
    first = next((n for n in planned if n in apart and not any(b in apart for b in n.all_input_nodes)), final)
    quantity, definition = _definition(method, leaky)
    shaped = isinstance(work.module(first), ShapedActivation)
    why = "its input is not Gaussian" if shaped else f"{operation_name(first)} changes c by itself"
    work.notes.append(
        f"{quantity} from input to output is planned to be {planned[final]:.4g}, and the analysis finds "
        f"{found[final]:.4g} at {final.name}; they part first at {first.name}: {why}{_not_gaussian(work, own)}. "
        f"{definition} is about local maps of Gaussian inputs, with pooling counted as keeping c"
    )


def _not_gaussian(work: Workspace, own: Subnetworks) -> str:
    kernels = work.kernels()
    sources = [region.source for region in own.regions if not region.gate and region.source in kernels]
    other = sum(not all(part.gaussian for part in kernels[source].parts) for source in sources)
    return f"; the inputs of {other} of {len(sources)} activations are not Gaussian" if other else ""


def _definition(method: Method, leaky: bool) -> tuple[str, str]:
    if isinstance(method, DKS):
        return "the slope C'(1)", f"The target zeta = {method.zeta:g}"
    if leaky:
        return "C(0)", f"The target eta = {method.eta:g}"
    return "the slope C'(1)", f"The target tau = {method.tau:g}"


def _measure(kernel: Kernel, leaky: bool) -> float:
    part = kernel.merged
    value = part.cov[Pairs().cosines.index(0.0), SAME] if leaky else part.slope[Pairs.UNIT, SAME]
    return float(value / part.q) if float(part.q) > 0 else math.nan


def _differ(planned: float, found: float) -> bool:
    """By more than one percent; a c value near 0 by more than .01."""
    return abs(found - planned) > _PLAN_TOLERANCE * max(abs(planned), 1.0 if abs(planned) < _PLAN_TOLERANCE else 0.0)


def _off(work: Workspace, node: fx.Node) -> bool:
    kernel = work.kernels()[node]
    return abs(float(kernel.merged.q) - 1) > (_SAMPLED_TOLERANCE if kernel.how.level >= 2 else _rounding(work))


def _rounding(work: Workspace) -> float:
    """What q may differ by: half precision rounds a weight by up to eps / 2, and with it q by up to eps."""
    halves = {p.dtype for p in work.graph.root.parameters()} & {torch.float16, torch.bfloat16}
    return max([_Q_TOLERANCE, *(torch.finfo(one).eps for one in halves)])


class _Causes:
    """The earliest node upstream whose inputs still have q = 1 (a gate's own q is not meant to be 1)."""

    def __init__(self, work: Workspace, gates: set[fx.Node]) -> None:
        self.work, self.gates, self.known = work, gates, dict[fx.Node, fx.Node]()

    def of(self, node: fx.Node) -> fx.Node:
        """Follow the first input that is off, up to one whose cause is known."""
        way = [node]
        while way[-1] not in self.known and (before := self._before(way[-1])) is not None:
            way.append(before)
        found = self.known.get(way[-1], way[-1])
        self.known |= dict.fromkeys(way, found)
        return found

    def _before(self, node: fx.Node) -> fx.Node | None:
        sources = _sources(node, self.work.kernels())
        return next((n for n in sources if n not in self.gates and _off(self.work, n)), None)


def _sources(node: fx.Node, kernels: dict[fx.Node, Kernel]) -> list[fx.Node]:
    """Kernels a node's q comes from: through lists (chunk, split), and through attention the values only."""
    inputs = list(node.all_input_nodes)
    if operation_name(node) == "scaled_dot_product_attention":
        inputs = [n for n in node.args[2:3] if isinstance(n, fx.Node)]
    found: list[fx.Node] = []
    for before in inputs:
        found += [before] if before in kernels else _sources(before, kernels)
    return found


def _reason(node: fx.Node) -> str:
    name = operation_name(node)
    reasons = {
        "scaled_dot_product_attention": "attention averages positions; how much depends on the data",
        "matmul": "attention averages positions; how much depends on the data",
        "lstm": "recurrent cells keep their own initialization",
        "gru": "recurrent cells keep their own initialization",
        "placeholder": "the input itself",
        "cat": "its operands have different q",
    }
    if node.op == "call_module":
        return "its local Q map does not give q = 1 here"
    return reasons.get(name, "the operation changes q by itself")
