"""Attacks on kernels of real inputs: parameters behind functions, stopped gradients, groups of unlike channels, and
operations that were taken for the identity or for their neighbours. Mostly against formulas, to rounding."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from gaussian_weights import with_gaussian_weights
from gram_montecarlo import Net
from torch import Tensor, nn
from torch.nn.functional import avg_pool2d, interpolate, linear, relu, rms_norm, scaled_dot_product_attention

import kgraph
from kgraph.errors import RuleError

SIZE = 64
DRAWS = 8192


def inputs(*shape: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(0), dtype=torch.float64)


def assert_exact(found: Tensor | None, expected: Tensor) -> None:
    torch.testing.assert_close(found, expected, rtol=1e-10, atol=1e-12)


def parameter(*shape: int) -> nn.Parameter:
    """Entries in [0.5, 1.5)."""
    return nn.Parameter(torch.rand(*shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64) + 0.5)


def net(forward: Callable[[Net, Tensor], Tensor], **layers: nn.Module | nn.Parameter) -> Net:
    torch.manual_seed(0)
    return Net(forward, **layers).double().eval()


def dense(fan_in: int = SIZE, out: int = SIZE) -> nn.Linear:
    return nn.Linear(fan_in, out, bias=False)


def sw2(layer: nn.Module) -> float:
    weight = layer.weight.detach().double()  # type: ignore[operator, union-attr]
    return weight.numel() / len(weight) * float(weight.square().mean())


def part_of(name: str, model: nn.Module, x: Tensor) -> Tensor:
    """What one parameter has in the NTK."""
    return kgraph.ntk(model, x, multipliers={n: 0.0 for n, _ in model.named_parameters() if n != name})


GAINS: dict[str, tuple[Callable[[Net, Tensor], Tensor], Callable[[Tensor], Tensor]]] = {
    "plain": (lambda m, h: h * m.g, torch.ones_like),
    "view": (lambda m, h: h * m.g[None, :], torch.ones_like),
    "shifted": (lambda m, h: h * (1 + m.g), torch.ones_like),
    "exp": (lambda m, h: h * m.g.exp(), torch.exp),
    "divided": (lambda m, h: h / m.g, lambda g: g**-2),
    "expanded": (lambda m, h: h * m.g.expand(len(h), -1), torch.ones_like),
    "repeated": (lambda m, h: h * m.g.repeat(len(h), 1), torch.ones_like),
}


@pytest.mark.parametrize("name", GAINS)
def test_a_gain_that_is_computed_is_trained(name: str) -> None:
    """f = W (d(g) relu(A x)): its part is sw2 E[d'(g)^2] K_relu. It was 0 for all but the plain one."""
    gain, slope = GAINS[name]
    model = net(lambda m, x: m.b(gain(m, relu(m.a(x)))), a=dense(8), b=dense(), g=parameter(SIZE))
    x = inputs(3, 8)
    below = kgraph.nngp(net(lambda m, x: relu(m.a(x)), a=dense(8)), x)
    expected = sw2(model.b) * float(slope(model.g.detach()).square().mean()) * below
    assert_exact(part_of("g", model, x), expected)


@pytest.mark.parametrize("name", ["matrix", "bias", "transposed"])
def test_a_weight_that_is_scaled_moves_slower(name: str) -> None:
    """``W / sqrt(n)``, as papers write it: <x, x'> / n and not <x, x'>; of a bias 3 b it is 9."""
    makes: dict[str, Callable[[Net, Tensor], Tensor]] = {
        "matrix": lambda m, x: linear(x, m.w / math.sqrt(8)),
        "bias": lambda m, x: linear(x, m.v, 3 * m.w),
        "transposed": lambda m, x: x @ (m.w / math.sqrt(8)).t(),
    }
    w = parameter(SIZE) if name == "bias" else parameter(SIZE, 8)
    model, x = net(makes[name], w=w, v=parameter(SIZE, 8)), inputs(3, 8)
    expected = torch.full((3, 3), 9.0).double() if name == "bias" else x @ x.T / 8
    assert_exact(part_of("w", model, x), expected)
    assert kgraph.empirical_ntk(model, x, multipliers={"v": 0.0}).matrix.allclose(expected)


def test_normalized_weights() -> None:
    """w = 2 v / |v| * |v_0|: J J^T = 4 (1 - u u^T) + u u^T for u = v / |v|, on average 4 - 3 / 8 at a fan-in of 8.

    Measured on 4 x 512 rows of random signs: 3 (u s)^2 / 32 has a standard deviation below 3 sqrt(2) / 32 a row.
    """
    layer = nn.utils.parametrizations.weight_norm(dense(8, 512)).double()
    with torch.no_grad():
        layer.parametrizations.weight.original0.mul_(2)  # type: ignore[union-attr]
    x = inputs(2, 8)
    ratio = kgraph.ntk(layer, x) / (x @ x.T)
    allowed = 4 * 3.625 * 3 * math.sqrt(2) / 32 / math.sqrt(4 * 512)
    torch.testing.assert_close(ratio, torch.full((2, 2), 3.625).double(), rtol=0, atol=allowed)


def test_a_parameter_through_an_activation() -> None:
    """A class token c: its part is sw2 E[relu'(c)^2] / L^2, the mean over draws t of 1(c > 0) t^2.

    That has a variance of 3 p - p^2, p the share of c > 0 (1 / 2 or so): below 3 / 2.
    """
    token = nn.Parameter(inputs(1, 1, SIZE))

    def forward(m: Net, x: Tensor) -> Tensor:
        return m.b(relu(torch.cat([m.c.expand(len(x), -1, -1), m.a(x)], 1))).mean(1)

    model = net(forward, a=dense(8), b=dense(), c=token)
    share = float((token > 0).double().mean())
    found = part_of("c", model, inputs(2, 4, 8)) * 25 / sw2(model.b)
    torch.testing.assert_close(found, torch.full((2, 2), share).double(), rtol=0, atol=4 * math.sqrt(1.5 / DRAWS))


def test_a_parameter_that_is_read_twice_moves_once() -> None:
    """relu(g z) g = g^2 relu(z): its slope is 2 g relu(z), squared 4; two parameters would have 2.

    In draws t of (2 g relu(z) t)^2 the fourth moment over the squared second one is below 6 * 3 * 2.
    """
    model = net(lambda m, x: m.b(relu(m.a(x) * m.g) * m.g), a=dense(8), b=dense(), g=parameter(SIZE))
    x = inputs(2, 8)
    below = kgraph.nngp(net(lambda m, x: relu(m.a(x)), a=dense(8)), x)
    expected = sw2(model.b) * 4 * float(model.g.detach().square().mean()) * below  # type: ignore[union-attr, operator]
    found = part_of("g", model, x)
    assert float((found / expected - 1).diagonal().abs().max()) < 4 * math.sqrt(36 / DRAWS)


REFUSED: dict[str, Callable[[Net, Tensor], Tensor]] = {
    "two functions": lambda m, x: m.b(m.a(x) * m.g + relu(m.a(x)) * m.g.exp()),
    "detached": lambda m, x: m.b(relu(m.a(x)).detach()),
    "detached parameter": lambda m, x: m.b(relu(m.a(x)) * m.g.detach()),
    "shared by positions": lambda m, x: m.b(m.a(x)[:, None] * m.g.view(2, SIZE)[torch.tensor([0, 1, 0])]).mean(1),
}


@pytest.mark.parametrize("name", REFUSED)
def test_parameters_whose_part_is_not_known(name: str) -> None:
    count = 2 * SIZE if name == "shared by positions" else SIZE
    model, x = net(REFUSED[name], a=dense(8), b=dense(), g=parameter(count)), inputs(2, 8)
    assert bool(kgraph.nngp(model, x).isfinite().all())
    with pytest.raises(RuleError, match=r"part of 'g' in the NTK|stops gradients on the way"):
        kgraph.ntk(model, x)


def test_no_grad_and_harmless_stops() -> None:
    def frozen(m: Net, x: Tensor) -> Tensor:
        with torch.no_grad():
            h = m.a(x)
        return m.b(relu(h))

    x = inputs(2, 8)
    with pytest.raises(RuleError, match="stops gradients"):
        kgraph.ntk(net(frozen, a=dense(8), b=dense()), x)

    def gate(h: Tensor) -> Tensor:
        return h * (h > 0).detach()

    masked = net(lambda m, x: m.b(gate(m.a(x))), a=dense(8), b=dense())
    plain = net(lambda m, x: m.b(relu(m.a(x))), a=dense(8), b=dense())
    torch.testing.assert_close(kgraph.ntk(masked, x), kgraph.ntk(plain, x), rtol=1e-9, atol=0)  # quadrature's own


def test_a_trained_mask_has_no_ntk() -> None:
    def forward(m: Net, x: Tensor) -> Tensor:
        q, k, v = (layer(x)[:, None] for layer in (m.q, m.k, m.v))
        return scaled_dot_product_attention(q, k, v, attn_mask=m.mask)[:, 0].mean(1)

    model = net(forward, q=dense(8), k=dense(8), v=dense(8), mask=parameter(4, 4))
    with pytest.raises(RuleError, match="the part of mask in the NTK"):
        kgraph.ntk(model, inputs(2, 4, 8))


def test_multipliers_and_variances_of_what_is_behind() -> None:
    model = net(lambda m, x: m.b(relu(linear(x, 0.2 * m.w)) * m.g), w=parameter(SIZE, 8), b=dense(), g=parameter(SIZE))
    x = inputs(2, 8)
    none = {name: 0.0 for name, _ in model.named_parameters()}
    assert not bool(kgraph.ntk(model, x, multipliers=none).any())
    for name in "wg":
        with pytest.raises(RuleError, match=f"variance declared of '{name}' has no rule"):
            kgraph.nngp(model, x, variances={name: 1.0})


def test_buffers_are_not_trained() -> None:
    """A matrix that is stored beside the parameters counts as drawn, which is assumed, and has no part in the NTK."""
    model, x = net(lambda m, x: m.b(relu(linear(m.a(x), m.k))), a=dense(8), b=dense()), inputs(2, 8)
    model.register_buffer("k", torch.eye(SIZE, dtype=torch.float64))
    result = kgraph.kernels(model, x)
    assert result.how == "assumed"
    torch.testing.assert_close(result.ntk, part_of("a.weight", model, x) + part_of("b.weight", model, x))


# Linear operations, seen through a layer of one tap: sw2 <y, y'> / C of what they give


SEEN: dict[str, Callable[[Tensor], Tensor]] = {
    "average over the edge, own divisor": lambda x: avg_pool2d(x, 2, 2, ceil_mode=True, divisor_override=3),
    "average of padding, own divisor": lambda x: avg_pool2d(x, 2, 1, 1, divisor_override=3),
    "nearest of a factor": lambda x: interpolate(x, scale_factor=1.3),
    "nearest of a size": lambda x: interpolate(x, size=7),
    "integers": lambda x: (3 * x).long().double(),
    "truth": lambda x: (3 * x).relu().bool().double(),
}


@pytest.mark.parametrize("name", SEEN)
def test_operations_on_the_input(name: str) -> None:
    change, x = SEEN[name], inputs(2, 3, 5, 5)
    model = net(lambda m, x: m.a(change(x)), a=nn.Conv2d(3, 8, 1, bias=False))
    y = change(x)
    expected = sw2(model.a) * torch.einsum("acij,bcij->abij", y, y) / 3
    assert_exact(kgraph.nngp(model, x), expected)


def test_norms_of_nothing() -> None:
    """0 / sqrt(0 + eps) is 0."""
    x = inputs(2, SIZE)
    x[1] = 0
    found = kgraph.nngp(net(lambda m, x: m.a(rms_norm(x, (SIZE,))), a=dense()), x)
    assert bool(found.isfinite().all()) and float(found[1].abs().max()) == 0


@pytest.mark.filterwarnings("ignore:LSTM with projections")
def test_projected_states_are_refused() -> None:
    lstm = nn.LSTM(8, 16, proj_size=4, batch_first=True)
    with pytest.raises(RuleError):
        kgraph.nngp(net(lambda m, x: m.lstm(x)[0][:, -1], lstm=lstm), inputs(2, 3, 8))


def test_padding_tokens_are_zeros() -> None:
    model = net(lambda m, x: m.e(x), e=nn.Embedding(20, SIZE, padding_idx=0))
    result = kgraph.kernels(model, torch.tensor([[0, 1], [0, 2]]))
    rows = model.e.weight.detach()[1:]  # type: ignore[union-attr, index]
    q = float(rows.square().mean())
    alike = torch.tensor([[[0, 1], [0, 0]], [[0, 0], [0, 1]]]).double()  # [x, x', position]
    expected = q * alike
    assert_exact(result.nngp, expected)
    assert_exact(result.ntk, alike)


def test_computed_tokens_and_rescaled_tables() -> None:
    tokens = torch.tensor([[0, 1, 2], [2, 1, 0], [3, 4, 4]])
    made = {"e": nn.Embedding(6, SIZE), "b": dense()}
    found = kgraph.kernels(net(lambda m, x: m.b(relu(m.e((x + 1) % 5))).mean(1), **made), tokens)
    plain = kgraph.kernels(net(lambda m, x: m.b(relu(m.e(x))).mean(1), **made), (tokens + 1) % 5)
    assert_exact(found.ntk, plain.ntk)
    with pytest.raises(RuleError, match="max_norm"):
        kgraph.nngp(nn.Sequential(nn.Embedding(6, SIZE, max_norm=0.5), dense()), tokens)


def grouped(groups: int, fan_in: int, change: Callable[[Net, Tensor], Tensor], **layers: nn.Module) -> Net:
    conv = nn.Conv2d(fan_in, 12, 3, padding=1, groups=groups, bias=False)
    return net(lambda m, x: torch.tanh(m.g(change(m, x))).mean((2, 3)), g=conv, **layers)


@pytest.mark.parametrize("groups", [3, 6])
def test_groups_of_unlike_inputs(groups: int) -> None:
    """The mean over the groups' own kernels; the kernel of the mean was off by a half."""
    x = inputs(2, 6, 4, 4) * torch.tensor([3.0, 3.0, 1.0, 1.0, 0.1, 0.1]).double()[:, None, None]
    width = 6 // groups
    options = {"variances": {"g.weight": 0.1}}
    result = kgraph.kernels(grouped(groups, 6, lambda m, x: x), x, **options)
    alone = [kgraph.kernels(grouped(1, width, lambda m, x: x), part, **options) for part in x.split(width, 1)]
    assert result.how == "quadrature"
    for kernel in ("nngp", "ntk"):
        expected = torch.stack([getattr(one, kernel) for one in alone]).mean(0)
        assert_exact(getattr(result, kernel), expected)


def test_group_norm_of_unlike_inputs() -> None:
    """Statistics of 20 channels each, not of all 40."""
    x = inputs(2, 40, 3, 3)
    x[:, :20] = 3 * x[:, :20] + 1
    conv = nn.Conv2d(40, 4, 1, bias=False)
    model = net(lambda m, x: m.g(m.n(x)), n=nn.GroupNorm(2, 40, affine=False), g=conv)
    y = model.n(x)  # type: ignore[operator]
    assert_exact(kgraph.nngp(model, x), sw2(conv) * torch.einsum("acij,bcij->abij", y, y) / 40)


def test_groups_of_unlike_layers() -> None:
    layers = {name: nn.Conv2d(3, 4, 1, bias=False) for name in "ab"}
    options = {"variances": {"a.weight": 1.0, "b.weight": 1.0, "g.weight": 0.1}}
    x = inputs(2, 3, 4, 4)
    beside = grouped(2, 8, lambda m, x: torch.cat([3 * m.a(x), 0.1 * m.b(x)], 1), **layers)
    one = grouped(1, 4, lambda m, x: 3 * m.a(x), **layers)
    two = grouped(1, 4, lambda m, x: 0.1 * m.b(x), **layers)
    expected = (kgraph.nngp(one, x, **options) + kgraph.nngp(two, x, **options)) / 2
    assert_exact(kgraph.nngp(beside, x, **options), expected)


def test_one_number_for_all_channels_is_assumed() -> None:
    """A norm behind it would take its gradient out again, which no law of one channel shows."""
    layers = {"a": with_gaussian_weights(dense(8)), "b": dense(), "s": parameter(1)}
    model, x = net(lambda m, x: m.b(relu(m.a(x)) * m.s), **layers), inputs(2, 8)
    assert [kgraph.kernels(model, x, with_ntk=on).how for on in (True, False)] == ["assumed", "exact"]


class _Spike(torch.autograd.Function):
    """A step with the derivative of a hat: how spiking networks are trained."""

    @staticmethod
    def forward(ctx: Any, u: Tensor) -> Tensor:
        ctx.save_for_backward(u)
        return (u > 0).to(u.dtype)

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> Tensor:  # type: ignore[override]
        (u,) = ctx.saved_tensors
        return g * (1 - u.abs()).clamp_min(0)


class _Relu(torch.autograd.Function):
    """A relu whose backward is its derivative, in a file of its own for memory's sake."""

    @staticmethod
    def forward(ctx: Any, u: Tensor) -> Tensor:
        ctx.save_for_backward(u)
        return u.clamp_min(0)

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> Tensor:  # type: ignore[override]
        (u,) = ctx.saved_tensors
        return g * (u > 0)


class _Applied(nn.Module):
    def __init__(self, function: type[torch.autograd.Function]) -> None:
        super().__init__()
        self.function = function

    def forward(self, u: Tensor) -> Tensor:
        return self.function.apply(u)  # type: ignore[return-value]


def test_a_backward_written_by_hand_is_followed_or_refused() -> None:
    x = inputs(2, 8)
    spiking = nn.Sequential(nn.Linear(8, 64), _Applied(_Spike), nn.Linear(64, 4))
    with pytest.raises(RuleError, match=r"backward written by hand.*'0.weight'"):
        kgraph.ntk(spiking, x)
    assert bool(kgraph.nngp(spiking, x).isfinite().all())
    spiking[0].requires_grad_(False)  # nothing passes through the step any more
    frozen = kgraph.ntk(spiking, x)
    torch.testing.assert_close(frozen.diagonal(), torch.full((2,), 64 / 2 + 1.0).double(), rtol=1e-9, atol=0)
    activations = (_Applied(_Relu), nn.ReLU())  # without a closed form, kernels averages over the biases themselves
    own, plain = (nn.Sequential(nn.Linear(8, 64, bias=False), a, nn.Linear(64, 4)) for a in activations)
    plain.load_state_dict(own.state_dict())
    torch.testing.assert_close(kgraph.ntk(own, x), kgraph.ntk(plain, x), rtol=1e-9, atol=0)
