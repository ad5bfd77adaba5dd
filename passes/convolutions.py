"""Geometry of convolutions in a graph, and which of them read the input's few channels.

Positions of an input of few channels have cosines that scatter. A stem, the first convolution, reads its whole window:
many numbers, whose cosines scatter less.
"""

from __future__ import annotations

import math
from typing import Any

from torch import Tensor, fx

from kgraph.canonical import aten, operation_name
from kgraph.initializers import layer_padding, per_axis
from kgraph.passes.affine import CONVOLUTIONS, TRANSPOSED
from kgraph.rules.conv import tap_counts
from kgraph.site import shape_of

_FEW = 16
"""Channels of an input below which a convolution reads all its taps: a position of three colours is three numbers."""
_LAYERS = ("linear", "addmm", "matmul", "mm", "embedding", *CONVOLUTIONS, *TRANSPOSED)


def geometry_of(node: fx.Node, *, transposed: bool) -> dict[str, Any]:
    names = ("stride", "padding", "dilation", "groups")
    if transposed:
        names = ("stride", "padding", "output_padding", "groups", "dilation")
    given = dict(zip(names, node.args[3:], strict=False)) | dict(node.kwargs)
    given.pop("output_padding", None)
    defaults: dict[str, Any] = {"stride": 1, "padding": 0, "dilation": 1, "groups": 1}
    chosen = {**defaults, **{k: v for k, v in given.items() if k in defaults}}
    chosen["padding"] = _with_explicit_padding(node, chosen["padding"])
    return {**{k: _plain(v) for k, v in chosen.items()}, "transposed": transposed}


def _with_explicit_padding(node: fx.Node, padding: Any) -> Any:
    """A separate padding operation in front moves the tap that meets the output position."""
    source = node.args[0]
    if not isinstance(source, fx.Node) or source.target not in (
        aten.pad.default,
        aten.constant_pad_nd.default,
    ):
        return padding
    amounts = source.args[1]
    assert isinstance(amounts, (list, tuple))
    front = [int(a) for a in amounts[0::2]][::-1]  # type: ignore[call-overload]
    if isinstance(padding, str):
        return front
    own = list(padding) if isinstance(padding, (list, tuple)) else [padding] * len(front)
    own = own * len(front) if len(own) == 1 else own
    return [o + f for o, f in zip(own, front, strict=True)] if len(own) == len(front) else padding


def _own_padding(node: fx.Node) -> Any:
    given = dict(zip(("stride", "padding"), node.args[3:], strict=False)) | dict(node.kwargs)
    return _plain(given.get("padding", 0))


def _plain(value: Any) -> Any:
    return tuple(value) if isinstance(value, (list, tuple)) else value


def single_position(node: fx.Node) -> bool:
    source = node.args[0]
    return isinstance(source, fx.Node) and all(size == 1 for size in shape_of(source)[2:])


def is_stem(node: fx.Node, weight: Tensor) -> bool:
    """Whether a convolution mixes so few channels of an input that it reads all its taps."""
    if operation_name(node) not in CONVOLUTIONS or weight.ndim < 3 or weight.shape[1] >= _FEW:
        return False
    mixes = geometry_of(node, transposed=False)["groups"] == 1 and weight[0, 0].numel() > 1
    return mixes and not _behind_layers(node)


def _behind_layers(node: fx.Node) -> bool:
    """Whether another affine layer lies between the inputs and this one."""
    queue, seen = [node], {node}
    while queue:
        new = [n for n in queue.pop().all_input_nodes if n not in seen]
        if any(operation_name(n) in _LAYERS for n in new):
            return True
        seen.update(new)
        queue += new
    return False


def read_share(node: fx.Node, weight: Tensor) -> float:
    """Share of its taps that such a convolution meets at the average output: at borders some read padding."""
    source = node.args[0]
    if not is_stem(node, weight) or not isinstance(source, fx.Node):
        return 1.0
    taps = weight.shape[2:]
    geometry = geometry_of(node, transposed=False)
    if geometry["padding"] != _own_padding(node):  # of a separate operation, whose zeros are inputs
        return 1.0
    strides, dilations = (per_axis(key, geometry[key], len(taps)) for key in ("stride", "dilation"))
    pads: Any = layer_padding(geometry["padding"], taps, dilations)
    axes = zip(shape_of(source)[2:], shape_of(node)[2:], taps, strides, pads, dilations, strict=True)
    return math.prod(float(tap_counts(*axis, transposed=False).mean()) for axis in axes)
