"""The Jacobian's spectrum as the theory of a chain predicts it from the weights' own second and fourth moments."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, fx
from torch.nn import functional

from kgraph.canonical import operation_name
from kgraph.initializers import layer_padding, per_axis
from kgraph.meanfield import JacobianMoments, Moments
from kgraph.modules import Scale
from kgraph.nonlinear import Region
from kgraph.site import shape_of

CONVOLUTIONS = ("conv1d", "conv2d", "conv3d")
TRANSPOSED = ("conv_transpose1d", "conv_transpose2d", "conv_transpose3d")
_SAME_ENTRIES = frozenset(
    (
        "dropout", "reshape", "view", "flatten", "unflatten", "permute", "transpose", "t", "contiguous", "clone",
        "squeeze", "unsqueeze", "detach", "_unsafe_view", "alias", "pad", "constant_pad_nd",
    )
)  # fmt: skip
"""Operations that only move entries; padding is part of the convolution behind it, whose size counts."""


def predict(
    nodes: list[fx.Node], start: fx.Node, regions: Mapping[fx.Node, Region], qs: Mapping[fx.Node, float]
) -> tuple[JacobianMoments | None, str]:
    """Moments after the ``nodes`` behind ``start``, or None and the reason why a chain's theory does not apply.

    Args:
        regions: nonlinear regions by their end.
        qs: q value at every region's source.
    """
    at = JacobianMoments(size=math.prod(shape_of(start)[1:]))
    inner = {node for region in regions.values() for node in region.nodes if node is not region.end}
    seen = {start, *nodes}
    known: dict[tuple[int, float], tuple[float, float]] = {}
    for node in nodes:
        if node in inner:
            continue
        reads = [n for n in node.all_input_nodes if n in seen]
        if node in regions:
            region = regions[node]
            key = id(region.fn), round(qs[region.source], 12)
            if key not in known:
                moments = Moments(region.fn, qs[region.source])
                known[key] = moments.mu(1), moments.mu(2)
            at = at.through_slopes(*known[key])
            continue
        step = _linear(node) if len(reads) == 1 else None
        if step is None:
            return None, f"{node.name} ({operation_name(node)}) is no step of a chain"
        if _single_channels(node):
            return (
                None,
                f"{node.name} sums one channel each: neither its units nor their slopes are those of wide layers",
            )
        if step != (1.0, 1.0):
            at = at.through_weights(*step, math.prod(shape_of(node)[1:]))
    return at, ""


def _single_channels(node: fx.Node) -> bool:
    """Depthwise: J is no product of free factors, and what it gives is not Gaussian."""
    if operation_name(node) not in (*CONVOLUTIONS, *TRANSPOSED):
        return False
    source = node.args[0]
    return isinstance(source, fx.Node) and convolution_options(node)["groups"] == shape_of(source)[1] > 1


def _linear(node: fx.Node) -> tuple[float, float] | None:
    """(t_1, t_2) of a linear step; None for what is none."""
    name = operation_name(node)
    if name in _SAME_ENTRIES:
        return 1.0, 1.0
    owner = node.graph.owning_module
    if node.op == "call_module" and owner is not None:
        module = owner.get_submodule(str(node.target))
        return (module.factor**2, module.factor**4) if isinstance(module, Scale) else None
    weight = weight_of(node)
    if weight is None:
        return None
    if name in CONVOLUTIONS or name in TRANSPOSED:
        options = convolution_options(node)
        return convolution_moments(weight, name in TRANSPOSED, options["groups"], options["stride"])
    return matrix_moments(weight)


def weight_of(node: fx.Node) -> Tensor | None:
    """Weight of an affine node, [out, in] for matrices, in float64; None for other nodes."""
    name = operation_name(node)
    at = {"linear": 1, "addmm": 2, "mm": 1, "matmul": 1}.get(name, 1 if name in (*CONVOLUTIONS, *TRANSPOSED) else None)
    if at is None or not isinstance(source := node.args[at], fx.Node) or source.op != "get_attr":
        return None
    value: Any = node.graph.owning_module
    for part in str(source.target).split("."):
        value = getattr(value, part)
    weight = value.detach().double()
    return weight.T if name in ("addmm", "mm", "matmul") else weight


def convolution_options(node: fx.Node) -> dict[str, Any]:
    """Stride and groups of a convolution's node."""
    names = ("stride", "padding", "dilation", "groups")
    if operation_name(node) in TRANSPOSED:
        names = ("stride", "padding", "output_padding", "groups", "dilation")
    given = dict(zip(names, node.args[3:], strict=False)) | dict(node.kwargs)
    stride: Any = given.get("stride", 1)
    axes = len(shape_of(node)) - 2
    strides = [stride] * axes if isinstance(stride, int) else [*stride] * (axes if len(stride) == 1 else 1)
    return {"stride": strides, "groups": given.get("groups", 1), "dilation": given.get("dilation", 1)}


def matrix_moments(weight: Tensor) -> tuple[float, float]:
    """t_1 = tr(W W^T) / out and t_2 = tr((W W^T)^2) / out."""
    gram = weight @ weight.T if weight.shape[0] <= weight.shape[1] else weight.T @ weight
    return float(weight.square().sum()) / len(weight), float(gram.square().sum()) / len(weight)


def convolution_moments(weight: Tensor, transposed: bool, groups: int, stride: list[int]) -> tuple[float, float]:
    """The same for a convolution's operator on a wide field: W W^T is the kernel's correlation with itself, at lags
    that are multiples of the stride. (Dilation cancels where it has no common factor with the stride.)

    A transposed convolution is the adjoint: W^T W has the same trace over as many inputs.
    """
    axes = weight.ndim - 2
    lags = tuple(slice((k - 1) % s, None, s) for k, s in zip(weight.shape[2:], stride, strict=True))
    correlate = (functional.conv1d, functional.conv2d, functional.conv3d)[axes - 1]
    pad = [size - 1 for size in weight.shape[2:]]
    fourth = 0.0
    for block in weight.chunk(groups):
        products = correlate(block, block, padding=pad)
        fourth += float(products[(..., *lags)].square().sum())
    second, rows = float(weight.square().sum()), weight.shape[0]
    if transposed:
        rows = weight.shape[1] * groups * math.prod(stride)  # outputs for each input position
    return second / rows, fourth / rows


def reads_border(node: fx.Node) -> bool:
    """Whether a convolution's taps that are not zero read padding at some outputs: its field is no endless one."""
    weight = weight_of(node) if operation_name(node) in CONVOLUTIONS else None
    if weight is None or not isinstance(source := node.args[0], fx.Node):
        return False
    options, used = convolution_options(node), weight.flatten(2).square().sum((0, 1)).nonzero().flatten()
    kernel, given = weight.shape[2:], (*node.args[4:5], node.kwargs.get("padding", 0))[0]
    dilation: Any = options["dilation"]
    dilations = per_axis("dilation", dilation, len(kernel))
    pads = layer_padding(given, kernel, dilations)  # pyright: ignore[reportArgumentType]
    places = torch.unravel_index(used, kernel) if len(used) else ()
    sizes: Any = zip(places, pads, dilations, options["stride"], shape_of(source)[2:], shape_of(node)[2:], strict=False)
    return any(
        int(at.min()) * apart < pad or (outputs - 1) * stride - pad + apart * int(at.max()) >= inputs
        for at, pad, apart, stride, inputs, outputs in sizes
    )


def next_affine(node: fx.Node) -> fx.Node | None:
    """The affine layer that reads a value, through operations that only move entries; None where it is not one."""
    for _ in range(16):
        readers = list(node.users)
        if len(readers) != 1:
            affine = [user for user in readers if weight_of(user) is not None]
            return affine[0] if affine else None
        (node,) = readers
        if node.op == "output":
            return None
        if weight_of(node) is not None:
            return node
        if operation_name(node) not in _SAME_ENTRIES:
            return None
    return None


def bias_of(node: fx.Node) -> Tensor | None:
    """Bias of an affine node."""
    at = 0 if operation_name(node) == "addmm" else 2
    source = node.args[at] if len(node.args) > at else None
    if not isinstance(source, fx.Node) or source.op != "get_attr" or operation_name(node) in ("mm", "matmul"):
        return None
    value: Any = node.graph.owning_module
    for part in str(source.target).split("."):
        value = getattr(value, part)
    return torch.as_tensor(value).detach().double()
