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
    assert row["c"] == pytest.approx([c * (row["q"] - 1) / row["q"] for c in (0.0, 0.5, 0.9)], abs=1e-6)
    assert row["how"] == "exact"


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


class Shaped(nn.Module):
    """``shape(x, W relu(V x))``."""

    def __init__(self, shape: Callable[[Tensor, Tensor], Tensor], width: int = 32) -> None:
        super().__init__()
        self.first, self.last, self.shape = nn.Linear(32, width, bias=False), nn.Linear(width, 32, bias=False), shape
        self.draw()

    def draw(self) -> None:
        nn.init.normal_(self.first.weight, std=32**-0.5)
        nn.init.normal_(self.last.weight, std=self.last.in_features**-0.5)

    def forward(self, x: Tensor) -> Tensor:
        return self.shape(x, self.last(torch.relu(self.first(x))))


ONE_FOR_ALL: dict[str, tuple[Callable[[Tensor], Tensor], float]] = {
    "randn": (lambda h: h * torch.randn(()), 1.0),
    "rand": (lambda h: h * torch.rand(()), 1 / 3),
    "normal": (lambda h: torch.normal(1.0, 2.0, (1,)) * h, 5.0),
    "a coin": (lambda h: h * (torch.rand(()) < 0.25), 0.25),
    "bernoulli": (lambda h: h * torch.empty(1).bernoulli_(0.3), 0.3),
    "a choice": (lambda h: torch.where(torch.rand(()) < 0.25, h, 0.0), 0.25),
    "whole numbers": (lambda h: h * torch.randint(0, 3, ()), 5 / 3),
    "a row": (lambda h: h * torch.rand(1, 32), 1 / 3),
    "channels": (lambda h: h * torch.randn(32), 1.0),
    "of a number": (lambda h: h * torch.rand_like(h[0, 0]), 1 / 3),
}


@pytest.mark.parametrize("name", ONE_FOR_ALL)
def test_one_number_for_all_inputs_is_averaged_over(name: str) -> None:
    """q times E[n^2], and the same cosines, for both inputs have one n: any fixed draw would give another q."""
    draw, factor = ONE_FOR_ALL[name]
    model = Shaped(lambda x, h: draw(h))
    final = kgraph.analyze(model, X).final
    bare = Shaped(lambda x, h: h)
    bare.load_state_dict(model.state_dict())
    own = kgraph.analyze(bare, X).final
    assert final.q == pytest.approx(own.q * factor, rel=1e-5)
    assert final.c == pytest.approx(own.c, abs=1e-6)
    one = name not in ("a row", "channels")  # then all channels have one number, and what follows is no Gaussian
    assert (final.how == "assumed") == one
    if name != "of a number":  # whose first input alone it reads
        with pytest.raises(RuleError, match="draws noise that no input decides"):
            kgraph.nngp(model, X)


def test_depth_that_a_whole_batch_drops_against_plain_torch() -> None:
    """x + 4 m f(x), one m of a half for all: 64 draws of 0 or 1 are no mean, so weights and m are drawn 800 times."""

    def shape(x: Tensor, h: Tensor) -> Tensor:
        return x + (torch.rand(()) < 0.5) * 4 * h

    final = kgraph.analyze(Shaped(shape), X).final
    model, x = Shaped(shape, 256), torch.eye(2, 32) * 32**0.5  # of cosine 0
    torch.manual_seed(3)
    found = []
    with torch.no_grad():
        for _ in range(800):
            model.draw()
            y = model(x)
            found.append(torch.stack([y.square().mean(), (y[0] * y[1]).mean()]))
    draws = torch.stack(found)
    (q, cov), (error, other) = draws.mean(0).tolist(), (draws.std(0) / 800**0.5).tolist()
    # the measured variance of 32 x 32 weights is off by sqrt(2 / 1024), of both layers
    assert final.q == pytest.approx(q, abs=4 * error + 2 * 0.045 * 4 * 2)
    assert final.c[0] == pytest.approx(cov / q, abs=4 * (other + error * cov / q) / q + 0.03)


def test_random_weights_and_choices_are_known() -> None:
    """A random projection is a layer of known weights, and a random order of channels an index."""
    projected = Shaped(lambda x, h: h @ torch.randn(32, 32))
    kgraph.nngp(projected, X)
    for shape in (lambda x, h: h[:, torch.rand(32).argsort()], lambda x, h: h[:, torch.randperm(32)]):
        final = kgraph.analyze(Shaped(shape), X).final
        assert final.c == pytest.approx([1 / math.pi, 0.609, 0.910], abs=0.03)


def test_dropout_of_a_known_tensor_follows_the_mode() -> None:
    """A table that is dropped before it is added is, in eval mode, the table (and was another one, 0 or doubled)."""

    class Model(nn.Module):
        def __init__(self, rate: float) -> None:
            super().__init__()
            self.layer, self.rate = nn.Linear(32, 32), rate
            self.table = nn.Parameter(torch.linspace(-1, 1, 32))

        def forward(self, x: Tensor) -> Tensor:
            return self.layer(x) + nn.functional.dropout(self.table, self.rate, self.training)

    dropped, plain = Model(0.5), Model(0.0)
    plain.load_state_dict(dropped.state_dict())
    one, two = (kgraph.analyze(m, X, mode="eval").final for m in (dropped, plain))
    assert (one.q, one.c) == (two.q, two.c)
    kernels = [kgraph.nngp(m.eval(), X) for m in (dropped, plain)]
    assert torch.equal(*kernels)
