"""Log-determinants among a model's outputs: found by what they are, and said to be false where a rewrite made them so.

An invertible flow returns y(x) and log|det dy/dx|. Weighted sums, restored q values and shaped activations change y; a
log-determinant that the forward computes by a formula of its own does not follow.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from kgraph.inputs import Inputs
from kgraph.untouched import untouched

_MOST_INPUTS = 4
_MOST_ENTRIES = 1024
"""Entries of one input up to which its Jacobian is made: a backward run and a row for each."""
_AGREEMENT = 1e-2
"""Relative to 1 + |log det|: float32 forwards agree to 1e-4, other quantities by chance at several inputs do not."""

Pair = tuple[int, int]


def find_log_determinants(model: nn.Module, inputs: Inputs) -> tuple[Pair, ...]:
    """(k, l) for outputs l that are log|det| of the derivative of output k with respect to the only tensor input."""
    x = _single(inputs)
    if x is None or any(p.is_meta for p in model.parameters()):
        return ()
    shapes = [tuple(v.shape) for v in _run(model, inputs, x.detach())]
    pairs = [(k, m) for k in range(len(shapes)) for m in range(len(shapes)) if _may_be(shapes[k], shapes[m], x)]
    return tuple(pair for pair in pairs if _is_log_determinant(model, inputs, x, pair))


def false_log_determinants(model: nn.Module, inputs: Inputs, pairs: tuple[Pair, ...]) -> list[str]:
    """What to say of those of ``pairs`` that do not hold for ``model``."""
    x = _single(inputs)
    bad = [pair for pair in pairs if x is not None and not _is_log_determinant(model, inputs, x, pair)]
    return [
        f"output {m} was the log-determinant of output {k} and is no longer: sums, gates or activations that it "
        "depends on were changed, and its formula in the forward does not follow. Transform the networks inside the "
        "flow (scale, shift), not the flow"
        for k, m in bad
    ]


def _single(inputs: Inputs) -> Tensor | None:
    """The one floating-point input, where it is small enough."""
    tensors = [leaf for leaf in pytree.tree_leaves(tuple(inputs)) if isinstance(leaf, Tensor)]
    if len(tensors) != 1 or not tensors[0].is_floating_point() or tensors[0].ndim < 2 or tensors[0].is_meta:
        return None
    return tensors[0] if 0 < tensors[0][0:1].numel() <= _MOST_ENTRIES else None


def _may_be(y: tuple[int, ...], log_det: tuple[int, ...], x: Tensor) -> bool:
    rows = x.shape[0]
    same = len(y) > 1 and y[0] == rows and torch.Size(y).numel() == x.numel()
    return same and log_det in ((rows,), (rows, 1)) and x[0].numel() > 1


def _run(model: nn.Module, inputs: Inputs, x: Tensor) -> list[Tensor]:
    """The tensors of the output for another value of the input, in eval mode; model and input stay as they were."""
    args, kwargs = pytree.tree_map_only(Tensor, lambda _: x.clone(), (inputs.args, inputs.kwargs))
    with untouched(model), torch.set_grad_enabled(x.requires_grad):
        model.eval()
        output: Any = model(*args, **kwargs)
    return [leaf for leaf in pytree.tree_leaves(output) if isinstance(leaf, Tensor) and leaf.is_floating_point()]


def _is_log_determinant(model: nn.Module, inputs: Inputs, x: Tensor, pair: Pair) -> bool:
    point = x.detach().clone().requires_grad_()
    leaves = _run(model, inputs, point)
    y, given = leaves[pair[0]].flatten(1), leaves[pair[1]].detach().flatten()[:_MOST_INPUTS].double()
    if not y.requires_grad:
        return False
    sums = y.sum(0)  # an input's outputs depend on that input alone
    rows = [torch.autograd.grad(one, point, retain_graph=True, materialize_grads=True)[0] for one in sums]
    jacobian = torch.stack(rows, 1).flatten(2)[:_MOST_INPUTS].double()  # inputs x outputs x entries
    true = torch.linalg.slogdet(jacobian).logabsdet
    return bool(((given - true).abs() <= _AGREEMENT * (1 + true.abs())).all())


__all__ = ["false_log_determinants", "find_log_determinants"]
