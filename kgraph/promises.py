"""What the recipe promises, checked on the rewritten graph: q = 1, and the plan of the local maps."""

from __future__ import annotations

import math

from torch import fx

from kgraph.canonical import operation_name
from kgraph.closed_loop import Planned, averaged, correlation, ends
from kgraph.contractions import WORDS, contraction_of
from kgraph.departures import Causes, departure, off
from kgraph.how import LEVELS
from kgraph.modules import Scale, ShapedActivation, WeightedSum
from kgraph.nonlinear import Region, find_regions
from kgraph.output_q import check_outputs
from kgraph.passes.affine_image import tangent
from kgraph.passes.base import Workspace
from kgraph.passes.exponentials import is_exponential, is_rate
from kgraph.passes.rescale import is_max_pool
from kgraph.passes.shape_activations import kept_reason
from kgraph.products import unbounded
from kgraph.subnetworks import find_subnetworks

_NO_MEAN = 1e-6
_ASSUMED = LEVELS.index("assumed")
_C_TOLERANCE, _SLOPE_TOLERANCE = 0.03, 0.1
"""Distances from the plan, of c and relative of the slope, at which it counts as missed."""


def is_free(region: Region) -> bool:
    """Whether the recipe shapes this nonlinear layer."""
    return not kept_reason(region)


def check(work: Workspace) -> set[fx.Node]:
    """Say where q is not 1 at a nonlinear layer's input, and which node is the cause; check what products do.

    Returns the outputs that shall have q = 1.
    """
    kernels = work.kernels()
    regions = find_regions(work.graph.module, kernels.__contains__)
    gates = {node for region in regions if region.gate for node in region.nodes}
    cause = Causes(work, gates)
    causes: dict[fx.Node, list[Region]] = {}
    for region in regions:
        if region.source in kernels and not region.gate and not is_rate(region) and off(work, region.source):
            causes.setdefault(cause.of(region.source), []).append(region)
    for node, found in causes.items():
        first = float(kernels[found[0].source].merged.q)
        listed = ", ".join(r.end.name for r in found[:3]) + (f" and {len(found) - 3} more" if len(found) > 3 else "")
        work.unmet.append(f"q is not 1 at the input of {listed} (q = {first:.4g}): {departure(work, node)}")
    outputs = check_outputs(work, cause, regions, causes)
    own = find_subnetworks(work.graph, work.propagation(), free=is_free)
    if line := unbounded(own):
        work.unmet.append(line)
    return outputs


def compare(work: Workspace, plan: Planned, *, centred: bool) -> None:
    """Say where the propagation departs from the plan, at an output or in front of an average, and what is the cause.

    The plan composes local maps of Gaussian inputs, with pooling counted as keeping c.

    Args:
        centred: whether the method takes means off (DKS), so that none is to blame.
    """
    kernels = work.kernels()
    checked = [node for node in dict.fromkeys([*averaged(work), *ends(work)]) if node in kernels]
    c, slope = (
        {node: read(kernels[_corrected(work, node)]) for node in planned if node in kernels}
        for read, planned in ((correlation, plan.c), (tangent, plan.slope))
    )
    apart = {region.end for region in work.regions() if region.gate or is_rate(region) or is_exponential(region)}
    for quantity, planned, found, differ in (
        ("C(0)", {node: curve[0] for node, curve in plan.c.items()}, c, _apart),
        ("the slope C'(1)", plan.slope, slope, _relatively_apart),
    ):
        missed = [node for node in checked if node in found and differ(planned[node], found[node])]
        if missed:
            steps = {n: _step(work, n, planned, found) for n in found if n.all_input_nodes and n not in apart}
            most = max(steps, key=lambda node: steps[node])
            parts = f"{most.name} ({_short(planned[most])}, {_short(found[most])}): {_departs(work, most, centred)}"
            work.unmet.append(f"{_missed(quantity, missed, planned, found)}; they part most at {parts}")
    _assumptions(work, [node for node in checked if node in plan.c or node in plan.slope])


def _assumptions(work: Workspace, checked: list[fx.Node]) -> None:
    """Say that the plan is met by a number that is assumed, which may be far off."""
    kernels = work.kernels()
    found = [(node, kernels[node].how) for node in checked if kernels[node].how.level == _ASSUMED]
    if found:
        node, how = found[-1]
        work.notes.append(
            f"at {node.name} the kernel is assumed ({how.note}), so that the plan may be missed: "
            "the certificate measures by how much"
        )


def _step(work: Workspace, node: fx.Node, planned: dict[fx.Node, float], found: dict[fx.Node, float]) -> float:
    """How much further apart plan and propagation are at a node than at its inputs."""

    def gap(at: fx.Node) -> float:
        apart = abs(found[at] - planned[at]) / max(abs(found[at]), abs(planned[at]), 1e-3)
        return apart if math.isfinite(apart) else 0.0

    inputs = [n.all_input_nodes[0] if isinstance(work.module(n), Scale) else n for n in node.all_input_nodes]
    return gap(node) - max((gap(before) for before in inputs if before in found), default=0.0)


def _missed(quantity: str, missed: list[fx.Node], planned: dict[fx.Node, float], found: dict[fx.Node, float]) -> str:
    worst = max(missed, key=lambda node: abs(found[node] - planned[node]))
    more = f", and it is missed at {len(missed) - 1} more" if len(missed) > 1 else ""
    return (
        f"{quantity} from input to {worst.name} is planned to be {_short(planned[worst])}, and the analysis finds "
        f"{_short(found[worst])}{more}"
    )


def _short(number: float) -> str:
    """Four digits, and 0 for what rounding leaves of it."""
    return "0" if abs(number) < _NO_MEAN else f"{number:.4g}"


def _corrected(work: Workspace, node: fx.Node) -> fx.Node:
    """The constant behind a node, if a pass put one there."""
    return next((user for user in node.users if isinstance(work.module(user), Scale)), node)


def _departs(work: Workspace, node: fx.Node, centred: bool) -> str:
    """Why a node does not do what the plan says, and what would."""
    kernels, module = work.kernels(), work.module(node)
    if isinstance(module, ShapedActivation):
        part = kernels[node.all_input_nodes[0]].merged
        law = "Gaussian" if part.gaussian else "not Gaussian"
        return f"its input is {law}, of q {float(part.q):.4g} and mean {part.mean:.3g}"
    if isinstance(module, WeightedSum) and not centred:
        return "the means of its terms add up, and c with them; method='dks' has no means"
    if is_max_pool(node):
        return "max pooling has maps of its own, which no constant behind it undoes; average pooling would keep c"
    if kernels[node].positions == 1 and any(kernels[n].positions > 1 for n in node.all_input_nodes if n in kernels):
        means = not centred and abs(kernels[node].merged.mean) > _NO_MEAN
        cure = "; method='dks' has no means" if means else ""
        return f"an average over positions keeps of two inputs what their positions share{cure}"
    contraction = contraction_of(node, work.is_random)
    what = f" ({WORDS[contraction]})" if contraction is not None else ""
    return f"{operation_name(node)} changes c by itself{what}"


def _apart(planned: float, found: float) -> bool:
    return abs(found - planned) > _C_TOLERANCE


def _relatively_apart(planned: float, found: float) -> bool:
    return abs(found - planned) > _SLOPE_TOLERANCE * abs(planned)
