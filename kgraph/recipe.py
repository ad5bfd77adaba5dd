"""The recipe of DKS and TAT as passes, and the check of what came out."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

from kgraph.analysis import Ledger
from kgraph.canonical import operation_name
from kgraph.capture import Graph
from kgraph.checks import choice, flag, weight_of_shortcut
from kgraph.closed_loop import Planned, attainable, keeps, planned_maps, settle
from kgraph.errors import TargetError
from kgraph.methods import DKS, Method
from kgraph.opaque import unseen
from kgraph.passes.base import Pass, Pipeline, Workspace
from kgraph.passes.per_location_norm import InsertPerLocationNorm
from kgraph.passes.reinitialize import Reinitialize
from kgraph.passes.remove_norms import RemoveNorms
from kgraph.passes.rescale import Rescale
from kgraph.passes.scale_residuals import ScaleResiduals, reweight
from kgraph.passes.shape_activations import ShapeActivations, is_kinked, is_leaky, keep_unshaped
from kgraph.products import bounding_weight
from kgraph.promised import Promise, promised
from kgraph.promises import check, compare, is_free
from kgraph.propagate import Propagation
from kgraph.subnetworks import Subnetworks, find_subnetworks
from kgraph.targets import ShapingTargets, solve_kind, solve_targets
from kgraph.weight_laws import Law

DEFAULT_WEIGHT = 0.8
SHAPED_MODE = "eval"
"""Without norms the modes differ by dropout only, whose noise is no part of the kernel's shape."""
_RAISED = (DEFAULT_WEIGHT, 0.9, 0.95, 0.98)


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

    def shape(self, work: Workspace, method: Method, targets: ShapingTargets) -> tuple[ShapingTargets, Planned]:
        """Passes that need them: activations, settled on the propagation, then what restores q = 1."""
        Pipeline((ShapeActivations(method, targets),), self.progress).apply(work)
        planned = planned_maps(work, method)
        targets = settle(work, method, targets, planned)
        Pipeline((Rescale(keep=keeps(method)),), self.progress).apply(work)
        return targets, attainable(work, method, targets, planned)


@dataclass(frozen=True)
class Outcome:
    """A rewritten graph and how it came about."""

    graph: Graph
    shortcut_weight: float | None
    targets: ShapingTargets | None
    ledger: Ledger
    propagation: Propagation
    promise: Promise
    laws: dict[str, Law]


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
    planned = Planned()
    if targets is not None:
        targets, planned = plan.shape(work, method, targets)
    else:
        keep_unshaped(work, work.regions())
        Rescale().apply(work)
    graph.module.recompile()
    outputs = check(work)
    if targets is not None:
        compare(work, planned, centred=isinstance(method, DKS))
    promise = promised(work, method, outputs, planned)
    return Outcome(graph, weight, targets, work.ledger(repr(plan.method)), work.propagation(), promise, dict(work.laws))


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
        outside = "outside of what is not seen into, " if unseen(work.graph.module) else ""
        work.unmet.append(f"{outside}the model has no activation to shape")
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
