"""What the recipe promises, checked on the rewritten graph: q = 1, the largest slope, the plan of the local maps."""

from __future__ import annotations

import math

from torch import Tensor, fx

from kgraph.canonical import operation_name
from kgraph.contractions import WORDS, contraction_of
from kgraph.departures import Causes, departure, off
from kgraph.kernel import SAME, Kernel, Pairs
from kgraph.methods import DKS, TAT, Method
from kgraph.modules import ShapedActivation
from kgraph.nonlinear import Region, find_regions
from kgraph.output_q import check_outputs
from kgraph.passes.base import Workspace
from kgraph.passes.exponentials import is_rate
from kgraph.passes.input_causes import cause
from kgraph.passes.shape_activations import is_leaky, kept_reason
from kgraph.products import unbounded
from kgraph.subnetworks import Subnetworks, find_subnetworks

_PLAN_TOLERANCE = 0.01


def is_free(region: Region) -> bool:
    """Whether the recipe shapes this nonlinear layer."""
    return not kept_reason(region)


def check(work: Workspace, method: Method) -> set[fx.Node]:
    """Say where q is not 1 at a nonlinear layer's input, and which node is the cause; check the maximal slope.

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
    if isinstance(method, DKS):
        largest = own.max_slope()
        if largest.value > method.zeta * (1 + 1e-6):
            work.unmet.append(f"max slope is {largest.value:.6g} > zeta = {method.zeta:g} in the subnetwork {largest}")
    return outputs


def compare(work: Workspace, method: Method) -> None:
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
    why = _input_cause(work, own, first, planned[first], found[first], leaky) if shaped else _changes(work, first)
    work.notes.append(
        f"{quantity} from input to output is planned to be {planned[final]:.4g}, and the analysis finds "
        f"{found[final]:.4g} at {final.name}; they part first at {first.name}: {why}{_not_gaussian(work, own)}. "
        f"{definition} is about local maps of Gaussian inputs, with pooling counted as keeping c"
    )


def _changes(work: Workspace, node: fx.Node) -> str:
    contraction = contraction_of(node, work.is_random)
    what = f" ({WORDS[contraction]})" if contraction is not None else ""
    return f"{operation_name(node)} changes c by itself{what}"


def _input_cause(work: Workspace, own: Subnetworks, node: fx.Node, planned: float, found: float, leaky: bool) -> str:
    region = next(region for region in own.regions if region.end is node)
    part = work.kernels()[region.source].merged

    def read(value: Tensor, slope: Tensor) -> float:
        row = Pairs().cosines.index(0.0) if leaky else Pairs.UNIT
        top = value[row, SAME] if leaky else slope[row, SAME] * part.slope[row, SAME]
        return float(top / value[Pairs.SELF, SAME])

    return f"its input {cause(work, work.kernels(), region, read, planned, found)}"


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
