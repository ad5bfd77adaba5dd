"""Second moments of every node of a finite network on real inputs, and its NTK, over draws of its parameters.

The network is drawn anew by signed permutations of its parameters (see `kgraph.montecarlo`), and the taps of its
convolutions get random signs: real inputs are alike at neighbouring positions, so that the chance correlation of two
taps of a layer with few input channels, which permutations keep, would not average out.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.nn.modules.conv import _ConvNd

from kgraph.canonical import aten
from kgraph.capture import Graph
from kgraph.empirical import Factor, empirical_ntk, seeded
from kgraph.float64 import InFloat64
from kgraph.gram.taps import tap_shares
from kgraph.monte_carlo import redrawn
from kgraph.rules.sampled import for_mode
from kgraph.written_buffers import writes_buffer, written

DIRECTIONS = 32
"""Outputs up to which a draw's NTK is summed over all of them; beyond, this many random directions are drawn."""
Taker = Callable[[str, Tensor], None]


class NodeMoments:
    """Runs a captured graph on inputs and reads ``[q(x_0), q(x_1), K(x_0, x_1)]`` off every node.

    Args:
        graph: a captured model; it runs in float64.
        inputs: the placeholders' values, at least two rows each.
        n: number of inputs.
        mode: "train" or "eval".
    """

    def __init__(self, graph: Graph, inputs: list[Any], n: int, mode: str) -> None:
        self.graph, self.inputs, self.n, self.mode = graph, inputs, n, mode
        self.entries: dict[str, int] = {}
        self.batch_dims = self._find_batch_dims()

    @property
    def outputs(self) -> int | None:
        """Entries of the model's first output, None where it is not known."""
        output = next(n for n in self.graph.module.graph.nodes if n.op == "output")
        return next((self.entries[n.name] for n in output.all_input_nodes if n.name in self.entries), None)

    def measure(self, seed: int) -> dict[str, Tensor]:
        """Moments [3] by node name; ``seed`` is of the model's own random numbers."""
        moments: dict[str, Tensor] = {}

        def take(name: str, value: Tensor) -> None:
            if name in self.batch_dims:
                a, b = _by_input(value, self.batch_dims[name], self.n)[:2]
                moments[name] = torch.stack([a.square().mean(), b.square().mean(), (a * b).mean()])

        self._run(self.inputs, self.mode, take, seed)
        return moments

    def _run(self, inputs: list[Any], mode: str, take: Taker, seed: int = 0) -> None:
        with torch.no_grad(), seeded(self.graph.root, seed), InFloat64():
            MeasuringInterpreter(self.graph.module, mode, take).run(*inputs, enable_io_processing=False)

    def _find_batch_dims(self) -> dict[str, int]:
        """The dimension of every node that runs over inputs (outermost): it doubles with them, and repeats itself."""
        once: dict[str, Tensor] = {}
        found: dict[str, int] = {}

        def compare(name: str, twice: Tensor) -> None:
            value = once.pop(name, None)
            if value is None:
                return
            grown = [d for d, (x, y) in enumerate(zip(value.shape, twice.shape, strict=False)) if x != y]
            if len(grown) != 1 or value.shape[grown[0]] % self.n or not value.numel():
                return
            rows = _by_input(value, grown[0], self.n)
            again = _by_input(twice, grown[0], 2 * self.n)
            if again.shape[1] == rows.shape[1] and torch.allclose(again, torch.cat([rows, rows]), 1e-6, equal_nan=True):
                found[name] = grown[0]
                self.entries[name] = rows.shape[1]

        self._run(self.inputs, "eval", once.__setitem__)
        doubled = [torch.cat([x, x]) if isinstance(x, Tensor) and x.ndim else x for x in self.inputs]
        self._run(doubled, "eval", compare)
        return found


def _by_input(value: Tensor, dim: int, n: int) -> Tensor:
    return value.detach().double().movedim(dim, 0).reshape(n, -1)


class MeasuringInterpreter(fx.Interpreter):
    """The flat graph in one mode, with buffers left alone."""

    def __init__(self, module: fx.GraphModule, mode: str, take: Taker) -> None:
        super().__init__(module, garbage_collect_values=True)
        self.mode, self.take = mode, take

    def fetch_attr(self, target: str) -> Any:
        value = super().fetch_attr(target)
        return value.double() if isinstance(value, Tensor) and value.is_floating_point() else value

    def run_node(self, n: fx.Node) -> Any:
        args, kwargs = self.fetch_args_kwargs_from_env(n)
        if n.op == "placeholder":
            result = super().run_node(n)
        elif writes_buffer(n):
            result = written(n, tuple(args), kwargs, self.env)
        else:
            result = getattr(self, n.op)(n.target, self._in_mode(n, tuple(args)), kwargs)
        if isinstance(result, Tensor) and result.is_floating_point() and result.ndim and n.op != "get_attr":
            self.take(n.name, result)
        return result

    def _in_mode(self, n: fx.Node, args: tuple[Any, ...]) -> tuple[Any, ...]:
        if n.target is not aten.batch_norm.default:
            return for_mode(n, args, self.mode)
        if self.mode == "train":
            return (*args[:3], None, None, True, *args[6:])
        return (*args[:5], args[3] is None, *args[6:])


def flip_taps(model: nn.Module, generator: torch.Generator) -> None:
    """A random sign for every tap of every convolution, in place: different taps become uncorrelated."""
    for module in model.modules():
        if isinstance(module, _ConvNd):
            taps = module.weight.shape[2:]
            signs = torch.randint(0, 2, (math.prod(taps),), generator=generator) * 2 - 1
            module.weight.data.mul_(signs.reshape(taps).to(module.weight))


def own_moments(model: nn.Module) -> dict[str, Factor]:
    """E[p^2] of every parameter (of every tap, where a convolution's differ): df/dp in NTK form is its root times."""
    moments: dict[str, Factor] = {name: float(p.detach().square().mean()) for name, p in model.named_parameters()}
    for path, module in model.named_modules():
        if isinstance(module, _ConvNd):
            moments[f"{path}.weight".lstrip(".")] = tap_shares(module.weight)[0]
    return moments


def measure(
    model: nn.Module, nodes: NodeMoments, x: Any, draws: int, seed: int, factors: dict[str, Factor]
) -> tuple[dict[str, Tensor], Tensor]:
    """Moments of every node, [draws, 3], and the output's NTK, [draws, n, n]."""
    generator = torch.Generator().manual_seed(seed)
    samples: dict[str, list[Tensor]] = {}
    thetas: list[Tensor] = []
    sketch = None if (nodes.outputs or math.inf) <= DIRECTIONS else DIRECTIONS
    with redrawn(model) as redraw:
        for _ in range(draws):
            redraw(generator)
            flip_taps(model, generator)
            at = int(torch.randint(0, 2**31, (), generator=generator))
            for name, moments in nodes.measure(at).items():
                samples.setdefault(name, []).append(moments)
            thetas.append(empirical_ntk(model, x, sketch=sketch, multipliers=factors, seed=at).matrix)
    return {name: torch.stack(own) for name, own in samples.items()}, torch.stack(thetas)


def cosine_of(moments: Tensor) -> tuple[float, float]:
    """Cosine of the mean moments (a mean of cosines is off by 1/width, even at one layer), and its jackknife error."""

    def cosines(m: Tensor) -> Tensor:
        return m[..., 2] / (m[..., 0] * m[..., 1]).sqrt()

    n = len(moments)
    without = cosines((moments.sum(0) - moments) / (n - 1))
    error = ((n - 1) / n * (without - without.mean()).square().sum()).sqrt()
    return float(cosines(moments.mean(0))), float(error)
