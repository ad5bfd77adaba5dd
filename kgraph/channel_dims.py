"""Which dimension of an input holds its channels: the one that the first layer sums over, followed back through moves.

An image may be flattened, transposed, pooled or cut before the first layer reads it; every dimension of a value on the
way is known by the dimensions of the input that it holds.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, cast

from torch import Tensor, fx

from kgraph.canonical import operation_name

Origins = tuple[frozenset[int], ...]
"""For every dimension of a value, those of the input that it holds."""
_OF_THE_LAST = {
    *("linear", "addmm", "matmul", "bilinear", "layer_norm", "rms_norm"),
    *("rnn_tanh", "rnn_relu", "lstm", "gru"),
}
_OF_THE_FIRST = ("conv", "batch_norm", "group_norm", "instance_norm")
_VIEWS = {"view", "reshape", "_unsafe_view", "flatten", "unflatten", "squeeze", "unsqueeze"}
_CUTS = {"chunk", "split", "split_with_sizes"}
_TRANSPOSES = {"transpose", "swapaxes", "t", "numpy_T", "mT"}
_REDUCTIONS = {"mean", "sum", "amax", "amin", "var", "std", "logsumexp", "linalg_vector_norm", "norm"}


def channel_dim(node: fx.Node, dims: int) -> int:
    """Dimension of the input ``node`` that the first layer sums over: 1 before a convolution, the last before a
    linear layer, each as it lay in the input; without moves that can be followed, as it lies in what the layer reads.

    Where linear layers come first and a convolution behind them reads another dimension of the input as its channels,
    those it is: the linear layers sum over positions.
    """
    origins: dict[fx.Node, Origins | None] = {node: tuple(frozenset({d}) for d in range(dims))}
    queue = [node]
    by_linear: int | None = None
    for current in queue:
        name, known = operation_name(current), origins[current]
        if name.startswith(_OF_THE_FIRST) and dims > 2 and (by_linear is None or name.startswith("conv")):
            return _origin(known, 1, dims, otherwise=1 if by_linear is None else by_linear)
        if name in _OF_THE_LAST or dims == 1:
            by_linear = by_linear if by_linear is not None else _origin(known, -1, dims, otherwise=dims - 1)
            if known is None or name != "linear" or dims < 3:
                return by_linear
            origins[current] = (*known[:-1], frozenset())
        if name == "einsum" and (summed := _summed_dim(current, set(origins), dims)) is not None:
            return summed if by_linear is None else by_linear
        for user in current.users:
            if user not in origins:
                before = origins[current]
                origins[user] = before if _reads(user, dims) else _followed(user, current, before)
                queue.append(user)
    return by_linear if by_linear is not None else 1 if dims > 1 else 0


def _reads(node: fx.Node, dims: int) -> bool:
    """Whether a node is a layer, whose operand's dimensions are asked for."""
    name = operation_name(node)
    return (name.startswith(_OF_THE_FIRST) and dims > 2) or name in _OF_THE_LAST


def _origin(origins: Origins | None, dim: int, dims: int, otherwise: int) -> int:
    """The one dimension of the input that ``dim`` holds, apart from the batch."""
    if origins is None or not -len(origins) <= dim < len(origins):
        return otherwise
    found = origins[dim] - {0}
    return next(iter(found)) if len(found) == 1 and dims > 1 else otherwise


def _followed(node: fx.Node, before: fx.Node, origins: Origins | None) -> Origins | None:
    """Origins of the node's dimensions, given those of its operand ``before``; None if they cannot be told."""
    name, shapes = operation_name(node), (_shape(before), _shape(node))
    if name in _CUTS:  # a list of parts, each laid out as the whole
        return origins
    if origins is None or shapes[1] is None:
        return None
    if shapes[0] is None or len(shapes[0]) != len(origins):
        return origins if name == "getitem" and len(shapes[1]) == len(origins) else None
    order = list(range(len(origins)))
    if name in _VIEWS:
        return _regrouped(origins, shapes[0], shapes[1])
    if name == "permute":
        return tuple(origins[d] for d in cast(Any, node.args[1]))
    if name in _TRANSPOSES:
        one, two = cast(Any, node.args[1:3] or (-1, -2))
        order[one], order[two] = order[two], order[one]
        return tuple(origins[d] for d in order)
    if name == "select" or name in _REDUCTIONS:
        return _reduced(origins, node, len(shapes[1]))
    return origins if len(shapes[1]) == len(origins) else None


def _reduced(origins: Origins, node: fx.Node, left: int) -> Origins | None:
    """Without the dimensions that were summed or chosen from, unless they are kept as ones."""
    if left == len(origins):
        return origins
    listed = [a for a in node.args[1:] if isinstance(a, (list, tuple))]
    given: Any = listed[0] if listed else node.args[1:2]
    if not all(isinstance(d, int) for d in given):
        return None
    gone = {d % len(origins) for d in given}
    kept = tuple(o for d, o in enumerate(origins) if d not in gone)
    return kept if len(kept) == left else None


def _shape(node: fx.Node) -> tuple[Any, ...] | None:
    value = node.meta.get("val")
    return tuple(value.shape) if isinstance(value, Tensor) else None


def _regrouped(origins: Origins, before: Sequence[Any], after: Sequence[Any]) -> Origins | None:
    """A reshape that keeps the batch in front: every run of dimensions of equal size holds what it held."""
    numbers = [s for s in (*before[1:], *after[1:]) if isinstance(s, int)]
    if str(before[0]) != str(after[0]) or len(numbers) != len(before) + len(after) - 2 or 0 in numbers:
        return None
    found, taken, held, made = [origins[0]], 1, frozenset[int](), 0
    sizes = iter(zip(before[1:], origins[1:], strict=True))
    total = 1
    for size in after[1:]:
        made, total = made + 1, total * size
        while taken < total:
            length, own = next(sizes, (0, frozenset()))
            if not length:
                return None
            taken *= length
            held = held | own if length > 1 else held
        if taken == total:
            found, held, made = [*found, *[held] * made], frozenset(), 0
    return tuple(found) if math.prod(before[1:]) == math.prod(after[1:]) else None


def _summed_dim(node: fx.Node, seen: set[fx.Node], dims: int) -> int | None:
    """The one dimension of an operand among ``seen`` that an einsum sums over."""
    equation: Any = node.args[0]
    inputs, _, output = str(equation).replace(" ", "").partition("->")
    for letters, operand in zip(inputs.split(","), cast(Any, node.args[1]), strict=False):
        summed = [i for i, letter in enumerate(letters) if letter not in output]
        if operand in seen and len(letters) == dims and len(summed) == 1:
            return summed[0]
    return None
