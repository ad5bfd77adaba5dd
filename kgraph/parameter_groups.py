"""Optimizer parameter groups of a network in NTK form with standard parameters.

SGD with lr_W = eta c^2 and lr_b = eta beta^2 on W ~ N(0, c^2), b ~ N(0, beta^2) takes, step by step, the same
functions as SGD with rate eta on the NTK form ``z = c W a + beta b`` with W, b ~ N(0, 1).

Source: Jacot, Gabriel, Ged, Hongler 2019, arXiv 1907.05715.
"""

from __future__ import annotations

import math
from typing import Any

from torch import nn

from kgraph.capture import capture, check_model
from kgraph.checks import number
from kgraph.emitted import EmittedModule
from kgraph.errors import InputError
from kgraph.passes.base import Workspace
from kgraph.passes.ntk_chaos_layers import AffineLayer, affine_layer
from kgraph.record import TransformRecord
from kgraph.systems import NTKChaos


def param_groups(
    model: nn.Module,
    *,
    lr: float,
    beta: float | None = None,
    example_inputs: object = None,
    stride_exponent: float = 0.0,
) -> list[dict[str, Any]]:
    """Groups ``{"params", "lr", "name"}`` for any torch optimizer: lr c^2 for weights, lr beta^2 for biases.

        lr_W = lr c^2 S^(-e),   lr_b = lr beta^2 S^(-e),   c^2 = (1 - beta^2) / fan_in (1 / fan_in without bias)

    S is the product of the strides that lie between the input and the layer (S^l for l layers of stride S): transposed
    convolutions count as they enlarge the image, others as they shrink it. e = 1/2 balances the layers of a
    generator. Parameters of no affine layer (a learnable slope, an embedding) have the rate lr, and so have those of
    a layer whose weight is computed from its parameters (weight normalization, a transpose).

    Momentum keeps the equality; weight decay does not: a decay d of the NTK form is d / c^2 in the group of rate
    lr c^2.

    Args:
        model: any bare module; what `kgraph.transform` made of one with `NTKChaos` knows its beta and inputs.
        lr: eta, the rate of the NTK form; of the order of 1 over the largest eigenvalue of the NTK.
        beta: standard deviation of the biases; None: the method's.
        example_inputs: inferred when None.
        stride_exponent: e.

    Raises:
        InputError: lr is not positive, or no beta is given and the model knows none; and what `kgraph.capture` raises.
    """
    check_model(model)
    lr, stride_exponent = number("lr", lr), number("stride_exponent", stride_exponent)
    if not (math.isfinite(lr) and lr > 0 and math.isfinite(stride_exponent)):
        raise InputError(
            f"lr is {lr}, stride_exponent is {stride_exponent}", hint="Pass a positive rate and a finite exponent"
        )
    beta = _beta_of(model) if beta is None else number("beta", beta)
    if not 0 <= beta < 1:
        raise InputError(f"beta is {beta}", hint="It is the standard deviation of the biases, in [0, 1)")
    rates: dict[int, float] = {}
    aliases = dict(model.named_parameters(remove_duplicate=False))
    for layer, strides in _layers(model, example_inputs):
        factor = lr * strides**-stride_exponent
        for name, rate in ((layer.weight, factor * layer.variance(beta)), (layer.bias, factor * beta**2)):
            if name in aliases:
                rates.setdefault(id(aliases[name]), rate)
    named = model.named_parameters()
    return [{"params": [tensor], "lr": rates.get(id(tensor), lr), "name": name} for name, tensor in named]


def _beta_of(model: nn.Module) -> float:
    record = model.kgraph if isinstance(model, EmittedModule) else None
    method = record.method if isinstance(record, TransformRecord) else ()
    found = [one.beta for one in (method if isinstance(method, tuple) else (method,)) if isinstance(one, NTKChaos)]
    if not found:
        raise InputError(
            "the model was not made by NTKChaos", hint="Pass beta=..., the standard deviation of its biases"
        )
    return found[0]


def _layers(model: nn.Module, example_inputs: object) -> list[tuple[AffineLayer, float]]:
    """Affine layers with the product of the strides in front of each, along the longest way to it."""
    work = Workspace(capture(model, example_inputs), "eval")
    found: list[tuple[AffineLayer, float]] = []
    strides: dict[Any, float] = {}
    for node in work.nodes:
        strides[node] = max((strides[before] for before in node.all_input_nodes if work.is_random(before)), default=1.0)
        layer = affine_layer(work, node)
        if layer is not None:
            found.append((layer, strides[node]))
            strides[node] *= layer.strides if layer.transposed else 1 / layer.strides
    return found
