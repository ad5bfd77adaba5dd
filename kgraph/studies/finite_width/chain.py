"""A chain z_l = W_l phi_l(z_{l-1}) + b_l: linear layers, a pointwise function before each, the law of each matrix."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from kgraph.maps import Pointwise

Law = Literal["orthogonal", "gaussian"]
Distribution = Literal["measured", "orthogonal", "gaussian"]

_ORTHOGONAL_BELOW = 1e-3
"""Gram defect up to which a matrix counts as orthogonal: rounding of half precision is below."""
_FURTHEST = 3.0
"""Factor from 1 within which a large matrix's defect counts as that of independent entries."""


@dataclass(frozen=True, eq=False)
class ChainLayer:
    """One layer of a chain: ``z' = W phi(z) + b`` with E[W_ij^2] = C_W / width_in and E[b^2] = C_b.

    Attributes:
        name, module, op, source: of the linear layer's node.
        activation: name of phi, "" for none.
        phi: the pointwise function before the layer.
        width_in, width_out: of the matrix.
        C_W, C_b: variances, measured on the tensors or declared.
        has_bias: whether the layer has a bias, which is trained even where C_b = 0.
        law: of the matrix over draws; "gaussian" stands for independent entries of any law.
        law_how: "declared", "measured: ..." or "assumed: ...".
    """

    name: str
    module: str
    op: str
    source: str
    activation: str
    phi: Pointwise
    width_in: int
    width_out: int
    C_W: float
    C_b: float
    has_bias: bool
    law: Law
    law_how: str

    def learning_rates(self, parametrization: str) -> tuple[float, float]:
        """(lambda_W, lambda_b) of Theta = sum_b lambda_b (dz/db)^2 + sum_W (lambda_W / width_in) (dz/dW)^2.

        "standard", what PyTorch trains: (width_in, 1); "ntk": (C_W, C_b).
        """
        if parametrization == "ntk":
            return self.C_W, self.C_b
        return float(self.width_in), float(self.has_bias)


@dataclass(frozen=True)
class Chain:
    """A model read as a chain.

    Attributes:
        model: its name.
        layers: in order.
        notes: of the capture, and what was left out.
    """

    model: str
    layers: tuple[ChainLayer, ...]
    notes: tuple[str, ...] = ()


def law_of(matrix: Tensor, distribution: Distribution) -> tuple[Law, str]:
    """The law of a matrix [out, in], and how it is known.

    Measured by the Gram matrix G of its shorter side over the mean of its diagonal,

        defect = |G - 1|^2 / (r (r + 1) / c),    [r, c] = [min, max](out, in)

    0 for (semi-)orthogonal, about 1 for independent entries whatever their law: connected correlators of different
    units know only the second moments of those.
    """
    if distribution != "measured":
        return distribution, "declared"
    if matrix.is_meta:
        return "gaussian", "assumed: a meta tensor has no values"
    tall = matrix.detach().double()
    tall = tall if tall.shape[0] >= tall.shape[1] else tall.T
    long, short = tall.shape
    gram = tall.T @ tall
    scale = gram.diagonal().mean()
    if short == 1 or not bool(scale > 0):
        return "gaussian", "assumed: a single row or a zero matrix tells no law"
    eye = torch.eye(short, dtype=gram.dtype, device=gram.device)
    defect = float((gram / scale - eye).square().sum()) * long / (short * (short + 1))
    measured = f"Gram defect {defect:.1e} of that of independent entries"
    if defect < _ORTHOGONAL_BELOW:
        return "orthogonal", f"measured: {measured}"
    furthest = _FURTHEST + 8 / math.sqrt(short * (short + 1))  # a sum of r (r + 1) / 2 squares
    if 1 / furthest < defect < furthest:
        return "gaussian", f"measured: {measured}"
    return "gaussian", f"assumed: neither orthogonal nor independent entries ({measured})"
