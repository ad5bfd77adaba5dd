"""Neural tangent kernels against the empirical ones, averaged over draws of all weights.

The readout has few outputs, so that their Jacobian is small; the NTK's mean over outputs does not depend on how many.
"""

from __future__ import annotations

import pytest
import torch
from gram_montecarlo import Case, Net, check_ntk, conv, dense, images, sequences, vectors
from torch import Tensor, nn
from torch.nn.functional import relu, scaled_dot_product_attention

WIDE, FILTERS, OUT = 256, 64, 4


def plain(bias: bool) -> Net:
    layers = {"a": dense(8, WIDE, bias=bias), "b": dense(WIDE, WIDE, bias=bias), "o": dense(WIDE, OUT, bias=bias)}
    return Net(lambda m, x: m.o(relu(m.b(relu(m.a(x))))), **layers)


def tied(right: bool) -> Net:
    def forward(m: Net, x: Tensor) -> Tensor:
        z = m.w(relu(m.a(x)))
        return m.o(relu(z + (m.w if right else m.v)(relu(z))))

    return Net(forward, a=dense(8, WIDE), w=dense(WIDE, WIDE), v=dense(WIDE, WIDE), o=dense(WIDE, OUT))


def residual(right: bool) -> Net:
    def forward(m: Net, x: Tensor) -> Tensor:
        z = m.a(x)
        return m.o(relu((z if right else 0.0) + m.w(relu(z))))

    return Net(forward, a=dense(8, WIDE), w=dense(WIDE, WIDE), o=dense(WIDE, OUT))


def normed(right: bool) -> Net:
    norm = nn.LayerNorm(WIDE, elementwise_affine=right)
    with torch.no_grad():
        for parameter in norm.parameters():
            parameter.fill_(0.7)
    return Net(lambda m, x: m.o(relu(m.norm(relu(m.a(x))) - 0.7)), a=dense(8, WIDE), norm=norm, o=dense(WIDE, OUT))


def gated(right: bool) -> Net:
    def forward(m: Net, x: Tensor) -> Tensor:
        return m.o(torch.sigmoid(2 * m.a(x)) * m.b(x) if right else m.b(x) / 2)

    return Net(forward, a=dense(8, WIDE), b=dense(8, WIDE), o=dense(WIDE, OUT))


def convolved(padding: int) -> Net:
    def forward(m: Net, x: Tensor) -> Tensor:
        return m.o(relu(m.b(relu(m.a(x)))).mean((2, 3)))

    return Net(forward, a=conv(3, FILTERS), b=conv(FILTERS, FILTERS, padding=padding), o=dense(FILTERS, OUT))


def pooled(right: bool) -> Net:
    pool = nn.MaxPool2d(2) if right else nn.AvgPool2d(2)
    layers = {"a": conv(3, FILTERS), "b": conv(FILTERS, FILTERS), "o": dense(FILTERS, OUT), "pool": pool}
    return Net(lambda m, x: m.o(relu(m.b(m.pool(m.a(x)))).mean((2, 3))), **layers)


def batch() -> Tensor:
    """Enough inputs for the inverse of a channel's variance over them to have moments."""
    return torch.randn(8, 8, generator=torch.Generator().manual_seed(9), dtype=torch.float64)


def batch_normed(right: bool) -> Net:
    norm = nn.BatchNorm1d(WIDE) if right else nn.LayerNorm(WIDE)
    return Net(lambda m, x: m.o(relu(m.norm(m.a(x)))), a=dense(8, WIDE), norm=norm, o=dense(WIDE, OUT))


def attention(right: bool) -> Net:
    def forward(m: Net, x: Tensor) -> Tensor:
        y = m.a(x)
        q, k, v = (t(y)[:, None] for t in (m.q, m.k, m.v))
        mixed = scaled_dot_product_attention(q, k, v) if right else v
        return m.o(mixed[:, 0]).mean(1)

    layers = {name: dense(WIDE, WIDE) for name in "qkv"}
    return Net(forward, a=dense(6, WIDE), o=dense(WIDE, OUT), **layers)


def recurrent(kind: type[nn.RNNBase], last: bool) -> Net:
    def forward(m: Net, x: Tensor) -> Tensor:
        y = m.rnn(x)[0]
        return m.o(y[:, -1] if last else y[:, 0])

    return Net(forward, rnn=kind(6, WIDE, batch_first=True), o=dense(WIDE, OUT))


CASES = {
    "standard MLP": (lambda: plain(True), lambda: plain(False), vectors, 3, WIDE, False),
    "tied weights": (lambda: tied(True), lambda: tied(False), vectors, 4, WIDE, False),
    "residual": (lambda: residual(True), lambda: residual(False), vectors, 3, WIDE, False),
    "LayerNorm gain and bias": (lambda: normed(True), lambda: normed(False), vectors, 2, WIDE, False),
    "gate": (lambda: gated(True), lambda: gated(False), vectors, 2, WIDE, False),
    "BatchNorm": (lambda: batch_normed(True), lambda: batch_normed(False), batch, 2, WIDE, True),
    "convolution": (lambda: convolved(1), lambda: convolved(0), images, 3, FILTERS, False),
    "max pool": (lambda: pooled(True), lambda: pooled(False), images, 3, FILTERS, False),
    "attention": (lambda: attention(True), lambda: attention(False), sequences, 3, WIDE, False),
    "RNN": (lambda: recurrent(nn.RNN, True), lambda: recurrent(nn.RNN, False), sequences, 5, WIDE, False),
    "GRU": (lambda: recurrent(nn.GRU, True), lambda: recurrent(nn.GRU, False), sequences, 5, WIDE, False),
    "LSTM": (lambda: recurrent(nn.LSTM, True), lambda: recurrent(nn.LSTM, False), sequences, 5, WIDE, False),
}


PAIRS = [(name, form) for name in CASES for form in ("standard", "ntk") if (name, form) != ("LSTM", "ntk")]
"""An LSTM takes seconds; in NTK form it differs from a GRU by nothing that the other parametrization does not show."""


@pytest.mark.parametrize(("name", "parametrization"), PAIRS)
def test_ntk(name: str, parametrization: str) -> None:
    right, wrong, x, layers, width, train = CASES[name]
    check_ntk(Case(right, wrong, x, layers, width, 60, train), parametrization)
