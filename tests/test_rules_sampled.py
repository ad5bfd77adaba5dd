"""The sampled rule: operations without a rule, and tensors that share weights out of sight."""

from __future__ import annotations

import math

import pytest
import torch
from oracles import IMAGE, IMAGE_TRAIN, SEQUENCE, VECTOR, dense, disagreements, images, propagated, vectors
from torch import Tensor, nn
from torch.nn import functional

import kgraph
from kgraph.kernel import SAME, Pairs
from kgraph.rules import linear, region

relu = torch.relu


def gram(u: Tensor) -> Tensor:
    """Products of tokens, returned to their channels."""
    return torch.softmax(u @ u.mT / u.shape[-1], -1) @ u


SEQUENCES = {
    "cumulative": vectors(lambda u: torch.cumsum(relu(u), 1) / 4),
    "sorted positions": vectors(lambda u: u.sort(1)[0]),
    "attention by hand": vectors(gram),
}


@pytest.mark.parametrize("name", SEQUENCES)
def test_sequences_agree(name: str) -> None:
    assert disagreements(SEQUENCES[name], SEQUENCE) == []


IMAGES = {
    "unfolded": images(lambda u: functional.unfold(relu(u), 2).mean(1, keepdim=True).expand(-1, u.shape[1], -1)),
    "variance": images(lambda u: u.var((2, 3))),
    "median": images(lambda u: u.flatten(2).median(-1).values),
    "indices of maxima": images(lambda u: (lambda y: y.gather(2, y.argmax(2, keepdim=True)))(u)),
}


@pytest.mark.parametrize("name", ["variance", "median", "indices of maxima"])
def test_images_agree(name: str) -> None:
    assert disagreements(IMAGES[name], IMAGE) == []


SHARED = {
    "one layer, two inputs": vectors(lambda u, a: relu(a(u)) + a(relu(u)), dense),
    "a layer and its transpose": vectors(lambda u, a: relu(a(u)) @ a.weight, dense),
    "a function of a difference": vectors(lambda u, a: relu(a(u) - a(relu(u))), dense),
}


@pytest.mark.parametrize("name", SHARED)
def test_shared_weights_agree(name: str) -> None:
    assert disagreements(SHARED[name], VECTOR) == []


def test_a_layer_run_beside_its_own_drawn_output_fails_the_check(monkeypatch: pytest.MonkeyPatch) -> None:
    """Out of sight of the weights that are run, the layer's other output is drawn as if independent of them."""
    monkeypatch.setattr(region, "_reads", lambda part, weights: False)
    monkeypatch.setattr(linear, "once", lambda part, key, make: make(part))
    assert disagreements(vectors(lambda u, a: a(u) * a(u), dense), VECTOR)


def test_masks_differ_between_inputs() -> None:
    build = images(lambda u, d: functional.unfold(d(relu(u)), 1).reshape(u.shape), lambda w: nn.Dropout(0.3))
    assert disagreements(build, IMAGE_TRAIN) == []


def test_an_unknown_operation_is_drawn_and_says_so() -> None:
    """Nothing counts as the identity: cumsum over channels of n unit Gaussians has mean q (n + 1) / 2."""

    class Cumulative(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a = nn.Linear(64, 64, bias=False)
            nn.init.orthogonal_(self.a.weight)

        def forward(self, x: Tensor) -> Tensor:
            return torch.cumsum(self.a(x), -1)

    row = kgraph.analyze(Cumulative(), torch.randn(2, 64)).final
    assert row.how == "sampled"
    error = float(row.note.removeprefix("+-"))
    assert error < 0.5
    assert row.q == pytest.approx(32.5, rel=4 * error)


def test_rows_that_nobody_reads_are_not_a_number() -> None:
    part = list(propagated(vectors(lambda u: u.sort(1)[0]), SEQUENCE).kernels().values())[-1].merged
    assert math.isfinite(float(part.slope[Pairs.UNIT, SAME]))
    assert math.isfinite(float(part.ntk[Pairs.SELF, SAME]))
    assert part.slope[0].isnan().all()
    assert part.cov.isfinite().all()


def test_a_batch_norm_behind_a_drawn_node_has_an_ntk() -> None:
    class Sorted(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv, self.norm = nn.Conv2d(3, 16, 1), nn.BatchNorm2d(16)

        def forward(self, x: Tensor) -> Tensor:
            return self.norm(self.conv(x).sort(-1)[0])

    assert math.isfinite(kgraph.analyze(Sorted(), torch.randn(2, 3, 6, 6), mode="train").final.ntk)


class Attends(nn.Module):
    """Attention of tokens to themselves, without projections: a token meets its own square, of size sqrt(width)."""

    def forward(self, x: Tensor) -> Tensor:
        return torch.softmax(x @ x.mT / math.sqrt(x.shape[-1]), -1) @ x


class SortsTwice(nn.Module):
    """What was drawn is drawn on: the second maximum of four positions, by two operations without rules."""

    def forward(self, x: Tensor) -> Tensor:
        return self.last(x.sort(1)[0].cumsum(1)[:, 2:].diff(dim=1))

    def __init__(self) -> None:
        super().__init__()
        self.last = nn.Identity()


class Normalizes(nn.Module):
    """Directions of channels: q is 1 in every draw, the cosines are not."""

    def forward(self, x: Tensor) -> Tensor:
        return functional.normalize(x.flip(1).sort(-1)[0], dim=-1) * x.shape[-1] ** 0.5


@pytest.mark.parametrize("model", [Attends(), SortsTwice(), Normalizes()], ids=lambda m: type(m).__name__)
def test_sampled_numbers_are_within_four_printed_errors(model: nn.Module) -> None:
    """q and c(1/2) of the operations themselves, on many inputs."""
    torch.manual_seed(0)
    shape = (400, 4, 128)
    a, b = torch.randn(shape), torch.randn(shape)
    a = a / a.square().mean(2, keepdim=True).sqrt()
    b = b - (a * b).mean(2, keepdim=True) * a
    b = 0.5 * a + 0.75**0.5 * b / b.square().mean(2, keepdim=True).sqrt()
    row = kgraph.analyze(nn.Sequential(Last(), model), torch.randn(2, 4, 128)).final
    assert row.how == "sampled"
    error = float(row.note.removeprefix("+-"))
    one, two = model(a), model(b)
    q = torch.stack([one.square().mean((1, 2)), two.square().mean((1, 2))]).mean(0)
    cov = (one * two).mean((1, 2))
    assert abs(float(q.mean()) / row.q - 1) < 4 * (error + float(q.std() / q.mean()) / 20)
    assert abs(float(cov.mean() / q.mean()) - row.c[1]) < 4 * (error + float(cov.std() / q.mean()) / 20) + 4 / 128


class Last(nn.Module):
    """Tells that the last dimension holds the channels, and changes nothing."""

    def forward(self, x: Tensor) -> Tensor:
        return functional.rms_norm(x, (x.shape[-1],), eps=0.0)


OF_ALL = {
    "centred": lambda h: h - h.mean(),
    "unit deviation": lambda h: (h - h.mean()) / h.std(),
    "times a mean square": lambda h: h * h.square().mean(),
    "plus a small loss": lambda h: h + 0.5 * h.abs().mean(),
    "between 0 and 1": lambda h: (h - h.min()) / (h.max() - h.min()),
    "above the mean": lambda h: h * (h > h.mean()),
}


@pytest.mark.parametrize("name", OF_ALL)
def test_numbers_of_a_whole_batch_meet_its_entries(name: str) -> None:
    """Against plain torch, batches of four inputs; the report says that the batch's size is in the number."""

    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = nn.Linear(64, 64, bias=False)

        def forward(self, x: Tensor) -> Tensor:
            return OF_ALL[name](self.layer(x))

    generator = torch.Generator().manual_seed(2)
    model, x = Model(), torch.randn(4, 64, generator=generator)
    final = kgraph.analyze(model, x).final
    variance = float(model.layer.weight.detach().square().mean()) * 64
    draws = torch.stack([OF_ALL[name](row).square().mean() for row in _fields(400, variance, generator)])
    assert final.q == pytest.approx(float(draws.mean()), rel=0.1)  # four draws of 256 entries: 5 % twice over
    assert (final.how, final.note) == ("assumed", "statistics over a batch of the few inputs that were drawn")


def _fields(count: int, variance: float, generator: torch.Generator) -> Tensor:
    """Outputs of a wide layer for four unrelated inputs of q = 1, many times."""
    return torch.randn(count, 4, 64, generator=generator) * variance**0.5
