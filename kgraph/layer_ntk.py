"""What the NTK of a model is made of: the share of every layer, its spectrum, and multipliers that balance it.

NTK = sum over layers of the NTK by their parameters alone, a tangent each in one and the same walk
"""

from __future__ import annotations

import io
import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor, nn

from kgraph.capture import Graph
from kgraph.checks import flag
from kgraph.errors import InputError
from kgraph.gram.kernels import batched_inputs, captured, kernels_of
from kgraph.gram.moments import Moments
from kgraph.gram.options import Asked, learning
from kgraph.gram.tangents import Seeds, ntk_of_layers
from kgraph.gram.tiles import Bar, bytes_of_a_row


@dataclass(frozen=True)
class LayerShare:
    """Part of one layer in the output's NTK.

    Attributes:
        layer: path of the module that owns the parameters.
        share: its part of the mean diagonal of the NTK; all shares add up to 1.
        multiplier: learning-rate multiplier of the layer that would give every layer the same share and leave the
            total as it is; inf where the layer has no part at all.
    """

    layer: str
    share: float
    multiplier: float


@dataclass(frozen=True)
class NTKReport:
    """Layers and spectrum of a model's NTK on given inputs.

    Attributes:
        layers: in order of first use.
        ntk: the Gram matrix, [n, n].
        condition: largest over smallest eigenvalue.
        constant_share: part of the trace on the constant vector, (1^T NTK 1 / n) / tr NTK: 1/n for a multiple of the
            identity, 1 where all inputs look alike (order: nothing but the mean can be learnt).
        how: how the numbers were obtained.
        parametrization: "standard" or "ntk".
    """

    layers: tuple[LayerShare, ...]
    ntk: Tensor
    condition: float
    constant_share: float
    how: str
    parametrization: str

    def __str__(self) -> str:
        table = Table(title=f"NTK by layer ({self.parametrization} parametrization, {self.how})")
        for name, justify in (("layer", "left"), ("share", "right"), ("multiplier to balance", "right")):
            table.add_column(name, justify=justify)  # pyright: ignore[reportArgumentType]
        for row in self.layers:
            table.add_row(row.layer or "(model)", f"{100 * row.share:.2f} %", f"{row.multiplier:.3g}")
        text = io.StringIO()
        Console(file=text, width=100).print(table)
        n = len(self.ntk)
        summary = (
            f"condition number {self.condition:.3g}, constant mode {100 * self.constant_share:.1f} % of the trace "
            f"({100 / n:.1f} % for inputs that share nothing)"
        )
        return f"{text.getvalue()}{summary}"


def ntk_report(
    model: nn.Module | Graph,
    x: Any,
    *,
    parametrization: str = "standard",
    multipliers: dict[str, float] | None = None,
    count_frozen: bool = False,
    mode: str | None = None,
    seed: int = 0,
) -> NTKReport:
    """Share of every layer in the NTK on inputs ``x``, its condition number and its constant mode.

    Args:
        model: any bare module or captured graph.
        x: inputs as for `kgraph.kernels`.
        parametrization: "standard" (what PyTorch trains) or "ntk".
        multipliers: learning-rate multipliers by parameter name that are already set.
        count_frozen: whether parameters with ``requires_grad=False`` count too; else their share is 0.
        mode: "train" or "eval"; the model's own when None.
        seed: of joint draws.

    Raises:
        InputError: the NTK of the model vanishes; and what `kgraph.kernels` raises.
    """
    graph = model if isinstance(model, Graph) else captured(model, batched_inputs(x)[0])
    given = dict.fromkeys((name for name, _ in graph.module.named_parameters(remove_duplicate=False)), 1.0)
    given |= learning(graph.root, {} if multipliers is None else multipliers, flag("count_frozen", count_frozen))
    asked, moments = Asked(parametrization=parametrization, mode=mode, multipliers=given, seed=seed), Moments()
    result = kernels_of(graph, x, None, asked, moments)
    gram = _positions_averaged(result.output.tangents["ntk"], result.positions)
    total = float(gram.diagonal().mean())
    if not total > 0:
        raise InputError("the model's NTK vanishes on these inputs", hint="Some layer passes nothing on")
    parts: dict[str, float] = {}
    with Bar(_pieces(graph, given, result.positions, len(gram), asked.memory_gib), "NTK by layer") as bar:
        for seeds in bar:
            tangents = kernels_of(graph, x, None, asked, moments, seeds).output.tangents
            for layer, tangent in tangents.items():
                parts[layer] = float(_positions_averaged(tangent, result.positions).diagonal().mean())
    matrix = gram.detach()
    eigenvalues = torch.linalg.eigvalsh((matrix + matrix.T) / 2)
    smallest = float(eigenvalues[0])
    return NTKReport(
        _layers({layer: part / total for layer, part in parts.items()}),
        matrix,
        float(eigenvalues[-1]) / smallest if smallest > 0 else math.inf,
        float(matrix.mean() / matrix.diagonal().mean()),
        result.how,
        parametrization,
    )


_TANGENTS = 8
"""Layers at once where not even two tangents fit in memory, so that the matrix is computed in tiles."""


def _pieces(graph: Graph, multipliers: Mapping[str, Any], layout: str, inputs: int, memory_gib: float) -> list[Seeds]:
    """As many layers together as fit in memory."""
    seeds = list(ntk_of_layers(multipliers).items())
    room = int(memory_gib * 2**30 // (inputs**2 * bytes_of_a_row(graph, layout, 0))) - 1
    size = room if room > 0 else _TANGENTS
    return [dict(seeds[i : i + size]) for i in range(0, len(seeds), size)]


def _positions_averaged(ntk: Tensor, positions: str) -> Tensor:
    """NTK [n, n, ...] -> [n, n]: the mean over equal positions, where the output has some."""
    if ntk.ndim == 2:
        return ntk
    if positions != "full":
        return ntk.flatten(2).mean(2)
    count = math.prod(ntk.shape[2 : 2 + (ntk.ndim - 2) // 2])
    return ntk.reshape(*ntk.shape[:2], count, count).diagonal(dim1=2, dim2=3).mean(-1)


def _layers(shares: dict[str, float]) -> tuple[LayerShare, ...]:
    """Multipliers that make all shares equal."""
    taking_part = [layer for layer, share in shares.items() if share > 0]
    equal = 1 / max(len(taking_part), 1)
    return tuple(LayerShare(layer, share, equal / share if share > 0 else math.inf) for layer, share in shares.items())
