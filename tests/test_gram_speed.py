"""What makes kernels fast must not change them: pieces, series, tiles."""

from __future__ import annotations

import sys

import pytest
import torch
from torch import Tensor, nn

import kgraph
from kgraph.errors import InputError
from kgraph.gram.rows import Rows
from kgraph.maps import Pointwise, pointwise
from kgraph.maps import chunks as pieces
from kgraph.maps.series import make_series

DTYPE = torch.float64


def entries(count: int) -> tuple[Tensor, Tensor, Tensor]:
    """q1 [2, count, 1], q2 [2, 1, count] and covariances of every pair, c = +-1 among them."""
    generator = torch.Generator().manual_seed(0)
    q1 = 0.2 + 2 * torch.rand(2, count, 1, generator=generator, dtype=DTYPE)
    q2 = 0.2 + 2 * torch.rand(2, 1, count, generator=generator, dtype=DTYPE)
    c = 2 * torch.rand(2, count, count, generator=generator, dtype=DTYPE) - 1
    c[0, 0], c[1, 1], c[0, 2] = 1.0, -1.0, 0.0
    return q1, q2, c * q1.sqrt() * q2.sqrt()


@pytest.mark.parametrize("shape", [(7,), (3, 5, 9), (1, 40, 40), (4, 1, 1000), ()])
@pytest.mark.parametrize("size", [1, 16, 100])
def test_pieces_tile_the_shape_once(shape: tuple[int, ...], size: int) -> None:
    count = torch.zeros(shape)
    for box in pieces.pieces(shape, size):
        assert count[box].numel() <= size
        count[box] += 1
    assert (count == 1).all()


@pytest.mark.parametrize("name", ["relu", "leaky_relu", "abs", "erf", "gelu_exact", "sign", "square", "identity"])
def test_pieces_equal_the_whole(name: str) -> None:
    """Rounding apart: a vectorized loop's tail rounds differently."""
    phi = pointwise(name)
    q1, q2, cov = entries(120)
    q1[0, 5] = cov[0, 5] = 0.0
    split = phi.dual(q1, q2, cov)
    for i in (0, 1):
        for j in (0, 2, 5, 119):
            row = phi.dual(q1[i, j].expand(120), q2[i, 0], cov[i, j])
            torch.testing.assert_close(split[0][i, j], row[0], rtol=1e-14, atol=1e-14)
            torch.testing.assert_close(split[1][i, j], row[1], rtol=1e-14, atol=1e-14)


def relative(found: Tensor, wanted: Tensor, size: Tensor) -> float:
    return float(((found - wanted).abs() / size).max())


@pytest.mark.parametrize("name", ["erf", "gelu_exact", "sin", "relu"])
def test_many_entries_equal_the_closed_form(name: str) -> None:
    """relu: its series is too slow near |c| = 1, where the integral takes over."""
    exact = pointwise(name)
    q1, q2, cov = entries(64)  # enough for the series
    numeric = Pointwise(exact.fn).dual(q1, q2, cov)
    closed = exact.dual(q1, q2, cov)
    size = (exact.second(q1) * exact.second(q2)).sqrt()
    assert relative(numeric[0], closed[0], size) < 1e-10
    assert relative(numeric[1], closed[1], closed[1].abs().amax()) < 1e-10


@pytest.mark.parametrize("name", ["tanh", "silu", "softplus", "elu"])
def test_many_entries_equal_the_integral(name: str) -> None:
    phi = pointwise(name)
    q1, q2, cov = entries(64)  # enough for the series
    many = phi.dual(q1, q2, cov)
    some = (0, slice(0, 4), slice(0, 40))
    few = phi.dual(q1.expand_as(cov)[some], q2.expand_as(cov)[some], cov[some])
    for found, wanted in zip(many, few, strict=True):
        assert relative(found[some], wanted, wanted.abs().amax()) < 1e-10


def test_too_short_a_series_is_wrong_and_says_so() -> None:
    """Negative control: 8 terms of tanh."""
    phi = pointwise("tanh")
    q = torch.tensor([1.0, 2.0], dtype=DTYPE)
    one, two, c = torch.tensor([0]), torch.tensor([1]), torch.tensor([0.95], dtype=DTYPE)
    exact = phi.dual(q[:1], q[1:], c * 2**0.5)[0]
    short, long = (make_series(phi.fn, phi.plan(2.0), q, terms) for terms in (8, 128))
    assert short is not None
    assert long is not None
    assert not short.good(one, two, c).any()
    assert abs(short.sum(one, two, c)[0] - exact) > 1e-6
    assert long.good(one, two, c).all()
    assert abs(long.sum(one, two, c)[0] - exact) < 1e-10


def test_an_overflowing_function_has_no_series() -> None:
    fn = Pointwise(lambda u: torch.exp(u * u / 8))
    assert make_series(lambda u: torch.exp(u**4), fn.plan(0.5), torch.tensor([4.0], dtype=DTYPE)) is None


def convolutional() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(3, 8, 3, padding=1, bias=False),
        nn.ReLU(),
        nn.Conv2d(8, 8, 3, stride=2, bias=False),
        nn.ReLU(),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
        nn.Linear(8, 4, bias=False),
    )


def images(count: int, seed: int = 0) -> Tensor:
    return torch.randn(count, 3, 6, 6, generator=torch.Generator().manual_seed(seed))


SMALL = 12 * 36**2 * 64 / 2**30
"""GiB for 12 pairs of images: tiles of two inputs."""


@pytest.mark.parametrize("two", [False, True])
def test_tiles_equal_the_whole(two: bool) -> None:
    model, x1, x2 = convolutional(), images(5), images(3, 1) if two else None
    nodes = kgraph.kernels(model, x1, nodes="all").nodes
    middle = next(name for name, gram in nodes.items() if gram.places == (2, 2))
    whole = kgraph.kernels(model, x1, x2, nodes=[middle])
    tiled = kgraph.kernels(model, x1, x2, nodes=[middle], memory_gib=SMALL)
    assert whole.ntk is not None
    assert tiled.ntk is not None
    torch.testing.assert_close(tiled.nngp, whole.nngp, rtol=1e-12, atol=0)
    torch.testing.assert_close(tiled.ntk, whole.ntk, rtol=1e-12, atol=0)
    torch.testing.assert_close(tiled.nodes[middle].nngp, whole.nodes[middle].nngp, rtol=1e-12, atol=1e-15)
    torch.testing.assert_close(tiled.nodes[middle].ntk, whole.nodes[middle].ntk, rtol=1e-12, atol=1e-15)


def test_tiles_were_made(monkeypatch: pytest.MonkeyPatch) -> None:
    """Negative control of the test above: several walks, none over the cap."""
    module = sys.modules["kgraph.gram.kernels"]  # by name kgraph.gram.kernels is the function
    calls: list[int] = []
    run = module._run

    def counted(request: object, rows: Rows, *args: object, **kwargs: object) -> object:
        calls.append(len(rows.first))
        return run(request, rows, *args, **kwargs)  # type: ignore[arg-type]

    monkeypatch.setattr(module, "_run", counted)
    kgraph.kernels(convolutional(), images(5), positions="full", memory_gib=SMALL)
    assert len(calls) == 6
    assert max(calls) <= 12


def test_one_pair_too_large_is_named() -> None:
    with pytest.raises(InputError, match="memory_gib"):
        kgraph.kernels(convolutional(), images(3), memory_gib=1e-6)


def test_batch_statistics_are_not_tiled() -> None:
    model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU(), nn.Flatten(), nn.Linear(128, 2))
    with pytest.raises(InputError, match="batch statistics"):
        kgraph.kernels(model.train(), images(5), positions="full", memory_gib=SMALL)


def test_joint_draws_are_not_tiled() -> None:
    model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.MaxPool2d(2), nn.Flatten(), nn.Linear(32, 2))
    with pytest.raises(InputError, match="joint draws"):
        kgraph.kernels(model, images(6), positions="full", memory_gib=SMALL)
