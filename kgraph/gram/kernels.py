"""NNGP and NTK of a model on real inputs: the calls `nngp`, `ntk` and `kernels`."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.utils import _pytree as pytree

from kgraph.capture import Graph, capture, check_model
from kgraph.checks import dense_inputs, finite_inputs, mode_of, with_values
from kgraph.copies import copied
from kgraph.errors import InputError, RuleError
from kgraph.gram.block import Block
from kgraph.gram.device import away, computing_device, device_of, here, on
from kgraph.gram.engine import Engine
from kgraph.gram.joint import NeedsAllPairs
from kgraph.gram.layout import Layout, NeedsFull
from kgraph.gram.moments import Moments
from kgraph.gram.options import LAYOUTS, Asked, check_by_parameter, learning
from kgraph.gram.read import gram_of
from kgraph.gram.result import Kernels, NodeGram
from kgraph.gram.rows import Rows
from kgraph.gram.stops import refuse_stops
from kgraph.gram.tangents import Seed, Seeds
from kgraph.gram.tiles import (
    Bar,
    Tile,
    assembled,
    bytes_of_a_row,
    inputs_of,
    needs_whole_batch,
    tile_size,
    tiles,
    too_large,
)
from kgraph.gram.value import Value
from kgraph.gram.walk import Options, Walk
from kgraph.inputs import Inputs
from kgraph.site import computed
from kgraph.suggestions import no_node

_BEYOND = {
    "diagonal": "it averages or moves positions",
    "stationary": "it treats some positions unlike others",
    "exchangeable": "it treats some positions unlike others",
}


def kernels(
    model: nn.Module | Graph,
    x1: Any,
    x2: Any = None,
    *,
    nodes: Sequence[str] | str = (),
    parametrization: str = "standard",
    positions: str = "auto",
    mode: str | None = None,
    with_ntk: bool = True,
    variances: Mapping[str, float] | None = None,
    multipliers: Mapping[str, float | Tensor] | None = None,
    count_frozen: bool = False,
    seed: int = 0,
    memory_gib: float = 4.0,
) -> Kernels:
    """NNGP and NTK of a model as it is initialized, in the limit of many channels, on real inputs.

        NNGP(x, x') = E[(1/C) sum_c f_c(x) f_c(x')],   NTK(x, x') = E[(1/C) sum_c <df_c(x)/dp, df_c(x')/dp>]

    Args:
        model: any bare module (or a captured graph).
        x1, x2: inputs, [n, ...]: a tensor, or a tuple or dict of the model's arguments. x2 None: x1.
        nodes: graph nodes to report too, or "all".
        parametrization: of the NTK, "standard" (what PyTorch trains) or "ntk".
        positions: "diagonal" (equal positions only), "full" (every pair of positions, exact), "stationary" (one number
            per displacement) or "exchangeable" (equal and different positions): averages over positions, for inputs
            too large for "full"; "auto": "diagonal", or "full" where something averages or moves positions.
        mode: "train" (batch statistics, dropout) or "eval"; the model's own when None.
        with_ntk: False computes the NNGP alone.
        variances: declared E[w^2] by parameter name; the others are measured on the tensors.
        multipliers: learning-rate multipliers by parameter name: factors on its part of the NTK. Tensors that
            require gradients get them (the NTK is linear in every multiplier).
        count_frozen: whether parameters with ``requires_grad=False`` have their part in the NTK too; else they have
            none (multiplier 0), unless a multiplier of theirs is given.
        seed: of the draws that operations without a closed form are measured on.
        memory_gib: memory to stay below, by estimate: a larger Gram matrix is computed in tiles of inputs.

    The computation is on the device of ``x1`` (on the CPU where that device has no float64), the result too; the model
    may be anywhere, and draws are the same on every device.

    Raises:
        ModelError, InputError, CaptureError, RuleError: see `kgraph.errors`. InputError too where the matrix is over
            ``memory_gib`` and needs all inputs at once (batch statistics, joint draws).
    """
    asked = Asked(
        nodes, parametrization, positions, mode, with_ntk, variances, multipliers, count_frozen, seed, memory_gib
    )
    graph = model if isinstance(model, Graph) else captured(model, batched_inputs(x1)[0])
    return kernels_of(graph, x1, x2, asked, Moments())


def kernels_of(graph: Graph, x1: Any, x2: Any, asked: Asked, moments: Moments, seeds: Seeds | None = None) -> Kernels:
    """`kernels` of a captured graph, with what was measured on its tensors before; with other tangents if given."""
    device = computing_device(x1)
    first, n1 = batched_inputs(x1)
    second, n2 = batched_inputs(x2) if x2 is not None else (None, n1)
    mode, variances, multipliers = of_model(graph, asked)
    speeds = learning(graph.root, multipliers, asked.count_frozen) if asked.with_ntk else {}
    if asked.with_ntk:
        refuse_stops(graph, speeds)
    if seeds is None:
        seeds = {"ntk": Seed(multipliers=speeds)} if asked.with_ntk else {}
    differentiated = any(isinstance(m, Tensor) and m.requires_grad for m in speeds.values())
    with torch.set_grad_enabled(differentiated), on(device):
        inputs, rows = _joined(here(first), here(second), n1, n2)
        request = _Request(graph, inputs, Options(mode, variances, moments), asked, seeds)
        result = _escalating(request, rows, LAYOUTS[asked.positions], n1, n2 if x2 is not None else None)
    return result.to(device_of(x1))


def of_model(graph: Graph, asked: Asked) -> tuple[str, Mapping[str, float], Mapping[str, float | Tensor]]:
    """Mode, variances and multipliers, as the model has them or as they were asked for.

    Raises:
        InputError: there is no such mode or parameter, or it cannot have that number.
    """
    variances = {} if asked.variances is None else asked.variances
    multipliers = {} if asked.multipliers is None else asked.multipliers
    check_by_parameter("variances", variances, graph)
    check_by_parameter("multipliers", multipliers, graph)
    return mode_of(graph.root, asked.mode), variances, multipliers


def _without_choice(options: dict[str, Any]) -> dict[str, Any]:
    if "with_ntk" in options:
        raise InputError("with_ntk is an option of kgraph.kernels", hint="Leave it out")
    return options


def nngp(model: nn.Module | Graph, x1: Any, x2: Any = None, **options: Any) -> Tensor:
    """NNGP Gram matrix of the model's output, [n1, n2]; options as for `kernels`."""
    return kernels(model, x1, x2, **_without_choice(options), with_ntk=False).nngp


def ntk(model: nn.Module | Graph, x1: Any, x2: Any = None, parametrization: str = "standard", **options: Any) -> Tensor:
    """NTK Gram matrix of the model's output, [n1, n2]; options as for `kernels`."""
    result = kernels(model, x1, x2, parametrization=parametrization, **_without_choice(options)).ntk
    assert result is not None
    return result


def _arguments(x: Any) -> Inputs:
    if isinstance(x, Tensor):
        return Inputs((x,), {})
    if isinstance(x, Mapping):
        return Inputs((), dict(x))
    if isinstance(x, (tuple, list)):
        return Inputs(tuple(x), {})
    raise InputError(f"inputs are a {type(x).__name__}", hint="Pass a tensor, a tuple or a dict of arguments")


def batched_inputs(x: Any) -> tuple[Inputs, int]:
    """The model's arguments, and how many inputs they hold."""
    inputs = _arguments(x)
    dense_inputs(tuple(inputs), with_values=True)
    sizes = {leaf.shape[0] for leaf in pytree.tree_leaves(tuple(inputs)) if isinstance(leaf, Tensor) and leaf.ndim}
    if len(sizes) != 1:
        raise InputError("the inputs have no common first dimension", hint="Pass tensors with one row an input")
    if 0 in sizes:
        raise InputError("there are no inputs: the first dimension is 0", hint="Pass at least one")
    finite_inputs(tuple(inputs))
    return inputs, sizes.pop()


def captured(model: nn.Module, inputs: Inputs) -> Graph:
    """The model as a graph on the CPU, for kernels alone."""
    with_values(check_model(model))
    _check_tables(model)
    model = _on_cpu(model)
    reference = next((p for p in model.parameters() if p.is_floating_point()), None)

    def example(value: Any) -> Any:
        if not isinstance(value, Tensor) or not value.ndim:
            return away(value)
        value = (value[:2] if len(value) > 1 else torch.cat([value, value])).cpu()
        return value.to(reference.dtype) if value.is_floating_point() and reference is not None else value

    graph = capture(model, Inputs(*pytree.tree_map(example, tuple(inputs))), deep=0)  # nobody will train this graph
    if graph.path:
        raise InputError(graph.path, hint="Kernels are of single inputs: take the batch size out of the forward")
    return graph


def _check_tables(model: nn.Module) -> None:
    for name, module in model.named_modules():
        if isinstance(module, (nn.Embedding, nn.EmbeddingBag)) and module.max_norm is not None:
            raise RuleError(
                f"{name!r} rescales the rows that it looks up (max_norm={module.max_norm:g}), which has no rule",
                hint="Rescale the rows once and set max_norm to None",
            )


def _on_cpu(model: nn.Module) -> nn.Module:
    """The model, or a copy on the CPU: what is captured there runs on any device."""
    elsewhere = {t.device.type for t in (*model.parameters(), *model.buffers())} - {"cpu", "meta"}
    return copied(model).cpu() if elsewhere else model


def _joined(first: Inputs, second: Inputs | None, n1: int, n2: int) -> tuple[list[Any], Rows]:
    """Placeholders' values for all inputs, and the pairs asked for. A single input is doubled."""
    leaves = pytree.tree_leaves(tuple(first))
    if second is None:
        if n1 > 1:
            return leaves, Rows.square(n1)
        return [torch.cat([x, x]) if isinstance(x, Tensor) else x for x in leaves], Rows.square(2)
    others = pytree.tree_leaves(tuple(second))
    shapes = [[tuple(x.shape[1:]) for x in given if isinstance(x, Tensor)] for given in (leaves, others)]
    if pytree.tree_structure(tuple(first)) != pytree.tree_structure(tuple(second)):
        raise InputError("x1 and x2 name the model's arguments differently", hint="Pass both in the same way")
    if shapes[0] != shapes[1]:
        raise InputError(f"x1 and x2 differ: {shapes[0]} against {shapes[1]} an input", hint="Pass inputs of one shape")
    both = [torch.cat([x, y]) if isinstance(x, Tensor) else x for x, y in zip(leaves, others, strict=True)]
    return both, Rows.cross(n1, n2)


@dataclass(frozen=True)
class _Request:
    graph: Graph
    inputs: list[Any]
    options: Options
    asked: Asked
    seeds: Seeds


def _escalating(request: _Request, rows: Rows, layouts: tuple[Layout, ...], n1: int, n2: int | None) -> Kernels:
    """The cheapest layout and the fewest pairs that the graph's operations can do with."""
    layout, *rest = layouts
    try:
        return _fitting(request, rows, layout, n1, n2)
    except NeedsFull:
        if not rest:
            raise InputError(
                f'positions="{layout.name}" does not determine this model\'s kernel: {_BEYOND[layout.name]}',
                hint='Pass positions="auto" or "full"',
            ) from None
        return _escalating(request, rows, tuple(rest), n1, n2)
    except NeedsAllPairs:
        return _escalating(request, Rows.square(rows.inputs, rows.batches), layouts, n1, n2)


def _fitting(request: _Request, rows: Rows, layout: Layout, n1: int, n2: int | None) -> Kernels:
    """At once, or in tiles where that would take too much memory."""
    row = bytes_of_a_row(request.graph, layout.name, len(request.seeds))
    allowed, needed = request.asked.memory_gib * 2**30, float(row * len(rows.first))
    if needed <= allowed:
        return _run(request, rows, layout, n1, n2)
    if needs_whole_batch(request.graph, request.options.mode):
        raise too_large("batch statistics need all inputs at once", needed, request.asked.memory_gib)
    size = tile_size(int(allowed // row))
    if not size:
        cause = "a single pair of inputs needs more than that"
        raise too_large(cause, needed, request.asked.memory_gib, averaging=layout.name == "full")
    whole = too_large("joint draws need all inputs at once", needed, request.asked.memory_gib)
    parts: list[tuple[Tile, Kernels]] = []
    with Bar(tiles(n1, n2, size)) as bar:
        for tile in bar:
            here = replace(request, inputs=inputs_of(tile, request.inputs))
            try:
                parts.append((tile, _run(here, tile.rows, layout, tile.n1, tile.n2, on_draws=whole)))
            except NeedsAllPairs:
                raise whole from None
    return _joined_tiles(parts, n1, n2)


def _joined_tiles(parts: list[tuple[Tile, Kernels]], n1: int, n2: int | None) -> Kernels:
    first = parts[0][1]
    nodes = {name: assembled([(tile, k.nodes[name]) for tile, k in parts], n1, n2) for name in first.nodes}
    return replace(first, output=assembled([(tile, k.output) for tile, k in parts], n1, n2), nodes=nodes)


def _run(
    request: _Request,
    rows: Rows,
    layout: Layout,
    n1: int,
    n2: int | None,
    on_draws: InputError | None = None,
) -> Kernels:
    """Walk the graph once; ``on_draws`` is raised if joint draws were needed."""
    engine = Engine(rows, layout, request.asked.parametrization, request.seeds, request.asked.seed)
    wanted: dict[str, NodeGram] = {}

    def take(node: fx.Node, value: Value) -> None:
        if request.asked.nodes == "all" or node.name in request.asked.nodes:
            wanted[node.name] = gram_of(engine, node.name, value, n1, n2)

    walk = Walk(request.graph, engine, request.options, take)
    walk.run(request.inputs)
    final = walk.final()
    if final is None:
        raise InputError(
            "the model's output does not depend on its inputs in a way that a kernel could follow",
            hint="Pass floating-point inputs, or token ids that an embedding reads",
        )
    missing = (
        [] if isinstance(request.asked.nodes, str) else [name for name in request.asked.nodes if name not in wanted]
    )
    if missing:
        raise no_node(missing[0], wanted)
    with computed(final[0]):
        output_gram = gram_of(engine, "output", final[1], n1, n2)
    if on_draws is not None and engine.draws.used:
        raise on_draws
    return Kernels(output_gram, wanted, layout.name, request.asked.parametrization)


__all__ = ["Block", "Kernels", "NodeGram", "kernels", "nngp", "ntk"]
