"""Structure that averages would lose: tokens beside tokens, groups of several laws, stacks, halves, few channels.

The oracle draws plain networks anew, by PyTorch's own initialization, and runs them on pairs of inputs.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

import kgraph
from kgraph.analysis import NodeKernel


class Model(nn.Module):
    """Layers and a function of them and the input."""

    def __init__(self, function: Callable[..., Tensor], *layers: nn.Module) -> None:
        super().__init__()
        self.layers, self.function = nn.ModuleList(layers), function

    def forward(self, x: Tensor) -> Tensor:
        return self.function(x, *self.layers)


def unrelated(*shape: int, channel: int, seed: int) -> tuple[Tensor, Tensor]:
    """Two inputs of q = 1 and cosine 0 over the channels, at every position."""
    generator = torch.Generator().manual_seed(seed)
    first, second = (torch.randn(shape, generator=generator, dtype=torch.float64) for _ in range(2))
    first = first / first.square().mean(channel, keepdim=True).sqrt()
    second = second - (first * second).mean(channel, keepdim=True) * first
    return first, second / second.square().mean(channel, keepdim=True).sqrt()


def torch_says(build: Callable[[], nn.Module], shape: tuple[int, ...], channel: int, draws: int) -> list[Tensor]:
    """q and E[v_a v_b] of unrelated inputs, each with its standard error: [mean, error] of plain networks."""
    found = []
    for seed in range(draws):
        torch.manual_seed(seed)
        model = build().double()
        with torch.no_grad():
            a, b = (model(x) for x in unrelated(*shape, channel=channel, seed=seed))
        found.append(torch.stack([(a.square() + b.square()).mean() / 2, (a * b).mean()]))
    table = torch.stack(found)
    return [table.mean(0), table.std(0) / math.sqrt(draws)]


def assert_agrees(build: Callable[[], nn.Module], shape: tuple[int, ...], channel: int, draws: int) -> NodeKernel:
    """The analysis is within four standard errors of plain networks (and 1 % for their width)."""
    torch.manual_seed(0)
    row = kgraph.analyze(build(), torch.randn(shape)).final
    mean, error = torch_says(build, shape, channel, draws)
    q, cov = mean.tolist()
    assert abs(row.q - q) <= 4 * float(error[0]) + 0.01 * q, (row.q, q, row.how)
    assert abs(row.c[0] * row.q - cov) <= 4 * float(error[1]) + 0.01 * q, (row.c[0] * row.q, cov, row.how)
    return row


class Tokens(nn.Module):
    def __init__(self, read: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.first, self.last = nn.Parameter(torch.randn(1, 2, 64)), nn.Parameter(2 * torch.randn(1, 1, 64))
        self.read, self.out = read, nn.Linear(64, 64, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        batch = x.shape[0]
        tokens = torch.cat([self.first.expand(batch, -1, -1), x, self.last.expand(batch, -1, -1)], 1)
        return self.out(self.read(tokens))


CONSTANT = {"two in front": lambda t: t[:, :2], "the last": lambda t: t[:, -1], "unbound": lambda t: t.unbind(1)[1]}


@pytest.mark.parametrize("name", CONSTANT)
def test_a_token_that_is_a_parameter_is_the_same_for_all_inputs(name: str) -> None:
    model = Tokens(CONSTANT[name]).eval()
    row = kgraph.analyze(model, torch.randn(2, 5, 64)).final
    token = model.last if name == "the last" else model.first
    assert row.c[0] == pytest.approx(1, abs=1e-12)
    gain = 64 * float(model.out.weight.detach().square().mean())
    assert row.q == pytest.approx(gain * float(token.detach().square().mean()), rel=1e-5)


def test_the_other_tokens_depend_on_the_input() -> None:
    """Negative control: what lies between the constants has the cosines of the input."""
    row = kgraph.analyze(Tokens(lambda t: t[:, 2:-1]).eval(), torch.randn(2, 5, 64)).final
    assert row.c[0] == pytest.approx(0, abs=1e-12)
    assert row.how == "exact"


def test_a_mean_of_channels_is_exact() -> None:
    """Positions become channels, and channels are averaged: n independent draws, of relu of mean 1/sqrt(2 pi)."""

    def build() -> nn.Module:
        return Model(lambda x, a: torch.relu(a(x.mT)).sum(-1), nn.Linear(48, 96, bias=False))

    row = assert_agrees(build, (2, 48, 64), 1, 60)
    assert row.how == "exact"


def test_a_mean_of_dependent_channels_is_drawn() -> None:
    """Negative control: two halves of one function are no 2 n independent channels."""

    def build() -> nn.Module:
        return Model(lambda x, a: torch.cat([torch.relu(a(x)), torch.relu(a(x))], 1).mean(1), nn.Linear(64, 64))

    assert kgraph.analyze(build(), torch.randn(2, 64)).final.how in ("sampled", "assumed")


def test_groups_see_their_own_laws() -> None:
    """Parts of 24, 40 and 32 channels in groups of 16: two groups hold two laws each."""

    def forward(x: Tensor, a: nn.Module, b: nn.Module, c: nn.Module, norm: nn.Module) -> Tensor:
        return norm(torch.cat([a(x), torch.relu(b(x)), 1 + torch.relu(c(x))], 1))

    def build() -> nn.Module:
        layers = [nn.Conv2d(32, width, 1, bias=False) for width in (24, 40, 32)]
        nn.init.normal_(layers[1].weight, std=3 / math.sqrt(32))
        return Model(forward, *layers, nn.GroupNorm(6, 96))

    assert_agrees(build, (1, 32, 6, 6), 1, 40)


@pytest.mark.parametrize(("groups", "how"), [(64, "assumed"), (16, "assumed"), (2, "exact")])
def test_few_channels_per_group_are_no_gaussian(groups: int, how: str) -> None:
    layers = nn.Conv1d(8, 64, 1, bias=False), nn.GELU(), nn.Conv1d(64, 64, 3, groups=groups, bias=False), nn.GELU()
    report = kgraph.analyze(nn.Sequential(*layers), torch.randn(2, 8, 9))
    assert report.final.how == how
    assert report["conv1d_1"].how == "exact"  # its second moments need no law


def test_few_weights_used_twice_are_not_new() -> None:
    """E[(w^2)^2] = 3 E[w^2]^2: the same tap twice."""
    model = Model(lambda x, a: a(a(x)), nn.Conv1d(16, 16, 1, groups=16, bias=False))
    row = kgraph.analyze(model, torch.randn(2, 16, 4)).final
    assert row.how == "assumed"
    assert "used before" in row.note


def forked(x: Tensor, layer: nn.Module) -> Tensor:
    z = layer(x)
    return torch.stack([z, torch.tanh(z), torch.relu(z)], 2).sum(2)


def test_a_sum_over_a_stack_is_the_sum() -> None:
    row = assert_agrees(lambda: Model(forked, nn.Conv1d(64, 64, 1, bias=False)), (1, 64, 8), 1, 40)
    assert row.how == "quadrature"


def test_a_mean_over_a_stack_with_a_jump_in_it() -> None:
    """The pieces are independent and one has mean 0: a quarter of the sum of their mean squares."""

    def run(x: Tensor, a: nn.Module, b: nn.Module) -> Tensor:
        return torch.stack([b(x), torch.round(4 * a(torch.tanh(x) ** 2))]).mean(0)

    layers = nn.Conv1d(64, 64, 2, stride=2), nn.Conv1d(64, 64, 1, stride=2, bias=False)
    report = kgraph.analyze(Model(run, *layers), torch.randn(2, 64, 8))
    assert report.final.slope == math.inf
    assert report.final.q == pytest.approx((report["conv1d"].q + report["round_1"].q) / 4, rel=1e-9)


def test_what_is_left_of_terms_that_cancel_is_not_exact() -> None:
    """x - BN(x) is the noise of the batch's statistics, and in the limit a share eps of x."""
    report = kgraph.analyze(Model(lambda x, norm: x - norm(x), nn.BatchNorm2d(16)), torch.randn(8, 16, 4, 4))
    assert 0 < report.final.q < 1e-9 and report.final.how == "assumed" and "cancel" in report.final.note
    exact = kgraph.analyze(Model(lambda x, layer: layer(x - 0.9 * x), nn.Linear(16, 16)), torch.randn(8, 16)).final
    assert exact.how == "exact"


class Einsum(nn.Module):
    def __init__(self, equation: str, *shape: int, function: Callable[[Tensor], Tensor], swapped: bool = False) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(shape) / math.sqrt(shape[0]))
        self.equation, self.function, self.swapped = equation, function, swapped

    def forward(self, x: Tensor) -> Tensor:
        operands = (self.weight, x) if self.swapped else (x, self.weight)
        return self.function(torch.einsum(self.equation, *operands))


def halves(z: Tensor) -> Tensor:
    a, b = z.chunk(2, -1)
    return torch.relu(a + b)


def test_einsum_of_a_parameter_is_a_linear_layer() -> None:

    def build() -> nn.Module:
        return Einsum("blc,cd->bld", 64, 96, function=halves)

    assert assert_agrees(build, (2, 6, 64), 2, 40).how == "exact"


def test_einsum_makes_heads() -> None:

    def build() -> nn.Module:
        return Einsum("dhk,bld->blhk", 64, 4, 24, function=torch.tanh, swapped=True)

    assert assert_agrees(build, (2, 6, 64), 2, 40).how == "quadrature"


class Graph(nn.Module):
    """A graph convolution: a fixed adjacency, then a layer."""

    def __init__(self, einsum: bool) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(3)
        self.register_buffer("adjacency", torch.rand(12, 12, generator=generator).softmax(1))
        self.layer, self.einsum = nn.Linear(64, 64), einsum

    def forward(self, x: Tensor) -> Tensor:
        z = self.layer(x)
        return torch.einsum("ij,bjc->bic", self.adjacency, z) if self.einsum else self.adjacency @ z


@pytest.mark.parametrize("einsum", [False, True])
def test_a_fixed_adjacency_is_a_map_of_positions(einsum: bool) -> None:
    assert assert_agrees(lambda: Graph(einsum), (2, 12, 64), 2, 40).how == "exact"


def attended(u: Tensor) -> Tensor:
    return torch.softmax(u @ u.mT / u.shape[-1], -1) @ u


def test_halves_of_a_drawn_tensor_are_two_tensors() -> None:
    """The channels of attention by hand are drawn; those of one half are none of the other's."""

    def build() -> nn.Module:
        return Model(lambda x, a: halves(2 * attended(a(x))), nn.Linear(128, 128, bias=False))

    assert assert_agrees(build, (4, 6, 128), 2, 40).how == "sampled"


@pytest.mark.parametrize(("size", "how"), [(6, "right"), (7, "assumed")])
def test_the_middle_of_what_is_flipped_stays(size: int, how: str) -> None:
    def run(x: Tensor, layer: nn.Module) -> Tensor:
        y = layer(x)
        return torch.stack([y, y.flip(2)]).sum(0)

    model = Model(run, nn.Conv1d(32, 32, 1, bias=False))
    report = kgraph.analyze(model, torch.randn(2, 32, size))
    row, own = report.final, report.nodes[1].q
    with torch.no_grad():
        q = model(torch.randn(4000, 32, size)).square().mean()
    assert float(q) == pytest.approx(own * (2 + 2 * (size % 2) / size), rel=0.03)  # the middle has twice the others'
    assert row.how == "assumed" or (how != "assumed" and abs(row.q / float(q) - 1) < 0.06)


def test_a_range_by_narrow_is_a_slice() -> None:
    layer = nn.Conv1d(32, 32, 1, padding=1)
    one, two = (
        kgraph.analyze(Model(cut, layer), torch.randn(2, 32, 6)).final
        for cut in (lambda x, layer: layer(x).narrow(2, 1, 3), lambda x, layer: layer(x)[:, :, 1:4])
    )
    assert (one.q, one.c, one.how) == (two.q, two.c, two.how) == (two.q, two.c, "assumed")
