"""Forwards that draw random numbers, in eval mode too: captured, still random after emission, and truthful."""

from __future__ import annotations

import math
import random
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.distributions import Distribution, Laplace, Normal

import kgraph
from kgraph.capture import capture
from kgraph.errors import CaptureError, RuleError

X = torch.randn(2, 32, generator=torch.Generator().manual_seed(1))
WIDTH = 256


class Noisy(nn.Module):
    """An encoder whose code gets ``draw(code)`` added, and a decoder."""

    def __init__(self, draw: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.encode, self.draw = nn.Linear(32, WIDTH, bias=False), draw
        self.decode = nn.Sequential(nn.Linear(WIDTH, 16), nn.ReLU(), nn.Linear(16, 4))
        nn.init.normal_(self.encode.weight, std=32**-0.5)

    def forward(self, x: Tensor) -> Tensor:
        code = self.encode(x)
        return self.decode(code + self.draw(code))


def reparametrized(code: Tensor) -> Tensor:
    return Normal(torch.zeros_like(code), torch.ones_like(code)).rsample()


STANDARD = {
    "randn_like": torch.randn_like,
    "randn": lambda code: torch.randn(code.shape),
    "randn of two sizes": lambda code: torch.randn(code.shape[0], WIDTH),
    "in place": lambda code: torch.empty(code.shape).normal_(),
    "a distribution": reparametrized,
}
OTHERS = {
    "bernoulli": lambda code: torch.bernoulli(torch.sigmoid(code)),
    "a mask": lambda code: code * (torch.rand(code.shape) < 0.5),
    "rand": torch.rand_like,
    "gumbel": nn.functional.gumbel_softmax,
    "dropout that always drops": lambda code: nn.functional.dropout(code, 0.5),
}


@pytest.mark.parametrize("name", [*STANDARD, *OTHERS])
def test_noise_is_captured_and_stays(name: str) -> None:
    model = Noisy((STANDARD | OTHERS)[name]).eval()
    emitted = capture(model, X).emit().eval()
    torch.manual_seed(5)
    expected = model(X)
    torch.manual_seed(5)
    torch.testing.assert_close(emitted(X), expected)
    assert not torch.equal(emitted(X), emitted(X))
    made = kgraph.transform(model, "tat", X).eval()
    assert not torch.equal(made(X), made(X))


@pytest.mark.parametrize("name", STANDARD)
@pytest.mark.parametrize("mode", ["train", "eval"])
def test_every_input_has_noise_of_its_own(name: str, mode: str) -> None:
    """code + n, each of variance 1: q = 2, and c/2 between inputs; one noise for both would give (1 + c) / 2."""
    rows = kgraph.analyze(Noisy(STANDARD[name]), X, mode=mode).to_dict()["nodes"]
    row = next(row for row in rows if row["name"].startswith("add") and row["q"] > 1.5)
    assert row["q"] == pytest.approx(2.0, rel=0.05)
    assert row["c"] == pytest.approx([0.0, 0.25, 0.45], abs=0.03)
    assert row["how"] not in ("exact", "quadrature")


def test_always_dropping_counts_in_eval_mode() -> None:
    """2 code * mask has q = 2 and cosine c/2 between inputs."""

    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = nn.Linear(32, 8)

        def forward(self, x: Tensor) -> Tensor:
            return self.layer(nn.functional.dropout(x, 0.5))

    rows = {row["name"]: row for row in kgraph.analyze(Model().eval(), X).to_dict()["nodes"]}
    assert rows["dropout"]["q"] == pytest.approx(2.0)
    assert rows["dropout"]["c"] == pytest.approx([0.0, 0.25, 0.45], abs=1e-6)


def test_noise_without_a_batch_is_one_for_all_inputs() -> None:
    model = Noisy(lambda code: torch.ones(WIDTH) * torch.randn(()))
    rows = {row["name"]: row for row in kgraph.analyze(model, X).to_dict()["nodes"]}
    assert rows["add"]["c"][0] == pytest.approx(1 - rows["linear"]["q"] / rows["add"]["q"], abs=1e-6)


def test_kernels_refuse_noise_that_no_input_decides() -> None:
    with pytest.raises(RuleError, match=r"draws noise.*node 'randn', test_noise\.py:\d+.*kgraph\.analyze"):
        kgraph.nngp(Noisy(STANDARD["randn"]), X)


@pytest.mark.parametrize("whose", ["Python", "NumPy"])
def test_foreign_random_numbers_are_refused_by_name(whose: str) -> None:
    def draw(code: Tensor) -> Tensor:
        factor = random.gauss(0, 1) if whose == "Python" else np.random.rand()  # the draw
        return code * factor

    with pytest.raises(CaptureError, match=f"draws {whose}.*torch.rand") as caught:
        kgraph.transform(Noisy(draw), "tat", X)
    lines = Path(__file__).read_text().splitlines()
    number = next(i for i, line in enumerate(lines, 1) if line.endswith("# the draw"))
    assert caught.value.source == (f"{Path(__file__).name}:{number}" if whose == "Python" else None)


def test_validation_is_as_it_was(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Distribution, "_validate_args", True)  # a strict export of before may have switched it off
    kgraph.analyze(Noisy(reparametrized), X)
    with pytest.raises(ValueError, match="constraint"):
        Normal(torch.zeros(1), -torch.ones(1))


EULER = 0.5772156649015329
LAWS: dict[str, tuple[Callable[[Tensor], Tensor], float]] = {
    "exponential": (lambda code: torch.empty_like(code).exponential_(2.0), 0.5),
    "its logarithm": (lambda code: torch.empty_like(code).exponential_().log(), math.pi**2 / 6 + EULER**2),
    "uniform": (lambda code: torch.empty_like(code).uniform_(-1, 2), 1.0),
    "gumbel of rand": (
        lambda code: -torch.log(-torch.log(torch.rand_like(code) + 1e-20) + 1e-20),
        math.pi**2 / 6 + EULER**2,
    ),
    "Laplace": (lambda code: Laplace(torch.zeros_like(code), 1.0).rsample(), 2.0),
    "logistic": (lambda code: torch.logit(torch.rand_like(code)), math.pi**2 / 3),
    "log normal": (lambda code: torch.empty_like(code).log_normal_(0.0, 0.5), math.exp(0.5)),
    "bernoulli": (lambda code: torch.bernoulli(torch.full_like(code, 0.3)), 0.3),
    "a square": (lambda code: torch.rand_like(code).square(), 0.2),
}


@pytest.mark.parametrize("name", LAWS)
def test_noise_has_its_own_law(name: str) -> None:
    """q of the noise alone, in closed form; what one law gives another does not (Gaussian of the same moments)."""
    draw, q = LAWS[name]
    nodes = kgraph.analyze(Noisy(draw), X).analysis.nodes
    end = next(i for i, node in enumerate(nodes) if node.op == "add" and "linear" in node.inputs)
    noise = next(node for node in nodes[:end][::-1] if node.name in nodes[end].inputs and node.name != "linear")
    assert noise.q == pytest.approx(q, rel=1e-4)  # uniform numbers of Laplace and Gumbel keep off the ends by 1e-7
    assert (noise.slope, noise.ntk, noise.how == "assumed") == (0.0, 0.0, False)


def test_gumbel_softmax_has_a_kernel() -> None:
    class Soft(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = nn.Linear(32, 8, bias=False)
            nn.init.normal_(self.layer.weight, std=32**-0.5)

        def forward(self, x: Tensor) -> Tensor:
            return nn.functional.gumbel_softmax(self.layer(x))

    final = kgraph.analyze(Soft(), X).final
    generator = torch.Generator().manual_seed(2)
    logits = torch.randn(200_000, 8, generator=generator)  # q = 1
    uniform = torch.rand(logits.shape, generator=generator, dtype=torch.float64)
    expected = (logits - (-uniform.log()).log()).softmax(-1).square().mean()
    assert final.q == pytest.approx(float(expected), rel=0.1)
    assert final.how == "sampled"


def test_noise_of_unknown_law_says_so() -> None:
    node = next(n for n in kgraph.analyze(Noisy(geometric), X).analysis.nodes if n.op.startswith("geometric"))
    assert (node.how, node.note) == ("assumed", "its noise counts as Gaussian")
    assert node.q == pytest.approx(6.0, rel=0.05)  # (2 - p) / p^2


def geometric(code: Tensor) -> Tensor:
    return torch.empty_like(code).geometric_(0.5)
