"""Measurement of residual chains on the finite network: |h_l - h_0| and gradients by layer, over draws of it."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx
from torch.utils import _pytree as pytree

from kgraph.capture import Graph
from kgraph.empirical import seeded
from kgraph.inputs import batch_size
from kgraph.monte_carlo import signed_permutation
from kgraph.node_moments import MeasuringInterpreter
from kgraph.residual.chains import ResidualChain
from kgraph.residual.roles import layers_by_role, obstacle, parameter_uses, stacked, tensor_of, weight_of

Redraw = Callable[[torch.Generator], None]
_SIGMAS = 5.0


@dataclass(frozen=True)
class Samples:
    """Of one chain, over draws: mean squares over inputs by layer, and the log ratios of all inputs.

    Attributes:
        forward: |h_l - h_0|^2 / |h_0|^2, [draws, L + 1].
        backward: |p_l - p_L|^2 / |p_L|^2, p = dL/dh, [draws, L + 1].
        ratio: |p_l|^2 / |p_L|^2, [draws, L + 1].
        log_ratio: ln(|h_L| / |h_0|), [draws, inputs].
        width: entries of one h.
    """

    forward: Tensor
    backward: Tensor
    ratio: Tensor
    log_ratio: Tensor
    width: int


def correlated_roles(module: fx.GraphModule, chain: ResidualChain) -> dict[str, list[fx.Node]]:
    """Roles whose weights one layer on are correlated, beyond five standard errors of independent entries."""
    uses = parameter_uses(module)
    found = {}
    for role, layers in layers_by_role(module, chain).items():
        if len(layers) < 3 or obstacle(module, layers, uses):
            continue
        paths = stacked(module, layers)
        lag = float((paths[1:] * paths[:-1]).sum() / paths.square().sum().clamp_min(1e-300))
        if abs(lag) > _SIGMAS / math.sqrt(paths.numel()):
            found[role] = layers
    return found


@contextmanager
def redrawn(graph: Graph, chains: tuple[ResidualChain, ...]) -> Iterator[Redraw]:
    """Offer a function that draws all parameters anew in place; put the originals back at the end.

    Signed permutations of channels, as in `kgraph.montecarlo`; where weights are correlated along depth, one and the
    same signed permutation of entries for all layers of a role: every entry keeps its path.
    """
    originals = {id(p): (p, p.detach().clone()) for p in graph.root.parameters()}
    groups = [
        [id(tensor_of(graph.module, weight_of(node))) for node in layers]
        for chain in chains
        for layers in correlated_roles(graph.module, chain).values()
    ]
    together = {key for group in groups for key in group}

    def redraw(generator: torch.Generator) -> None:
        for key, (parameter, original) in originals.items():
            if key not in together:
                parameter.data.copy_(signed_permutation(original, generator))
        for group in groups:
            count = originals[group[0]][1].numel()
            order = torch.randperm(count, generator=generator)
            signs = torch.randint(0, 2, (count,), generator=generator) * 2 - 1
            for parameter, original in (originals[key] for key in group):
                parameter.data.copy_((original.flatten()[order] * signs.to(original)).reshape(original.shape))

    try:
        yield redraw
    finally:
        for parameter, original in originals.values():
            parameter.data.copy_(original)


def measure_chains(
    graph: Graph, chains: tuple[ResidualChain, ...], draws: int, inputs: int, mode: str, seed: int
) -> tuple[Samples, ...]:
    """Run the network forwards and backwards: each draw has new parameters, inputs and directions of the gradient.

    The gradient is that of a random linear function of h_L, dL/dh_L a Gaussian vector.
    """
    generator = torch.Generator().manual_seed(seed)
    collected: list[list[tuple[Tensor, ...]]] = [[] for _ in chains]
    widths = [0] * len(chains)
    wanted = {node.name for chain in chains for node in nodes_of(chain)}
    values: dict[str, Tensor] = {}

    def take(name: str, value: Tensor) -> None:
        if name in wanted:
            values[name] = value

    with redrawn(graph, chains) as redraw, torch.enable_grad():
        for _ in range(draws):
            redraw(generator)
            given = [_input(leaf, inputs, batch_size(graph.inputs), generator) for leaf in _leaves(graph)]
            with seeded(graph.root, int(torch.randint(0, 2**31, (), generator=generator))):
                MeasuringInterpreter(graph.module, mode, take).run(*given, enable_io_processing=False)
            for i, chain in enumerate(chains):
                states = [values[node.name] for node in nodes_of(chain)]
                collected[i].append(_moments(states, inputs, generator))
                widths[i] = states[0].numel() // inputs
            values.clear()
    return tuple(
        Samples(*(torch.stack(column) for column in zip(*rows, strict=True)), width=width)
        for rows, width in zip(collected, widths, strict=True)
    )


def nodes_of(chain: ResidualChain) -> list[fx.Node]:
    """h_0, then the sum of every block."""
    return [chain.blocks[0].source, *(block.sum for block in chain.blocks)]


def _leaves(graph: Graph) -> list[Any]:
    return pytree.tree_leaves(tuple(graph.inputs))


def _input(leaf: Any, inputs: int, batch: int, generator: torch.Generator) -> Any:
    """Fresh Gaussian values of ``inputs`` rows; token ids and masks are repeated as they are."""
    if not isinstance(leaf, Tensor) or leaf.ndim == 0 or leaf.shape[0] != batch:
        return leaf
    if not leaf.is_floating_point():
        return leaf[torch.arange(inputs) % batch]
    drawn = torch.randn(inputs, *leaf.shape[1:], generator=generator, dtype=torch.float64)
    return drawn.requires_grad_()


def _moments(states: list[Tensor], inputs: int, generator: torch.Generator) -> tuple[Tensor, ...]:
    last = states[-1]
    direction = torch.randn(last.shape, generator=generator, dtype=torch.float64).to(last)
    grads = torch.autograd.grad((last * direction).sum(), states, retain_graph=True, allow_unused=True)
    h = [_rows(state.detach(), inputs) for state in states]
    p = [_rows(g if g is not None else torch.zeros_like(s), inputs) for g, s in zip(grads, states, strict=True)]
    return (
        torch.stack([_ratio(x - h[0], h[0]) for x in h]),
        torch.stack([_ratio(x - p[-1], p[-1]) for x in p]),
        torch.stack([_ratio(x, p[-1]) for x in p]),
        (h[-1].norm(dim=1) / h[0].norm(dim=1)).log(),
    )


def _rows(value: Tensor, inputs: int) -> Tensor:
    """One row an input; all in one row where dimension 0 is not the batch (and views may have moved it)."""
    return value.reshape(inputs if value.shape[0] == inputs else 1, -1)


def _ratio(x: Tensor, y: Tensor) -> Tensor:
    return (x.square().sum(1) / y.square().sum(1)).mean()
