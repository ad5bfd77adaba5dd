"""Weights that the forward computes: which of them a new draw may stand in for.

Only a normalization may be left out: f(t W) = f(W) for every t > 0, so that nothing but the direction of W is used and
a weight drawn at the right size has no need of it (weight standardization, weight_norm, spectral_norm). A mask, an
absolute value, a symmetric part or an average over rotations is what the model means, and stays.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, fx
from torch.utils import _pytree as pytree

from kgraph.canonical import operation_name
from kgraph.passes.base import Workspace

_MOVES = {"t", "transpose", "permute", "reshape", "view", "contiguous", "clone", "numpy_T", "mT", "detach", "to"}
_TIMES = 7.0
_CLOSE = 1e-3


def is_moved(weight: fx.Node, origin: fx.Node) -> bool:
    """Whether ``weight`` is ``origin`` with its entries in another order."""
    node = weight
    while node is not origin:
        if operation_name(node) not in _MOVES or not isinstance(node.args[0], fx.Node):
            return False
        node = node.args[0]
    return True


def is_normalization(work: Workspace, weight: fx.Node, origin: fx.Node) -> bool:
    """Whether ``weight`` depends on no more than the direction of ``origin``, by trial on random numbers."""
    tensor = work.tensor(origin)
    if tensor.is_meta:
        return False
    generator = torch.Generator().manual_seed(0)
    drawn = torch.randn(tensor.shape, generator=generator, dtype=torch.float64).to(tensor.device)
    found = [_computed(work, weight, {origin: scale * drawn}) for scale in (1.0, _TIMES)]
    one, other = found
    if one is None or other is None or not bool(one.any()):
        return False
    return float((one - other).abs().max()) <= _CLOSE * float(one.abs().max())


def _computed(work: Workspace, wanted: fx.Node, known: dict[fx.Node, Any]) -> Tensor | None:
    """``wanted`` from the model's tensors and those in ``known``; None where it reads an input."""
    for node in work.nodes:
        if node in known:
            continue
        if node.op == "get_attr":
            value = work.tensor(node)
            value = value.detach().double() if value.is_floating_point() else value
            known[node] = value if bool(value.any()) else torch.ones_like(value)  # gains that begin at 0 hide the rest
        elif node.op == "call_function" and all(n in known for n in node.all_input_nodes):
            args, kwargs = pytree.tree_map_only(fx.Node, known.__getitem__, (node.args, dict(node.kwargs)))
            try:
                known[node] = node.target(*args, **kwargs)  # type: ignore[operator]
            except (RuntimeError, TypeError):  # other branches of the graph need not go through in this precision
                continue
        if node is wanted:
            break
    value = known.get(wanted)
    return value if isinstance(value, Tensor) else None
