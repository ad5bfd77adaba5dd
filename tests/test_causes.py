"""Causes as the ledger words them: what a product of matrices is, and what an activation's input has and plans lack."""

from __future__ import annotations

import re
from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import kgraph
from kgraph.capture import capture
from kgraph.contractions import Contraction, contraction_of
from kgraph.propagate import propagate
from kgraph.residual.chains import find_chains

NODES, WIDTH = 6, 16


class Net(nn.Module):
    """Three layers, a fixed adjacency and a trained matrix, in a forward that a test writes."""

    def __init__(self, forward: Callable[[Net, Tensor], Tensor]) -> None:
        super().__init__()
        self.a, self.b, self.c = (nn.Linear(WIDTH, WIDTH) for _ in range(3))
        self.trained = nn.Parameter(torch.randn(NODES, NODES) / NODES**0.5)
        adjacency = (torch.rand(NODES, NODES) < 0.5).float() + torch.eye(NODES)
        self.register_buffer("adjacency", adjacency / adjacency.sum(1, keepdim=True))
        self.run = forward

    def forward(self, x: Tensor) -> Tensor:
        return self.run(self, x)


def graph_layer(m: Net, x: Tensor) -> Tensor:
    return m.c(F.relu(m.adjacency @ m.b(F.relu(m.a(x)))))  # type: ignore[operator]


def einsum_layer(m: Net, x: Tensor) -> Tensor:
    return m.c(F.relu(torch.einsum("ij,bjc->bic", m.adjacency, m.b(F.relu(m.a(x))))))  # type: ignore[arg-type]


def mixer(m: Net, x: Tensor) -> Tensor:
    return m.c(F.relu(m.trained @ m.b(x)))


def bilinear(m: Net, x: Tensor) -> Tensor:
    return m.c(F.relu((m.a(x) @ m.b(x).transpose(-1, -2)) @ m.c(x)))


def attention(m: Net, x: Tensor) -> Tensor:
    weights = torch.softmax((m.a(x) @ m.b(x).transpose(-1, -2)) / 4, -1)
    return m.c(F.relu(F.dropout(weights, 0.1, m.training) @ m.c(x)))


def masked(m: Net, x: Tensor) -> Tensor:
    logits = torch.einsum("bqc,bkc->bqk", m.a(x), m.b(x)) * 0.25
    logits = logits.masked_fill(torch.ones(NODES, NODES).triu(1).bool(), -1e4)
    return m.c(F.relu(torch.einsum("bqk,bkc->bqc", F.softmax(logits, -1), m.c(x))))


def weighted_behind_a_layer(m: Net, x: Tensor) -> Tensor:
    """A softmax that lies behind a layer makes no attention of the product."""
    h = m.a(torch.softmax(x, -1))
    return m.c(F.relu(torch.bmm(h @ m.b(x).transpose(-1, -2), m.b(x))))


KINDS: list[tuple[Callable[[Net, Tensor], Tensor], list[Contraction]]] = [
    (graph_layer, ["constant"]),
    (einsum_layer, ["constant"]),
    (mixer, ["parameter"]),
    (bilinear, ["product", "product"]),
    (attention, ["logits", "attention"]),
    (masked, ["logits", "attention"]),
    (weighted_behind_a_layer, ["product", "product"]),
]


@pytest.mark.parametrize(("forward", "expected"), KINDS, ids=lambda value: getattr(value, "__name__", ""))
def test_what_a_product_is(forward: Callable[[Net, Tensor], Tensor], expected: list[Contraction]) -> None:
    graph = capture(Net(forward), torch.randn(3, NODES, WIDTH))
    kernels = propagate(graph, mode="eval").kernels()
    found = [contraction_of(node, kernels.__contains__) for node in graph.module.graph.nodes if node.op != "output"]
    assert [kind for kind in found if kind] == expected


WORDS = {
    graph_layer: "mixing by a constant matrix",
    bilinear: "a product of two activations",
    attention: "attention averages positions",
}


@pytest.mark.parametrize("forward", WORDS, ids=lambda f: f.__name__)
def test_the_ledger_says_which(forward: Callable[[Net, Tensor], Tensor]) -> None:
    record = kgraph.transform(Net(forward), "tat", torch.randn(3, NODES, WIDTH)).kgraph
    assert record is not None
    (line,) = [line for line in record.ledger.unmet if "q is not 1" in line]
    assert [word for word in WORDS.values() if word in line] == [WORDS[forward]]


def test_a_graph_network_has_no_attention_branches() -> None:
    def graph_residual(m: Net, x: Tensor) -> Tensor:
        return x + m.b(m.adjacency @ F.relu(m.a(x)))  # type: ignore[operator]

    def bilinear_residual(m: Net, x: Tensor) -> Tensor:
        h = m.a(x)
        return x + m.b((h @ h.transpose(-1, -2)) @ h)

    def attention_residual(m: Net, x: Tensor) -> Tensor:
        h = m.a(x)
        return x + m.b(torch.softmax(h @ h.transpose(-1, -2), -1) @ h)

    kinds = {graph_residual: "res-3", bilinear_residual: "product", attention_residual: "attention"}
    for forward, expected in kinds.items():
        graph = capture(Net(forward), torch.randn(3, NODES, WIDTH))
        random = propagate(graph, mode="eval").kernels().__contains__
        (chain,) = find_chains(graph.module, random).chains
        assert chain.kinds == (expected,), forward.__name__


class Block(nn.Module):
    def __init__(self, width: int, act: nn.Module) -> None:
        super().__init__()
        self.one, self.two, self.act = nn.Linear(width, width), nn.Linear(width, width), act

    def forward(self, x: Tensor) -> Tensor:
        return self.act(x + self.two(self.act(self.one(x))))


def post_activation(act: nn.Module, width: int = 32) -> nn.Module:
    return nn.Sequential(nn.Linear(width, width), act, *(Block(width, act) for _ in range(6)))


def restored(result: nn.Module) -> list[kgraph.Change]:
    """What was done behind activations whose input is no Gaussian of mean 0."""
    return [change for change in result.kgraph.ledger.changes if "after an input that" in change.why]  # type: ignore[union-attr]


def test_the_mean_of_a_shortcut_is_named_with_its_share() -> None:
    """Measured on wide networks: the input of the activation that is corrected has this mean and share."""
    width = 400
    shaped = kgraph.transform(post_activation(nn.ReLU(), width), kgraph.TAT(eta=0.6), torch.randn(2, width)).eval()
    line = restored(shaped)[-1]
    found = re.search(r"input that has the mean ([\d.]+) of its shortcut (\w+), ([\d.]+)% of its q", line.why)
    assert found is not None, line.why
    node = next(node for node in shaped.graph.nodes if f"{node.target}" == line.node.split(" ")[0])  # type: ignore[union-attr]
    inputs: list[Tensor] = []
    shaped.get_submodule(str(node.target)).register_forward_hook(lambda _, args, out: inputs.append(args[0]))
    with torch.no_grad():
        shaped(F.normalize(torch.randn(64, width), dim=-1) * width**0.5)
    (u,) = inputs
    mean, share = float(u.mean()), float(u.mean() ** 2 / u.square().mean())
    error = 4 / width**0.5  # one draw of the weights: means of `width` units that all inputs share
    assert abs(mean - float(found[1])) < error
    assert abs(share - float(found[3]) / 100) < 2 * abs(mean) * error
    assert error < mean  # what is named is not nothing


def test_centred_activations_have_no_mean_to_name() -> None:
    """DKS centres its activations: what parts there is the law of the sums alone."""
    lines = restored(kgraph.transform(post_activation(nn.Softplus()), "dks", torch.randn(2, 32)))
    assert lines and not any("has the mean" in line.why for line in lines)


AFFINE = {
    "clone": lambda h: h.clone(),
    "division": lambda h: torch.true_divide(h, 1.0),
    "interpolation": lambda h: torch.lerp(h, 2 * h, 0.5) / 1.5,
    "guard": lambda h: torch.nan_to_num(h.clamp(-1e9, 1e9)),
}


@pytest.mark.parametrize("name", AFFINE)
def test_what_computes_a_line_is_no_activation(name: str) -> None:
    """A clamp within reach is one."""

    class Affine(nn.Module):
        def __init__(self, fn: Callable[[Tensor], Tensor]) -> None:
            super().__init__()
            self.a, self.b, self.fn = nn.Linear(16, 16), nn.Linear(16, 16), fn

        def forward(self, x: Tensor) -> Tensor:
            return self.b(self.fn(self.a(x)))

    shaped = kgraph.transform(Affine(AFFINE[name]), "dks", torch.randn(4, 16))
    assert shaped.kgraph is not None and shaped.kgraph.ledger.unmet == ("the model has no activation to shape",)
    near = kgraph.transform(Affine(lambda h: h.clamp(-1.0, 2.0)), "dks", torch.randn(4, 16))
    assert near.kgraph is not None and near.kgraph.ledger.counts()["shape activation"] == 1
