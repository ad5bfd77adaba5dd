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
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.utils import _pytree as pytree

from kgraph.analysis import Analysis
from kgraph.canonical import aten
from kgraph.capture import Graph, capture, check_model
from kgraph.errors import InputError
from kgraph.propagate import TOKEN_VIEWS, channel_dim
from kgraph.rules.sampled import for_mode
from kgraph.site import shape_of

Progress = Callable[[int, int], None]


@dataclass(frozen=True)
class Measured:
    """Measured kernel of one node: means over draws with their standard errors.

    Attributes:
        name: node name.
        q, q_error: second moment over channels and positions.
        c, c_error: cosine for every input cosine.
        width: entries averaged over at one position (channels): finite-width error is O(1/width).
    """

    name: str
    q: float
    q_error: float
    c: tuple[float, ...]
    c_error: tuple[float, ...]
    width: int


@dataclass(frozen=True)
class MonteCarlo:
    """Result of `montecarlo`: one `Measured` a node.

    Attributes:
        nodes: by node name, in graph order.
        cosines: the input cosines.
        draws: number of parameter draws.
    """

    nodes: dict[str, Measured]
    cosines: tuple[float, ...]
    draws: int
    mode: str

    def __getitem__(self, name: str) -> Measured:
        if name not in self.nodes:
            raise InputError(f"no node is called {name!r}", hint=f"Known: {', '.join(list(self.nodes)[:8])}, ...")
        return self.nodes[name]

    def disagreements(
        self, analysis: Analysis, *, sigmas: float = 4.0, width_factor: float = 4.0
    ) -> list[tuple[str, str, float, float, float]]:
        """Nodes where prediction and measurement differ by more than ``sigmas`` standard errors + O(1/width).

        The finite-width allowance of a node is ``width_factor * depth / narrowest width so far`` (relative for q,
        absolute for c): corrections of every layer add up. Returns (node, quantity, predicted, measured, allowed).
        """
        found = []
        narrowest: dict[str, float] = {}
        for row in analysis.nodes:
            measured = self.nodes.get(row.name)
            if measured is None:
                continue
            before = [narrowest[name] for name in row.inputs if name in narrowest]
            narrowest[row.name] = min([float(measured.width), *before])
            slack = width_factor * (1 + row.depth) / narrowest[row.name]
            allowed = sigmas * measured.q_error + slack * abs(row.q)
            if abs(measured.q - row.q) > allowed:
                found.append((row.name, "q", row.q, measured.q, allowed))
            for cosine, c, own, error in zip(self.cosines, row.c, measured.c, measured.c_error, strict=True):
                if math.isfinite(c) and math.isfinite(own) and abs(own - c) > sigmas * error + slack:
                    found.append((row.name, f"c({cosine})", c, own, sigmas * error + slack))
        return found

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
    if draws < 2:
        raise InputError(f"draws is {draws}", hint="A standard error needs at least 2")
    mode = mode or ("train" if check_model(model).training else "eval")
    if mode not in ("train", "eval"):
        raise InputError(f"mode is {mode!r}", hint="Choose 'train' or 'eval'")
    graph = capture(model, example_inputs, verify=False)
    runner = _Runner(graph, cosines, mode, background)
    generator = torch.Generator().manual_seed(seed)
    samples: dict[str, list[Tensor]] = {}
    with _redrawn(graph.root) as redraw, torch.no_grad():
        for draw in range(draws):
            redraw(generator)
            for name, moments in runner.run(generator).items():
                samples.setdefault(name, []).append(moments)
            if progress is not None:
                progress(draw + 1, draws)
    nodes = {name: _summary(name, values, runner.widths[name]) for name, values in samples.items()}
    return MonteCarlo(nodes, tuple(cosines), draws, mode)


def _summary(name: str, values: list[Tensor], width: int) -> Measured:
    """Rows: q_a, then (q_b, cov_ab) of every cosine."""
    rows = torch.stack(values)
    q = rows[:, 0]
    c = rows[:, 2::2] / (rows[:, :1] * rows[:, 1::2]).clamp_min(1e-300).sqrt()
    c = torch.where(rows[:, 1::2] > 0, c, torch.nan)
    root = math.sqrt(len(values))
    return Measured(
        name,
        float(q.mean()),
        float(q.std()) / root,
        tuple(c.mean(0).tolist()),
        tuple((c.std(0) / root).tolist()),
        width,
    )


@contextmanager
def _redrawn(root: nn.Module) -> Iterator[Callable[[torch.Generator], None]]:
    """Offer a function that re-draws all parameters in place; put the originals back at the end."""
    originals = {id(p): (p, p.detach().clone()) for p in root.parameters()}

    def redraw(generator: torch.Generator) -> None:
        for parameter, original in originals.values():
            parameter.data.copy_(_signed_permutation(original, generator))

    try:
        yield redraw
    finally:
        for parameter, original in originals.values():
            parameter.data.copy_(original)


def _signed_permutation(tensor: Tensor, generator: torch.Generator) -> Tensor:
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


class _Runner(fx.Interpreter):
    """Runs the flat graph on probes and background, and records moments of the probe rows at every node."""

    def __init__(self, graph: Graph, cosines: tuple[float, ...], mode: str, background: int | None) -> None:
        super().__init__(graph.module, garbage_collect_values=True)
        self.graph_, self.cosines, self.mode = graph, cosines, mode
        self.probes = 1 + len(cosines)
        self.size = self.probes + (background if background is not None else self._background())
        self.widths: dict[str, int] = {}
        self.moments: dict[str, Tensor] = {}
        self.tokens: set[fx.Node] = set()

    def _background(self) -> int:
        norms = [n for n in self.module.graph.nodes if n.target is aten.batch_norm.default]  # type: ignore[union-attr]
        if self.mode != "train" or not norms:
            return 0
        smallest = min(math.prod(shape_of(n)[2:]) for n in norms)
        return max(16, min(256, -(-1024 // max(smallest, 1))))

    def run(self, generator: torch.Generator) -> dict[str, Tensor]:  # type: ignore[override]
        self.generator, self.moments = generator, {}
        leaves, _spec = pytree.tree_flatten(self.graph_.inputs)
        nodes = [n for n in self.module.graph.nodes if n.op == "placeholder"]  # type: ignore[union-attr]
        inputs = [self._input(node, value) for node, value in zip(nodes, leaves, strict=True)]
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(int(torch.randint(0, 2**31, (), generator=generator)))
            super().run(*inputs, enable_io_processing=False)
        return self.moments

    def _input(self, node: fx.Node, value: Any) -> Any:
        if not isinstance(value, Tensor) or value.ndim == 0:
            return value
        if not value.is_floating_point():
            self.tokens.add(node)
            return value[:1].expand(self.size, *value.shape[1:]).clone()
        return self._probes(tuple(value.shape[1:]), channel_dim(node, value.ndim) - 1).to(value)

    def _probes(self, shape: tuple[int, ...], channel: int) -> Tensor:
        """Probe a, probes b with exact cosines to it at every position, then the background; q = 1 everywhere."""
        z = torch.randn((self.size, *shape), generator=self.generator, dtype=torch.float64).movedim(channel + 1, -1)

        def unit(x: Tensor) -> Tensor:
            return x / x.square().mean(-1, keepdim=True).sqrt()

        a = unit(z[0])
        rows = [a]
        for cosine, other in zip(self.cosines, z[1 : self.probes], strict=True):
            if other.shape[-1] > 1:
                other = unit(other - (other * a).mean(-1, keepdim=True) * a)
            rows.append(cosine * a + math.sqrt(1 - cosine**2) * other)
        return torch.cat([torch.stack(rows), unit(z[self.probes :])]).movedim(-1, channel + 1)

    def run_node(self, n: fx.Node) -> Any:
        if n.target in TOKEN_VIEWS and any(i in self.tokens for i in n.all_input_nodes):
            self.tokens.add(n)
        if n.target is aten.embedding.default and any(i in self.tokens for i in n.all_input_nodes):
            result = self._embedded(n)
        elif n.target is aten.batch_norm.default and self.mode == "train":
            result = self._batch_norm(n)
        elif n.op == "call_function" and getattr(getattr(n.target, "_schema", None), "is_mutable", False):
            args, kwargs = self.fetch_args_kwargs_from_env(n)
            result = args[0] if n.args[0].op == "get_attr" else n.target(*args, **kwargs)  # type: ignore
        else:
            result = self._plain(n)
        self._record(n, result)
        return result

    def _plain(self, n: fx.Node) -> Any:
        args, kwargs = self.fetch_args_kwargs_from_env(n)
        if n.op == "placeholder":
            return super().run_node(n)
        args = for_mode(n, tuple(args), self.mode)
        if n.target is aten.batch_norm.default and args[3] is not None:
            args = (*args[:5], False, *args[6:])
        return getattr(self, n.op)(n.target, args, kwargs)

    def _embedded(self, n: fx.Node) -> Tensor:
        """Gaussian rows with the table's own mean and variance, and the probes' cosines."""
        args, _ = self.fetch_args_kwargs_from_env(n)
        table, ids = args[0], args[1]
        mean, scale = table.double().mean(), table.double().std()
        rows = self._probes((*ids.shape[1:], table.shape[1]), ids.ndim - 1)
        return (mean + scale * rows).to(table)

    def _batch_norm(self, n: fx.Node) -> Any:
        args, kwargs = self.fetch_args_kwargs_from_env(n)
        x, weight, bias, eps = args[0], args[1], args[2], args[7]
        if not (isinstance(x, Tensor) and x.shape[0] == self.size and self.size > self.probes):
            return n.target(*args, **kwargs)  # type: ignore[operator]
        dims = [0, *range(2, x.ndim)]
        rest = x[self.probes :]
        mean, variance = rest.mean(dims), rest.var(dims, unbiased=False)
        return torch.nn.functional.batch_norm(x, mean, variance, weight, bias, False, 0.0, eps)

    def _record(self, n: fx.Node, value: Any) -> None:
        batched = isinstance(value, Tensor) and value.is_floating_point() and value.ndim > 1
        if not batched or value.shape[0] % self.size or n.op in ("get_attr", "output"):
            return
        rows = value.detach().double().reshape(self.size, -1)[: self.probes]
        a = rows[0]
        entries = [a.square().mean()]
        for b in rows[1:]:
            entries += [b.square().mean(), (a * b).mean()]
        self.moments[n.name] = torch.stack(entries)
        self.widths[n.name] = _width(value)


def _width(value: Tensor) -> int:
    """Channels of a tensor, taken as the larger of its channel-like dimensions."""
    return int(value.shape[1] if value.ndim in (2, 4, 5) else value.shape[-1])
