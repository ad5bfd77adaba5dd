"""Operations that move entries: the same moments, but no longer the same number at the same place."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from oracles import IMAGE, SEQUENCE, VECTOR, Body, dense, disagreements, images, pixelwise, vectors
from torch import Tensor, nn
from torch.nn import functional

import kgraph
from kgraph.rules import reindex

relu = torch.relu


def with_moved(move):
    """y + move(y) of one tensor y."""

    def body(u: Tensor) -> Tensor:
        y = relu(u)
        return y + move(y)

    return body


MOVES = {
    "rolled": lambda y: y.roll(1, -1),
    "flipped": lambda y: y.flip(-1),
    "transposed": lambda y: y.transpose(2, 3),
    "shuffled": lambda y: functional.channel_shuffle(y, 4),
    "halves swapped": lambda y: torch.cat([y[:, :, 3:], y[:, :, :3]], 2),
    "channels swapped": lambda y: torch.cat(y.chunk(2, 1)[::-1], 1),
}


@pytest.mark.parametrize("name", MOVES)
def test_a_tensor_meets_itself_moved(name: str) -> None:
    assert disagreements(images(with_moved(MOVES[name])), IMAGE) == []


IMAGES = {
    "halves of positions": lambda u: (lambda y: y[:, :, :3] + y[:, :, 3:])(relu(u)),
    "product of halves": lambda u: (lambda y: y.chunk(2, 2)[0] * y.chunk(2, 2)[1])(relu(u)),
    "a column less": lambda u: relu(u) - relu(u)[:, :, :1],
    "every second": lambda u: relu(u)[:, :, ::2],
    "every second channel": lambda u: relu(u)[:, ::2],
    "zero border": lambda u: functional.pad(relu(u), (1, 1, 0, 1)),
    "zero border, tanh": lambda u: torch.tanh(functional.pad(u, (1, 1, 1, 1)) - 0.5),
    "reflected border": lambda u: functional.pad(relu(u), (1, 1, 1, 1), mode="reflect"),
    "cropped": lambda u: functional.pad(relu(u), (-1, -1, 0, 0)),
    "repeated": lambda u: relu(u).repeat(1, 1, 2, 1),
    "repeated one by one": lambda u: relu(u).repeat_interleave(2, -1),
    "nearest": lambda u: functional.interpolate(relu(u), scale_factor=2),
    "bilinear": lambda u: functional.interpolate(relu(u), scale_factor=2, mode="bilinear"),
    "pixels shuffled": lambda u: functional.pixel_shuffle(relu(u), 2).mean((2, 3)),
    "pixels unshuffled": lambda u: functional.pixel_unshuffle(relu(u), 2),
}


@pytest.mark.parametrize("name", IMAGES)
def test_the_network_agrees(name: str) -> None:
    assert disagreements(images(IMAGES[name]), IMAGE) == []


VECTORS = {
    "a tensor times itself flipped": vectors(lambda u: u * u.flip(-1)),
    "halves of channels": vectors(lambda u: (lambda c: relu(c[0]) + c[1])(u.chunk(2, -1))),
    "halves swapped": vectors(lambda u: u + torch.cat(u.chunk(2, -1)[::-1], -1)),
    "unequal pieces": vectors(lambda u: (lambda c: relu(c[0]) * c[1][..., :32])(u.split([32, u.shape[-1] - 32], -1))),
    "means of four channels": vectors(lambda u: u.reshape(len(u), -1, 4).mean(-1)),
    "maxima of four channels": vectors(lambda u: u.reshape(len(u), 4, -1).amax(1)),
}


@pytest.mark.parametrize("name", VECTORS)
def test_channels_agree(name: str) -> None:
    assert disagreements(VECTORS[name], VECTOR) == []


def test_positions_flattened_into_channels_agree() -> None:
    assert (
        disagreements(lambda w: Body(lambda u, a: a(relu(u).flatten(1)), pixelwise(w), nn.Linear(36 * w, w)), IMAGE)
        == []
    )


def test_patches_as_channels_agree() -> None:
    def focus(u: Tensor, c: nn.Module) -> Tensor:
        y = relu(u)
        return c(torch.cat([y[:, :, ::2], y[:, :, 1::2]], 1))

    assert disagreements(images(focus, lambda w: nn.Conv2d(2 * w, w, 1)), IMAGE) == []


def test_tokens_mixed_by_a_layer_agree() -> None:
    def mix(u: Tensor, tokens: nn.Module) -> Tensor:
        return tokens(relu(u).transpose(1, 2)).transpose(1, 2)

    build = lambda w: Body(mix, dense(w), nn.Linear(8, 8, bias=False))  # noqa: E731
    assert [d for d in disagreements(build, SEQUENCE) if "(i,j)" not in d[0]] == []


@pytest.mark.parametrize("name", ["rolled", "transposed"])
def test_a_moved_tensor_taken_as_unmoved_fails_the_check(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(reindex, "moved", lambda part, label: part)
    assert disagreements(images(with_moved(MOVES[name])), IMAGE)


@pytest.mark.parametrize(("dtype", "expected"), [(torch.long, torch.trunc), (torch.bool, lambda u: (u != 0).double())])
def test_casts_to_types_without_fractions(dtype: torch.dtype, expected: Callable[[Tensor], Tensor]) -> None:
    """E[trunc(z)^2] and E[1[z != 0]] of z ~ N(0, q), drawn: four standard errors; a cast is not the identity."""

    class Cast(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.read = nn.Linear(16, 64, bias=False)

        def forward(self, x: Tensor) -> Tensor:
            return (3 * self.read(x)).to(dtype).float()

    found = kgraph.analyze(Cast(), torch.randn(2, 16))
    before = next(node.q for node in found.nodes if node.op == "mul")
    z = before**0.5 * torch.randn(100_000, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    squares = expected(z).square()
    assert found.final.q == pytest.approx(float(squares.mean()), abs=4 * float(squares.std()) / 100_000**0.5 + 1e-9)
    assert abs(found.final.q - before) > 0.1
