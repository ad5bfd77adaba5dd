"""Monte Carlo: run the real network on pairs of inputs with set cosines and measure q and c at every node.

The parameters are re-drawn by random signed permutations of their channels: variances, tap profiles, spectra and
orthogonality stay as they are in the model at hand, so the estimate is about *this* model's initialization,
whatever made it. Probe inputs have q = 1 at every position and exact cosines. Where batch statistics are used,
they are those of background inputs, so that a probe does not normalize itself.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from scipy import stats
from torch import Tensor, fx, nn

from kgraph.analysis import Analysis, NodeKernel
from kgraph.canonical import aten
from kgraph.capture import capture, check_model
from kgraph.checks import callback, cosines_of, count, mode_of, not_negative, positive, seeded, with_values
from kgraph.errors import InputError
from kgraph.finite import Runner, tied
from kgraph.suggestions import no_node

Progress = Callable[[int, int], None]

_ROUNDING = 1e-5
"""Of float32 networks."""

_AVERAGES = ("mean", *(f"{kind}avg_pool{dims}d" for kind in ("", "adaptive_") for dims in (1, 2, 3)))
_LINEAR = {
    *(
        "linear",
        "addmm",
        "input",
        "add",
        "sub",
        "rsub",
        "neg",
        "cat",
        "stack",
        "mean",
        "dropout",
        "Scale",
        "WeightedSum",
    ),
    *("avg_pool1d", "avg_pool2d", "avg_pool3d", "adaptive_avg_pool1d", "adaptive_avg_pool2d", "adaptive_avg_pool3d"),
    *("view", "reshape", "flatten", "unflatten", "transpose", "permute", "contiguous", "clone", "expand", "repeat"),
    *("slice", "select", "chunk", "split", "split_with_sizes", "unbind", "getitem", "squeeze", "unsqueeze", "roll"),
    *("flip", "pad", "pixel_shuffle", "pixel_unshuffle", "channel_shuffle", "upsample_nearest2d", "embedding", "to"),
    *("upsample_bilinear2d", "Identity"),
}
"""Operations that take the mean of kernels to the mean of kernels."""


@dataclass(frozen=True)
class Measured:
    """Measured kernel of one node: means over draws with their standard errors.

    Attributes:
        name: node name.
        q, q_error: second moment over channels and positions.
        c, c_error: cosine for every input cosine, of the mean moments.
        width: entries averaged over at one position (channels).
        fluctuation: relative variance, over draws and positions, of one network's own kernel at one position (and
            at two, relative to q^2); about 2 / width behind one Gaussian layer, and it adds up along the depth.
    """

    name: str
    q: float
    q_error: float
    c: tuple[float, ...]
    c_error: tuple[float, ...]
    width: int
    fluctuation: float = 0.0


@dataclass(frozen=True)
class MonteCarlo:
    """Result of `montecarlo`: one `Measured` a node.

    Attributes:
        nodes: by node name, in graph order.
        cosines: the input cosines.
        draws: number of parameter draws.
        background: batch members that gave the batch statistics (0: there were none).
    """

    nodes: dict[str, Measured]
    cosines: tuple[float, ...]
    draws: int
    mode: str
    background: int = 0

    def __getitem__(self, name: str) -> Measured:
        if name not in self.nodes:
            raise no_node(name, self.nodes)
        return self.nodes[name]

    def disagreements(
        self, analysis: Analysis, *, sigmas: float = 4.0, curvature: float = 1.0
    ) -> list[tuple[str, str, float, float, float]]:
        """Nodes where prediction and measurement differ by more than ``sigmas`` standard errors + O(1/width).

        With few draws the standard error is uncertain itself: Student's quantile of the same tail takes the place
        of ``sigmas`` (5.8 for 4 with 16 draws).

        A finite network's kernel K fluctuates around its mean, and a nonlinear layer f takes the mean of f(K):

            E[f(K)] - f(E[K]) = f'' Var(K) / 2 = (curvature / 2) f(K) Var(K) / K^2

        The allowance of a node (relative for q, absolute for c) is the sum of ``curvature / 2`` times the measured
        fluctuation of the layer's input over the nonlinear layers before it, along the path where it is largest; the
        default 1 is that of a quadratic. Nothing is allowed behind linear layers alone; an average over positions keeps
        the absolute allowance, while q falls. Batch statistics of B
        background inputs with n positions of correlation r fluctuate by 2 (1/n + r^2) / B besides.

        Returns:
            (node, quantity, predicted, measured, allowed)
        """
        _check_report(analysis, curvature)
        positive("sigmas", sigmas)
        found = []
        slack = self.allowances(analysis, curvature)
        sigmas = float(stats.t.isf(stats.norm.sf(sigmas), self.draws - 1))
        for row in analysis.nodes:
            measured = self.nodes.get(row.name)
            if measured is None:
                continue
            allowed = sigmas * measured.q_error + (slack[row.name] + _ROUNDING) * abs(row.q)
            if abs(measured.q - row.q) > allowed:
                found.append((row.name, "q", row.q, measured.q, allowed))
            for cosine, c, own, error in zip(self.cosines, row.c, measured.c, measured.c_error, strict=True):
                allowed = sigmas * error + slack[row.name] + _ROUNDING
                if math.isfinite(c) and math.isfinite(own) and abs(own - c) > allowed:
                    found.append((row.name, f"c({cosine})", c, own, allowed))
        return found

    def allowances(self, analysis: Analysis, curvature: float = 1.0) -> dict[str, float]:
        """What finite width may add at every node: see `disagreements`."""
        _check_report(analysis, curvature)
        rows = {row.name: row for row in analysis.nodes}
        slack: dict[str, float] = {}
        for row in analysis.nodes:
            slack[row.name] = max((slack[name] for name in row.inputs if name in slack), default=0.0)
            if row.op in _AVERAGES and row.inputs and row.q > 0:
                slack[row.name] *= max(1.0, rows[row.inputs[0]].q / row.q)
            if row.op in _LINEAR or row.op.startswith("conv"):
                continue
            known = [self.nodes[name].fluctuation for name in row.inputs if name in self.nodes]
            slack[row.name] += curvature / 2 * max(known, default=0.0)
            if row.op == "batch_norm" and self.background and row.inputs:
                slack[row.name] += curvature / 2 * self._of_batch(rows[row.inputs[0]])
        return slack

    def _of_batch(self, row: NodeKernel) -> float:
        positions = math.prod(row.shape[2:])
        correlation = row.c_positions if math.isfinite(row.c_positions) else 0.0
        return 2 * (1 / positions + correlation**2) / self.background

    def __str__(self) -> str:
        head = f"{'node':32s} {'q':>22s} " + " ".join(f"{f'c({c})':>18s}" for c in self.cosines)
        lines = [f"Monte Carlo, {self.draws} draws, {self.mode} mode", head]
        for m in self.nodes.values():
            cs = " ".join(f"{c:9.4f} +- {e:.4f}" for c, e in zip(m.c, m.c_error, strict=True))
            lines.append(f"{m.name[-32:]:32s} {m.q:10.4g} +- {m.q_error:8.2g} {cs}")
        return "\n".join(lines)


def montecarlo(
    model: nn.Module,
    example_inputs: object = None,
    *,
    cosines: tuple[float, ...] = (0.0, 0.5, 0.9),
    draws: int = 8,
    seed: int = 0,
    mode: str | None = None,
    background: int | None = None,
    progress: Progress | None = None,
) -> MonteCarlo:
    """Measure q and c of every node by running the finite network.

    Args:
        model: any module; left as it was.
        example_inputs: give the shapes; inferred when None.
        cosines: input cosines of the probe pairs.
        draws: parameter draws (at least 2).
        seed: of the draws; the global generator is not touched.
        mode: "train" or "eval"; the model's own when None.
        background: batch members that give batch statistics; chosen from the shapes when None.
        progress: called with (done, draws).

    Raises:
        InputError: fewer than two draws, or an unknown mode; and what `capture` raises.
    """
    count("draws", draws, 2, "A standard error needs at least 2")
    seed, cosines = seeded(seed), cosines_of(cosines)
    if background is not None:
        count("background", background, 0)
    callback("progress", progress)
    with_values(check_model(model))
    mode = mode_of(model, mode)
    graph = capture(model, example_inputs, verify=False)
    runner = Runner(graph, cosines, mode, background)
    generator = torch.Generator().manual_seed(seed)
    samples: dict[str, list[Tensor]] = {}
    with redrawn(graph.root, as_they_are(graph.module.graph)) as redraw, torch.no_grad():
        for draw in range(draws):
            redraw(generator)
            for name, moments in runner.run(generator).items():
                samples.setdefault(name, []).append(moments)
            if progress is not None:
                progress(draw + 1, draws)
    nodes = {name: _summary(name, values, runner.widths[name]) for name, values in samples.items()}
    return MonteCarlo(nodes, tuple(cosines), draws, mode, runner.size - runner.probes)


def _check_report(analysis: object, curvature: object) -> None:
    if not isinstance(analysis, Analysis):
        raise InputError(f"analysis is a {type(analysis).__name__}", hint="Pass the .analysis of a report")
    not_negative("curvature", curvature)


def _summary(name: str, values: list[Tensor], width: int) -> Measured:
    """Rows: q_a, then (q_b, cov_ab) of every cosine, then the local moments of `kgraph.finite`."""
    rows, local = torch.stack(values)[:, :-5], torch.stack(values)[:, -5:]
    root = math.sqrt(len(values))
    mean = rows.mean(0)
    size = (mean[:1] * mean[1::2]).sqrt()
    c = torch.where(size > 0, mean[2::2] / size, torch.nan)
    # the ratio of means is unbiased to first order, and so is the error of its linear part
    parts = rows[:, 2::2] / size - c / 2 * (rows[:, :1] / mean[:1] + rows[:, 1::2] / mean[1::2])
    return Measured(
        name,
        float(mean[0]),
        float(rows[:, 0].std()) / root,
        tuple(c.tolist()),
        tuple((parts.std(0) / root).tolist()),
        width,
        _fluctuation(local.mean(0)),
    )


def _fluctuation(local: Tensor) -> float:
    """Largest variance of the kernel at one position, at two, and of two inputs, relative to q^2."""
    same, same_square, apart, apart_square, crossed = local.tolist()
    return max(same_square - same**2, apart_square - apart**2, crossed, 0.0) / max(same**2, 1e-300)


def as_they_are(graph: fx.Graph) -> frozenset[str]:
    """Vectors of which only some entries are read, and tables of embeddings, read for their mean and variance."""
    nodes = [n for n in graph.nodes if n.op == "get_attr"]
    cuts = (aten.slice.Tensor, aten.select.int)
    cut = {n.target for n in nodes if any(user.target in cuts for user in n.users)}
    tables = {n.target for n in nodes if n.users and not tied(n)}
    return frozenset(str(target) for target in cut | tables)


@contextmanager
def redrawn(root: nn.Module, kept: frozenset[str] = frozenset()) -> Iterator[Callable[[torch.Generator], None]]:
    """Offer a function that re-draws all parameters but ``kept`` in place; put the originals back at the end."""
    originals = {id(p): (p, p.detach().clone()) for name, p in root.named_parameters() if name not in kept}

    def redraw(generator: torch.Generator) -> None:
        for parameter, original in originals.values():
            parameter.data.copy_(signed_permutation(original, generator))

    try:
        yield redraw
    finally:
        for parameter, original in originals.values():
            parameter.data.copy_(original)


def signed_permutation(tensor: Tensor, generator: torch.Generator) -> Tensor:
    """Permute the two channel dimensions and flip their signs; vectors (biases, gains) are only permuted."""
    if tensor.ndim == 0 or not tensor.is_floating_point():
        return tensor
    rows = torch.randperm(tensor.shape[0], generator=generator).to(tensor.device)
    result = tensor[rows]
    if tensor.ndim == 1:
        return result
    columns = torch.randperm(tensor.shape[1], generator=generator).to(tensor.device)
    signs = [torch.randint(0, 2, (n,), generator=generator).to(tensor) * 2 - 1 for n in tensor.shape[:2]]
    shape = (*tensor.shape[:2], *(1 for _ in tensor.shape[2:]))
    return result[:, columns] * (signs[0][:, None] * signs[1][None]).reshape(shape)
