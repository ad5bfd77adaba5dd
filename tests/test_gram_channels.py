"""Channels in another order, in groups, and where an input has them: against closed forms and the same network written
in another way."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from gram_montecarlo import Net
from torch import Tensor, nn
from torch.nn import functional as F

import kgraph

GENERATOR = torch.Generator().manual_seed(0)
X = torch.randn(3, 8, generator=GENERATOR, dtype=torch.float64)
IMAGES = torch.randn(3, 8, 4, 4, generator=GENERATOR, dtype=torch.float64)


def layer(fan_in: int, fan_out: int = 32) -> nn.Linear:
    """sw2 = 1, no bias."""
    made = nn.Linear(fan_in, fan_out, bias=False, dtype=torch.float64)
    with torch.no_grad():
        made.weight.normal_(generator=GENERATOR)
        made.weight.mul_((1 / fan_in / made.weight.square().mean()).sqrt())
    return made


def net(forward: Callable[..., Tensor], **layers: nn.Module | nn.Parameter) -> Net:
    return Net(forward, **layers).double().eval()


def shuffled(u: Tensor) -> Tensor:
    return F.channel_shuffle(u[..., None], 4)[..., 0]


ORDERS: dict[str, Callable[[Tensor], Tensor]] = {
    "flip": lambda u: u.flip(1),
    "roll": lambda u: torch.roll(u, 3, 1),
    "shuffle": shuffled,
}


@pytest.mark.parametrize("order", ORDERS.values(), ids=ORDERS)
def test_channels_in_another_order_are_others(order: Callable[[Tensor], Tensor]) -> None:
    """K(u + order(u) / 2) = (1 + 1/4) K, not (3/2)^2 K; the same order twice is the same field."""
    k = X @ X.T / 8
    once = kgraph.kernels(net(lambda m, x: m.w((u := m.a(x)) + 0.5 * order(u)), a=layer(8, 32), w=layer(32)), X)
    twice = kgraph.kernels(net(lambda m, x: m.w(order(u := m.a(x)) + 0.5 * order(u)), a=layer(8), w=layer(32)), X)
    assert once.ntk is not None
    assert once.how == "exact"
    torch.testing.assert_close(once.nngp, 1.25 * k)
    torch.testing.assert_close(twice.nngp, 2.25 * k)
    torch.testing.assert_close(once.ntk, 1.25 * (32 * k + 8 * k))  # fan_in K of either layer, sw2 = 1


@pytest.mark.parametrize("order", ORDERS.values(), ids=ORDERS)
def test_known_channels_in_another_order(order: Callable[[Tensor], Tensor]) -> None:
    """An input's channels are numbers: K of x + order(x) is that of this very tensor."""
    found = kgraph.nngp(net(lambda m, x: m.w(F.relu(x) - order(x)), w=layer(8)), X)
    z = F.relu(X) - order(X)
    torch.testing.assert_close(found, z @ z.T / 8)


def test_groups_of_channels_in_another_order() -> None:
    """The last half of (u, relu(v)) turned round is u: what a cut behind a flip finds."""

    def forward(m: Net, x: Tensor) -> Tensor:
        return m.w(torch.cat([m.a(x), F.relu(m.b(x))], 1).flip(1).narrow(1, 32, 32))

    found = kgraph.nngp(net(forward, a=layer(8), b=layer(8), w=layer(32)), X)
    torch.testing.assert_close(found, X @ X.T / 8)


def test_an_order_taken_back_is_refused() -> None:
    with pytest.raises(kgraph.errors.RuleError, match="brings them back"):
        kgraph.nngp(net(lambda m, x: m.w((u := m.a(x)) + u.flip(1).flip(1)), a=layer(8), w=layer(32)), X)


READ: dict[str, tuple[Callable[[Net, Tensor], Tensor], Callable[[Tensor], Tensor]]] = {
    "tokens of an image": (lambda m, x: m.w(m.n(F.relu(x).flatten(2).transpose(1, 2)).mean(1)), lambda x: x),
    "channels last": (lambda m, x: m.w(m.n(F.relu(x)).mean((1, 2))), lambda x: x.permute(0, 2, 3, 1)),
    "a part of the positions": (
        lambda m, x: m.w(m.n(torch.cat(F.relu(x).flatten(2).transpose(1, 2).chunk(2, 1), 1)).mean(1)),
        lambda x: x,
    ),
    "at once": (lambda m, x: m.w(m.n(F.relu(x.permute(0, 2, 3, 1).reshape(-1, 2, 8, 8))).mean((1, 2))), lambda x: x),
}


@pytest.mark.parametrize(("forward", "given"), READ.values(), ids=READ)
def test_an_input_has_its_channels_where_the_first_layer_reads_them(
    forward: Callable[[Net, Tensor], Tensor], given: Callable[[Tensor], Tensor]
) -> None:
    """LayerNorm over the 8 channels at every position, then a mean over positions, on known numbers."""
    found = kgraph.nngp(net(forward, n=nn.LayerNorm(8, elementwise_affine=False), w=layer(8)), given(IMAGES))
    z = F.layer_norm(F.relu(IMAGES).flatten(2).transpose(1, 2), (8,)).mean(1)
    torch.testing.assert_close(found, z @ z.T / 8)
    wrong = F.layer_norm(F.relu(IMAGES), (4,)).mean((2, 3))
    assert not torch.allclose(found, wrong @ wrong.T / 8, rtol=0.01)


def test_a_half_of_an_inputs_channels() -> None:
    """Behind a cut of the channels of tokens; a layer reads them, so they are the channels."""
    model = net(lambda m, x: m.w(x.flatten(2).transpose(1, 2).chunk(2, 2)[1]).mean(1), w=layer(4))
    z = IMAGES[:, 4:].mean((2, 3))
    torch.testing.assert_close(kgraph.nngp(model, IMAGES), z @ z.T / 4)


def test_a_layer_over_positions_in_front_of_a_convolution() -> None:
    """The convolution tells the channels: y = W (P x), and the kernel is that of the positions' sums P x."""
    x = IMAGES.flatten(2)
    mix, conv = layer(16, 16), nn.Conv1d(8, 32, 1, bias=False)
    found = kgraph.kernels(net(lambda m, x: m.c(m.p(x))[..., 0], p=mix, c=conv), x, with_ntk=False)
    with torch.no_grad():
        z, gain = mix(x)[..., 0], 8 * conv.weight.square().mean()
    torch.testing.assert_close(found.nngp, gain * z @ z.T / 8)
    assert found.how == "assumed"


def test_pooled_inputs_are_read_channel_by_channel() -> None:
    z = IMAGES.sigmoid().amax((2, 3))
    found = kgraph.nngp(net(lambda m, x: m.w(x.sigmoid().amax((2, 3))), w=layer(8)), IMAGES)
    torch.testing.assert_close(found, z @ z.T / 8, rtol=1e-3, atol=0)  # maxima of every channel in turn


def test_one_trained_number_for_positions_read_as_channels() -> None:
    """y = s W u: all other weights frozen, the NTK is that of s alone, K / s^2."""

    def forward(m: Net, x: Tensor) -> Tensor:
        return m.w(F.relu(m.a(x)).flatten(1) * m.s)

    model = net(forward, a=nn.Conv2d(8, 16, 1), w=layer(256), s=nn.Parameter(torch.tensor(0.5))).requires_grad_(False)
    model.get_parameter("s").requires_grad_(True)
    found = kgraph.kernels(model, IMAGES)
    assert found.ntk is not None
    torch.testing.assert_close(found.ntk, found.nngp / 0.25)
    model.get_parameter("s").data.fill_(1.0)
    torch.testing.assert_close(found.nngp, 0.25 * kgraph.nngp(model, IMAGES))


def test_a_token_beside_groups_of_channels() -> None:
    """A class token in front of channels of two laws: the laws joined first, or the token."""

    def forward(m: Net, x: Tensor) -> Tensor:
        x = x.flatten(2).transpose(1, 2)
        parts = [m.a(x), F.relu(m.a(x))]
        if m.token.shape[-1] == 64:
            return m.w(torch.cat([m.token.expand(len(x), -1, -1), torch.cat(parts, 2)], 1).mean(1))
        return m.w(torch.cat([torch.cat([m.token.expand(len(x), -1, -1), p], 1) for p in parts], 2).mean(1))

    a, w, token = layer(8, 32), layer(64), torch.randn(1, 1, 32, generator=GENERATOR, dtype=torch.float64)
    two = [nn.Parameter(t) for t in (token, torch.cat([token, token], 2))]
    one, other = (kgraph.nngp(net(forward, a=a, w=w, token=t), IMAGES) for t in two)
    torch.testing.assert_close(other, one)


def test_a_group_norm_over_few_channels_of_unlike_laws() -> None:
    """Behind a depthwise layer of an input every channel has its own law: all groups have q = 1, as an assumption."""
    model = net(
        lambda m, x: m.w(m.n(m.a(x)).flatten(1)), a=nn.Conv2d(8, 8, 1, groups=8), n=nn.GroupNorm(2, 8), w=layer(128)
    )
    found = kgraph.kernels(model, IMAGES)
    assert found.how == "assumed"
    torch.testing.assert_close(found.nngp.diagonal(), torch.ones(3).double(), rtol=1e-3, atol=0)


def test_a_function_that_is_zero() -> None:
    """Values too small for the shrinkage are 0, and so is GELU of them."""
    model = net(lambda m, x: m.w(F.gelu(F.hardshrink(0.4 * torch.tanh(m.a(x))))), a=layer(8), w=layer(32))
    assert not kgraph.nngp(model, X).any()


GROUPED: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "lerp": lambda u, v: torch.lerp(u, v, 0.3),
    "maximum": torch.maximum,
    "hypot": lambda u, v: torch.hypot(u, v),
}


@pytest.mark.parametrize("name", GROUPED)
def test_entry_by_entry_through_groups_of_channels(name: str) -> None:
    """Of (a, relu(b)) and (c, d): the average of the two halves by themselves."""

    def forward(m: Net, x: Tensor) -> Tensor:
        a, b, c, d = (getattr(m, n)(x) for n in "abcd")
        halves = [(a, c), (F.relu(b), d)]
        if m.w.in_features == 64:
            return m.w(GROUPED[name](*(torch.cat(side, 1) for side in zip(*halves, strict=True))))
        return m.w(GROUPED[name](*halves[m.which]))

    layers = {n: layer(8) for n in "abcd"}
    both = kgraph.nngp(net(forward, **layers, w=layer(64)), X)
    parts = []
    for which in (0, 1):
        model = net(forward, **layers, w=layer(32))
        model.which = which  # type: ignore[assignment]
        parts.append(kgraph.nngp(model, X))
    scale = float(both.diagonal().max())
    torch.testing.assert_close(both, (parts[0] + parts[1]) / 2, rtol=0, atol=0.02 * scale)
    assert not torch.allclose(parts[0], parts[1], rtol=0, atol=0.05 * scale)


def test_heads_cut_through_groups_of_channels_are_refused_with_advice() -> None:
    """Two laws side by side, cut into heads that each hold one of them."""

    def forward(m: Net, x: Tensor) -> Tensor:
        return m.w(torch.cat([m.a(x), F.relu(m.b(x))], 1).unflatten(1, (2, 32)).flatten(1))

    with pytest.raises(kgraph.errors.RuleError, match=r"reshape through groups of channels.*kgraph\.empirical_ntk"):
        kgraph.nngp(net(forward, a=layer(8), b=layer(8), w=layer(64)), X)


@pytest.mark.parametrize("padding", [0, 1])
def test_known_channels_that_are_copied_along_positions(padding: int) -> None:
    """Coordinates: one is the same in every row, the other in every column; as an input's channels they are whole."""

    class Coordinates(nn.Module):
        def __init__(self, whole: bool) -> None:
            super().__init__()
            self.layer, self.whole = nn.Conv2d(5, 8, 3, padding=padding, bias=False), whole

        def forward(self, x: Tensor) -> Tensor:
            count, _, height, width = x.shape
            if self.whole:
                return torch.relu(self.layer(x))
            rows = torch.linspace(-1, 1, height, dtype=x.dtype).view(1, 1, height, 1).expand(count, 1, height, width)
            columns = torch.linspace(0, 2, width, dtype=x.dtype).view(1, 1, 1, width).expand(count, 1, height, width)
            ones = torch.ones(1, 1, 1, 1, dtype=x.dtype).expand(count, 2, height, width)
            return torch.relu(self.layer(torch.cat([x, rows, columns, ones], 1)))

    x = torch.randn(2, 1, 5, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    rows = torch.linspace(-1, 1, 5, dtype=torch.float64).view(5, 1).expand(2, 1, 5, 3)
    columns = torch.linspace(0, 2, 3, dtype=torch.float64).expand(2, 1, 5, 3)
    joined = torch.cat([x, rows, columns, torch.ones(2, 2, 5, 3, dtype=torch.float64)], 1)
    variances = {"layer.weight": 0.1}

    found = kgraph.kernels(Coordinates(whole=False), x, variances=variances, positions="full")
    asked = kgraph.kernels(Coordinates(whole=True), joined, variances=variances, positions="full")

    torch.testing.assert_close(found.nngp, asked.nngp, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(found.ntk, asked.ntk, rtol=1e-12, atol=1e-12)
