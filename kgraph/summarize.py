"""From kernels to plain data: the rows of a report."""

from __future__ import annotations

import math
from collections.abc import Mapping

from torch import Tensor, fx

from kgraph.analysis import Analysis, NodeKernel
from kgraph.canonical import aten, operation_name
from kgraph.capture import Graph
from kgraph.errors import RuleError
from kgraph.kernel import DIFF, SAME, Kernel, Pairs
from kgraph.modes import depends_on_mode
from kgraph.nonlinear import is_activation
from kgraph.propagate import Propagation
from kgraph.site import shape_of, site_of


def summarize(graph: Graph, result: Propagation) -> Analysis:
    """The rows of a report: one for every node whose value is random."""
    kernels = result.kernels()
    if not kernels:
        raise RuleError(
            f"nothing in {graph.name} depends on an input in a way that a kernel could follow",
            hint="Pass floating-point inputs, or token ids that an embedding reads",
        )
    depth = _depths(graph.module.graph, kernels)
    rows = tuple(_row(node, kernel, result.pairs, depth[node], kernels) for node, kernel in kernels.items())
    output = next(n for n in graph.module.graph.nodes if n.op == "output")
    final = next((n for n in output.all_input_nodes if n in kernels), None)
    if final is None and not _follows(output, result.values):
        raise RuleError(f"what {graph.name} returns does not depend on its inputs", hint="Return what is made of them")
    return Analysis(
        model=graph.name,
        mode=result.mode,
        cosines=result.pairs.cosines,
        positions="exchangeable",
        nodes=rows,
        output=final.name if final is not None else rows[-1].name,
        seconds=result.seconds,
        max_slope=None,
        max_slope_at="",
        notes=(*graph.notes, *_batch_statistics(graph.module.graph, kernels), *result.notes),
        parametrization=result.parametrization,
        path=_path(graph, result.mode),
        inputs="; ".join(f"{name} of {moments}" for name, moments in result.pairs.moments.items()),
    )


def _follows(output: fx.Node, values: Mapping[fx.Node, object]) -> bool:
    """Whether anything returned is made of a random tensor, if not one itself (a loss); ones_like of one is known."""
    seen, queue = {output}, [output]
    while queue:
        new = [n for n in queue.pop().all_input_nodes if n not in seen and not isinstance(values.get(n), Tensor)]
        seen.update(new)
        queue += new
    return any(isinstance(values.get(n), Kernel) for n in seen)


def _path(graph: Graph, mode: str) -> str:
    """Which forward stands for one of train mode that was not captured."""
    if graph.training or mode == "eval":
        return ""
    switched = ", dropout and norms of train mode" if depends_on_mode(graph.module.graph) else ""
    return f"forward of eval mode{switched}"


def _batch_statistics(graph: fx.Graph, kernels: dict[fx.Node, Kernel]) -> list[str]:
    """Batch normalization without running statistics: by hand, or told to keep none."""
    norms = [
        n for n in graph.nodes if n.target is aten.batch_norm.default and n.args[3] is None and n.args[0] in kernels
    ]
    if not norms:
        return []
    more = f" and {len(norms) - 3} more" if len(norms) > 3 else ""
    return [f"{', '.join(n.name for n in norms[:3])}{more}: by the statistics of the batch in eval mode too"]


def _depths(graph: fx.Graph, kernels: dict[fx.Node, Kernel]) -> dict[fx.Node, int]:
    depth: dict[fx.Node, int] = {}
    for node in graph.nodes:
        before = max((depth[n] for n in node.all_input_nodes if n in depth), default=0)
        depth[node] = before + (node in kernels and is_activation(node))
    return depth


def _row(node: fx.Node, kernel: Kernel, pairs: Pairs, depth: int, kernels: dict[fx.Node, Kernel]) -> NodeKernel:
    part = kernel.merged
    cov: list[list[float]] = part.cov.tolist()
    q = cov[Pairs.SELF][SAME]
    nan = math.nan
    drawn = kernel.how.name in ("sampled", "assumed")  # draws may exceed what a cosine can be
    cosines = tuple(cov[i][SAME] / q if q > 0 else nan for i in range(len(pairs.cosines)))
    cosines = tuple(min(max(c, -1.0), 1.0) for c in cosines) if drawn and q > 0 else cosines
    places = cov[Pairs.SELF][DIFF] / q if q > 0 and kernel.positions > 1 else nan
    site = site_of(node)
    return NodeKernel(
        name=node.name,
        module=site.path if node.op != "call_module" else str(node.target),
        op=operation_name(node) if node.op != "placeholder" else "input",
        shape=shape_of(node) or kernel.shape,
        source=site.source,
        depth=depth,
        q=q,
        c=cosines,
        c_positions=places,
        slope=float(part.slope[Pairs.UNIT, SAME]) / q if q > 0 else nan,
        mean=part.mean,
        how=kernel.how.name,
        note=kernel.how.note,
        inputs=tuple(n.name for n in node.all_input_nodes if n in kernels),
        ntk=float(part.ntk[Pairs.SELF, SAME]),
    )
