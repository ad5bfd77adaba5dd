"""Why an activation does not do what its local maps say: the size of its input, the input's mean, or its law.

Local maps are those of Gaussians of mean 0 and q = 1. In order, the input's own q, its own mean and its own law are
put in; what moves the result most is the cause. The mean matters where sums carry a positive activation along (the
shortcuts of a post-activation ResNet): means add up coherently, where everything else adds up in squares.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, fx

from kgraph.kernel import Kernel, Part
from kgraph.maps import Pointwise
from kgraph.modules import WeightedSum
from kgraph.nonlinear import Region
from kgraph.passes.base import Workspace

Read = Callable[[Tensor, Tensor], float]
"""What is looked at, of ``E[phi(u) phi(v)]`` and ``E[phi'(u) phi'(v)]`` for all pairs, [P, 2] each."""
_NEAR = 1e-6


def cause(
    work: Workspace, kernels: dict[fx.Node, Kernel], region: Region, read: Read, expected: float, found: float
) -> str:
    """The cause, in words that go on "its input ...", with figures where it is the mean.

    Args:
        kernels: of the graph as it is.
        region: the activation.
        expected: what the local map says.
        found: what the analysis says.
    """
    if region.source not in kernels:
        return "is not Gaussian"
    part, fn = kernels[region.source].merged, region.fn
    q = float(part.q)
    plain, with_mean = (read(*_maps(part, fn, mean)) for mean in (0.0, part.mean))
    size, mean, law = abs(plain - expected), abs(with_mean - plain), abs(found - with_mean)
    if size > max(mean, law):
        return f"has q = {q:.4g}"
    if mean <= max(law, _NEAR * abs(plain)):
        return "is not Gaussian"
    return (
        f"has the mean {part.mean:.3g}{_brought(work, kernels, region.source)}, {part.mean**2 / q:.1%} of its q "
        f"(a Gaussian of this mean gives {with_mean:.4g}, of mean 0 {plain:.4g})"
    )


def _maps(part: Part, fn: Pointwise, mean: float) -> tuple[Tensor, Tensor]:
    shifted = fn if mean == 0 else fn.affine(input_shift=mean)
    variance = (part.q - mean**2).clamp_min(0)
    return shifted.dual(variance, variance, part.cov - mean**2)


def _brought(work: Workspace, kernels: dict[fx.Node, Kernel], source: fx.Node) -> str:
    """Which term of a weighted sum holds most of its mean."""
    module = work.module(source)
    terms = [term for term in source.args if isinstance(term, fx.Node) and term in kernels]
    if not isinstance(module, WeightedSum) or len(terms) != len(module.weights):
        return ""
    sizes = torch.tensor([abs(w * kernels[term].merged.mean) for w, term in zip(module.weights, terms, strict=True)])
    at = int(sizes.argmax())
    return f" of {'its shortcut' if source.meta.get('shortcut') == at else 'its term'} {terms[at].name}"


__all__ = ["Read", "cause"]
