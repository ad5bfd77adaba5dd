"""The fluctuations of a chain of finite width measured over draws of its parameters, beside those predicted."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch
from rich.console import RenderableType
from rich.table import Table
from rich.text import Text
from torch import Tensor, nn

from kgraph.capture import Graph, capture
from kgraph.checks import callback, not_negative, positive, seeded
from kgraph.checks import count as count_of
from kgraph.errors import InputError
from kgraph.report.numbers import count, elide, short
from kgraph.studies.finite_width.chain import ChainLayer, Distribution
from kgraph.studies.finite_width.draws import Progress, Sampler, derivatives_are_seen
from kgraph.studies.finite_width.reader import read_chain
from kgraph.studies.finite_width.report import Fluctuations, fluctuations
from kgraph.studies.tables import SCALES, LayerReport, brief, head_of, shown, table_of
from kgraph.suggestions import no_node

Disagreement = tuple[str, str, float, float, float]
_THIRD = {"R": "KR/nΘ³", "S": "KS/nΘ³", "T": "KT/nΘ³", "U": "KU/nΘ³"}
_QUANTITIES = ("K", "Theta", *SCALES, *_THIRD)


@dataclass(frozen=True)
class MeasuredNode:
    """One linear layer's units over the draws.

    Attributes:
        name, module: of the graph node.
        width_in: n of the layer.
        K, Theta: E[z_i^2], E[H_ii].
        scaled: V/K^2, D/(K Theta), F/(K Theta), A/Theta^2, B/Theta^2, P/Theta^2, Q/Theta^2, and R, S, T, U times
            K/Theta^3 (P to U nan unless asked for), V, ... being n times the connected correlators.
        K_error, Theta_error, error: jackknife standard errors.
    """

    name: str
    module: str
    width_in: int
    K: float
    K_error: float
    Theta: float
    Theta_error: float
    scaled: dict[str, float]
    error: dict[str, float]

    @property
    def relative(self) -> dict[str, float]:
        """The same over n: V/(n K^2), ..."""
        return {name: value / self.width_in for name, value in self.scaled.items()}


@dataclass(frozen=True)
class MeasuredFluctuations(LayerReport):
    """Result of `measure_fluctuations`; prints measured beside predicted.

    Attributes:
        predicted: by `kgraph.fluctuations`, with the same options.
        nodes: one a linear layer, in order.
        draws: of all parameters.
        notes: what a reader should know.
    """

    predicted: Fluctuations
    nodes: tuple[MeasuredNode, ...]
    draws: int
    notes: tuple[str, ...]

    def __getitem__(self, name: str) -> MeasuredNode:
        """A node by its name or the path of its module."""
        for node in self.nodes:
            if name in (node.name, node.module):
                return node
        raise no_node(name, [node.name for node in self.nodes])

    def disagreements(
        self,
        predicted: Fluctuations | None = None,
        *,
        quantities: Sequence[str] = ("V", "F", "B", "P"),
        sigmas: float = 4.0,
        slack: float = 0.15,
        width_factor: float = 1.0,
    ) -> list[Disagreement]:
        """Where a scaled tensor differs by more than what draws and higher orders of 1/n explain.

        Allowed is the larger of ``sigmas`` standard errors and, of the predicted value, ``slack`` or ``width_factor *
        layer / narrowest width so far`` (the input's does not count: it is fixed); of P also that share of B, for P is
        made of B and may cancel, as that of relu does, but not beyond leading order. What was not measured is left out.
        An expansion in depth / width says nothing where that is 1. Returns (node, quantity, predicted, measured,
        allowed).
        """
        if not isinstance(quantities, tuple | list) or not all(name in tuple(SCALES) for name in quantities):
            raise InputError(f"quantities is {quantities!r}", hint=f"Pass a tuple of {', '.join(SCALES)}")
        if predicted is not None and not isinstance(predicted, Fluctuations):
            raise InputError(f"predicted is {predicted!r}", hint="Pass what kgraph.fluctuations returned")
        positive("sigmas", sigmas)
        not_negative("slack", slack)
        not_negative("width_factor", width_factor)
        found: list[Disagreement] = []
        narrowest = math.inf
        for depth, (node, own) in enumerate(zip(self.nodes, (predicted or self.predicted).nodes, strict=True), 1):
            narrowest = min(narrowest, max(own.width_in, own.width_out) if depth == 1 else own.width_in)
            order = width_factor * depth / narrowest
            for name in quantities:
                wanted, got = own.scaled[name], node.scaled[name]
                higher = order * abs(own.scaled["B"]) if name == "P" else 0.0
                allowed = max(sigmas * node.error[name], max(slack, order) * abs(wanted), higher) + 1e-9
                if math.isfinite(got) and not abs(got - wanted) <= allowed:
                    found.append((node.name, name, wanted, got, allowed))
        return found

    def to_dict(self) -> dict[str, Any]:
        """All numbers as JSON-ready data."""
        nodes = [asdict(n) | {"relative": n.relative} for n in self.nodes]
        return {
            "draws": self.draws,
            "nodes": nodes,
            "notes": list(self.notes),
            "predicted": self.predicted.to_dict(),
        }

    def _parts(self, width: int, all_nodes: bool) -> list[RenderableType]:
        wrong = {d[:2] for d in self.disagreements()}
        rows = shown(len(self.nodes), all_nodes)
        head = f"Fluctuations of {self.predicted.model} over {count(self.draws, 'draw')}, "
        head += f"beside the recursions: {count(len(wrong), 'disagreement')}"
        parts: list[RenderableType] = [Text(head, style="bold"), Text("")]
        parts.append(self._table(("V", "F", "B"), rows, wrong, width))
        if len(rows) < len(self.nodes):
            parts.append(Text(f"{count(len(self.nodes) - len(rows), 'row')} hidden (all_nodes=True shows all)", "dim"))
        derived = [i for i, n in enumerate(self.nodes) if math.isfinite(n.scaled["P"])]
        if derived:
            kept = [derived[i] for i in shown(len(derived), all_nodes)]
            parts += [Text(""), self._table(("P", "Q"), kept, wrong, width)]
        third = [i for i in derived if math.isfinite(self.nodes[i].scaled["R"])]
        if third:
            heads = ["node", "n", "K", *(head for name in _THIRD for head in (_THIRD[name], "±"))]
            kept = [third[i] for i in shown(len(third), all_nodes)]
            parts += [Text(""), table_of(heads, 1, (self._cells(i, tuple(_THIRD), wrong, width) for i in kept))]
        return parts + [Text(f"note: {note}", style="dim") for note in self.notes]

    def _table(self, names: Sequence[str], rows: Sequence[int], wrong: set[tuple[str, str]], width: int) -> Table:
        heads = ["node", "n", "K", *(head for name in names for head in (head_of(name), "±", "predicted"))]
        return table_of(heads, 1, (self._cells(i, names, wrong, width) for i in rows))

    def _cells(self, index: int, names: Sequence[str], wrong: set[tuple[str, str]], width: int) -> list[str]:
        node, own = self.nodes[index], self.predicted.nodes[index]
        cells = [elide(node.name, max(9, width - 88)), str(node.width_in), short(node.K)]
        for name in names:
            mark = "! " if (node.name, name) in wrong else ""
            cells += [brief(node.relative[name]), brief(node.error[name] / node.width_in, 1)]
            cells += [mark + brief(own.relative[name])] if name in own.relative else []
        return cells


def measure_fluctuations(
    model: nn.Module | Graph,
    example_inputs: object = None,
    *,
    draws: int = 400,
    seed: int = 0,
    dntk: bool | str | Sequence[str] = False,
    ddntk: bool | str | Sequence[str] = False,
    distribution: Distribution = "measured",
    weight_variance: float | None = None,
    bias_variance: float | None = None,
    input_q: float = 1.0,
    parametrization: str = "standard",
    progress: Progress | None = None,
) -> MeasuredFluctuations:
    """Measure V, F, B, D, A (and P to U) of a chain over draws of its weights, beside `kgraph.fluctuations`.

    All draws run at once, in float64: matrices [draws, out, in] of each layer's law and variance, one fixed input.

    With ``ddntk`` also the means of the two tensors of third order in lambda, for which no recursion is given here,

        R = n E[dd_I H_iijj],    S = n E[dd_II H_iijj],    T = n E[dd_II H_ijij],    U = n E[dd_II H_ijji],    i != j
        dd_I H_ijkl = lambda^3 (d3z_i) (dz_j) (dz_k) (dz_l),    dd_II H_ijkl = lambda^3 (dz_k d2z_i) (d2z_j dz_l)

    V, F, B and P meet the recursions up to O(depth / n). A, D and Q are differences that nearly cancel: their own 1/n
    terms are smaller than the 1/n^2 ones at any width below some hundreds, so they are given but not compared.

    Args:
        model, example_inputs, distribution, weight_variance, bias_variance, input_q, parametrization: as for
            `kgraph.fluctuations`.
        draws: at least 3.
        seed: of the draws; the global generator is not touched.
        dntk: also measure P and Q, by nested forward derivatives: at all nodes, or at those named.
        ddntk: also measure P, Q, R, S, T and U, which takes some n times the work of P and Q.
        progress: called with (done, draws).

    Raises:
        InputError: fewer than three draws, or an unknown node; and what `kgraph.fluctuations` raises.

    Source: Day, Kahn, Roberts 2023, arXiv 2310.07765; R to U: Roberts, Yaida, Hanin 2022, arXiv 2106.10165.
    """
    count_of("draws", draws, 3, "A jackknife error of a variance needs a whole number of at least 3")
    seed = seeded(seed)
    callback("progress", progress)
    graph = model if isinstance(model, Graph) else capture(model, example_inputs)
    declared: dict[str, Any] = {"weight_variance": weight_variance, "bias_variance": bias_variance}
    predicted = fluctuations(
        graph, distribution=distribution, input_q=input_q, parametrization=parametrization, **declared
    )
    layers = read_chain(graph, distribution, **declared).layers
    notes = ["A, D, Q are measured with the 1/n² terms that hide them at small n: in .scaled, not compared"]
    third = _wanted(layers, ddntk, "ddntk")
    wanted = sorted({*_wanted(layers, dntk, "dntk"), *third})
    seen, smooth = (_seen(predicted, layers, order) for order in (False, True))
    if any(index >= seen for index in wanted):
        notes.append(f"P, Q not measured from {layers[seen].name} on: phi'' before it has spikes that derivatives miss")
    if any(index >= smooth for index in third):
        notes.append(f"R, S, T, U not measured from {layers[smooth].name} on: the function before it has a kink")
    taken = {i: i in third and i < smooth for i in wanted if i < seen}
    sampler = Sampler(layers, taken, input_q, parametrization, seed)
    samples = sampler.run(draws, progress)
    nodes = tuple(_node(layer, samples[:, i]) for i, layer in enumerate(layers))
    return MeasuredFluctuations(predicted, nodes, draws, (*predicted.notes, *notes))


def _wanted(layers: Sequence[ChainLayer], asked: bool | str | Sequence[str], option: str) -> list[int]:
    """Indices of the layers whose derivatives are asked for; the first has none."""
    if isinstance(asked, bool):
        return list(range(1, len(layers))) if asked else []
    asked = [asked] if isinstance(asked, str) else asked
    if not isinstance(asked, Sequence) or not all(isinstance(name, str) for name in asked):
        raise InputError(f"{option} is {asked!r}", hint="Pass True, False or names of nodes")
    for name in asked:
        if not any(name in (layer.name, layer.module) for layer in layers):
            raise InputError(f"{option} names {name!r}, which is no linear layer", hint="Name nodes of the table")
    return [i for i, layer in enumerate(layers) if layer.name in asked or layer.module in asked]


def _seen(predicted: Fluctuations, layers: Sequence[ChainLayer], third: bool) -> int:
    """Index of the first layer behind a function with a kink that counts where phi is differentiated."""
    for index, (before, layer) in enumerate(zip(predicted.nodes[:-1], layers[1:], strict=True), start=1):
        if not (before.K > 0 and derivatives_are_seen(layer.phi, before.K, third)):
            return index
    return len(layers)


def _node(layer: ChainLayer, rows: Tensor) -> MeasuredNode:
    """Estimates from the means over draws of `STATISTICS`, errors by leaving out one draw at a time."""
    draws = len(rows)
    values = _estimates(rows.mean(0), layer.width_in)
    without = _estimates((rows.sum(0) - rows) / (draws - 1), layer.width_in)
    error = ((draws - 1) / draws * (without - without.mean(0)).square().sum(0)).sqrt()
    named = {name: (float(v), float(e)) for name, v, e in zip(_QUANTITIES, values, error, strict=True)}
    return MeasuredNode(
        layer.name,
        layer.module,
        layer.width_in,
        *named["K"],
        *named["Theta"],
        {name: named[name][0] for name in _QUANTITIES[2:]},
        {name: named[name][1] for name in _QUANTITIES[2:]},
    )


def _estimates(means: Tensor, n: int) -> Tensor:
    """`_QUANTITIES` from [..., 13] means of `STATISTICS`."""
    zz, zzzz, h, hh, hzz, HH, Hzz, p, q, *third = means.unbind(-1)
    K, Theta = zz, h
    scaled = (
        zzzz / K**2 - 1,
        hzz / (K * Theta) - 1,
        Hzz / (K * Theta),
        hh / Theta**2 - 1,
        HH / Theta**2,
        p / Theta**2,
        q / Theta**2,
        *(mean * K / Theta**3 for mean in third),
    )
    return torch.stack([K, Theta, *(n * s for s in scaled)], -1)
