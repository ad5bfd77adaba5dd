"""What a computation of kernels on real inputs returns."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor


@dataclass(frozen=True)
class NodeGram:
    """Kernels of one node.

    Attributes:
        name: fx node name.
        nngp: E[u_a u_b] averaged over channels, [n1, n2, *places] or [n1, n2, *places, *places] (full).
        ntk: NTK block, alike; None if not asked for.
        places: sizes of the position axes.
        how: how the numbers were obtained.
    """

    name: str
    nngp: Tensor
    ntk: Tensor | None
    places: tuple[int, ...]
    how: str


@dataclass(frozen=True)
class Kernels:
    """Gram matrices of a model's output and of named nodes.

    Attributes:
        nngp, ntk: of the output, [n1, n2] (with positions, if the output has some: as in `NodeGram`).
        nodes: by name, those asked for.
        positions: position model used.
        how: how the output's numbers were obtained.
        places: sizes of the output's position axes.
    """

    nngp: Tensor
    ntk: Tensor | None
    nodes: dict[str, NodeGram]
    positions: str
    parametrization: str
    how: str
    places: tuple[int, ...] = ()
