"""Second moments of a model's tensors: declared, or measured on their entries."""

from __future__ import annotations

from torch import Tensor

from kgraph.gram.rules.table import Context


def second_moment(context: Context, name: str, tensor: Tensor, *, whole: bool = True) -> float:
    """E[x^2]: declared for this parameter, or measured on its entries (on some of them, if not ``whole``)."""
    context.refuse_declared(name, "another tensor is computed from it")
    if name in context.variances and tensor.is_complex():
        raise context.error(f"the variance declared of {name!r} has no rule: it is complex", "Set its entries instead")
    if name in context.variances:
        return context.variances[name]
    return context.measured(_mean_square, name, tensor) if whole else _mean_square(tensor)


def _mean_square(tensor: Tensor) -> float:
    x = (tensor.real if tensor.is_complex() else tensor).detach().double()  # see `kgraph.gram.complex_numbers`
    return float(x.square().mean()) if x.numel() else 0.0
