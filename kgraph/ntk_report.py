"""What the NTK of a model is made of: the share of every layer, its spectrum, and multipliers that balance it.

    NTK = sum over parameters p of m_p T_p        m_p: learning-rate multiplier of p (1 unless set)

so the part of p is the derivative of the NTK by m_p, and one backward pass through the propagation gives all parts.
"""

from __future__ import annotations

import io
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor, nn

from kgraph.capture import Graph
from kgraph.checks import flag
from kgraph.errors import InputError
from kgraph.gram import Kernels, kernels
from kgraph.gram.kernels import batched_inputs, captured
from kgraph.gram.options import learning
from kgraph.gram.tiles import Bar

Run = Callable[[Mapping[str, float | Tensor]], Kernels]


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

    def run(chosen: Mapping[str, float | Tensor]) -> Kernels:
        return kernels(graph, x, parametrization=parametrization, mode=mode, multipliers=chosen, seed=seed)

    result = run(given)
    gram = _positions_averaged(result)
    total = float(gram.diagonal().mean())
    if not total > 0:
        raise InputError("the model's NTK vanishes on these inputs", hint="Some layer passes nothing on")
    shares = _parts_by_runs(run, given) if result.how in ("sampled", "assumed") else _parts_by_gradient(run, given)
    shares = {name: part / total for name, part in shares.items()}
    matrix = gram.detach()
    eigenvalues = torch.linalg.eigvalsh((matrix + matrix.T) / 2)
    smallest = float(eigenvalues[0])
    return NTKReport(
        _layers(shares),
        matrix,
        float(eigenvalues[-1]) / smallest if smallest > 0 else math.inf,
        float(matrix.mean() / matrix.diagonal().mean()),
        result.how,
        parametrization,
    )


def _parts_by_gradient(run: Run, multipliers: dict[str, float]) -> dict[str, float]:
    """m_p d(mean diagonal) / d m_p: exact, for one propagation and its gradient."""
    knobs = {name: torch.tensor(m, dtype=torch.float64, requires_grad=True) for name, m in multipliers.items()}
    total = _positions_averaged(run(knobs)).diagonal().mean()
    gradients = torch.autograd.grad(total, list(knobs.values()), materialize_grads=True)
    return {name: float(g) * multipliers[name] for name, g in zip(knobs, gradients, strict=True)}


def _parts_by_runs(run: Run, multipliers: dict[str, float]) -> dict[str, float]:
    """One propagation a parameter, all other multipliers 0: where draws stand between, a gradient does not exist."""
    parts = {}
    with Bar(list(multipliers.items()), "NTK by layer") as bar:
        for name, own in bar:
            if own == 0.0:
                parts[name] = 0.0
                continue
            alone = {other: own if other == name else 0.0 for other in multipliers}
            parts[name] = float(_positions_averaged(run(alone)).diagonal().mean())
    return parts


def _positions_averaged(result: Kernels) -> Tensor:
    """NTK [n, n, ...] -> [n, n]: the mean over equal positions, where the output has some."""
    ntk = result.ntk
    assert ntk is not None
    if ntk.ndim == 2:
        return ntk
    if result.positions != "full":
        return ntk.flatten(2).mean(2)
    count = math.prod(ntk.shape[2 : 2 + (ntk.ndim - 2) // 2])
    return ntk.reshape(*ntk.shape[:2], count, count).diagonal(dim1=2, dim2=3).mean(-1)


def _layers(shares: dict[str, float]) -> tuple[LayerShare, ...]:
    """Parameters of one module together; multipliers that make all shares equal."""
    by_layer: dict[str, float] = {}
    for name, share in shares.items():
        layer = name.rpartition(".")[0]
        by_layer[layer] = by_layer.get(layer, 0.0) + share
    taking_part = [layer for layer, share in by_layer.items() if share > 0]
    equal = 1 / max(len(taking_part), 1)
    return tuple(
        LayerShare(layer, share, equal / share if share > 0 else math.inf) for layer, share in by_layer.items()
    )
