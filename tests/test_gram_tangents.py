"""The slope as a tangent: the NTK's recursion from another seed, against closed forms, `kgraph.analyze` and autograd.

It is E[<grad_x f(x), grad_x' f(x')>] of a channel f, and of inputs that white probes stand for the slope of analyze.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping

import numpy as np
import pytest
import torch
from gram_montecarlo import DRIFT, SIGMAS, dense, prepared
from torch import Tensor, fx, nn
from torch.utils import _pytree as pytree

from kgraph.capture import Graph, capture
from kgraph.gram import field as f
from kgraph.gram.block import Block
from kgraph.gram.engine import Engine
from kgraph.gram.exchangeable import Exchangeable
from kgraph.gram.kernels import kernels_of
from kgraph.gram.layout import Diagonal
from kgraph.gram.moments import Moments
from kgraph.gram.options import Asked
from kgraph.gram.read import gram_of
from kgraph.gram.rows import Rows
from kgraph.gram.tangents import SLOPE, Seed
from kgraph.gram.value import Value
from kgraph.gram.walk import Options, Walk
from kgraph.kernel import SAME, Pairs
from kgraph.propagate import propagate
from kgraph.roots import Root

X = torch.randn(3, 6, generator=torch.Generator().manual_seed(0), dtype=torch.float64)


def slope_of(model: nn.Module, x: Tensor, seed: Seed = SLOPE) -> Tensor:
    found = kernels_of(capture(model, x), x, None, Asked(), Moments(), {"slope": seed}).output.tangents
    assert set(found) == {"slope"}
    return found["slope"]


def chain(activation: Callable[[], nn.Module], layers: int = 4) -> nn.Module:
    """sw2 = 1.5 and sb2 = .09 exactly."""
    parts = [part for _ in range(layers) for part in (nn.Linear(32, 32), activation())]
    return prepared(nn.Sequential(nn.Linear(6, 32), activation(), *parts[2:]), False)


def test_relu_against_arc_cosines() -> None:
    """sw2 (pi - theta) / (2 pi) a layer, theta between what the layer puts out."""
    k, slope = X @ X.T / 6, torch.ones(3, 3, dtype=torch.float64)
    for _ in range(4):
        k = 1.5 * k + 0.09
        norm = torch.outer(k.diagonal(), k.diagonal()).sqrt()
        c = (k / norm).clamp(-1, 1)
        angle = torch.arccos(c)
        slope = slope * 1.5 * (math.pi - angle) / (2 * math.pi)
        k = norm * ((1 - c * c).clamp_min(0).sqrt() + c * (math.pi - angle)) / (2 * math.pi)
    torch.testing.assert_close(slope_of(chain(nn.ReLU), X), slope, rtol=1e-7, atol=0)


def test_tanh_by_quadrature() -> None:
    """chi = sw2 E[tanh'^2] a layer on the diagonal, by 200 Gauss-Hermite points."""
    z, w = (torch.from_numpy(a) for a in np.polynomial.hermite_e.hermegauss(200))
    w = w / w.sum()
    q, slope = X.square().mean(1), torch.ones(3, dtype=torch.float64)
    for _ in range(4):
        h = torch.tanh((1.5 * q + 0.09).sqrt()[:, None] * z)
        q, slope = (w * h.square()).sum(1), slope * 1.5 * (w * (1 - h.square()).square()).sum(1)
    torch.testing.assert_close(slope_of(chain(nn.Tanh), X).diagonal(), slope, rtol=1e-9, atol=0)


def probe(node: fx.Node, size: int, rows: Rows) -> Value:
    """White inputs of q = 1, one independent of another, which all move alike."""
    same = rows.same.double()
    none = torch.zeros_like(same)
    block = Block(torch.stack([same, none], 1), {"slope": torch.stack([torch.ones_like(same), none], 1)})
    leaf = f.Leaf((), frozenset({Root(f"input {node.name}")}), block=block)
    return Value(((size, leaf),), ((("b", rows.inputs),), (("c", size),)))


def slopes(graph: Graph, width: int, seeds: Mapping[str, Seed]) -> dict[str, float]:
    """Of every node, on exchangeable probes."""
    rows, found = Rows.square(2), {}
    engine = Engine(rows, Exchangeable(), "standard", seeds)

    def take(node: fx.Node, value: Value) -> None:
        found[node.name] = float(gram_of(engine, node.name, value, 2, None).tangents["slope"].reshape(-1)[0])

    node = next(node for node in graph.module.graph.nodes if node.op == "placeholder")
    with torch.no_grad():
        Walk(graph, engine, Options("eval"), take).run([probe(node, width, rows)])
    return found


class Residual(nn.Module):
    """A pre-activation stream with norms, a scaled branch and a gate."""

    def __init__(self) -> None:
        super().__init__()
        self.read, self.norm, self.out = nn.Linear(64, 64), nn.LayerNorm(64), nn.Linear(64, 8)
        self.a, self.b, self.gate = nn.Linear(64, 64), nn.Linear(64, 64), nn.Linear(64, 64)
        self.scale = nn.Parameter(torch.full((64,), 0.5))

    def forward(self, x: Tensor) -> Tensor:
        h = self.read(x)
        h = h + self.scale * self.b(torch.relu(self.a(self.norm(h))))
        return self.out(torch.sigmoid(self.gate(self.norm(h))) * h)


MODELS: dict[str, Callable[[], nn.Module]] = {
    "relu": lambda: nn.Sequential(nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 8)),
    "norm, prelu": lambda: nn.Sequential(nn.Linear(64, 64), nn.LayerNorm(64), nn.PReLU(), nn.Linear(64, 8)),
    "residual": Residual,
}


@pytest.mark.parametrize("name", MODELS)
def test_probes_against_analyze(name: str) -> None:
    """To 1e-10 at every node; with the layers' own terms added it is something else."""
    torch.manual_seed(0)
    model = MODELS[name]().double().eval()
    x = torch.randn(4, 64, dtype=torch.float64)
    for name, bias in model.named_parameters():  # analyze knows that the first layer's are uniform
        if name.endswith("bias"):
            nn.init.zeros_(bias)
    graph = capture(model, x)
    kernels = propagate(graph, mode="eval").kernels()
    wanted = {node.name: float(kernel.merged.slope[Pairs.UNIT, SAME]) for node, kernel in kernels.items()}
    found = slopes(graph, 64, {"slope": SLOPE})
    assert len(found) >= 4 and found == pytest.approx({name: wanted[name] for name in found}, rel=1e-10)
    wrong = slopes(graph, 64, {"slope": Seed(at_inputs=1.0)})
    assert all(wrong[n] > 1.5 * found[n] for n in found if n.startswith("linear"))


def measured(make: Callable[[], nn.Module], x: Tensor, draws: int) -> tuple[Tensor, Tensor]:
    """Mean over outputs of the inner products of their gradients, and its standard error over draws."""
    found = []
    for seed in range(draws):
        torch.manual_seed(seed)
        model, inputs = make().double(), x.clone().requires_grad_()
        y = model(inputs).flatten(1)
        rows = torch.eye(y.shape[1], dtype=y.dtype)[:, None].expand(-1, len(y), -1)
        (gradient,) = torch.autograd.grad(y, inputs, rows, is_grads_batched=True)  # inputs do not meet
        flat = gradient.flatten(2)
        found.append(torch.einsum("cap,cbp->ab", flat, flat) / len(flat))
    stacked = torch.stack(found)
    return stacked.mean(0), stacked.std(0) / math.sqrt(draws)


def convolutional() -> nn.Module:
    return nn.Sequential(
        nn.Conv2d(3, 128, 3, padding=1, bias=False),
        nn.ReLU(),
        nn.Conv2d(128, 128, 3, stride=2, bias=False),
        nn.Tanh(),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
        nn.Linear(128, 16, bias=False),
    )


class Attends(nn.Module):
    """Softmax attention of one head, and the mean over positions."""

    def __init__(self) -> None:
        super().__init__()
        self.read, self.out = dense(6, 128, bias=False), dense(128, 16, bias=False)
        self.q, self.k, self.v = (dense(128, 128, bias=False) for _ in range(3))

    def forward(self, x: Tensor) -> Tensor:
        h = self.read(x)
        return self.out(nn.functional.scaled_dot_product_attention(self.q(h), self.k(h), self.v(h)).mean(1))


BY_AUTOGRAD: dict[str, tuple[Callable[[], nn.Module], tuple[int, ...], float]] = {
    "convolutions": (convolutional, (2, 3, 5, 5), 0.0),
    "attention": (Attends, (2, 3, 6), (5 / 8192) ** 0.5),
}


@pytest.mark.parametrize("name", BY_AUTOGRAD)
def test_against_autograd(name: str) -> None:
    """Within four standard errors, 2.5 / width a layer, and those of its own draws; half of it is not."""
    make, shape, drawn = BY_AUTOGRAD[name]
    x = torch.randn(shape, generator=torch.Generator().manual_seed(3), dtype=torch.float64)
    torch.manual_seed(0)
    found = slope_of(make().double(), x)
    mean, error = measured(make, x, 16)
    allowed = SIGMAS * error + (4 * DRIFT / 128 + SIGMAS * drawn) * found.diagonal().max()
    assert bool(((found - mean).abs() <= allowed).all())
    assert bool(((found / 2 - mean).abs() > allowed).diagonal().all())


def test_frozen_layers_and_nothing_at_all() -> None:
    """Multiplier 0 is no own term; without tangents no block has any."""
    model = prepared(nn.Sequential(nn.Linear(6, 16), nn.LayerNorm(16), nn.Tanh(), nn.Linear(16, 16)), False)
    graph, names = capture(model, X), [name for name, _ in model.named_parameters()]
    carried: list[dict[str, Tensor]] = []

    def take(engine: Engine) -> Callable[[fx.Node, Value], None]:
        return lambda _, value: carried.extend(engine.pair(u, u).tangents for _, u in value.groups)

    seeds: dict[str, Seed]
    for seeds in ({}, {"ntk": Seed(multipliers=dict.fromkeys(names, 0.0))}, {"ntk": Seed()}):
        carried.clear()
        engine = Engine(Rows.square(3), Diagonal(), "standard", seeds)
        Walk(graph, engine, Options("eval"), take(engine)).run(pytree.tree_leaves((X,)))
        moves = bool(seeds) and seeds["ntk"].multipliers == {}
        assert len(carried) >= 5 and any(carried) == moves
