"""What a computation of kernels on real inputs returns."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from kgraph.checks import device_named


@dataclass(frozen=True)
class NodeGram:
    """Kernels of one node.

    Attributes:
        name: fx node name.
        nngp: E[u_a u_b] averaged over channels, ``[n1, n2, *places]`` or ``[n1, n2, *places, *places]`` (full).
        tangents: alike, by name (`kgraph.gram.tangents`); "ntk" if it was asked for.
        places: sizes of the position axes.
        how: how the numbers were obtained.
        one_minus_c: 1 - c, ``[n1, n2, *places]``; nan where q = 0. Under "diagonal" positions it is carried from layer
            to layer, so that thousands of them leave its digits; else it is the difference. None where every pair
            of positions is held.
    """

    name: str
    nngp: Tensor
    tangents: dict[str, Tensor]
    places: tuple[int, ...]
    how: str
    one_minus_c: Tensor | None = None

    def to(self, device: torch.device) -> NodeGram:
        """The same with its tensors on another device."""
        device = device_named(device)
        tangents = {name: t.to(device) for name, t in self.tangents.items()}
        apart = None if self.one_minus_c is None else self.one_minus_c.to(device)
        return replace(self, nngp=self.nngp.to(device), tangents=tangents, one_minus_c=apart)

    @property
    def ntk(self) -> Tensor | None:
        """The NTK's block; None if it was not asked for."""
        return self.tangents.get("ntk")


@dataclass(frozen=True)
class Kernels:
    """Gram matrices of a model's output and of named nodes.

    Attributes:
        output: of the output, [n1, n2] (with positions, if it has some: as in `NodeGram`).
        nodes: by name, those asked for.
        positions: position model used.
        parametrization: of the NTK.
    """

    output: NodeGram
    nodes: dict[str, NodeGram]
    positions: str
    parametrization: str

    def to(self, device: torch.device) -> Kernels:
        """The same with all tensors on another device."""
        device = device_named(device)
        nodes = {name: gram.to(device) for name, gram in self.nodes.items()}
        return replace(self, output=self.output.to(device), nodes=nodes)

    @property
    def nngp(self) -> Tensor:
        """The output's NNGP."""
        return self.output.nngp

    @property
    def ntk(self) -> Tensor | None:
        """The output's NTK."""
        return self.output.ntk

    @property
    def one_minus_c(self) -> Tensor | None:
        """The output's 1 - c."""
        return self.output.one_minus_c

    @property
    def how(self) -> str:
        """How the output's numbers were obtained."""
        return self.output.how

    @property
    def places(self) -> tuple[int, ...]:
        """Sizes of the output's position axes."""
        return self.output.places
