"""Terms that share random numbers, and convolutions of every kind, against brute force."""

from __future__ import annotations

import pytest
import torch
from gram_montecarlo import CHANNELS, Case, Net, check_nngp, conv, dense, images, prepared, sequences, vectors
from torch import Tensor, nn
from torch.nn.functional import pixel_shuffle, relu

import kgraph
from kgraph.errors import RuleError


def doubled() -> Net:
    return Net(lambda m, x: relu(m.a(x)) + relu(m.a(x)), a=dense(8))


def two_layers_summed() -> Net:
    return Net(lambda m, x: relu(m.a(x)) + relu(m.b(x)), a=dense(8), b=dense(8))


def used_twice() -> Net:
    return Net(lambda m, x: m.w(m.a(x)) + m.w(relu(m.a(x))), a=dense(8), w=dense())


def used_once_each() -> Net:
    return Net(lambda m, x: m.w(m.a(x)) + m.v(relu(m.a(x))), a=dense(8), w=dense(), v=dense())


def tied() -> Net:
    """The states of one repeated layer are summed up: states of different depth are correlated."""

    def forward(m: Net, x: Tensor) -> Tensor:
        z = m.a(x)
        y = m.w(relu(z))
        return z + y + m.w(relu(y))

    return Net(forward, a=dense(8), w=dense())


def tied_states() -> Net:
    def forward(m: Net, x: Tensor) -> Tensor:
        one = m.w(relu(m.a(x)))
        two = m.w(relu(one))
        return one + two + m.w(relu(two))

    return Net(forward, a=dense(8), w=dense())


def untied_states() -> Net:
    def forward(m: Net, x: Tensor) -> Tensor:
        one = m.w(relu(m.a(x)))
        two = m.v(relu(one))
        return one + two + m.u(relu(two))

    return Net(forward, a=dense(8), w=dense(), v=dense(), u=dense())


def relu_after_concat() -> Net:
    return Net(
        lambda m, x: m.w(relu(torch.cat([m.a(x), relu(m.b(x)) - 0.7], 1))), a=dense(8, 256), b=dense(8, 256), w=dense()
    )


def concat_taken_for_gaussian() -> Net:
    return Net(
        lambda m, x: m.w(relu(m.g(torch.cat([m.a(x), relu(m.b(x)) - 0.7], 1)) / 1.5**0.5)),
        a=dense(8, 256),
        b=dense(8, 256),
        g=dense(bias=False),
        w=dense(),
    )


def relu_after_residual() -> Net:
    def forward(m: Net, x: Tensor) -> Tensor:
        h = relu(m.a(x))
        return relu(h + relu(m.w(h)) - 1.0)

    return Net(forward, a=dense(8), w=dense())


def residual_taken_for_gaussian() -> Net:
    def forward(m: Net, x: Tensor) -> Tensor:
        h = relu(m.a(x))
        return relu(m.g(h + relu(m.w(h))) / 1.5**0.5 - 1.0)

    return Net(forward, a=dense(8), w=dense(), g=dense(bias=False))


def relu_of_skip() -> Net:
    """relu(x + W relu(x)): the sum is no Gaussian's image under one function."""

    def forward(m: Net, x: Tensor) -> Tensor:
        z = m.a(x)
        h = 2 * relu(z)
        return m.v(relu(h - 1 + 0.2 * m.w(h)))

    return Net(forward, a=dense(8), w=dense(), v=dense())


def skip_taken_for_gaussian() -> Net:
    def forward(m: Net, x: Tensor) -> Tensor:
        h = 2 * relu(m.a(x))
        return m.v(relu(m.g(h) / 1.5**0.5 - 1 + 0.2 * m.w(h)))

    return Net(forward, a=dense(8), w=dense(), v=dense(), g=dense(bias=False))


DENSE = {
    "x + x": (doubled, two_layers_summed, 1),
    "one layer twice": (used_twice, used_once_each, 2),
    "tied with its input": (tied, used_once_each, 3),
    "tied across depth": (tied_states, untied_states, 4),
    "relu of concat": (relu_after_concat, concat_taken_for_gaussian, 2),
    "relu of residual": (relu_after_residual, residual_taken_for_gaussian, 2),
    "relu of skip": (relu_of_skip, skip_taken_for_gaussian, 3),
}


@pytest.mark.parametrize("name", DENSE)
def test_shared(name: str) -> None:
    right, wrong, layers = DENSE[name]
    check_nngp(Case(right, wrong, vectors, layers))


def image_net(*, transposed: bool = False, **options: object) -> Net:
    """Two convolutions, the second as told, and a global average (borders matter)."""
    kind = nn.ConvTranspose2d if transposed else nn.Conv2d
    second = kind(CHANNELS, 32 if transposed else CHANNELS, 3, **options)  # type: ignore[arg-type]
    return Net(lambda m, x: relu(m.b(relu(m.a(x)))).mean((2, 3)), a=conv(3), b=second)


def minus_average(same: bool) -> Net:
    def forward(m: Net, x: Tensor) -> Tensor:
        y, z = m.a(x), m.b(x)
        return relu(y - nn.functional.avg_pool2d(y if same else z, 3, 1, 1)).mean((2, 3))

    return Net(forward, a=conv(3), b=conv(3))


def shuffled(right: bool) -> Net:
    def forward(m: Net, x: Tensor) -> Tensor:
        y = m.a(x)
        y = pixel_shuffle(y, 2) if right else nn.functional.interpolate(y[:, : CHANNELS // 4], scale_factor=2)
        return m.b(y).mean((2, 3))

    return Net(forward, a=conv(3), b=conv(CHANNELS // 4))


CONVOLUTIONS = {
    "dilation": ({"padding": 2, "dilation": 2}, {"padding": 1}),
    "groups": ({"padding": 1, "groups": 2}, {"padding": 0, "groups": 2}),
    "padding": ({"padding": 2}, {"padding": 1}),
    "stride": ({"padding": 1, "stride": 2}, {"padding": 1}),
    "circular": ({"padding": 1, "padding_mode": "circular"}, {"padding": 1}),
    "reflect": ({"padding": 1, "padding_mode": "reflect"}, {"padding": 1}),
    "transposed": (
        {"transposed": True, "stride": 2, "padding": 1, "output_padding": 1},
        {"transposed": True, "stride": 1, "padding": 1},
    ),
}


@pytest.mark.parametrize("name", CONVOLUTIONS)
def test_convolution(name: str) -> None:
    right, wrong = CONVOLUTIONS[name]
    draws = 20 if right.get("transposed") else 60
    check_nngp(Case(lambda: image_net(**right), lambda: image_net(**wrong), images, 2, CHANNELS, draws))


def test_minus_its_own_average() -> None:
    check_nngp(Case(lambda: minus_average(True), lambda: minus_average(False), images, 1, CHANNELS, 100))


def test_pixel_shuffle() -> None:
    check_nngp(Case(lambda: shuffled(True), lambda: shuffled(False), lambda: images(2), 2, CHANNELS // 4, 200))


def test_a_sequence_read_backwards_and_forwards() -> None:
    def net(same: bool) -> Net:
        def forward(m: Net, x: Tensor) -> Tensor:
            y = m.a(x)
            return relu(y + (y if same else m.b(x)).flip(1)).mean(1)

        return Net(forward, a=dense(6), b=dense(6))

    check_nngp(Case(lambda: net(True), lambda: net(False), sequences, 1))


def test_shuffled_channels_are_others() -> None:
    """y + shuffled(y) adds independent channels; the sum would be four times y's kernel if they were the same."""

    def net(shuffled: bool) -> Net:
        def forward(m: Net, x: Tensor) -> Tensor:
            y = m.a(x)
            return relu(y + (torch.channel_shuffle(y, 2) if shuffled else y)).flatten(1)

        return Net(forward, a=conv(3))

    check_nngp(Case(lambda: net(True), lambda: net(False), lambda: images(2), 1, CHANNELS))


def test_what_cannot_be_followed_is_refused() -> None:
    """Channels transposed by hand, or shuffled across groups with laws of their own."""

    def by_hand(m: Net, x: Tensor) -> Tensor:
        y = m.a(x)
        return y + y.reshape(-1, 2, CHANNELS // 2, 4, 4).transpose(1, 2).reshape(-1, CHANNELS, 4, 4)

    def across(m: Net, x: Tensor) -> Tensor:
        return torch.channel_shuffle(torch.cat([m.a(x), relu(m.b(x))], 1), 2).chunk(2, 1)[0]

    for forward in (by_hand, across):
        model = prepared(Net(forward, a=conv(3), b=conv(3)), False)
        with pytest.raises(RuleError):
            kgraph.nngp(model, images())


def test_where() -> None:
    """A choice between two fields by one of them."""

    def net(right: bool) -> Net:
        def forward(m: Net, x: Tensor) -> Tensor:
            a, b = m.a(x), m.b(x)
            return torch.where((a if right else m.c(x)) > 0.5, a, b)

        return Net(forward, a=dense(8), b=dense(8), c=dense(8))

    check_nngp(Case(lambda: net(True), lambda: net(False), vectors, 1))


def skip_from_input() -> Net:
    return Net(lambda m, x: x + m.a(x), a=dense(64, 64))


def crossed_halves() -> Net:
    """Halves of the input's channels are known numbers too: adding them to each other adds their own products."""
    return Net(lambda m, x: torch.cat([x[:, :32] + m.a(x), x[:, 32:] + x[:, :32]], 1), a=dense(64, 32))


@pytest.mark.parametrize("biased", [False, True], ids=["", "bias"])
def test_sums_with_the_input_itself(biased: bool) -> None:
    """<x + W x, x' + W x'> / C = (1 + sw2) <x, x'> / C: the input is not independent of what is made of it."""
    x = vectors(64)
    model = skip_from_input().double()
    model.a.bias = nn.Parameter(torch.ones(64, dtype=torch.float64)) if biased else None
    sw2, sb2 = 64 * model.a.weight.square().mean(), float(biased)
    gram, means = x @ x.T / 64, x.mean(1)
    shifted = sb2 * (means[:, None] + means[None] + 1)  # E[b] = 1: the mean of x meets that of the bias
    torch.testing.assert_close(kgraph.nngp(model, x), (gram * (1 + sw2) + shifted).detach())
    model = crossed_halves().double()
    model.a.bias = None
    one, two = x[:, :32], x[:, 32:] + x[:, :32]
    expected = (one @ one.T + two @ two.T) / 64 + 64 * model.a.weight.square().mean() * gram / 2
    torch.testing.assert_close(kgraph.nngp(model, x), expected.detach())
