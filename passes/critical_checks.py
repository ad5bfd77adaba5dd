"""For `CriticalWeights`: what a graph has that the theory of a critical chain does not, and whether q is kept."""

from __future__ import annotations

from typing import Any

from torch import fx

from kgraph.canonical import operation_name
from kgraph.initializers import delta_tap, layer_padding, per_axis
from kgraph.nonlinear import Region
from kgraph.passes.base import Workspace
from kgraph.passes.reinitialize import CONVOLUTIONS, TRANSPOSED, geometry_of
from kgraph.passes.remove_norms import NORMS
from kgraph.site import shape_of

_KEPT_Q = (0.5, 2.0)
_PADS = ("pad", "constant_pad_nd")


def affine_arguments(work: Workspace, node: fx.Node) -> tuple[int, int, int | None] | None:
    """Places of input, weight and bias among the arguments of an affine layer; None for other nodes."""
    name = operation_name(node)
    if name in ("linear", *CONVOLUTIONS, *TRANSPOSED) and work.is_random(node.args[0]):
        return 0, 1, 2
    if name == "addmm" and work.is_random(node.args[1]):
        return 1, 2, 0
    if name in ("matmul", "mm") and work.is_random(node.args[0]) and not work.is_random(node.args[1]):
        return 0, 1, None
    return None


def depths_of(work: Workspace, regions: list[Region]) -> dict[fx.Node, int]:
    """Nonlinear layers on the longest path to every node."""
    ends = {region.end for region in regions}
    depth: dict[fx.Node, int] = {}
    for node in work.nodes:
        depth[node] = max((depth[n] for n in node.all_input_nodes), default=0) + (node in ends)
    return depth


def obstacles(work: Workspace, depth: dict[fx.Node, int]) -> list[str]:
    """What stands in the way of the chain that the theory is about, in plain words; a pool behind it does not."""
    last = max(depth.values(), default=0)
    norms, sums, pools = list[str](), list[str](), list[str]()
    for node in work.nodes:
        random = [n for n in node.all_input_nodes if work.is_random(n)]
        name = operation_name(node)
        if node.target in NORMS and work.is_random(node.args[0]):
            norms.append(node.name)
        elif len(random) > 1 or (name in ("add", "mul") and len(random) == 1 and list(node.args).count(random[0]) > 1):
            sums.append(node.name)
        elif ("pool" in name or name == "mean") and depth[node] < last:
            pools.append(node.name)
    told = (
        (norms, "normalize: q there is what they make it, chi_1 is not 1; EdgeOfChaos(remove_norms=True) removes them"),
        (sums, "join several random tensors: the critical line is that of a chain without them"),
        (pools, "pool positions: q falls behind them"),
    )
    return [f"{_few(names)} {what}" for names, what in told if names]


def _few(names: list[str]) -> str:
    return ", ".join(names[:4]) + (f" and {len(names) - 4} more" if len(names) > 4 else "")


def border_losses(work: Workspace, all_taps: bool) -> list[str]:
    """Convolutions some of whose outputs read zeros of the padding: part of their q is lost there."""
    names = [node.name for node in work.nodes if _reads_padding(work, node, all_taps)]
    more = "; delta-orthogonal weights read none" if all_taps else ""
    return [f"{_few(names)} read zeros at the borders: q falls behind them{more}"] if names else []


def _reads_padding(work: Workspace, node: fx.Node, all_taps: bool) -> bool:
    name = operation_name(node)
    if name in TRANSPOSED:
        return False
    source = node.args[0] if name in CONVOLUTIONS and work.is_random(node.args[0]) else None
    weight = node.args[1] if isinstance(source, fx.Node) else None
    if not isinstance(source, fx.Node) or not isinstance(weight, fx.Node):
        return False
    if operation_name(source) in _PADS:
        if operation_name(source) == "pad" and len(source.args) > 2 and source.args[2] != "constant":
            return False
        (source,) = source.all_input_nodes
    geometry, kernel = geometry_of(node, transposed=False), shape_of(weight)[2:]
    dilations, strides = (per_axis(key, geometry[key], len(kernel)) for key in ("dilation", "stride"))
    pads = layer_padding(geometry["padding"], kernel, dilations)
    axes: Any = zip(kernel, pads, dilations, strides, shape_of(source)[2:], shape_of(node)[2:], strict=True)
    return any(_crops(*axis, all_taps) for axis in axes)  # pyright: ignore[reportCallIssue]


def _crops(size: int, pad: int, dilation: int, stride: int, places: int, outputs: int, all_taps: bool) -> bool:
    """Whether the first or the last output reads a place outside the field through a tap that is not zero."""
    cell = min(size, stride)
    start = 0 if all_taps else min(delta_tap(size, pad, dilation), size - cell)
    end = size - 1 if all_taps else start + cell - 1
    return dilation * start < pad or (outputs - 1) * stride - pad + dilation * end >= places


def strays(work: Workspace, regions: list[Region], q: float, all_taps: bool) -> str:
    """Nonlinear layers whose propagated q is not q*, where nothing that ``unmet`` names explains it."""
    transposed = any(operation_name(node) in TRANSPOSED for node in work.nodes)
    if transposed or border_losses(work, all_taps) or any("no bias" in unmet for unmet in work.unmet):
        return ""
    kernels = work.kernels()
    affine = {node for node in work.nodes if affine_arguments(work, node) is not None}
    low, high = (q * factor for factor in _KEPT_Q)
    bad = [
        f"{region.source.name} (q {found:.3g})"
        for region in regions
        if region.source in affine and shape_of(region.source) and region.source in kernels
        if not low < (found := float(kernels[region.source].merged.q)) < high
    ]
    return f"q* = {q:.3g} is not kept at {_few(bad)}" if bad else ""
