"""Positions that are not alike: exact where averages do, "assumed" where they do not."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

import kgraph


def conv(**options: object) -> nn.Conv2d:
    layer = nn.Conv2d(64, 64, 3, bias=False, **options)  # type: ignore[arg-type]
    nn.init.normal_(layer.weight, std=(2 / 576) ** 0.5)
    return layer


EXACT = {
    "one border, averaged": lambda: nn.Sequential(conv(padding=1), nn.AdaptiveAvgPool2d(1)),
    "one border, flattened": lambda: nn.Sequential(conv(padding=1), nn.Flatten(), nn.Linear(64 * 36, 8)),
    "no padding": lambda: nn.Sequential(conv(), nn.ReLU(), conv(), nn.ReLU()),
    "copied, then convolved point by point": lambda: nn.Sequential(nn.Upsample(scale_factor=2), nn.Conv2d(64, 64, 1)),
    "pieces of channels": lambda: Pieces(),
    "windows side by side, pooled": lambda: nn.Sequential(nn.AvgPool2d(2), nn.MaxPool2d(2)),
    "patches": lambda: nn.Sequential(nn.ConvTranspose2d(64, 64, 2, 2), nn.ReLU()),
}
ASSUMED = {
    "a function behind a border": lambda: nn.Sequential(conv(padding=1), nn.ReLU()),
    "two borders": lambda: nn.Sequential(conv(padding=1), conv(padding=1)),
    "pixels of a border": lambda: nn.Sequential(conv(padding=1), Corner()),
    "strides of a transposed convolution": lambda: nn.Sequential(nn.ConvTranspose2d(64, 64, 3, 2), nn.Tanh()),
    "reflected": lambda: nn.Sequential(conv(padding=1, padding_mode="reflect"), nn.ReLU(), nn.AdaptiveAvgPool2d(1)),
    "a product": lambda: Product(),
    "a border, convolved without padding": lambda: nn.Sequential(conv(padding=1), conv()),
    "a border, pooled": lambda: nn.Sequential(conv(padding=1), nn.AvgPool2d(3, 1)),
    "a border, pooled to windows that overlap": lambda: nn.Sequential(conv(padding=1), nn.AdaptiveAvgPool2d(4)),
    "windows that overlap, pooled": lambda: nn.Sequential(conv(), nn.MaxPool2d(2)),
    "windows that overlap, strided": lambda: nn.Sequential(conv(), conv(stride=2)),
    "windows cut by a border": lambda: nn.MaxPool2d(3, 1, 1),
    "the largest of a border": lambda: nn.Sequential(conv(padding=1), nn.AdaptiveMaxPool2d(1)),
    "the largest of a border, by hand": lambda: nn.Sequential(conv(padding=1), Largest()),
    "mixed, then squared": lambda: Mixed(),
    "copied, and the outer ones left out": lambda: nn.Sequential(nn.Upsample(scale_factor=2), conv()),
    "copied, then bent": lambda: nn.Sequential(nn.Upsample(scale_factor=2), nn.ReLU()),
    "averaged over windows that overlap, then bent": lambda: nn.Sequential(nn.AvgPool2d(2, 1), nn.ReLU()),
    "positions given twice": lambda: nn.Sequential(conv(), Twice(), nn.AdaptiveAvgPool2d(1)),
    "what reads a border added to it": lambda: Again(),
    "interpolated": lambda: nn.Sequential(nn.Upsample(scale_factor=2, mode="bilinear"), nn.Tanh()),
}


class Corner(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x[:, :, 0, 0]


class Largest(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x.amax((2, 3))


class Mixed(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("ring", (torch.eye(6).roll(1, 0) + torch.eye(6)) / 2)

    def forward(self, x: Tensor) -> Tensor:
        x = self.ring @ x
        return x * x


class Pieces(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return torch.cat([x, x], dim=1)


class Twice(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return torch.cat([x, x], dim=3)


class Again(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv = conv(padding=1)

    def forward(self, x: Tensor) -> Tensor:
        x = self.conv(x)
        return x + torch.sin(x)


class Product(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = conv(padding=1), conv(padding=1)

    def forward(self, x: Tensor) -> Tensor:
        return self.a(x) * self.b(x)


@pytest.mark.parametrize("name", EXACT)
def test_averages_that_do_stay_exact(name: str) -> None:
    assert kgraph.analyze(EXACT[name](), torch.randn(2, 64, 6, 6)).final.how in ("exact", "quadrature")


@pytest.mark.parametrize("name", ASSUMED)
def test_what_needs_single_positions_is_assumed(name: str) -> None:
    row = kgraph.analyze(ASSUMED[name](), torch.randn(2, 64, 6, 6)).final
    assert row.how == "assumed"
    assert "positions" in row.note


def measured(build, draws: int = 40) -> float:
    found = []
    for seed in range(draws):
        torch.manual_seed(seed)
        with torch.no_grad():
            found.append(build()(torch.randn(2, 64, 6, 6)).square().mean())
    return float(torch.stack(found).mean())


def test_the_label_is_right_about_both() -> None:
    """One border: q of plain networks within 3 %. Two: 1 - (q counted) / q is 8 % and more."""
    for name, build, right in (
        ("one", lambda: conv(padding=1), True),
        ("two", lambda: nn.Sequential(conv(padding=1), conv(padding=1), conv(padding=1)), False),
    ):
        torch.manual_seed(0)
        row = kgraph.analyze(build(), torch.randn(2, 64, 6, 6)).final
        off = abs(row.q / measured(build) - 1)
        assert (off < 0.03) == right, (name, off)
        assert (row.how == "exact") == right


def test_taps_that_meet_no_two_positions() -> None:
    """A transposed convolution of one position: its results share nothing but their biases (c = b^2 / q)."""
    torch.manual_seed(0)
    layer = nn.ConvTranspose1d(512, 512, 2, stride=2)
    nn.init.normal_(layer.weight, std=512**-0.5)
    nn.init.normal_(layer.bias, std=0.5)
    row = kgraph.analyze(layer, torch.randn(2, 512, 1)).final
    y = layer(torch.randn(64, 512, 1)).detach()
    drawn = float((y[..., 0] * y[..., 1]).mean() / y.square().mean())
    assert row.c_positions == pytest.approx(float(layer.bias.detach().square().mean()) / row.q, rel=1e-6)
    assert row.c_positions == pytest.approx(drawn, abs=4 / 512**0.5)


class Twofold(nn.Module):
    """Running means of running means: the first of each reads few positions, and the second has to know which."""

    def __init__(self, times: int) -> None:
        super().__init__()
        self.layer, self.times = nn.Linear(64, 64), times
        self.register_buffer("mean", torch.ones(6, 6).tril() / torch.arange(1, 7)[:, None])

    def forward(self, x: Tensor) -> Tensor:
        x = self.layer(x)
        for _ in range(self.times):
            x = self.mean @ x
        return x


@pytest.mark.parametrize(("times", "how"), [(1, "exact"), (2, "assumed")])
def test_a_second_uneven_mixture_is_assumed(times: int, how: str) -> None:
    row = kgraph.analyze(Twofold(times), torch.randn(2, 6, 64)).final
    with torch.no_grad():
        found = [Twofold(times)(torch.randn(200, 6, 64)).square().mean() for _ in range(8)]
    right = abs(float(torch.stack(found).mean()) / row.q - 1) < 0.05
    assert row.how == how and right == (how == "exact")


class Picked(nn.Module):
    """What ``made`` makes of positions or channels, and what ``read`` reads of it."""

    def __init__(self, made: Callable[[Tensor], Tensor], read: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.layer, self.made, self.read = nn.Linear(64, 64, bias=False), made, read
        nn.init.normal_(self.layer.weight, std=1 / 8)

    def forward(self, x: Tensor) -> Tensor:
        return self.read(self.made(self.layer(x)))


RUNS: dict[str, Callable[[Tensor], Tensor]] = {
    "sum": lambda x: x.cumsum(1),
    "running mean": lambda x: x.cumsum(1) / torch.arange(1, 7).view(1, 6, 1),
    "largest so far": lambda x: x.cummax(1).values,
    "least so far": lambda x: x.cummin(1)[0],
    "in order": lambda x: x.sort(1)[0] + 1.0,
    "top": lambda x: torch.topk(x, 4, 1).values * 2,
    "product": lambda x: (1 + x).cumprod(1),
    "logarithm": lambda x: x.logcumsumexp(1),
}
READS: dict[str, Callable[[Tensor], Tensor]] = {
    "one": lambda x: x[:, 0],
    "last": lambda x: x.select(1, -1),
    "two": lambda x: x.narrow(1, 1, 2),
    "every second": lambda x: x[:, ::2],
    "bent": torch.tanh,
    "weighed": lambda x: x * torch.linspace(0, 1, x.shape[1]).view(1, -1, 1),
}


@pytest.mark.parametrize("run", RUNS)
@pytest.mark.parametrize("read", READS)
def test_positions_of_a_running_sum_or_an_order_are_not_alike(run: str, read: str) -> None:
    row = kgraph.analyze(Picked(RUNS[run], READS[read]), torch.randn(2, 6, 64)).final
    assert row.how == "assumed"


def test_the_first_of_a_running_sum_is_no_average() -> None:
    """q of position i is i, and 3.5 the mean of six; averages over all of them stay what they are."""
    x = torch.randn(2, 6, 64)
    one = kgraph.analyze(Picked(RUNS["sum"], READS["one"]), x).final
    assert one.how == "assumed" or one.q == pytest.approx(1.0, rel=0.2)
    for read in (lambda x: x, lambda x: 3 * x.transpose(1, 2), lambda x: x.mean(1)):
        whole = kgraph.analyze(Picked(RUNS["sum"], read), x).final
        assert whole.how == "sampled"
    assert kgraph.analyze(Picked(lambda x: x, READS["one"]), x).final.how == "exact"


@pytest.mark.parametrize("made", [lambda x: x.cumsum(-1), lambda x: x.sort(-1)[0]])
def test_channels_of_a_running_sum_or_an_order_are_not_alike(made: Callable[[Tensor], Tensor]) -> None:
    """One of them is not like the rest; a layer behind sums over all."""
    x, head = torch.randn(2, 64), nn.Linear(64, 8, bias=False)
    assert kgraph.analyze(Picked(made, lambda x: x[:, :4]), x).final.how == "assumed"
    assert kgraph.analyze(Picked(made, torch.tanh), x).final.how == "assumed"
    assert kgraph.analyze(nn.Sequential(Picked(made, lambda x: x), head), x).final.how == "sampled"
