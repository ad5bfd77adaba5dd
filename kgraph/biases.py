"""Biases whose law matters: PyTorch draws uniform ones, and of few inputs they are a large share of what a unit holds.

A unit's value is a Gaussian about its bias. Where the bias's fourth cumulant is a share of the variance squared that
shows, functions are averaged over the biases themselves, by a Gauss rule of their values.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from kgraph.kernel import Bias, Gaussian, Part, Sum

_NODES = 6
SHOWS = 2e-3
"""Fourth cumulant over the variance squared: the relative change of a second moment is about a tenth of it."""
_SIGMAS = 5.0
_CHANCE = 0.05
"""Of Gaussian biases to be taken as they are instead of by their law: no error, for they are what they are."""
_MOST_TERMS = 8


def bias_law(bias: Tensor | None, mean: float) -> Bias | None:
    """The law of a layer's biases about ``mean``; None where they are few, all alike or as good as Gaussian."""
    if bias is None or bias.is_meta or bias.is_complex() or bias.numel() < 2 or not any(bias.stride()):
        return None
    values = bias.detach().double().flatten()
    square = float(values.square().mean()) - mean**2
    centred = values - values.mean()
    spread = float(centred.square().mean())
    if square <= 0 or spread <= 1e-12 * square:
        return None
    centred = centred * math.sqrt(square / spread)
    fourth = _excess(centred, square)
    if not fourth:
        return None
    if abs(float(centred.pow(3).mean())) <= _SIGMAS * math.sqrt(6 / len(values)) * square**1.5:
        centred = torch.cat([centred, -centred])  # its skewness is noise
    nodes, weights = gauss_rule(centred)
    return Bias(nodes, weights, square, fourth * square**2)


def excess_kurtosis(values: Tensor) -> float:
    """E[x^4] / E[x^2]^2 - 3 about zero; 0 of few, of values all alike and of what is as good as Gaussian."""
    values = values.detach().double().flatten()
    square = float(values.square().mean()) if len(values) > 1 else 0.0
    return _excess(values, square) if square > 0 else 0.0


def _excess(centred: Tensor, square: float) -> float:
    """Excess kurtosis; 0 where it is noise."""
    fourth = float(centred.pow(4).mean()) / square**2 - 3
    noise = _SIGMAS * math.sqrt(24 / len(centred))
    return fourth if abs(fourth) > noise or _bounded(centred, square) else 0.0


def _bounded(centred: Tensor, square: float) -> bool:
    """Whether Gaussian values would hardly ever keep so close together: few uniform ones show by that first."""
    inside = math.erf(float(centred.abs().max()) / math.sqrt(2 * square))
    return inside ** len(centred) < _CHANCE


def together(laws: Sequence[Bias]) -> Bias:
    """The law of a sum of independent biases: cumulants add."""
    total = laws[0]
    for law in laws[1:]:
        values = (total.nodes[:, None] + law.nodes).flatten()
        nodes, weights = gauss_rule(values, (total.weights[:, None] * law.weights).flatten())
        total = Bias(nodes, weights, total.variance + law.variance, total.excess + law.excess)
    return total


def gauss_rule(values: Tensor, shares: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """Nodes and weights with the first moments of the values (Lanczos; Golub and Welsch 1969).

    Args:
        values: [n].
        shares: their probabilities, [n]; alike if None.
    """
    start = torch.full_like(values, len(values) ** -0.5) if shares is None else shares.sqrt()
    basis, diagonal, beside = [start], [], []
    for _ in range(_NODES):
        image = values * basis[-1]
        diagonal.append(image @ basis[-1])
        for _ in range(2):  # once more, for rounding
            image = image - sum((image @ b) * b for b in basis)
        norm = image.norm()
        if len(diagonal) == _NODES or float(norm) <= 1e-9 * float(values.abs().max()):
            break
        beside.append(norm)
        basis.append(image / norm)
    matrix = torch.diag(torch.stack(diagonal))
    for i, b in enumerate(beside):
        matrix[i, i + 1] = matrix[i + 1, i] = b
    nodes, vectors = torch.linalg.eigh(matrix)
    return nodes, vectors[0].square()


def bias_of(part: Part) -> Bias | None:
    """The bias in a Gaussian part (or in a sum of some) that shows; the largest where several do."""
    bias = any_bias_of(part)
    return bias if bias is not None and abs(bias.excess) > SHOWS * float(part.q - part.mean**2) ** 2 else None


def any_bias_of(part: Part) -> Bias | None:
    """The same, whether it shows or not: averages of positions have it, and less besides."""
    return max(_biases(part), key=lambda bias: abs(bias.excess), default=None)


def _biases(part: Part) -> list[Bias]:
    if isinstance(part.expr, Gaussian):
        return [part.expr.bias] if part.expr.bias is not None else []
    if not isinstance(part.expr, Sum) or len(part.expr.terms) > _MOST_TERMS:
        return []
    return [bias.times(weight) for weight, term in part.expr.terms for bias in _biases(term)]
