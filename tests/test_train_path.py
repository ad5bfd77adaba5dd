"""What a forward does in train mode only is kept, or named: masks by hand, recurrent dropout, auxiliary outputs."""

from __future__ import annotations

import copy
import io
import random
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional

import kgraph
from kgraph.capture import capture

pytestmark = pytest.mark.filterwarnings("ignore:.*LeafSpec.*:FutureWarning")
WIDTH = 16
X = torch.randn(64, WIDTH, generator=torch.Generator().manual_seed(0))


class Masked(nn.Module):
    """A branch times zeros and ones, as people write it by hand."""

    def __init__(self, style: str) -> None:
        super().__init__()
        self.style, self.branch = style, nn.Linear(WIDTH, WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        h = torch.tanh(self.branch(x))
        return x + (self.dropped(h) if self.training else h)

    def dropped(self, h: Tensor) -> Tensor:
        if self.style == "bernoulli, divided last":
            return h * torch.bernoulli(torch.full((h.shape[0], 1), 0.25)) / 0.25
        if self.style == "comparison":
            return h * (torch.rand(h.shape[0], 1) < 0.25).float() / 0.25
        if self.style == "comparison from above":
            return (torch.rand(h.shape[0], 1, dtype=h.dtype) > 0.75) * h * 4.0
        if self.style == "every entry":
            return h / 0.25 * (torch.rand_like(h) < 0.25)
        return h * torch.floor(0.25 + torch.rand(h.shape[0], 1)) / 0.25


STYLES = ("bernoulli, divided last", "comparison", "comparison from above", "every entry", "floor")


@pytest.mark.parametrize("style", STYLES)
@torch.no_grad()
def test_masks_by_hand_stay_random(style: str) -> None:
    """Train: a quarter of the branch's rows (or entries) times 4, the rest 0; eval: the branch itself."""
    model = nn.Sequential(Masked(style), nn.Linear(WIDTH, 4))
    plain = capture(copy.deepcopy(model), X)
    assert not plain.notes and not plain.lost
    block = capture(copy.deepcopy(model[0]), X).emit()
    branch = torch.tanh(model[0].branch(X))
    assert torch.allclose(block.eval()(X), X + branch, atol=1e-6)
    torch.manual_seed(0)
    ratio = torch.cat([(block.train()(X) - X) / branch for _ in range(20)])
    ratio = ratio if style == "every entry" else ratio[:, :1]
    kept = torch.isclose(ratio, torch.tensor(4.0), rtol=1e-2)
    assert bool((kept | (ratio.abs() < 1e-3)).all())
    error = (0.25 * 0.75 / ratio.numel()) ** 0.5
    assert abs(float(kept.float().mean()) - 0.25) < 4 * error
    if style != "every entry":  # all entries of a row share its number
        moved = ((block(X) - X).abs() > 1e-6).float().mean(1)
        assert 0 < float((moved < 0.01).float().mean()) < 1 and bool(((moved < 0.01) | (moved > 0.9)).all())


def test_masks_by_hand_stay_random_in_a_transformed_model() -> None:
    model = nn.Sequential(Masked(STYLES[0]), nn.Linear(WIDTH, 4))
    shaped = kgraph.transform(model, "tat", X)
    assert not any("train" in line for line in shaped.kgraph.ledger.unmet)
    assert not torch.equal(shaped.train()(X), shaped(X)) and torch.equal(shaped.eval()(X), shaped(X))


class SharedMask(nn.Module):
    """One mask for two branches: two dropouts would draw two."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.leave = nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, 4)

    def forward(self, x: Tensor) -> Tensor:
        a, b = torch.tanh(self.a(x)), torch.tanh(self.b(x))
        if self.training:
            mask = torch.bernoulli(torch.full((x.shape[0], 1), 0.5))
            a, b = a * mask / 0.5, b * mask / 0.5
        return self.leave(a + b)


class Auxiliary(nn.Module):
    """Another output in train mode, of a head that eval mode does not call; dropout that both have."""

    def __init__(self) -> None:
        super().__init__()
        self.body, self.norm = nn.Linear(WIDTH, WIDTH), nn.BatchNorm1d(WIDTH)
        self.helper, self.leave = nn.Linear(WIDTH, 4), nn.Linear(WIDTH, 4)

    def forward(self, x: Tensor) -> Any:
        h = functional.dropout(torch.tanh(self.norm(self.body(x))), 0.5, self.training)
        return (self.leave(h), self.helper(h)) if self.training else self.leave(h)


class Skipped(nn.Module):
    """A layer left out by a random number, of torch or of Python."""

    def __init__(self, python: bool) -> None:
        super().__init__()
        self.python, self.body, self.leave = python, nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, 4)

    def forward(self, x: Tensor) -> Tensor:
        if self.training and (random.random() if self.python else torch.rand(())) < 0.5:
            return self.leave(x)
        return self.leave(torch.tanh(self.body(x)))


LOSSES = {
    "shared mask": (SharedMask, "bernoulli"),
    "auxiliary output": (Auxiliary, "helper"),
    "skipped by a tensor": (lambda: Skipped(False), "cannot be captured"),
    "skipped by Python": (lambda: Skipped(True), ""),
}


@pytest.mark.parametrize("name", LOSSES)
def test_what_is_lost_is_said(name: str) -> None:
    build, word = LOSSES[name]
    model = build()
    shaped = kgraph.transform(model, "tat", X)
    (line,) = [line for line in shaped.kgraph.ledger.unmet if line.startswith("train mode:")]
    assert word in line
    notes = kgraph.analyze(model, X).analysis.notes
    ways = ("Python or NumPy", "captured in eval mode") if name == "skipped by Python" else ("captured in eval mode",)
    assert sum(any(way in note for way in ways) for note in notes) == 1  # Python's number decides which of the two
    assert shaped.eval()(X).shape == (64, 4)


def test_what_both_modes_have_follows_the_mode() -> None:
    """The dropout and the norm of a model that is captured for its auxiliary output in eval mode."""
    module = capture(copy.deepcopy(Auxiliary()), X).emit()
    torch.manual_seed(0)
    one, two = module.train()(X), module(X)
    assert not torch.equal(one, two)
    assert module.get_buffer("norm.running_mean").abs().max() > 0  # it learned from batches
    assert torch.equal(module.eval()(X), module(X))


@pytest.mark.parametrize("kind", [nn.LSTM, nn.GRU])
def test_dropout_of_recurrent_layers_follows_the_mode(kind: Any) -> None:
    class Recurrent(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.cells = kind(WIDTH, WIDTH, num_layers=2, dropout=0.5, batch_first=True)
            self.leave = nn.Linear(WIDTH, 4)

        def forward(self, x: Tensor) -> Tensor:
            return self.leave(self.cells(x)[0])

    model, x = Recurrent(), X[:6].reshape(2, 3, WIDTH)
    graph = capture(copy.deepcopy(model), x)
    module = graph.emit()
    assert not graph.lost and not graph.notes
    assert torch.allclose(module.eval()(x), model.eval()(x), atol=1e-6)
    torch.manual_seed(0)
    expected = model.train()(x)
    torch.manual_seed(0)
    assert torch.allclose(module.train()(x), expected, atol=1e-6)
    assert not torch.equal(module(x), module(x))
    file = io.BytesIO()
    torch.save(module, file)
    file.seek(0)
    assert torch.allclose(torch.load(file, weights_only=False).eval()(x), model.eval()(x), atol=1e-6)


@pytest.mark.parametrize("training", [True, False])
def test_reports_are_of_the_mode_of_the_model(training: bool) -> None:
    """Behind a dropout E x^2 / (1 - p): in train mode q = 2 from there on, for leaky relus are homogeneous; else 1."""
    layers = [nn.Linear(64, 64), nn.ReLU(), nn.Dropout(0.5), nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 8)]
    model, x = nn.Sequential(*layers).train(training), torch.randn(4, 64)
    shaped = kgraph.transform(model, "tat", x)
    record, again = shaped.kgraph, kgraph.analyze(shaped, x)
    modes = {report.analysis.mode for report in (record.before, record.after, again)}
    assert modes == {"train" if training else "eval"}
    for own, theirs in ((record.after, again), (record.before, kgraph.analyze(model, x))):
        assert own.final.q == pytest.approx(theirs.final.q, rel=1e-9)
    assert record.after.final.q == pytest.approx(2.0 if training else 1.0, rel=1e-3)
    noted = [note for note in record.ledger.notes if "mode='eval'" in note]
    assert len(noted) == training


def test_an_emission_whose_dropout_follows_the_mode_is_captured_again() -> None:
    """It calls a module without arguments: the switch."""

    class Dropped(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.body = nn.Linear(WIDTH, WIDTH)

        def forward(self, x: Tensor) -> Tensor:
            return functional.dropout(torch.tanh(self.body(x)), 0.5, self.training)

    once = capture(Dropped(), X).emit()
    twice = capture(copy.deepcopy(once), X).emit()
    assert torch.equal(twice.eval()(X), once.eval()(X))
    assert not torch.equal(twice.train()(X), twice(X))
