"""Attacks on kernels of real inputs: means that differ, inputs met again, weights read both ways, tiny distances."""

from __future__ import annotations

import math
from collections.abc import Callable

import numpy as np
import pytest
import torch
from gram_montecarlo import Net
from torch import Tensor, nn
from torch.nn.functional import conv2d, linear, pad, relu, rms_norm

import kgraph
from kgraph.errors import RuleError

SIZE = 64
"""Enough for a mean of biases to be told from noise."""
CHANNELS = 16


def inputs(*shape: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(0), dtype=torch.float64)


def layer(level: float | None = None, fan_in: int = SIZE, out: int = SIZE) -> nn.Linear:
    """A layer whose biases are all ``level``, or that has none."""
    made = nn.Linear(fan_in, out, bias=level is not None)
    if level is not None:
        nn.init.constant_(made.bias, level)
    return made


def net(forward: Callable[[Net, Tensor], Tensor], **layers: nn.Module | nn.Parameter) -> Net:
    torch.manual_seed(0)
    for each in layers.values():
        if isinstance(each, nn.Linear):
            nn.init.normal_(each.double().weight, 0.0, SIZE**-0.5)
    return Net(forward, **layers).double().eval()


def sw2(layer: nn.Module) -> float:
    return SIZE * float(layer.weight.detach().square().mean())  # type: ignore[operator, union-attr]


# Fields whose mean differs from place to place, or from input to input


def test_padding_behind_a_bias() -> None:
    """Positions added by padding are 0, those of the layer are around 1: no single mean describes both."""
    x = inputs(2, 4, SIZE)
    layers = {"a": layer(1.0), "c": layer()}
    padded = net(lambda m, x: m.c(relu(pad(m.a(x), (0, 0, 1, 1)))).mean(1), **layers)
    plain = net(lambda m, x: m.c(relu(m.a(x))).mean(1), **layers)
    found, bare = kgraph.nngp(padded, x), kgraph.nngp(plain, x)
    torch.testing.assert_close(found, bare * (4 / 6) ** 2, rtol=1e-12, atol=0)
    assert float((found / bare - 1).abs().min()) > 0.5  # negative control


def test_positions_of_two_layers_of_unlike_biases() -> None:
    x = inputs(2, 4, SIZE)
    layers = {"a": layer(1.5), "b": layer(-0.5), "c": layer()}
    beside = net(lambda m, x: m.c(relu(torch.cat([m.a(x), m.b(x)], 1)).mean(1)), **layers)
    apart = net(lambda m, x: m.c(0.5 * relu(m.a(x)).mean(1) + 0.5 * relu(m.b(x)).mean(1)), **layers)
    alike = net(lambda m, x: m.c(relu(torch.cat([m.a(x), m.a(x)], 1)).mean(1)), **layers)
    for kernel in (kgraph.nngp, kgraph.ntk):
        found = kernel(beside, x)
        torch.testing.assert_close(found, kernel(apart, x), rtol=1e-12, atol=1e-14)
        assert float((kernel(alike, x) / found - 1).abs().min()) > 0.1  # negative control


def test_rms_norm_behind_a_bias() -> None:
    """The norm scales the mean along: it differs from input to input. By Gauss-Hermite, within four errors of draws."""
    x = inputs(3, SIZE) * torch.tensor([[1.0], [0.3], [3.0]])
    model = net(lambda m, x: torch.tanh(rms_norm(m.a(x), (SIZE,), eps=0.0)), a=layer(1.0))
    q = sw2(model.a) * x.square().mean(1)
    nodes, weights = (torch.from_numpy(t) for t in np.polynomial.hermite_e.hermegauss(80))
    z = (1 + q.sqrt()[:, None] * nodes) / (1 + q).sqrt()[:, None]
    expected = (torch.tanh(z).square() * weights).sum(1) / math.sqrt(2 * math.pi)
    result = kgraph.kernels(model, x)
    allowed = 4 * 0.5 / 8192**0.5  # tanh^2 is within [0, 1]: its deviation is at most 1 / 2
    assert result.how == "sampled"
    assert float((result.nngp.diagonal() - expected).abs().max()) < allowed
    wrong = expected[[0, 0, 0]]  # negative control: one input's mean taken for all
    assert float((wrong - expected).abs().max()) > allowed


# Inputs that are met again


@pytest.mark.parametrize("left", [False, True], ids=["x Wx", "Wx x"])
def test_products_with_the_input_itself(left: bool) -> None:
    """E[(x z + x)(x' z' + x')] over z = W x + 1 is <x, x'> / C times sw2 <x, x'> / C + 4."""
    x = inputs(3, SIZE)
    model = net(lambda m, x: (x * m.a(x) if left else m.a(x) * x) + x, a=layer(1.0))
    gram = x @ x.T / SIZE
    result = kgraph.kernels(model, x)
    assert result.how == "exact"
    torch.testing.assert_close(result.nngp, gram * (sw2(model.a) * gram + 4))


def test_draws_take_every_channel_of_the_input_as_often() -> None:
    """1000 channels do not go into 8192 draws: the first ones must not count more (by 9 to 8)."""
    x = inputs(2, 1000)
    x[:, 192:] = 0
    model = Net(lambda m, x: torch.maximum(x, m.a(x)), a=nn.Linear(1000, 1000, bias=False)).double()
    nn.init.normal_(model.a.weight, 0.0, 1e-9)
    result = kgraph.kernels(model, x, with_ntk=False)
    expected = relu(x) @ relu(x).T / 1000
    assert result.how == "sampled"
    torch.testing.assert_close(result.nngp, expected, rtol=1e-6, atol=1e-9)


def test_mixed_inputs_of_two_batches_are_refused() -> None:
    """Running sums would go on from x1 to x2."""
    model, x = net(lambda m, x: m.a(x.cumsum(0)), a=layer()), inputs(3, SIZE)
    running = x.cumsum(0)
    torch.testing.assert_close(kgraph.nngp(model, x), sw2(model.a) * running @ running.T / SIZE)
    with pytest.raises(RuleError, match="two batches"):
        kgraph.nngp(model, x, x)


# Weights that are read several ways


BOTH_WAYS: dict[str, Callable[[Net, Tensor], Tensor]] = {
    "matmul": lambda m, x: relu(m.a(x)) @ m.a.weight,
    "transposed twice": lambda m, x: relu(m.a(x)) @ m.a.weight.mT.mT,
    "linear": lambda m, x: linear(relu(m.a(x)), m.a.weight.t()),
}


@pytest.mark.parametrize("name", BOTH_WAYS)
def test_a_weight_and_its_transpose_are_refused(name: str) -> None:
    """An autoencoder of tied weights: they are not independent, which was off by 40 %."""
    with pytest.raises(RuleError, match="used as it is and transposed"):
        kgraph.nngp(net(BOTH_WAYS[name], a=layer()), inputs(2, SIZE))


@pytest.mark.parametrize("mT", [False, True])
def test_a_transpose_is_the_weight_it_comes_from(mT: bool) -> None:
    def by_hand(m: Net, x: Tensor) -> Tensor:
        one, two = (m.a.weight.mT, m.a.weight.mT) if mT else (m.a.weight.t(), m.a.weight.transpose(0, 1))
        h = x @ one
        return h + relu(h) @ two

    def tied(m: Net, x: Tensor) -> Tensor:
        h = m.a(x)
        return h + m.a(relu(h))

    x, layers = inputs(2, SIZE), {"a": layer(), "b": layer()}
    found = kgraph.ntk(net(by_hand, **layers), x)
    torch.testing.assert_close(found, kgraph.ntk(net(tied, **layers), x))
    untied = kgraph.ntk(net(lambda m, x: m.a(x) + m.b(relu(m.a(x))), **layers), x)
    assert float((untied / found - 1).abs().max()) > 0.01  # negative control


def test_a_convolution_of_two_strides_is_refused() -> None:
    def forward(m: Net, x: Tensor) -> Tensor:
        return m.a(x).mean((2, 3)) + conv2d(x, m.a.weight, None, 2, 1).mean((2, 3))

    model = Net(forward, a=nn.Conv2d(3, SIZE, 3, 1, 1, bias=False)).double()
    with pytest.raises(RuleError, match="several strides"):
        kgraph.nngp(model, inputs(2, 3, 4, 4))


def test_draws_behind_a_layer_are_called_draws() -> None:
    x, layers = inputs(2, 3, SIZE), {"a": layer(), "b": layer(), "c": layer()}
    drawn = net(lambda m, x: m.c(torch.maximum(m.a(x), m.b(x))).mean(1), **layers)
    assert kgraph.kernels(drawn, x).how == "sampled"
    assert kgraph.kernels(net(lambda m, x: m.c(relu(m.a(x))).mean(1), **layers), x).how == "exact"


# Distances of all sizes


def normed(m: Net, x: Tensor) -> Tensor:
    h = m.norm(m.a(x)) + x
    return m.c(relu(m.b(h)) + m.a(relu(m.b(h))))


NEAR: dict[str, Callable[[Net, Tensor], Tensor]] = {
    "norm, shared weights": normed,
    "products with x": lambda m, x: m.c(x + x * m.a(x)) * torch.sigmoid(m.b(x)),
    "x beside W x": lambda m, x: m.wide(relu(torch.cat([x, m.a(x)], 1))),
    "rms": lambda m, x: m.c(rms_norm(relu(m.a(x)), (SIZE,))),
}


@pytest.mark.parametrize("name", NEAR)
def test_one_minus_c_is_quadratic_in_the_distance(name: str) -> None:
    """To O(d) by kinks, and to eps / d by the q values; a difference of kernels is off by eps / d^2."""
    layers = {"a": layer(), "b": layer(), "c": layer(), "wide": layer(None, 2 * SIZE)}
    model = net(NEAR[name], **layers, norm=nn.LayerNorm(SIZE))
    x, step = inputs(2, SIZE)
    ratios, slopes = {}, {}
    for distance in (1e-2, 1e-6, 1e-8):
        result = kgraph.kernels(model, torch.stack([x, x + distance * step]))
        assert result.one_minus_c is not None and result.ntk is not None
        ratios[distance] = float(result.one_minus_c[0, 1]) / distance**2
        slopes[distance] = float(result.ntk[0, 0] - result.ntk[0, 1]) / distance / float(result.ntk[0, 0])
        q = result.nngp.diagonal()
        if distance == 1e-2:
            naive = 1 - result.nngp[0, 1] / (q[0] * q[1]).sqrt()
            assert float(naive) / distance**2 == pytest.approx(ratios[distance], rel=1e-9)
    assert ratios[1e-2] == pytest.approx(ratios[1e-6], rel=0.1)
    assert ratios[1e-6] == pytest.approx(ratios[1e-8], rel=2e-5)
    assert slopes[1e-6] == pytest.approx(slopes[1e-8], rel=1e-3, abs=1e-5)
    naive = float(1 - result.nngp[0, 1] / (q[0] * q[1]).sqrt()) / 1e-8**2  # negative control
    assert naive != pytest.approx(ratios[1e-8], rel=0.1)


# Position models that average


def shifts(size: int = 4) -> Tensor:
    """Two images whose channels are all circular shifts of one."""
    images = inputs(2, size, size)
    return torch.stack([images.roll((a, b), (1, 2)) for a in range(size) for b in range(size)], 1)


def conv(*, mode: str = "circular", size: int = 3, **options: int) -> nn.Conv2d:
    options = {"padding": options.get("dilation", 1) * (size - 1) // 2, **options}
    return nn.Conv2d(CHANNELS, CHANNELS, size, padding_mode=mode, **options)  # type: ignore[arg-type]


def behind(forward: Callable[[Net, Tensor], Tensor], **layers: nn.Module) -> Net:
    torch.manual_seed(0)
    return Net(lambda m, x: m.head(forward(m, x)), head=nn.Linear(CHANNELS, 2), **layers).double().eval()


def one_after(second: nn.Module) -> Net:
    return behind(lambda m, x: relu(m.b(relu(m.a(x)))).mean((2, 3)), a=conv(), b=second)


def linear_after(second: nn.Module) -> Net:
    return behind(lambda m, x: m.b(relu(m.a(x))).mean((2, 3)), a=conv(), b=second)


STATIONARY: dict[str, Callable[[], Net]] = {
    "stride": lambda: one_after(conv(stride=2)),
    "dilation": lambda: one_after(conv(dilation=2)),
    "groups": lambda: one_after(conv(groups=4)),
    "depthwise": lambda: one_after(conv(groups=CHANNELS)),
    "even": lambda: one_after(conv(size=2, stride=2, padding=0)),
    "no padding": lambda: one_after(conv(padding=0)),
    "zeros, then an average": lambda: linear_after(conv(mode="zeros")),
    "transposed": lambda: linear_after(nn.ConvTranspose2d(CHANNELS, CHANNELS, 3, 2, 1, 1, groups=2)),
    "shared": lambda: behind(lambda m, x: (m.a(x) + m.a(relu(m.a(x)))).mean((2, 3)), a=conv()),
    "input met again": lambda: behind(lambda m, x: (x * m.a(x) + x).mean((2, 3)), a=conv()),
}


@pytest.mark.parametrize("parametrization", ["standard", "ntk"])
@pytest.mark.parametrize("name", STATIONARY)
def test_stationary_is_exact(name: str, parametrization: str) -> None:
    model, x = STATIONARY[name](), shifts()
    full, found = (
        kgraph.kernels(model, x[:1], x, positions=positions, parametrization=parametrization)
        for positions in ("full", "stationary")
    )
    torch.testing.assert_close(found.nngp, full.nngp, rtol=1e-10, atol=1e-12)
    torch.testing.assert_close(found.ntk, full.ntk, rtol=1e-10, atol=1e-12)


def test_stationary_is_not_exact_at_borders() -> None:
    """Negative control: mirrored borders are not stationary."""
    model, x = linear_after(conv(mode="reflect")), shifts()
    full, found = (kgraph.nngp(model, x, positions=positions) for positions in ("full", "stationary"))
    assert float((found / full - 1).abs().max()) > 1e-3


def test_weights_that_are_functions_of_one_another_are_refused() -> None:
    """2 W beside W is not independent of it; parts of one parameter are independent of each other."""

    def both(m: Net, x: Tensor) -> Tensor:
        return m.a(x) + nn.functional.linear(x, 2 * m.a.weight)

    def parts(m: Net, x: Tensor) -> Tensor:
        return nn.functional.linear(x, m.a.weight[:8]) + nn.functional.linear(x, m.a.weight[8:])

    x = torch.randn(2, 8, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    with pytest.raises(RuleError, match=r"'a.weight' is behind two weights"):
        kgraph.nngp(Net(both, a=nn.Linear(8, 16)).double(), x)
    model = Net(parts, a=nn.Linear(8, 16, bias=False)).double()
    sw2 = sum(8 * float(half.detach().square().mean()) for half in model.a.weight.chunk(2))
    torch.testing.assert_close(kgraph.nngp(model, x), sw2 * x @ x.T / 8)
