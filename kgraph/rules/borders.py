"""Positions that are not alike: which operations make them so, and which ones then need more than their average.

Kernels here are averages over positions. A zero-padded border makes them differ (inner pixels are larger), and so do
class tokens, uneven adjacencies and causal attention. Sums and averages of positions stay right; a nonlinear function
of an average is not the average of the function, and a second border reads inner pixels more often than others. What
such an operation makes is "assumed".
"""

from __future__ import annotations

from collections.abc import Container, Mapping
from typing import Any

from torch import Tensor, fx, nn

from kgraph.canonical import operation_name
from kgraph.entries import said
from kgraph.how import assumed
from kgraph.kernel import Kernel, alike
from kgraph.modules import Scale, WeightedSum
from kgraph.rules.pointwise import COPIES, is_pointwise
from kgraph.rules.recurrent import STEPS
from kgraph.rules.speeds import is_parameter

BORDER = "positions at a zero-padded border counted like inner ones"
TAPS = "positions counted alike where a transposed convolution sums more taps at some"
COPIED = "pairs of positions that padding has copied counted like others"
WINDOWS = "pairs of positions whose windows a border cuts counted like others"
BETWEEN = "interpolated positions counted like given ones"
JOINED = "tokens of several laws counted like one"
MIXED = "positions mixed in different ways counted like one"
NEAR = "neighbouring positions counted as little alike as distant ones"
UNEVEN = "inputs of several mean squares counted as if all had their average"
CAUSAL = "positions that attend to few others counted like those that attend to many"
RUNNING = "positions that a running sum or an order makes differ, counted like one"
ORDERED = "channels that a running sum or an order makes differ, counted like one"

_AT_ONCE = (TAPS, COPIED, WINDOWS, BETWEEN)
"""Of these the average over pairs of positions is wrong already, not only what is made of it."""
_LINEAR = {"add", "sub", "rsub", "neg", "mul", "div", "dropout", "feature_dropout", "where", "pad"}
_PER_POSITION = {"layer_norm", "rms_norm", "softmax", "log_softmax", "scaled_dot_product_attention"}
_PER_POSITION |= {"amax", "amin", "max", "min", "logsumexp", "norm", "linalg_vector_norm", "std", "var", "sort", "topk"}
_ONE_SCALE = {"layer_norm", "rms_norm", "group_norm", "instance_norm"}
"""Behind these all inputs have one mean square."""
_VIEWS = {
    "view",
    "reshape",
    "flatten",
    "unflatten",
    "squeeze",
    "unsqueeze",
    "transpose",
    "permute",
    "contiguous",
    "clone",
}
_RUNS = {"cumsum", "cumprod", "cummax", "cummin", "logcumsumexp", "sort", "topk"}
_LAYERS = ("linear", "conv", "addmm", "matmul", "mm", "bmm", "einsum")
_STEPPED = ("lstm", "gru", "rnn_tanh", "rnn_relu")
_CUTS = {"index_select", "gather", "select", "slice", "narrow", "chunk", "split", "split_with_sizes", "unbind"}


class Borders:
    """Follows a walk node by node: ``reasons`` are those of the tensors whose positions are not alike.

    Args:
        sampled: nodes that are known by draws, which run what was drawn before them again, position by position.
    """

    def __init__(self, sampled: Container[fx.Node] = ()) -> None:
        self.sampled = sampled
        self.reasons: dict[fx.Node, str] = {}
        self.near: set[fx.Node] = set()  # tensors whose neighbouring positions are more alike than others
        self.shared: set[fx.Node] = set()  # of those, tensors whose neighbours hold the same numbers
        self.uneven: set[fx.Node] = set()  # tensors whose mean square differs from input to input
        self.said: dict[fx.Node, str] = {}

    def related(self, node: fx.Node) -> None:
        """Say that an input's neighbouring positions are alike, as those of images are."""
        self.near.add(node)
        self.shared.add(node)

    def judged(self, node: fx.Node, value: Any, values: Mapping[fx.Node, Any]) -> Any:
        """The node's value, "assumed" where the operation needs positions that the average does not hold."""
        read = [n for n in node.args if isinstance(n, fx.Node)]  # twice what is multiplied by itself
        read += [n for n in node.all_input_nodes if n not in read]
        before = [self.reasons[n] for n in read if n in self.reasons]
        kernels = [values[n] for n in node.all_input_nodes if isinstance(values[n], Kernel)]
        if not isinstance(value, Kernel):
            reason = _run_along(node, kernels) or next(iter(before), "")
            if isinstance(value, (list, tuple)):
                self.near.update({node} if any(n in self.near for n in read) else ())
                self.shared.update({node} if any(n in self.shared for n in read) else ())
            if reason and isinstance(value, (list, tuple)):
                self.reasons[node] = reason
                if before and kernels and _needs_positions(node, before, kernels, values):
                    self.said[node] = before[0]
            return value
        told = [self.said[n] for n in node.all_input_nodes if n in self.said]
        if not told and before and _needs_positions(node, before, kernels, values):
            told = [before[0]]
        if node in self.sampled:
            told = [why for why in told if why not in (RUNNING, ORDERED, STEPS)]
        inside = any(n in self.near for n in node.all_input_nodes)
        shared = any(n in self.shared for n in node.all_input_nodes)
        bends = _is_function(node) or len(read) > len(node.all_input_nodes)
        nearer = shared and _narrows(node, value, kernels)
        if not told and (
            (shared and value.positions > 1 and bends) or (inside and _reads_windows(node, value)) or nearer
        ):
            told = [NEAR]
        if any(n in self.uneven for n in node.all_input_nodes) and operation_name(node) not in _ONE_SCALE:
            self.uneven.add(node)
            told = told or [UNEVEN] * (bends or operation_name(node) in _PER_POSITION)
        overlaps = _overlaps(node, values)
        if value.positions > 1 and (inside or overlaps):
            self.near.add(node)
        if value.positions > 1 and (shared or (overlaps and not operation_name(node).startswith("conv"))):
            self.shared.add(node)
        made = _made_by(node, value, kernels, values)
        told = told or before[:1] * (made == MIXED)
        told += [made] if made in _AT_ONCE else []
        if told:
            value = said(value, assumed(told[0]))
            self.said[node] = told[0]
        reason = made or next(iter(before), "")
        stays = value.positions > 1 or operation_name(node) in _VIEWS or _is_function(node)
        if reason == ORDERED:
            one_of_them = any(role == "c" for axis in value.axes for role, _ in axis)
            stays = one_of_them and not operation_name(node).startswith(_LAYERS)  # those sum over all channels
        if reason and stays:
            self.reasons[node] = reason
        return value


def _is_function(node: fx.Node) -> bool:
    """Whether the node acts entry by entry, and not as a multiple."""
    if node.op == "call_module":
        root: Any = node.graph.owning_module
        return not isinstance(root.get_submodule(str(node.target)), (Scale, WeightedSum, nn.Identity))
    if operation_name(node) == "prelu":
        return True
    return is_pointwise(node.target) and operation_name(node).strip("_") not in _LINEAR and node.target not in COPIES


def _needs_positions(node: fx.Node, reasons: list[str], kernels: list[Kernel], values: Mapping[fx.Node, Any]) -> bool:
    name, uneven = operation_name(node), len(reasons)
    if reasons[0] == ORDERED and name.startswith((*_LAYERS, "layer_norm", "rms_norm")):  # of all channels together
        return False
    if name.startswith("conv"):
        return True  # windows read some positions more often than others
    if name.startswith("avg_pool"):
        return True
    if name.startswith("adaptive_avg_pool"):  # the average of all positions counts each of them once
        return max(_listed(_argument(node, "output_size", 1)), default=2) > 1
    if name in ("mul", "div"):
        known = [v for n in node.all_input_nodes if isinstance(v := values[n], Tensor)]
        return uneven > 1 or (name == "div" and len(kernels) > 1) or any(_differs(t, kernels[0]) for t in known)
    if name == "index":
        return True
    if name in _CUTS:
        return _cuts_positions(node, kernels, "c" if reasons[0] == ORDERED else "p")
    return _is_function(node) or name in _PER_POSITION or name.startswith(("max_pool", "adaptive_max_pool"))


def _differs(known: Tensor, x: Kernel) -> bool:
    """Whether a known factor of ``x`` has other numbers at some positions."""
    dims = range(1, min(known.ndim, len(x.axes)) + 1)
    placed = [at for at in dims if known.shape[-at] > 1 and any(role == "p" for role, _ in x.axes[-at])]
    return any(known.is_meta or bool((known != known.narrow(-at, 0, 1)).any()) for at in placed)


def _run_along(node: fx.Node, kernels: list[Kernel]) -> str:
    """Why the entries of a running sum, or of what is put in order, are not alike, or ""."""
    if operation_name(node) not in _RUNS or not kernels:
        return ""
    axes = kernels[0].axes
    dim = _argument(node, "dim", -1)
    roles = {role for role, _ in axes[dim % len(axes)]} if isinstance(dim, int) and axes else set[str]()
    return RUNNING if "p" in roles else ORDERED if "c" in roles else ""


def _cuts_positions(node: fx.Node, kernels: list[Kernel], cut: str) -> bool:
    """Whether a cut goes through positions (or channels), and not between tensors whose kernels are remembered."""
    index = 2 if operation_name(node) in ("chunk", "split", "split_with_sizes") else 1
    dim = node.args[index] if len(node.args) > index else 0
    if not kernels or not isinstance(dim, int):
        return False
    x = kernels[0]
    dim %= len(x.axes)
    beside = x.joined is not None and x.joined[0] == dim
    return not beside and x.shape[dim] > 1 and all(role == cut for role, _ in x.axes[dim])


def _argument(node: fx.Node, name: str, default: Any) -> Any:
    schema = getattr(node.target, "_schema", None)
    names = [a.name for a in schema.arguments] if schema is not None else []
    if name in node.kwargs:
        return node.kwargs[name]
    index = names.index(name) if name in names else len(node.args)
    return node.args[index] if index < len(node.args) else default


def _most(value: Any) -> int:
    if value == "same":
        return 1
    values = value if isinstance(value, (list, tuple)) else [value]
    return max((int(v) for v in values if isinstance(v, int)), default=0)


def _zeros(node: fx.Node) -> int:
    return _most(_argument(node, "padding", 0))


def _strided(node: fx.Node) -> bool:
    return _most(_argument(node, "stride", 1)) > 1


def _made_by(node: fx.Node, value: Kernel, kernels: list[Kernel], values: Mapping[fx.Node, Any]) -> str:
    """Why the positions of the node's own result are not alike, or ""."""
    name = operation_name(node)
    if run := _run_along(node, kernels):
        return run
    if value.positions == 1:
        return ""
    if name.startswith("conv_transpose"):
        weight = values.get(node.args[1])  # type: ignore[arg-type]
        sizes = list(weight.shape[2:]) if isinstance(weight, Tensor) else []
        stride = _argument(node, "stride", 1)
        strides = list(stride) if isinstance(stride, (list, tuple)) else [stride]
        even = sizes == strides * (len(sizes) // max(len(strides), 1)) and _zeros(node) == 0
        return "" if even else TAPS
    if name.startswith("conv"):
        return BORDER if _zeros(node) > 0 or kernels[0].unpadded is not None else ""
    if name in ("pad", "constant_pad_nd"):
        copies = name == "pad" and _argument(node, "mode", "constant") != "constant"
        return COPIED if copies else BORDER if any(_argument(node, "pad", ())) else ""
    if name.startswith("max_pool"):
        return WINDOWS if _zeros(node) > 0 else ""
    if name.startswith("avg_pool"):
        return BORDER if _zeros(node) > 0 and _argument(node, "count_include_pad", True) else ""
    if name.startswith(("upsample_linear", "upsample_bilinear", "upsample_trilinear", "upsample_bicubic")):
        return BETWEEN
    if name in ("cat", "concat", "stack"):
        if _copies(node, values):
            return COPIED
        return JOINED if value.joined is not None and not alike(value.joined[1]) else ""
    if name == "getitem" and value.joined is not None and operation_name(node.all_input_nodes[0]).startswith(_STEPPED):
        return "" if alike(value.joined[1]) else STEPS
    if name in ("matmul", "mm", "einsum"):
        constant = [n for n in node.all_input_nodes if isinstance(values[n], Tensor) and not is_parameter(n)]
        return MIXED if constant else ""
    if name == "scaled_dot_product_attention":
        return CAUSAL if _argument(node, "is_causal", False) or _argument(node, "attn_mask", None) is not None else ""
    return ""


def _overlaps(node: fx.Node, values: Mapping[fx.Node, Any]) -> bool:
    """Whether neighbouring windows of a convolution or pool share positions."""
    name = operation_name(node)
    if name.startswith("conv"):
        weight = values.get(node.args[1])  # type: ignore[arg-type]
        taps = list(weight.shape[2:]) if isinstance(weight, Tensor) else []
    elif name.startswith(("avg_pool", "max_pool")):
        taps = _listed(_argument(node, "kernel_size", 1))
    else:
        return name.startswith("upsample")
    steps = _listed(_argument(node, "stride", 1)) or taps
    if name.startswith("conv_transpose"):
        return max(steps, default=1) > 1  # some positions share taps, others do not
    steps = steps * len(taps) if len(steps) == 1 else steps
    return any(k > s for k, s in zip(taps, steps, strict=False))


def _reads_windows(node: fx.Node, value: Kernel) -> bool:
    """Whether a node takes averages or maxima of neighbours, or every second position."""
    name = operation_name(node)
    pools = name.startswith(("avg_pool", "max_pool", "adaptive_avg_pool", "adaptive_max_pool"))
    strided = name.startswith("conv_transpose") or (name.startswith("conv") and _strided(node))
    return (pools and value.positions > 1) or strided


def _narrows(node: fx.Node, value: Kernel, kernels: list[Kernel]) -> bool:
    """Whether a convolution leaves fewer positions, whose pairs are nearer to one another than those before it."""
    return operation_name(node).startswith("conv") and value.positions < kernels[0].positions


def _listed(value: Any) -> list[int]:
    values = value if isinstance(value, (list, tuple)) else [value]
    return [int(v) for v in values if isinstance(v, int)]


def _copies(node: fx.Node, values: Mapping[fx.Node, Any]) -> bool:
    """Whether a concatenation puts the same random numbers at several positions."""
    pieces = (
        [values[n] for n in node.args[0] if isinstance(n, fx.Node)] if isinstance(node.args[0], (list, tuple)) else []
    )
    dim = _argument(node, "dim", 0)
    if not pieces or not all(isinstance(piece, Kernel) for piece in pieces) or operation_name(node) == "stack":
        return False
    roles = {role for role, _ in pieces[0].axes[dim % len(pieces[0].axes)]}
    if "c" in roles or "b" in roles:
        return False
    return any(not a.merged.independent(b.merged) for i, a in enumerate(pieces) for b in pieces[:i])
