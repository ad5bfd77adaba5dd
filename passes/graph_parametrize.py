"""Graph-based parametrization: every output pixel of a convolution is scaled by its own number of parents.

    conv(x, W, b)   ->   conv(x, W) * sqrt(c_max / |P|) + b        (0 where |P| = 0; the bias is not scaled)

Parameters and their names stay; a pixel with all its parents, c_max, is multiplied by exactly 1. Circular and
reflected borders have no missing parents and are left alone. Source: Jacot et al. 2019, arXiv 1907.05715.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from torch import fx, nn

from kgraph.canonical import aten, operation_name
from kgraph.capture import capture, check_model
from kgraph.checks import flag
from kgraph.emitted import EmittedModule
from kgraph.parent_scale import PARENT_SCALE, ParentScale, Taps
from kgraph.passes.base import Pass, Workspace, owner_path
from kgraph.site import shape_of, site_of

CONVOLUTIONS = ("conv1d", "conv2d", "conv3d")
TRANSPOSED = ("conv_transpose1d", "conv_transpose2d", "conv_transpose3d")
_ARGUMENTS = ("input", "weight", "bias", "stride", "padding", "dilation", "groups")
_TRANSPOSED_ARGUMENTS = ("input", "weight", "bias", "stride", "padding", "output_padding", "groups", "dilation")


@dataclass(frozen=True)
class GraphParametrize(Pass):
    """Put a `ParentScale` behind every convolution whose output pixels differ in their number of parents.

    Args:
        dynamic: compute M in the graph, for exported models with dynamic image sizes; else it is kept as a buffer
            for the example's size (another size still works in eager mode). A convolution that is even at the
            example's size, but not at every size, is scaled too.
    """

    dynamic: bool = False

    def __post_init__(self) -> None:
        flag("dynamic", self.dynamic)

    def rewrite(self, work: Workspace) -> None:
        for node in work.nodes:
            if not is_convolution(node) or not work.is_random(node.args[0]) or _is_scaled(work, node):
                continue
            taps, like = taps_of(node)
            sizes = spatial_sizes(like, len(taps.kernel))
            count = taps.parents(sizes)
            if bool((count == count.max()).all()) and not (self.dynamic and taps.ever_uneven()):
                work.keep(node, operation_name(node), "every output pixel has the same number of parents")
                continue
            fewest, most = int(count.min()), int(count.max())
            self._scale(work, node, taps, like, sizes)
            before, after = f"{fewest} to {most} parents", "weights 1 at a bulk pixel, more at the others"
            work.record(
                node, "graph parametrization", "pixels of fewer parents would have less variance", before, after
            )

    def broken(self, work: Workspace) -> str:
        nodes = [n for n in work.nodes if is_convolution(n) and work.is_random(n.args[0])]
        left = [n.name for n in nodes if _is_uneven(n) and not _is_scaled(work, n)]
        return f"{', '.join(left)} still uneven" if left else ""

    def _scale(self, work: Workspace, node: fx.Node, taps: Taps, like: fx.Node, sizes: tuple[int, ...]) -> None:
        weight, bias = node.args[1], argument(node, "bias")
        value = node.meta.get("val")
        dtype, device = getattr(value, "dtype", None), getattr(value, "device", None)
        if isinstance(weight, fx.Node) and weight.op == "get_attr":
            dtype, device = work.tensor(weight).dtype, work.tensor(weight).device
        module = ParentScale(taps, None if self.dynamic else sizes, dtype, device)
        call = work.call_after(node, module, _name(work, node))
        call.args = (node, like, bias) if isinstance(bias, fx.Node) else (node, like)
        node.args = (node.args[0], weight, None, *node.args[3:])
        node.kwargs = {key: value for key, value in node.kwargs.items() if key != "bias"}
        node.meta.pop("group_size", None)  # no longer what the user's module computes: stays functional


def graph_parametrize(model: nn.Module, example_inputs: object = None, *, dynamic: bool = False) -> EmittedModule:
    """A copy of a model whose convolutions are parametrized by their graph; ``result.kgraph`` is the ledger.

    Args:
        model: any bare module, left as it was; parameters and state-dict keys of the result are the same.
        example_inputs: tensor, tuple or dict; inferred when None.
        dynamic: see `GraphParametrize`.

    Raises:
        ModelError, InputError, CaptureError: see `kgraph.errors`.
    """
    step = GraphParametrize(dynamic)
    owned = copy.deepcopy(check_model(model))
    work = Workspace(capture(owned, example_inputs), "eval")
    step.run(work)
    result = work.graph.emit()
    result.train(model.training)
    result.meta["kgraph"] = work.ledger(repr(step))
    return result


def is_convolution(node: fx.Node) -> bool:
    """Whether a node is a convolution, transposed or not, of a batch of images."""
    if node.op != "call_function" or operation_name(node) not in CONVOLUTIONS + TRANSPOSED:
        return False
    source, weight = node.args[0], node.args[1]
    return isinstance(source, fx.Node) and isinstance(weight, fx.Node) and len(shape_of(source)) == _ndim(weight)


def is_transposed(node: fx.Node) -> bool:
    return operation_name(node) in TRANSPOSED


def argument(node: fx.Node, name: str) -> Any:
    """An argument of a convolution by name; None where it is left out."""
    names = _TRANSPOSED_ARGUMENTS if is_transposed(node) else _ARGUMENTS
    at = names.index(name)
    return node.args[at] if at < len(node.args) else node.kwargs.get(name)


def taps_of(node: fx.Node) -> tuple[Taps, fx.Node]:
    """Geometry of a convolution, and the node whose sizes its input has; zero padding in front of it counts as its own.

    |P| is about the image: pixels of a padding are no parents.
    """
    like, weight = node.args[0], node.args[1]
    assert isinstance(like, fx.Node) and isinstance(weight, fx.Node)
    kernel = shape_of(weight)[2:]
    dims = len(kernel)
    stride, dilation = _each(argument(node, "stride"), dims, 1), _each(argument(node, "dilation"), dims, 1)
    if is_transposed(node):
        cut = _each(argument(node, "padding"), dims, 0)
        extra = _each(argument(node, "output_padding"), dims, 0)
        return Taps(kernel, stride, cut, cut, dilation, extra, True), like
    before, after = _paddings(argument(node, "padding"), kernel, dilation)
    while (amounts := _zero_padding(like, dims)) is not None:
        like = like.args[0]
        assert isinstance(like, fx.Node)
        before = tuple(b + a for b, a in zip(before, amounts[0::2], strict=True))
        after = tuple(b + a for b, a in zip(after, amounts[1::2], strict=True))
    return Taps(kernel, stride, before, after, dilation, (0,) * dims), like


def spatial_sizes(like: fx.Node, dims: int) -> tuple[int, ...]:
    return shape_of(like)[-dims:]


def bulk_parents(node: fx.Node) -> int:
    """c_max at the example's size."""
    taps, like = taps_of(node)
    return taps.most(spatial_sizes(like, len(taps.kernel)))


def _ndim(weight: fx.Node) -> int:
    return len(shape_of(weight))


def _each(value: Any, dims: int, default: int) -> tuple[int, ...]:
    values = [default] if value is None else [value] if isinstance(value, int) else list(value)
    return tuple(int(v) for v in (values * dims if len(values) == 1 else values))


def _paddings(padding: Any, kernel: Sequence[int], dilation: Sequence[int]) -> tuple[tuple[int, ...], tuple[int, ...]]:
    if padding == "same":  # PyTorch pads the odd one behind
        reach = [d * (k - 1) for d, k in zip(dilation, kernel, strict=True)]
        return tuple(r // 2 for r in reach), tuple(r - r // 2 for r in reach)
    amounts = (0,) * len(kernel) if padding == "valid" else _each(padding, len(kernel), 0)
    return amounts, amounts


def _zero_padding(node: fx.Node, dims: int) -> tuple[int, ...] | None:
    """(before, after) of every axis, first axis first, where a node pads an image with zeros; else None."""
    arguments: list[Any] = list(node.args)
    if node.target is aten.pad.default:
        mode = arguments[2] if len(arguments) > 2 else node.kwargs.get("mode", "constant")
        value = arguments[3] if len(arguments) > 3 else node.kwargs.get("value")
    elif node.target is aten.constant_pad_nd.default:
        mode, value = "constant", arguments[2] if len(arguments) > 2 else 0
    else:
        return None
    amounts = arguments[1]
    plain = all(isinstance(a, int) and a >= 0 for a in amounts) and len(amounts) <= 2 * dims
    if mode != "constant" or value not in (None, 0, 0.0) or not plain:
        return None
    missing = dims - len(amounts) // 2
    pairs = [(amounts[i], amounts[i + 1]) for i in range(0, len(amounts), 2)][::-1]
    return (0, 0) * missing + tuple(amount for pair in pairs for amount in pair)


def _is_uneven(node: fx.Node) -> bool:
    taps, like = taps_of(node)
    count = taps.parents(spatial_sizes(like, len(taps.kernel)))
    return bool((count != count.max()).any())


def _is_scaled(work: Workspace, node: fx.Node) -> bool:
    readers = [user for user in node.users if user.target is PARENT_SCALE or isinstance(work.module(user), ParentScale)]
    return bool(readers)


def _name(work: Workspace, node: fx.Node) -> str:
    """Beside the user's module: ``decoder.0`` gets ``decoder.0_parents``."""
    site, prefix = site_of(node), owner_path(work, node)
    leaf = bool(site.path) and f"{site.path}." != prefix
    return f"{site.path}_parents" if leaf else f"{prefix}parents"
