"""Predicted kernels beside those of the finite network: NNGP at every node, NTK of the output, on real inputs."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from os import PathLike
from typing import Any

import torch
from rich.box import SIMPLE_HEAD
from rich.console import Console, ConsoleOptions, RenderableType, RenderResult
from rich.table import Table
from rich.text import Text
from scipy import stats
from torch import Tensor, fx, nn
from torch.utils import _pytree as pytree

from kgraph.canonical import operation_name
from kgraph.capture import Graph, check_model
from kgraph.checks import count as count_of
from kgraph.checks import flag, not_negative, positive, seeded
from kgraph.copies import copied
from kgraph.errors import InputError
from kgraph.files import destination, save_figure
from kgraph.gram.kernels import NodeGram, batched_inputs, captured, kernels
from kgraph.gram.options import learning
from kgraph.node_moments import NodeMoments, cosine_of, measure, own_moments
from kgraph.nonlinear import is_activation
from kgraph.report.numbers import cosine, count, elide, short
from kgraph.report.table import PLAIN_WIDTH, to_text
from kgraph.suggestions import no_node

Disagreement = tuple[str, str, float, float, float]


@dataclass(frozen=True)
class NodeComparison:
    """Kernel of one node on the first two inputs, predicted and measured (means over positions).

    Attributes:
        name, op: of the graph node.
        depth: nonlinear layers up to it.
        q, q_measured, q_error: second moment at the first input.
        c, c_measured, c_error: cosine of the first two.
        slack: depth over the narrowest layer before it: a finite width moves a kernel by O(slack).
    """

    name: str
    op: str
    depth: int
    q: float
    q_measured: float
    q_error: float
    c: float
    c_measured: float
    c_error: float
    slack: float


@dataclass(frozen=True)
class KernelComparison:
    """Result of `compare`.

    Attributes:
        rows: one a node, in graph order.
        ntk, ntk_measured, ntk_error: of the output, [n, n], averaged over positions.
        slack: of the output's NTK, as in the rows.
        left_out: nodes with a prediction whose value has no dimension that is the batch.
        draws, mode, parametrization: as asked for.
    """

    rows: tuple[NodeComparison, ...]
    ntk: Tensor
    ntk_measured: Tensor
    ntk_error: Tensor
    slack: float
    left_out: tuple[str, ...]
    draws: int
    mode: str
    parametrization: str

    def __getitem__(self, name: str) -> NodeComparison:
        for row in self.rows:
            if row.name == name:
                return row
        raise no_node(name, [row.name for row in self.rows])

    def disagreements(self, sigmas: float = 4.0, *, width_factor: float = 4.0) -> list[Disagreement]:
        """Where the two differ by more than ``sigmas`` standard errors + ``width_factor * slack``.

        The error of few draws is itself uncertain: ``sigmas`` are those of a normal distribution, widened to as rare
        an event of Student's. Slack is relative (to sqrt(Theta_aa Theta_bb) for an NTK), absolute for c. Returns
        (node, quantity, predicted, measured, allowed).
        """
        positive("sigmas", sigmas)
        not_negative("width_factor", width_factor)
        wide = float(stats.t.isf(stats.norm.sf(sigmas), self.draws - 1))
        return [d for d in self._differences(wide, width_factor) if not abs(d[3] - d[2]) <= d[4]]

    def _differences(self, wide: float, width_factor: float) -> Iterator[Disagreement]:
        for r in self.rows:
            slack = width_factor * r.slack
            rounding = 1e-9 * abs(r.q)
            yield r.name, "q", r.q, r.q_measured, wide * r.q_error + slack * abs(r.q) + rounding
            if math.isfinite(r.c) and math.isfinite(r.c_measured):
                yield r.name, "c", r.c, r.c_measured, wide * r.c_error + slack + 1e-9
        scale = self.ntk.diagonal().clamp_min(0).sqrt()
        for a, b in torch.triu_indices(*self.ntk.shape).T.tolist():
            allowed = wide * float(self.ntk_error[a, b]) + (width_factor * self.slack + 1e-9) * float(
                scale[a] * scale[b]
            )
            yield "output", f"ntk({a}, {b})", float(self.ntk[a, b]), float(self.ntk_measured[a, b]), allowed

    def text(self, *, width: int = PLAIN_WIDTH, all_nodes: bool = False) -> str:
        """What `print` shows; rows that repeat the numbers of the row above are hidden unless ``all_nodes``."""
        flag("all_nodes", all_nodes)
        return to_text(self._parts(count_of("width", width), all_nodes), width)

    def __str__(self) -> str:
        return self.text()

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        yield from self._parts(options.max_width, False)

    def _parts(self, width: int, all_nodes: bool) -> list[RenderableType]:
        wrong = self.disagreements()
        shown = [r for i, r in enumerate(self.rows) if all_nodes or not i or _numbers(r) != _numbers(self.rows[i - 1])]
        head = f"Kernels of {count(self.draws, 'draw')} against the prediction, {self.mode} mode: "
        head += count(len(wrong), "disagreement")
        parts: list[RenderableType] = [Text(head, style="bold"), Text(""), _table(shown, {d[:2] for d in wrong}, width)]
        parts += [Text(line) for line in self._ntk_lines({d[1] for d in wrong if d[0] == "output"})]
        if len(shown) < len(self.rows):
            hidden = count(len(self.rows) - len(shown), "row")
            parts.append(Text(f"{hidden} hidden: same numbers (all_nodes=True shows all)", style="dim"))
        if self.left_out:
            parts.append(Text(f"note: not compared, for no dimension is the batch: {', '.join(self.left_out)}"))
        return parts

    def _ntk_lines(self, wrong: set[str]) -> Iterator[str]:
        yield f"NTK of the output ({self.parametrization} parametrization), first two inputs:"
        for a, b in ((0, 0), (0, 1), (1, 1)):
            values = short(float(self.ntk[a, b])), short(float(self.ntk_measured[a, b]))
            mark = " !" if f"ntk({a}, {b})" in wrong else ""
            yield f"  ({a}, {b})  {values[0]}  measured {values[1]} +- {short(float(self.ntk_error[a, b]))}{mark}"

    def plot(self, path: str | PathLike[str]) -> None:
        """Curves of q and c against depth, the measured with error bars, as an image file.

        Raises:
            InputError: matplotlib is not installed.
        """
        destination(path)
        try:
            from matplotlib.figure import Figure
        except ImportError as error:
            raise InputError("plots need matplotlib", hint="Install it with: pip install 'kgraph[plot]'") from error
        last = list({row.depth: row for row in self.rows}.values())
        figure = Figure(figsize=(11, 4), layout="constrained")
        for axes, name, scale in zip(figure.subplots(1, 2), ("q", "c"), ("log", "linear"), strict=True):
            x = [row.depth for row in last]
            measured, error = ([getattr(row, f"{name}_{kind}") for row in last] for kind in ("measured", "error"))
            axes.plot(x, [getattr(row, name) for row in last], color="C0", label="predicted")
            axes.errorbar(x, measured, error, fmt=".", color="C1", capsize=2, label=f"measured, {self.draws} draws")
            axes.set(xlabel="depth (nonlinear layers)", ylabel=f"{name} value", yscale=scale)
            axes.legend()
        save_figure(figure, path)


def compare(
    model: nn.Module,
    x1: Any,
    *,
    draws: int = 8,
    seed: int = 0,
    parametrization: str = "standard",
    count_frozen: bool = False,
) -> KernelComparison:
    """Measure a finite network's kernels over draws of its parameters, beside those that `kgraph.kernels` predicts.

        measured K(x, x') = (1/C) sum_c u_c(x) u_c(x'), mean over positions;   measured Theta: `kgraph.empirical_ntk`

    Args:
        model: any bare module, left as it was; its mode is used.
        x1: at least two inputs: a tensor, or a tuple or dict of the model's arguments.
        draws: of the parameters (at least 2).
        seed: of the draws; the global generator is not touched.
        parametrization: of the NTK, as for `kgraph.kernels`.
        count_frozen: whether parameters with ``requires_grad=False`` have their part in the NTK, as there.

    Raises:
        InputError: fewer than two draws or inputs; and what `kgraph.kernels` raises.
    """
    check_model(model)
    count_of("draws", draws, 2, "A standard error needs at least 2")
    seed = seeded(seed)
    batched_inputs(x1)  # refuses what has no values to move
    x = pytree.tree_map(_double, x1)  # on the CPU: measuring goes through the captured graph
    inputs, n = batched_inputs(x)
    if n < 2:
        raise InputError("there is one input", hint="A cosine needs two")
    own = copied(model).cpu()
    graph = captured(own, inputs)
    options: dict[str, Any] = {"parametrization": parametrization, "count_frozen": count_frozen}
    predicted = kernels(graph, x, nodes="all", seed=seed, **options)
    assert predicted.ntk is not None
    full = predicted.positions == "full"
    ntk = _over_positions(predicted.ntk, full)
    mode = "train" if own.training else "eval"
    nodes = NodeMoments(graph, pytree.tree_leaves(tuple(inputs)), n, mode)
    speeds = own_moments(own) if parametrization == "ntk" else dict.fromkeys(dict(own.named_parameters()), 1.0)
    factors = speeds | learning(own, {}, count_frozen)
    samples, thetas = measure(own, nodes, x, draws, seed, factors)
    rows, slack = _rows(graph, predicted.nodes, full, samples, nodes.entries)
    error = thetas.std(0) / math.sqrt(draws)
    left_out = tuple(name for name in predicted.nodes if name not in samples)
    return KernelComparison(rows, ntk, thetas.mean(0), error, slack, left_out, draws, mode, parametrization)


def _double(x: Any) -> Any:
    if not isinstance(x, Tensor):
        return x
    return x.cpu().double() if x.is_floating_point() else x.cpu()


def _over_positions(x: Tensor, full: bool) -> Tensor:
    """[n, n, *places] or [n, n, *places, *places] -> [n, n], the mean over equal positions."""
    flat = x.reshape(*x.shape[:2], -1)
    if full:
        side = math.isqrt(flat.shape[2])
        flat = flat.reshape(*x.shape[:2], side, side).diagonal(dim1=2, dim2=3)
    return flat.mean(2)


def _rows(
    graph: Graph, grams: dict[str, NodeGram], full: bool, samples: dict[str, Tensor], entries: dict[str, int]
) -> tuple[tuple[NodeComparison, ...], float]:
    """Rows in graph order, and the slack of the output."""
    depth: dict[fx.Node, int] = {}
    narrowest: dict[fx.Node, float] = {}
    slacks: dict[fx.Node, float] = {}
    rows: list[NodeComparison] = []
    for node in graph.module.graph.nodes:
        before = min((narrowest[i] for i in node.all_input_nodes), default=math.inf)
        depth[node] = max((depth[i] for i in node.all_input_nodes), default=0) + is_activation(node)
        slacks[node] = (1 + depth[node]) / before
        narrowest[node] = before
        if node.name in grams and node.name in samples:
            gram = grams[node.name]
            own = math.inf if node.op == "placeholder" else entries[node.name] / math.prod(gram.places)
            narrowest[node] = min(before, own)
            kernel = _over_positions(gram.nngp, full)
            rows.append(_row(node, depth[node], kernel, samples[node.name], slacks[node]))
    output = next(n for n in graph.module.graph.nodes if n.op == "output")
    return tuple(rows), max((slacks[n] for n in output.all_input_nodes), default=0.0)


def _row(node: fx.Node, depth: int, kernel: Tensor, moments: Tensor, slack: float) -> NodeComparison:
    q = moments[:, 0]
    c, c_error = cosine_of(moments)
    return NodeComparison(
        name=node.name,
        op="input" if node.op == "placeholder" else operation_name(node),
        depth=depth,
        q=float(kernel[0, 0]),
        q_measured=float(q.mean()),
        q_error=float(q.std()) / math.sqrt(len(q)),
        c=float(kernel[0, 1] / (kernel[0, 0] * kernel[1, 1]).sqrt()),
        c_measured=c,
        c_error=c_error,
        slack=slack,
    )


def _numbers(row: NodeComparison) -> list[float | None]:
    values = (row.q, row.q_measured, row.c, row.c_measured)
    return [float(f"{value:.9g}") if math.isfinite(value) else None for value in values]


def _table(rows: list[NodeComparison], wrong: set[tuple[str, str]], width: int) -> Table:
    table = Table(box=SIMPLE_HEAD, padding=(0, 1, 0, 0), pad_edge=False, show_edge=False)
    heads = ("node", "op", "depth", "q", "measured", "", "c", "measured", "")
    for i, head in enumerate(heads):
        table.add_column(head, no_wrap=True, justify="left" if i in (0, 1, 5, 8) else "right")
    for row in rows:
        cells = [elide(row.name, max(8, width - 80)), elide(row.op, 12), str(row.depth)]
        for name, write in (("q", short), ("c", cosine)):
            measured, error = getattr(row, f"{name}_measured"), getattr(row, f"{name}_error")
            mark = " !" if (row.name, name) in wrong else ""
            cells += [write(getattr(row, name)), write(measured), f"+-{error:.1e}{mark}"]
        table.add_row(*(Text(cell) for cell in cells))
    return table
