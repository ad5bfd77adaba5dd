"""Kernels on another device than the CPU: no tensor is made or left behind on the CPU, and the numbers are the same."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from other_device import DEVICE, Elsewhere, OtherDevice, away
from torch import Tensor, nn

import kgraph
from kgraph.capture import capture

Case = tuple[Callable[[], nn.Module], tuple[int, ...], dict[str, Any]]


class Shaped(nn.Module):
    """Residual sum, concatenation, gate, a buffer and a table of numbers made on the way."""

    def __init__(self) -> None:
        super().__init__()
        self.one, self.two, self.three = nn.Linear(6, 32), nn.Linear(32, 32), nn.Linear(64, 4)
        self.register_buffer("shift", torch.linspace(-1, 1, 32))
        self.scale = nn.Parameter(torch.ones(32))

    def forward(self, x: Tensor) -> Tensor:
        h = torch.tanh(self.one(x))
        h = h + torch.relu(self.two(h)) * self.scale + self.shift + torch.arange(32) / 32
        return self.three(torch.cat([h, torch.sigmoid(h) * h], 1))


class Recurrent(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.lstm, self.head = nn.LSTM(5, 16, batch_first=True), nn.Linear(16, 2)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.lstm(x)[0][:, -1])


class Attention(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.read, self.head = nn.Linear(8, 24), nn.Linear(8, 2)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.read(x).chunk(3, -1)
        return self.head(torch.nn.functional.scaled_dot_product_attention(q, k, v, is_causal=True).mean(1))


class Words(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.table, self.place = nn.Embedding(11, 16), nn.Parameter(torch.randn(1, 5, 16))
        self.norm, self.head = nn.LayerNorm(16), nn.Linear(16, 2)

    def forward(self, ids: Tensor) -> Tensor:
        return self.head(torch.nn.functional.gelu(self.norm(self.table(ids) + self.place))).mean(1)


def mlp(activation: Callable[[], nn.Module]) -> Callable[[], nn.Module]:
    return lambda: nn.Sequential(nn.Linear(6, 32), activation(), nn.Linear(32, 32), activation(), nn.Linear(32, 3))


def cnn(*after: Callable[[], nn.Module], **options: Any) -> Callable[[], nn.Module]:
    return lambda: nn.Sequential(
        nn.Conv2d(2, 16, 3, padding=1, **options),
        *(make() for make in after),
        nn.Conv2d(16, 16, 3, stride=2, padding=1),
        nn.ReLU(),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
        nn.Linear(16, 3),
    )


FULL: dict[str, Any] = {"positions": "full"}
CASES: dict[str, Case] = {
    "closed forms": (mlp(nn.ReLU), (5, 6), {}),
    "quadrature": (mlp(nn.SiLU), (3, 6), {}),
    "many pairs: a series": (mlp(nn.Tanh), (100, 6), {}),
    "kinks": (mlp(nn.Hardswish), (3, 6), {}),
    "small distances": (mlp(nn.Softplus), (3, 6), {"nodes": "all"}),
    "ntk parametrization": (mlp(nn.GELU), (3, 6), {"parametrization": "ntk"}),
    "sum, cat, gate, known tensors": (Shaped, (4, 6), {}),
    "pooling": (cnn(nn.ReLU), (3, 2, 6, 6), {}),
    "circular": (cnn(nn.Tanh, padding_mode="circular"), (2, 2, 4, 4), {}),
    "reflect": (cnn(nn.Tanh, padding_mode="reflect"), (2, 2, 4, 4), {}),
    "stationary": (cnn(nn.ReLU), (3, 2, 6, 6), {"positions": "stationary"}),
    "exchangeable": (cnn(nn.ReLU), (3, 2, 6, 6), {"positions": "exchangeable"}),
    "tiles": (cnn(nn.ReLU), (4, 2, 6, 6), {"memory_gib": 2.6e-3}),
    "batch statistics": (cnn(lambda: nn.BatchNorm2d(16), nn.ReLU), (3, 2, 4, 4), {}),
    "group norm by draws": (cnn(lambda: nn.GroupNorm(4, 16), nn.ReLU), (3, 2, 4, 4), {}),
    "max pool": (cnn(nn.ReLU, lambda: nn.MaxPool2d(2)), (2, 2, 4, 4), {}),
    "dropout": (cnn(nn.Tanh, lambda: nn.Dropout(0.3), lambda: nn.MaxPool2d(2)), (2, 2, 4, 4), {}),
    "random numbers": (cnn(nn.AlphaDropout), (2, 2, 4, 4), {}),
    "transposed": (
        lambda: nn.Sequential(nn.ConvTranspose1d(3, 16, 4, 2, 1), nn.Tanh(), nn.ConvTranspose1d(16, 2, 4, 2, 1)),
        (2, 3, 4),
        FULL,
    ),
    "LSTM": (Recurrent, (2, 3, 5), {}),
    "attention": (Attention, (2, 4, 8), {}),
    "tokens": (Words, (3, 5), {}),
}


@pytest.mark.parametrize("name", CASES)
def test_the_same_on_another_device(name: str) -> None:
    make, shape, options = CASES[name]
    torch.manual_seed(0)
    x = torch.randint(11, shape) if name == "tokens" else torch.randn(*shape, dtype=torch.float64)
    graph = capture(make(), x if name == "tokens" else x.float())
    expected = kgraph.kernels(graph, x, **options)
    with OtherDevice():
        found = kgraph.kernels(graph, away(x), **options)
    for gram in (found.output, *found.nodes.values()):
        for tensor in (gram.nngp, gram.ntk, gram.one_minus_c):
            assert tensor is None or isinstance(tensor, Elsewhere)
    assert found.ntk is not None and expected.ntk is not None
    torch.testing.assert_close(found.nngp.cpu(), expected.nngp, rtol=1e-12, atol=0)
    torch.testing.assert_close(found.ntk.cpu(), expected.ntk, rtol=1e-12, atol=0)


def test_two_sets_of_inputs_and_multipliers() -> None:
    graph = capture(mlp(nn.Tanh)(), torch.randn(2, 6))
    x, y = torch.randn(3, 6), torch.randn(2, 6)
    factor = {"0.weight": torch.tensor(2.0, dtype=torch.float64)}
    expected = kgraph.kernels(graph, x, y, multipliers=factor)
    with OtherDevice():
        for other in (away(y), y):  # inputs of two devices meet where the first are
            found = kgraph.kernels(graph, away(x), other, multipliers=factor)
            assert found.ntk is not None and expected.ntk is not None
            torch.testing.assert_close(found.ntk.cpu(), expected.ntk, rtol=1e-12, atol=0)


def test_the_ntk_report() -> None:
    """Multipliers are numbers of the CPU: the gradient comes back to them."""
    graph, x = capture(Shaped(), torch.randn(2, 6)), torch.randn(3, 6)
    expected = kgraph.ntk_report(graph, x)
    with OtherDevice():
        found = kgraph.ntk_report(graph, away(x))
    assert [row.share for row in found.layers] == pytest.approx([row.share for row in expected.layers], rel=1e-12)
    assert isinstance(found.ntk, Elsewhere)


def test_the_pretended_device_refuses_what_a_gpu_refuses() -> None:
    """Negative control: without these refusals the tests above would prove nothing."""
    with OtherDevice(), DEVICE:
        x = torch.randn(3)
        assert isinstance(x, Elsewhere) and isinstance(torch.tensor([1.0]), Elsewhere)
        with pytest.raises(RuntimeError, match="one device"):
            x + torch.ones(3, device="cpu")
        with pytest.raises(RuntimeError, match="one device"):
            torch.cat([x, torch.ones(3, device="cpu")])
        with pytest.raises(RuntimeError, match="generator"):
            torch.randn(3, generator=torch.Generator("cpu"))
        with pytest.raises(RuntimeError, match="numpy"):
            x.numpy()
        assert float((x + torch.tensor(1.0, device="cpu")).cpu().sum()) == pytest.approx(float(x.sum()) + 3)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.gpu
@pytest.mark.parametrize("name", CASES)
def test_the_same_on_a_gpu(name: str) -> None:
    """The model moves too, and stays where it is."""
    make, shape, options = CASES[name]
    torch.manual_seed(0)
    x, model = torch.randint(11, shape) if name == "tokens" else torch.randn(*shape), make()
    expected = kgraph.kernels(model, x, **options)
    found = kgraph.kernels(model.cuda(), x.cuda(), **options)
    assert found.nngp.is_cuda and found.ntk is not None and found.ntk.is_cuda and expected.ntk is not None
    assert all(parameter.is_cuda for parameter in model.parameters())
    torch.testing.assert_close(found.nngp.cpu(), expected.nngp, rtol=1e-9, atol=0)
    torch.testing.assert_close(found.ntk.cpu(), expected.ntk, rtol=1e-9, atol=0)
