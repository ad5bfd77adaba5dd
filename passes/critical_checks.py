"""For `CriticalWeights`: what a graph has that the theory of a critical chain does not, and whether q is kept."""

from __future__ import annotations

from typing import Any

from torch import Tensor, fx

from kgraph.canonical import operation_name
from kgraph.initializers import delta_tap, layer_padding, per_axis
from kgraph.nonlinear import Region
from kgraph.passes.affine import CONVOLUTIONS, TRANSPOSED
from kgraph.passes.base import Workspace
from kgraph.passes.convolutions import geometry_of, single_position
from kgraph.passes.remove_norms import NORMS
from kgraph.rules.table import find_rule
from kgraph.site import shape_of

_KEPT_Q = (0.5, 2.0)
PADS = ("pad", "constant_pad_nd")
_PRODUCTS = ("einsum", "matmul", "mm", "bmm", "baddbmm", "addmm", "bilinear", "tensordot", "mv")
_MOVES = (*PADS, "dropout", "feature_dropout", "embedding", "index", "index_select", "narrow", "movedim", "unfold")
_MOVES += ("pixel_shuffle", "pixel_unshuffle", "upsample_nearest1d", "upsample_nearest2d", "upsample_nearest3d")


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


def obstacles(work: Workspace, regions: list[Region], depth: dict[fx.Node, int]) -> list[str]:
    """What stands in the way of the chain that the theory is about, in plain words; a pool behind it does not."""
    last, ahead = max(depth.values(), default=0), _before_layers(work)
    functions = {node for region in regions if not region.gate for node in region.nodes}
    sources = {region.source for region in regions}
    norms, sums, pools, left, others = (list[str]() for _ in range(5))
    lone = [node.name for node in work.nodes if node in sources and _single_channels(work, node)]
    for node in work.nodes:
        random = [n for n in node.all_input_nodes if work.is_random(n)]
        name = operation_name(node)
        if node.target in NORMS and work.is_random(node.args[0]):
            norms.append(node.name)
        elif not random or node.op == "output" or node in functions or affine_arguments(work, node) is not None:
            continue
        elif name in _PRODUCTS and len(random) == 1 and _reads_weight(work, node):
            left.append(node.name)
        elif len(random) > 1 or (name in ("add", "mul") and list(node.args).count(random[0]) > 1):
            sums.append(node.name)
        elif "pool" in name or name == "mean":
            pools += [node.name] if depth[node] < last else []
        elif node in ahead and not _only_moves(node, name):
            others.append(node.name)
    told = (
        (norms, "normalize: q there is what they make it, chi_1 is not 1; EdgeOfChaos(remove_norms=True) removes them"),
        (sums, "join several random tensors: the critical line is that of a chain without them"),
        (pools, "pool positions: q is another behind them"),
        (lone, "sum one channel each: what the activation reads is not Gaussian, chi_1 is not 1"),
        (left, "hold weights that were not drawn: only linear layers, convolutions and x @ W are"),
        (others, "are neither layers nor one function of every entry: q is another behind them"),
    )
    return [f"{_few(names)} {what}" for names, what in told if names]


def _single_channels(work: Workspace, node: fx.Node) -> bool:
    """A depthwise convolution of more than one channel."""
    weight = node.args[1] if operation_name(node) in CONVOLUTIONS and work.is_random(node.args[0]) else None
    return isinstance(weight, fx.Node) and shape_of(weight)[1] == 1 < shape_of(weight)[0]


def _before_layers(work: Workspace) -> set[fx.Node]:
    """Nodes that some affine layer depends on."""
    found = set[fx.Node]()
    for node in reversed(work.nodes):
        if affine_arguments(work, node) is not None or node in found:
            found |= set(node.all_input_nodes)
    return found


def _reads_weight(work: Workspace, node: fx.Node) -> bool:
    """Whether a product is with a trained tensor of two axes or more, however viewed."""
    queue = [n for n in node.all_input_nodes if not work.is_random(n)]
    for origin in queue:
        if origin.op == "get_attr" and (tensor := work.tensor(origin)).ndim > 1 and tensor.requires_grad:
            return True
        queue += [n for n in origin.all_input_nodes if n not in queue]
    return False


def _only_moves(node: fx.Node, name: str) -> bool:
    """Whether entries are only moved, copied or cut out; sizes and indices count as such."""
    value = node.meta.get("val")
    if isinstance(value, Tensor) and not value.is_floating_point():
        return True
    known = find_rule(node.target)
    reindexes = known is not None and known.__module__ == "kgraph.rules.reindex"
    return reindexes or name in _MOVES or not isinstance(value, (Tensor, list, tuple))


def _few(names: list[str]) -> str:
    return ", ".join(names[:4]) + (f" and {len(names) - 4} more" if len(names) > 4 else "")


def border_losses(work: Workspace, all_taps: bool) -> list[str]:
    """Convolutions some of whose outputs read zeros of the padding: part of their q is lost there."""
    names = [node.name for node in work.nodes if _reads_padding(work, node, all_taps)]
    uneven = [node.name for node in work.nodes if _reaches_unevenly(work, node, all_taps)]
    more = "; delta-orthogonal weights read none" if all_taps else ""
    told = [f"{_few(names)} read zeros at the borders: q falls behind them{more}"] if names else []
    return told + ([f"{_few(uneven)} reach some outputs by fewer taps or none: q falls behind them"] if uneven else [])


def _reads_padding(work: Workspace, node: fx.Node, all_taps: bool) -> bool:
    name = operation_name(node)
    source = node.args[0] if name in CONVOLUTIONS and work.is_random(node.args[0]) else None
    weight = node.args[1] if isinstance(source, fx.Node) else None
    if not isinstance(source, fx.Node) or not isinstance(weight, fx.Node):
        return False
    if operation_name(source) in PADS:
        if operation_name(source) == "pad" and len(source.args) > 2 and source.args[2] != "constant":
            return False
        (source,) = source.all_input_nodes
    return any(_crops(*axis, all_taps) for axis in _axes(node, source, weight, transposed=False))


_AxisGeometry = tuple[int, int, int, int, int, int]


def _axes(node: fx.Node, source: fx.Node, weight: fx.Node, *, transposed: bool) -> list[_AxisGeometry]:
    """(size, padding, dilation, stride, places of the input, of the output) of every axis of a convolution."""
    geometry, kernel = geometry_of(node, transposed=transposed), shape_of(weight)[2:]
    dilations, strides = (per_axis(key, geometry[key], len(kernel)) for key in ("dilation", "stride"))
    pads: Any = layer_padding(geometry["padding"], kernel, dilations)
    return list(zip(kernel, pads, dilations, strides, shape_of(source)[2:], shape_of(node)[2:], strict=True))


def _crops(size: int, pad: int, dilation: int, stride: int, places: int, outputs: int, all_taps: bool) -> bool:
    """Whether the first or the last output reads a place outside the field through a tap that is not zero."""
    cell = min(size, stride)
    start = 0 if all_taps else min(delta_tap(size, pad, dilation), size - cell)
    end = size - 1 if all_taps else start + cell - 1
    return dilation * start < pad or (outputs - 1) * stride - pad + dilation * end >= places


def _reaches_unevenly(work: Workspace, node: fx.Node, all_taps: bool) -> bool:
    """Whether some outputs of a transposed convolution get nothing, or lack a tap that others have."""
    source, weight = (*node.args[:2], None, None)[:2]
    if operation_name(node) not in TRANSPOSED or not work.is_random(source) or single_position(node):
        return False
    assert isinstance(source, fx.Node) and isinstance(weight, fx.Node)
    return any(_misses(*axis, all_taps) for axis in _axes(node, source, weight, transposed=True))


def _misses(size: int, pad: int, dilation: int, stride: int, places: int, outputs: int, all_taps: bool) -> bool:
    """Output o reads input i through tap t where o + pad = stride i + dilation t."""
    cell = min(size, stride)
    start = 0 if all_taps else min(delta_tap(size, pad, dilation), size - cell)
    used = range(start, size if all_taps else start + cell)
    for output in range(outputs):
        reads = [at for tap in used if (at := output + pad - dilation * tap) % stride == 0]
        if not reads or min(reads) < 0 or max(reads) >= stride * places:
            return True
    return False


def strays(work: Workspace, regions: list[Region], q: float, all_taps: bool) -> str:
    """Nonlinear layers whose propagated q is not q*, where nothing that ``unmet`` names explains it."""
    # Kernels hold a mean over positions: zeros of a separate padding lower it, though the delta tap reads none.
    apart = any(operation_name(node) in (*TRANSPOSED, *PADS) for node in work.nodes)
    said = any("no bias" in unmet or "shares its weight" in unmet for unmet in work.unmet)
    if apart or said or border_losses(work, all_taps):
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
