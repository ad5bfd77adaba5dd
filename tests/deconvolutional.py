"""Decoders of tests/reference/order_chaos.json as ordinary torch models, and their kernels through the public calls."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

import kgraph
from kgraph.capture import Graph
from kgraph.meanfield.order_chaos import activation_moments, shift_of
from kgraph.modules import FunctionModule, ShapedActivation

REFERENCE: dict[str, Any] = json.loads((Path(__file__).parent / "reference" / "order_chaos.json").read_text())
_FORMS: dict[str, Any] = {"std": "standardized", "nrm": "normalized"}
_KINDS = {1: nn.ConvTranspose1d, 2: nn.ConvTranspose2d}


def balanced_module(name: str, form: str) -> ShapedActivation:
    """relu or erf, standardized or normalized."""
    activation = nn.ReLU() if name == "relu" else FunctionModule(torch.erf)
    moments = activation_moments(activation)
    shift = shift_of(moments, _FORMS[form])
    return ShapedActivation(activation, output_shift=-shift, output_scale=moments.power(shift) ** -0.5)


def characteristic(name: str, form: str, beta: float) -> float:
    """r of such a module."""
    moments = activation_moments(name)
    return moments.r(beta, shift_of(moments, _FORMS[form]))


def decoder(
    layers: int,
    dims: int,
    size: int,
    taps: tuple[int, int, int, int],
    activation: tuple[str, str] = ("relu", "std"),
    channels: int = 4,
    outputs: int | None = None,
) -> nn.Sequential:
    """``layers`` transposed convolutions of (kernel, stride, padding, output padding) on size^dims unrelated pixels."""
    kernel, stride, padding, extra = taps
    parts: list[nn.Module] = []
    for i in range(layers):
        fan, out = size**dims if i == 0 else channels, channels
        out = outputs if outputs is not None and i == layers - 1 else out
        parts.append(_KINDS[dims](fan, out, kernel, stride, padding, output_padding=extra))
        if i < layers - 1:
            parts.append(balanced_module(*activation))
    return nn.Sequential(*parts).double()


def pixels(size: int, dims: int) -> Tensor:
    """One input whose pixels are orthogonal and of q = 1, [1, size^dims, *sizes]."""
    count = size**dims
    return torch.eye(count, dtype=torch.float64).reshape(1, count, *(size,) * dims) * math.sqrt(count)


def graph_parametrized(model: nn.Module, size: int, dims: int) -> Any:
    return kgraph.graph_parametrize(model, pixels(size, dims).expand(2, *(-1,) * (dims + 1)))


def variances(model: nn.Module, beta: float, parents: float) -> dict[str, float]:
    """E[w^2] = (1 - beta^2) / (C_in c_max), E[b^2] = beta^2."""
    named = model.named_parameters()
    return {n: beta**2 if n.endswith("bias") else (1 - beta**2) / (p.shape[0] * parents) for n, p in named}


def kernel_matrices(
    model: nn.Module,
    size: int,
    dims: int,
    beta: float,
    parents: float,
    multipliers: Mapping[str, float] | None = None,
    graph: Graph | None = None,
) -> tuple[Tensor, Tensor]:
    """(NTK, NNGP) between all pairs of output pixels, [p, p] each."""
    found = kgraph.kernels(
        graph or model,
        pixels(size, dims),
        parametrization="ntk",
        positions="full",
        variances=variances(model, beta, parents),
        multipliers=multipliers,
    )
    count = math.prod(found.places)
    assert found.ntk is not None and found.how == "exact"
    return found.ntk[0, 0].reshape(count, count), found.nngp[0, 0].reshape(count, count)
