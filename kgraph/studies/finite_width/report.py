"""How far a chain of finite width is from its infinite-width kernel: the recursions of V, F, B, D, A, P, Q by node."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from typing import Any

from rich.console import RenderableType
from rich.text import Text
from torch import nn

from kgraph.capture import Graph, capture
from kgraph.checks import choice, positive
from kgraph.how import QUADRATURE, How, assumed
from kgraph.report.numbers import count, elide, short
from kgraph.report.table import HOW
from kgraph.studies.finite_width.chain import Chain, ChainLayer, Distribution, Law
from kgraph.studies.finite_width.reader import read_chain
from kgraph.studies.finite_width.recursion import (
    Correlators,
    Deficit,
    deficit_of,
    first_layer,
    gaussian_moments,
    next_layer,
)
from kgraph.studies.tables import SCALES, LayerReport, brief, head_of, shown, table_of, unit
from kgraph.suggestions import no_node

_ORDER = ("V", "F", "B", "D", "A", "P", "Q")


@dataclass(frozen=True)
class NodeFluctuations:
    """One linear layer's units: kernel, NTK, and the connected correlators times n = width_in.

    Attributes:
        name, module, op, source: of the graph node.
        activation: the pointwise function before it.
        width_in, width_out: of its matrix.
        law, law_how: "orthogonal" or "gaussian" (any independent entries), and how that is known.
        C_W, C_b: variances of weights (times width_in) and biases.
        deficit: what orthogonality takes off Cov(z_i^2, z_j^2)/K^2 in this layer.
        K, Theta: E[z_i^2] and E[H_ii] at infinite width.
        V, D, F, A, B, P, Q: n times the connected correlators, see `kgraph.studies.finite_width.recursion`.
        how: "quadrature", or "assumed" where a law is.
    """

    name: str
    module: str
    op: str
    source: str
    activation: str
    width_in: int
    width_out: int
    law: Law
    law_how: str
    C_W: float
    C_b: float
    deficit: float
    K: float
    Theta: float
    V: float
    D: float
    F: float
    A: float
    B: float
    P: float
    Q: float
    how: str

    @property
    def scaled(self) -> dict[str, float]:
        """V/K^2, D/(K Theta), F/(K Theta), A/Theta^2, B/Theta^2, P/Theta^2, Q/Theta^2: free of width and units."""
        return {name: getattr(self, name) / unit(name, self.K, self.Theta) for name in SCALES}

    @property
    def relative(self) -> dict[str, float]:
        """The same over n: the size of the fluctuations at the width that the layer has, such as V/(n K^2)."""
        return {name: value / self.width_in for name, value in self.scaled.items()}


@dataclass(frozen=True)
class Fluctuations(LayerReport):
    """Result of `fluctuations`; prints as a table.

    Attributes:
        model: its name.
        nodes: one a linear layer, in order.
        input_q: ``|x|^2`` / dimension of the input.
        parametrization: of Theta.
        deficit: "exact" or "leading".
        notes: what a reader should know.
    """

    model: str
    nodes: tuple[NodeFluctuations, ...]
    input_q: float
    parametrization: str
    deficit: Deficit
    notes: tuple[str, ...] = ()

    def __getitem__(self, name: str) -> NodeFluctuations:
        """A node by its name or the path of its module."""
        for node in self.nodes:
            if name in (node.name, node.module):
                return node
        raise no_node(name, [node.name for node in self.nodes])

    @property
    def largest(self) -> NodeFluctuations:
        """The node whose ``|V|/(n K^2)`` is largest."""
        return max(self.nodes, key=lambda node: abs(node.relative["V"]) if node.K else -1.0)

    def widening(self, relative: float = 0.1) -> float:
        """Factor on all widths at which ``|V|/(n K^2)``, falling like 1/n, is at most ``relative`` at every node."""
        return abs(self.largest.relative["V"]) / positive("relative", relative)

    def to_dict(self) -> dict[str, Any]:
        """All numbers as JSON-ready data, with `scaled` and `relative` of every node."""
        nodes = [asdict(n) | {"scaled": n.scaled, "relative": n.relative} for n in self.nodes]
        return asdict(self) | {"nodes": nodes, "notes": list(self.notes)}

    def _parts(self, width: int, all_nodes: bool) -> list[RenderableType]:
        rows = shown(len(self.nodes), all_nodes)
        heads = ("node", "n", "law", "K", "Θ", *(head_of(name) for name in _ORDER), "how")
        table = table_of(heads, 1, (_cells(self.nodes[i], max(9, width - 88)) for i in rows))
        parts: list[RenderableType] = [Text(line, style="bold") for line in self._summary()]
        parts += [Text(""), table]
        if len(rows) < len(self.nodes):
            hidden = count(len(self.nodes) - len(rows), "row")
            parts.append(Text(f"{hidden} hidden (all_nodes=True shows all)", style="dim"))
        return parts + [Text(f"note: {line}", style="dim") for line in self._notes()]

    def _summary(self) -> Iterator[str]:
        worst = self.largest
        value = worst.relative["V"]
        head = f"Finite-width fluctuations of {self.model}: "
        yield head + f"{count(len(self.nodes), 'linear layer')}, leading order in 1/n"
        line = f"Relative fluctuation of q: V/(n K²) reaches {short(value)} at {worst.name}"
        if abs(value) > 0.1:
            line += f"; at {short(self.widening())} times the widths it stays within 10 %"
        yield line

    def _notes(self) -> Iterator[str]:
        laws = Counter((n.law, n.law_how.split(":")[0]) for n in self.nodes)
        yield "law: " + ", ".join(f"{law} in {count(k, 'layer')} ({how})" for (law, how), k in laws.items())
        of = f"Θ in {self.parametrization} parametrization, of the linear layers' parameters"
        yield f"{of}; input q {short(self.input_q)}"
        yield from self.notes


def fluctuations(
    model: nn.Module | Graph,
    example_inputs: object = None,
    *,
    distribution: Distribution = "measured",
    weight_variance: float | None = None,
    bias_variance: float | None = None,
    input_q: float = 1.0,
    parametrization: str = "standard",
    deficit: Deficit = "leading",
) -> Fluctuations:
    """Fluctuations of kernel, NTK and its derivative over draws of a chain's weights, to leading order in 1/n.

        V' = chi_par^2 V + C_W^2 (<phi^4> - <phi^2>^2) - 2 o C_W^2 <phi^2>^2,    o = 1 orthogonal, 0 Gaussian

    and likewise F, B, D, A, P, Q. V/(n K^2) is the relative fluctuation of a layer's q from draw to draw: where it is
    not small, the infinite-width picture does not hold. Under Gaussian weights it grows like depth / width; orthogonal
    ones keep it of order 1 / width.

    Args:
        model: any module or captured graph that is a chain: linear layers (or convolutions that are one matrix at
            every position), pointwise functions of any kind between them.
        example_inputs: give the shapes; inferred when None.
        distribution: law of the weights over draws: "measured" on each tensor, or declared for all.
        weight_variance, bias_variance: C_W = width_in E[W^2] and C_b = E[b^2] of all layers; measured when None.
        input_q: ``|x|^2`` / dimension of the input.
        parametrization: of the NTK, "standard" (lambda_W = width_in, lambda_b = 1) or "ntk" (C_W, C_b).
        deficit: what orthogonality takes off in a layer, m = max(in, out): "leading" is 2/m, of one order with all
            else; "exact" is 2/(m + 2), right for a first layer of any width, but what it adds of order 1/n^2 piles up
            with depth (tanh, width 32, depth 40: V/K^2 -1.94, -0.36; measured -1.85).

    Raises:
        RuleError: the model is no chain; names the first node that breaks it.
        InputError: an option out of its domain; and what `capture` raises.

    Source: Day, Kahn, Roberts 2023, arXiv 2310.07765.
    """
    choice("parametrization", parametrization, ("standard", "ntk"))
    choice("deficit", deficit, ("exact", "leading"))
    input_q = positive("input_q", input_q)
    graph = model if isinstance(model, Graph) else capture(model, example_inputs)
    chain = read_chain(graph, distribution, weight_variance, bias_variance)
    nodes = tuple(_nodes(chain, input_q, parametrization, deficit))
    return Fluctuations(chain.model, nodes, input_q, parametrization, deficit, (*chain.notes, *_undefined(nodes)))


def _nodes(chain: Chain, q: float, parametrization: str, deficit: Deficit) -> Iterator[NodeFluctuations]:
    state: Correlators | None = None
    how = QUADRATURE
    for layer in chain.layers:
        if state is None:
            state = first_layer(layer, q, parametrization, deficit)
        else:
            state = next_layer(layer, gaussian_moments(layer.phi, state.K), state, parametrization, deficit)
        if layer.law_how.startswith("assumed"):
            how |= assumed(layer.law_how)
        yield _node(layer, state, deficit_of(layer, deficit), how)


def _node(layer: ChainLayer, s: Correlators, deficit: float, how: How) -> NodeFluctuations:
    return NodeFluctuations(
        name=layer.name,
        module=layer.module,
        op=layer.op,
        source=layer.source,
        activation=layer.activation,
        width_in=layer.width_in,
        width_out=layer.width_out,
        law=layer.law,
        law_how=layer.law_how,
        C_W=layer.C_W,
        C_b=layer.C_b,
        deficit=deficit,
        K=s.K,
        Theta=s.Theta,
        **{name: layer.width_in * getattr(s, name) for name in SCALES},
        how=how.name,
    )


def _undefined(nodes: tuple[NodeFluctuations, ...]) -> Iterator[str]:
    """Why some columns are empty."""
    dead = next((n for n in nodes if not n.K > 0), None)
    if dead is not None:
        yield f"K vanishes at {dead.name}: no averages behind it"
    jump = next((n for n in nodes if math.isnan(n.Theta)), None)
    if jump is not None and (dead is None or nodes.index(jump) <= nodes.index(dead)):
        yield f"from {jump.name} on only K and V are defined: the function before it jumps, and has no <phi'^2>"


def _cells(node: NodeFluctuations, width: int) -> list[str]:
    relative = node.relative
    return [
        elide(node.name, width),
        str(node.width_in),
        {"orthogonal": "orth", "gaussian": "gauss"}[node.law],
        short(node.K),
        short(node.Theta),
        *(brief(relative[name]) for name in _ORDER),
        HOW.get(node.how, node.how),
    ]
