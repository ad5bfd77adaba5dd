"""Products of random tensors against brute force."""

from __future__ import annotations

import pytest
import torch
from gram_montecarlo import CHANNELS, Case, Net, check_nngp, conv, dense, images, sequences, vectors
from torch import Tensor, nn
from torch.nn.functional import glu, relu, silu


def gate(keep_mask: bool, *, shared: bool = False) -> Net:
    """sigmoid(dropout(a)) * b; a and b are one layer's if ``shared``."""

    def forward(m: Net, x: Tensor) -> Tensor:
        a = m.a(x)
        gate = torch.sigmoid(3 * (m.drop(a) if keep_mask else a))
        return m.w(gate * (a if shared else m.b(x)))

    return Net(forward, a=dense(8), b=dense(8), w=dense(), drop=nn.Dropout(0.5))


def swiglu(*, tied: bool) -> Net:
    def forward(m: Net, x: Tensor) -> Tensor:
        h = m.a(x)
        gate = m.b(h)
        return m.w(silu(gate) * (gate if tied else m.c(h)))

    return Net(forward, a=dense(8), b=dense(), c=dense(), w=dense())


def glu_of_halves(right: bool) -> Net:
    def forward(m: Net, x: Tensor) -> Tensor:
        a, b = m.a(x).chunk(2, 1)
        return m.w(torch.sigmoid(2 * a) * (b if right else a))

    return Net(forward, a=dense(8, 1024), w=dense())


def fused_glu(right: bool) -> Net:
    """The operation itself, of one layer's halves and of two layers side by side."""

    def forward(m: Net, x: Tensor) -> Tensor:
        a, b = m.a(x).chunk(2, 1)
        y = m.w(glu(torch.cat([b, 2 * a], 1) if right else torch.cat([b, 2 * b], 1), 1))
        return glu(m.v(y))

    return Net(forward, a=dense(8, 1024), w=dense(), v=dense(512, 1024))


def squeeze_excite(right: bool) -> Net:
    """The gate is a function of the very field that it multiplies."""

    def forward(m: Net, x: Tensor) -> Tensor:
        y = relu(m.a(x))
        pooled = y.mean((2, 3), keepdim=True)
        s = torch.sigmoid(2 * m.up(relu(m.down(pooled))))
        return m.b(y * s if right else y * pooled)[..., :2].mean((2, 3))

    return Net(forward, a=conv(3), b=conv(), down=conv(size=1), up=conv(size=1))


def own_gate(right: bool) -> Net:
    """y * sigmoid(W y) and then relu of the sum with y: two uses of one field."""

    def forward(m: Net, x: Tensor) -> Tensor:
        y = m.a(x)
        g = y * torch.sigmoid(m.g(y))
        return m.w(relu(y + g if right else m.b(x) + g))

    return Net(forward, a=dense(8), b=dense(8), g=dense(), w=dense())


GATES = {
    "gate after dropout": (lambda: gate(True), lambda: gate(False), 2, True),
    "gate after dropout of itself": (lambda: gate(True, shared=True), lambda: gate(False, shared=True), 2, True),
    "SwiGLU": (lambda: swiglu(tied=False), lambda: swiglu(tied=True), 3, False),
    "SwiGLU of one layer": (lambda: swiglu(tied=True), lambda: swiglu(tied=False), 3, False),
    "GLU of halves": (lambda: glu_of_halves(True), lambda: glu_of_halves(False), 2, False),
    "fused GLU": (lambda: fused_glu(True), lambda: fused_glu(False), 3, False),
    "gate of its own input": (lambda: own_gate(True), lambda: own_gate(False), 3, False),
}


@pytest.mark.parametrize("name", GATES)
def test_gate(name: str) -> None:
    right, wrong, layers, train = GATES[name]
    check_nngp(Case(right, wrong, vectors, layers, train=train))


def test_squeeze_excite() -> None:
    check_nngp(Case(lambda: squeeze_excite(True), lambda: squeeze_excite(False), images, 4, CHANNELS, 100))


def test_dropout_then_relu() -> None:
    def net(p: float) -> Net:
        return Net(lambda m, x: m.w(relu(m.drop(m.a(x)) - 0.5)), a=dense(8), w=dense(), drop=nn.Dropout(p))

    check_nngp(Case(lambda: net(0.5), lambda: net(0.0), vectors, train=True))


def test_dropped_channels() -> None:
    """One mask for all positions of a channel: their average keeps the noise that masks of their own would average."""

    def net(drop: nn.Module) -> Net:
        return Net(lambda m, x: m.b(m.drop(relu(m.a(x)))).mean((2, 3)), a=conv(3), b=conv(), drop=drop)

    for positions in ("auto", "full"):
        case = Case(lambda: net(nn.Dropout2d(0.5)), lambda: net(nn.Dropout(0.5)), images, 2, CHANNELS, train=True)
        check_nngp(case, positions=positions)


def test_dropped_channels_of_sequences() -> None:
    """Channels last: `Dropout1d` drops positions there, all channels at once."""

    def net(drop: nn.Module) -> Net:
        return Net(lambda m, x: m.b(m.drop(relu(m.a(x)))).mean(1), a=dense(6), b=dense(), drop=drop)

    check_nngp(Case(lambda: net(nn.Dropout1d(0.5)), lambda: net(nn.Dropout1d(0.1)), sequences, 2, train=True))
