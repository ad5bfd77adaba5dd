"""Which nodes must be run together, because their inputs share random weights in a way no formula shows.

A frontier of nodes is drawn as independent fields (parts that are expressions of the same Gaussians get the same
draws), and everything between it and the wanted node is run as it is. A drawn node must share no weight with
another one out of sight, nor with a layer that is run: such nodes are run as well, latest first.
"""

from __future__ import annotations

import itertools
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx
from torch.utils import _pytree as pytree

from kgraph import algebra
from kgraph.canonical import operation_name
from kgraph.draws import leaves_of
from kgraph.kernel import Kernel, Part, Samples
from kgraph.modules import Scale
from kgraph.rules.table import TURNED, parameter_of

LARGEST = 40
"""Nodes of a region; past them the rest is taken as independent, and said so."""

MOST_AGAIN = 12
"""Nodes of a region up to which drawn nodes in front of it are run again; past them they are drawn as Gaussian."""


@dataclass(frozen=True)
class Region:
    """Nodes to run, in order; nodes to draw; and whether drawn ones still share weights."""

    nodes: tuple[fx.Node, ...]
    frontier: tuple[fx.Node, ...]
    entangled: bool


def find_region(node: fx.Node, values: Mapping[fx.Node, Any], order: dict[fx.Node, int]) -> Region:
    """The region behind ``node``'s value; ``order`` are the places of the graph's nodes."""
    region, frontier = [node], random_inputs(node, values)
    while _size(region) < LARGEST:
        late = _to_run(region, frontier, values, order)
        if late is None:
            return Region(_sorted(region, order), tuple(frontier), False)
        inputs = random_inputs(late, values)
        if not inputs:
            break
        region.append(late)
        frontier = list(dict.fromkeys([n for n in frontier if n is not late] + inputs))
        frontier = [n for n in frontier if n not in region]
    return Region(_sorted(region, order), tuple(frontier), True)


def _size(region: list[fx.Node]) -> int:
    """Nodes but for the constants that a transform put in: a region reaches as far with them as without."""
    return sum(not _is_constant(node) for node in region)


def _is_constant(node: fx.Node) -> bool:
    owner = node.graph.owning_module
    return node.op == "call_module" and owner is not None and isinstance(owner.get_submodule(str(node.target)), Scale)


def _sorted(nodes: list[fx.Node], order: dict[fx.Node, int]) -> tuple[fx.Node, ...]:
    return tuple(sorted(nodes, key=order.__getitem__))


def _to_run(
    region: list[fx.Node], frontier: list[fx.Node], values: Mapping[fx.Node, Any], order: dict[fx.Node, int]
) -> fx.Node | None:
    """The latest drawn node that cannot be drawn by itself."""
    weights = {name for node in region for name in weights_of(node, values)}
    found = [n for n in frontier if _discrete(n) or any(_reads(part, weights) for part in parts_of(values[n]))]
    if _size(region) < MOST_AGAIN:  # no Gaussian field stands for what was drawn
        found += [n for n in frontier if any(of_draws(part) for part in parts_of(values[n]))]
    for i, one in enumerate(frontier):
        for two in frontier[i + 1 :]:
            if _share_numbers(values[one], values[two]):
                found.append(max(one, two, key=order.__getitem__))
    return max(found, key=order.__getitem__, default=None)


def _share_numbers(one: Any, two: Any) -> bool:
    """Whether two values hold common random numbers that draws of each by itself would not: a tensor turned around."""
    for left, right in itertools.product(kernels_of(one), kernels_of(two)):
        alike = left.axes == right.axes and left.split == right.split
        for a, b in itertools.product(left.parts, right.parts):
            if algebra.entangled(a, b) or not (alike or a.independent(b)):
                return True
    return False


def weights_of(node: fx.Node, values: Mapping[fx.Node, Any]) -> list[str]:
    """Names of the known tensors that a node reads, as rules name their roots."""
    known = [n for n in node.all_input_nodes if isinstance(values.get(n), Tensor)]
    return [parameter_of(n)[0] for n in known]


_TURNING = ("addmm", "matmul", "mm", "conv_transpose")


def ways_of(node: fx.Node, values: Mapping[fx.Node, Any]) -> list[str]:
    """The same as rules name them by the dimension that is summed over: W u and W^T u are two roots."""
    name, found = operation_name(node), []
    for source in (n for n in node.all_input_nodes if isinstance(values.get(n), Tensor)):
        base, turned = parameter_of(source)
        found.append(base + TURNED if turned ^ name.startswith(_TURNING) else base)
        found += [base, base + TURNED] if name == "einsum" else []  # its letters say which
    return found


def of_draws(part: Part) -> bool:
    """Whether the law of a part is known by draws of single entries alone, not as a field."""
    return any(isinstance(leaf.expr, Samples) for leaf in leaves_of(part))


def _reads(part: Part, weights: set[str]) -> bool:
    return any(part.roots.named(name) or part.roots.named(name + TURNED) for name in weights)


def _discrete(node: fx.Node) -> bool:
    """Whether a node's entries are truth values or indices: no Gaussian field stands for them."""
    value = node.meta.get("val")
    tensors = [leaf for leaf in pytree.tree_leaves(value) if isinstance(leaf, torch.Tensor)]
    return any(not tensor.is_floating_point() for tensor in tensors)


def random_inputs(node: fx.Node, values: Mapping[fx.Node, Any]) -> list[fx.Node]:
    return [n for n in node.all_input_nodes if kernels_of(values[n])]


def kernels_of(value: Any) -> list[Kernel]:
    """The kernels in a node's value."""
    return [leaf for leaf in pytree.tree_leaves(value) if isinstance(leaf, Kernel)]


def parts_of(value: Any) -> list[Part]:
    """Their parts."""
    return [part for kernel in kernels_of(value) for part in kernel.parts]
