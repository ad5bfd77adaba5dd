"""Where a model stands between order and chaos: r of every layer, its scaled NTK, its borders and checkerboards.

Source: Jacot, Gabriel, Ged, Hongler 2019, arXiv 1907.05715.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.utils import _pytree as pytree

from kgraph.canonical import operation_name
from kgraph.capture import Graph, capture
from kgraph.checks import choice, count, seeded
from kgraph.errors import InputError
from kgraph.gram import Kernels, kernels
from kgraph.inputs import Inputs, resolve_inputs
from kgraph.kernel import SAME, Kernel, Pairs
from kgraph.nonlinear import find_regions
from kgraph.propagate import Propagation, propagate
from kgraph.site import site_of
from kgraph.studies.order_chaos.pixels import MOST_PIXELS, Pixels, measure_pixels, transposed_stride
from kgraph.studies.order_chaos.report import LayerOrder, OrderChaosReport

_AFFINE = ("linear", "addmm", "mm", "matmul")
_UNIT = 0.1
"""Distance of the inputs' mean square from 1 that changes no r by much."""
_CERTAIN = 1e-3
"""Distance of r from 1 that is the edge for any number of weights."""


def order_chaos(
    model: nn.Module | Graph,
    example_inputs: object = None,
    *,
    parametrization: str = "ntk",
    period: int | None = None,
    inputs: int = 8,
    seed: int = 0,
) -> OrderChaosReport:
    """Regime of every layer, scaled NTK between inputs, constant-mode share; borders and checkerboards of images.

    Args:
        model: any bare module (or captured graph), as it stands: weight variances are measured.
        example_inputs: at least two inputs, whose NTK is taken; None: ``inputs`` Gaussian ones.
        parametrization: of the NTK, "ntk" or "standard".
        period: of the checkerboard; None: the stride of the last transposed convolution.
        inputs: number of Gaussian inputs where none are given.
        seed: of those, and of joint draws.

    Raises:
        ModelError, InputError, CaptureError, RuleError: see `kgraph.errors`.
    """
    choice("parametrization", parametrization, ("standard", "ntk"))
    if period is not None:
        count("period", period, 2)
    count("inputs", inputs, 2)
    seed = seeded(seed)
    root = model.root if isinstance(model, Graph) else model
    known = model.inputs if isinstance(model, Graph) else resolve_inputs(root, example_inputs)
    graph = model if isinstance(model, Graph) else capture(model, known)
    x = known if example_inputs is not None else _gaussian(known, inputs, seed)
    arguments = x.args or x.kwargs
    options: dict[str, Any] = {"parametrization": parametrization, "seed": seed}
    result = kernels(graph, arguments, **options)
    matrix = _over_positions(result)
    if not float(matrix.diagonal().min()) > 0:
        raise InputError("the model's NTK vanishes on some input", hint="Some layer passes nothing on")
    pixels, notes = _pixels(graph, arguments, result.places, period, options)
    share = float(matrix.mean() / matrix.diagonal().mean())
    rows = tuple(_layers(graph, propagate(graph, mode="train" if root.training else "eval")))
    return OrderChaosReport(
        graph.name, rows, matrix, share, pixels, parametrization, result.how, (*graph.notes, *notes, *_scale_note(x))
    )


def _scale_note(inputs: Inputs) -> tuple[str, ...]:
    """A word where the inputs' mean square is not 1, beyond four standard errors of Gaussian entries."""
    values = [v for v in pytree.tree_leaves(tuple(inputs)) if isinstance(v, Tensor) and v.is_floating_point()]
    if len(values) != 1 or not values[0].numel():
        return ()
    q = float(values[0].detach().double().square().mean())
    if abs(q - 1) <= _UNIT + 4 * math.sqrt(2 / values[0].numel()):
        return ()
    return (f"q and r of the layers are for inputs of mean square 1, the NTK is for those given, of {q:.4g}",)


def _gaussian(like: Inputs, count: int, seed: int) -> Inputs:
    """As many Gaussian inputs in the shape of the examples; what is no floating-point tensor stays and is repeated."""
    generator = torch.Generator().manual_seed(seed)

    def draw(value: Any) -> Any:
        if not isinstance(value, Tensor) or not value.ndim:
            return value
        if not value.is_floating_point():
            return value[torch.arange(count) % len(value)]
        return torch.randn(count, *value.shape[1:], generator=generator).to(value.dtype)

    return Inputs(*pytree.tree_map(draw, tuple(like)))


def _over_positions(result: Kernels) -> Tensor:
    """NTK [n, n, ...] -> [n, n]: the mean over equal output positions."""
    assert result.ntk is not None
    flat = result.ntk.reshape(*result.ntk.shape[:2], -1)
    if result.positions == "full" and result.places:
        side = math.isqrt(flat.shape[2])
        flat = flat.reshape(*flat.shape[:2], side, side).diagonal(dim1=2, dim2=3)
    return flat.mean(2)


def _pixels(
    graph: Graph, arguments: Any, places: tuple[int, ...], period: int | None, options: dict[str, Any]
) -> tuple[Pixels | None, tuple[str, ...]]:
    """Kernel between the output's pixels for the first input."""
    count = math.prod(places)
    if count <= 1:
        return None, ()
    if count > MOST_PIXELS:
        return None, (f"borders and checkerboards of {count} pixels are left out: at most {MOST_PIXELS}",)
    first = pytree.tree_map(lambda v: v[:1] if isinstance(v, Tensor) and v.ndim else v, arguments)
    result = kernels(graph, first, positions="full", **options)
    assert result.ntk is not None
    chosen = period or _last_stride(graph)
    return measure_pixels(result.ntk.reshape(count, count), result.nngp.reshape(count, count), places, chosen), ()


def _last_stride(graph: Graph) -> int | None:
    """Stride of the last transposed convolution that has one above 1."""
    found = [transposed_stride(node) for node in graph.module.graph.nodes]
    strides = [stride for stride in found if stride > 1]
    return strides[-1] if strides else None


def _layers(graph: Graph, result: Propagation) -> Iterator[LayerOrder]:
    """Activations that an affine layer reads, through whatever stands between."""
    values = result.kernels()
    for region in find_regions(graph.module, values.__contains__):
        layer = None if region.gate else _reader(region.end, values)
        if layer is None or region.source not in values:
            continue
        before, after = _slope(values[region.source]), _slope(values[_scaled(layer)])
        if before > 0 and math.isfinite(after):
            name, r = site_of(region.end).path or region.end.name, after / before
            q = float(values[region.source].merged.q)
            weight, count = _weight(graph, layer)
            # two standard errors of the measured variance of its weights, sqrt(2 / n) each
            yield LayerOrder(name, weight, q, r, _CERTAIN + 2 * math.sqrt(2 / count) * r)


def _slope(kernel: Kernel) -> float:
    """C'(1) from the input: d c / d (input cosine) at c = 1."""
    part = kernel.merged
    q = float(part.q)
    return float(part.slope[Pairs.UNIT, SAME]) / q if q > 0 else math.nan


def _reader(node: fx.Node, values: dict[fx.Node, Kernel]) -> fx.Node | None:
    """The first affine layer behind a node."""
    queue, seen = [node], {node}
    while queue:
        for user in queue.pop(0).users:
            if user in seen or user not in values:
                continue
            name = operation_name(user)
            if name in _AFFINE or name.startswith("conv"):
                return user
            seen.add(user)
            queue.append(user)
    return None


def _scaled(layer: fx.Node) -> fx.Node:
    """A convolution's parent scale, where it has one; else the layer."""
    return next((n for n in layer.users if operation_name(n) in ("parent_scale", "ParentScale")), layer)


def _weight(graph: Graph, layer: fx.Node) -> tuple[str, int]:
    """Module path and entries of a layer's weight; the node's name where it is no parameter."""
    for argument in layer.args[1:]:
        if isinstance(argument, fx.Node) and argument.op == "get_attr":
            value: Any = graph.module
            for part in str(argument.target).split("."):
                value = getattr(value, part)
            if value.ndim > 1:
                return str(argument.target).rpartition(".")[0] or layer.name, value.numel()
    return layer.name, 1
