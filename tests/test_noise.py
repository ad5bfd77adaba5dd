"""Forwards that draw random numbers, in eval mode too: captured, still random after emission, and truthful."""

from __future__ import annotations

import random
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.distributions import Distribution, Normal

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
