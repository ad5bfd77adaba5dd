"""What an attack by strangers found in `kgraph.analyze`: no number that is wrong is called exact."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional

import kgraph

WIDTH = 96


class Net(nn.Module):
    def __init__(self, run: Callable[[Tensor, nn.Module, nn.Module], Tensor]) -> None:
        super().__init__()
        self.a, self.b = (nn.Linear(WIDTH, WIDTH, bias=False) for _ in range(2))
        self.run = run

    def forward(self, x: Tensor) -> Tensor:
        return self.run(x, self.a, self.b)


def measured(run: Callable[[Tensor, nn.Module, nn.Module], Tensor], draws: int = 60) -> Tensor:
    """q of drawn networks, on inputs of mean square 1."""
    found = []
    for seed in range(draws):
        torch.manual_seed(seed)
        x = torch.randn(8, WIDTH)
        with torch.no_grad():
            found.append(Net(run)(x / x.square().mean(1, keepdim=True).sqrt()).square().mean())
    return torch.stack(found)


def through(weight: Tensor, x: Tensor) -> Tensor:
    return functional.linear(x, weight)


WRONG = {
    "positive weights": lambda x, a, b: through(b.weight.abs(), torch.relu(a(x))),
    "softmax of weights": lambda x, a, b: through(torch.softmax(30 * b.weight, -1), torch.relu(a(x))),
    "a symmetric weight twice": lambda x, a, b: through(
        a.weight + a.weight.t(), torch.relu(through(a.weight + a.weight.t(), x))
    ),
}


@pytest.mark.parametrize("name", WRONG)
def test_what_is_not_counted_is_said(name: str) -> None:
    torch.manual_seed(0)
    row = kgraph.analyze(Net(WRONG[name]), torch.randn(2, WIDTH)).final
    q = measured(WRONG[name])
    assert abs(float(q.mean()) / row.q - 1) > 0.2  # the very number that must not be called exact
    assert row.how == "assumed" and "weight" in row.note


CROSSED = {
    "differences": lambda x, a, b: (a(x)[:, :16, None] - a(x)[:, None, :16]).flatten(1),
    "sums behind relu": lambda x, a, b: torch.relu(a(x)[:, :16, None] + a(x)[:, None, :16]).flatten(1),
    "pairs of two": lambda x, a, b: torch.relu(a(x)[:, :16, None] + b(x)[:, None, :16]).flatten(1),
    "bilinear pooling": lambda x, a, b: (torch.relu(a(x))[:, :16, None] * torch.relu(a(x))[:, None, :16]).flatten(1),
}


@pytest.mark.parametrize("name", CROSSED)
def test_a_tensor_against_itself_over_two_axes(name: str) -> None:
    torch.manual_seed(0)
    row = kgraph.analyze(Net(CROSSED[name]), torch.randn(2, WIDTH)).final
    q = measured(CROSSED[name], 200)
    error = float(row.note.removeprefix("+-")) if row.how == "sampled" and row.note else 0.0
    allowed = 4 * (error + float(q.std() / q.mean()) / 200**0.5) + 4 / WIDTH
    assert row.how == "assumed" or abs(float(q.mean()) / row.q - 1) < allowed, (row.how, row.q, float(q.mean()))


def test_an_ntk_that_draws_do_not_give_is_no_number() -> None:
    """W^T W x: its parameters' directions are not drawn, and 0 would be a lie."""
    torch.manual_seed(0)
    report = kgraph.analyze(Net(lambda x, a, b: through(a.weight.t(), torch.relu(a(x)))), torch.randn(2, WIDTH))
    assert report.final.how in ("sampled", "assumed")
    assert report.final.ntk != report.final.ntk
    assert report["linear"].ntk > 0


class OfItsInput(nn.Module):
    """A depthwise convolution times what it reads."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv1d(64, 64, 1, groups=64)
        nn.init.normal_(self.conv.weight)
        nn.init.constant_(self.conv.bias, 0.3)  # pyright: ignore

    def forward(self, x: Tensor) -> Tensor:
        return self.conv(x) * x


def test_a_channel_is_not_independent_of_what_it_is_made_of() -> None:
    """E[(w x + b)^2 x^2] = 3 w^2 + b^2 for 1 + b^2."""
    torch.manual_seed(0)
    model = OfItsInput()
    row = kgraph.analyze(model, torch.randn(2, 64, 4)).final
    assert row.how == "assumed" and "channels" in row.note
    drawn = float(model(torch.randn(400, 64, 4)).detach().square().mean())
    assert drawn > 2 * row.q


def test_uniform_biases_survive_an_average() -> None:
    """tanh of means of positions: a bias is one number at all of them."""
    torch.manual_seed(0)
    conv = nn.Conv1d(512, 512, 1)
    nn.init.normal_(conv.weight, std=512**-0.5)
    nn.init.uniform_(conv.bias, -2.0, 2.0)  # pyright: ignore
    row = kgraph.analyze(nn.Sequential(conv, nn.AvgPool1d(8), nn.Tanh()), torch.randn(2, 512, 32)).final
    with torch.no_grad():
        drawn = float(torch.tanh(nn.functional.avg_pool1d(conv(torch.randn(32, 512, 32)), 8)).square().mean())
    variance = 1 / 8 + 4 / 3
    z = torch.randn(10**6, generator=torch.Generator().manual_seed(0)) * variance**0.5
    assert row.q == pytest.approx(drawn, rel=0.01)
    assert row.q != pytest.approx(float(torch.tanh(z).square().mean()), rel=0.01)  # were it Gaussian


@pytest.mark.parametrize(("tokens", "how"), [(6, "assumed"), (64, "quadrature")])
def test_few_positions_are_no_gaussian(tokens: int, how: str) -> None:
    """A layer over positions: all channels share the weights of a unit, whose sum of squares varies by 2 / tokens."""
    layers = nn.Linear(tokens, tokens, bias=False), nn.Tanh(), nn.Conv1d(64, 64, 1)
    report = kgraph.analyze(nn.Sequential(*layers), torch.randn(2, 64, tokens))
    assert (report["linear"].how, report["tanh"].how) == ("exact", how)


def test_no_cosine_is_above_one() -> None:
    """A norm over channels is one number a vector: draws put c at 1.02."""
    torch.manual_seed(0)
    report = kgraph.analyze(Net(lambda x, a, b: a(x).norm(dim=1, keepdim=True)), torch.randn(2, WIDTH))
    assert all(-1 <= c <= 1 for row in report.nodes for c in row.c)


@pytest.mark.parametrize("draw", ["bernoulli", "rand"])
def test_noise_of_a_fixed_batch_is_of_every_input(draw: str) -> None:
    """A mask a row, drawn with the batch size written out: E[m m'] = 1/4 between inputs, 1/2 for one."""

    def masked(x: Tensor, a: nn.Module, b: nn.Module) -> Tensor:
        mask = torch.bernoulli(torch.full((2, WIDTH), 0.5)) if draw == "bernoulli" else torch.rand(2, WIDTH) < 0.5
        return b(mask * torch.relu(a(x)))

    torch.manual_seed(0)
    row = kgraph.analyze(Net(masked), torch.randn(2, WIDTH)).final
    assert row.c[2] == pytest.approx(0.9096 / 2, abs=0.03)  # half of what relu alone has


def test_an_output_that_reads_no_input_is_no_row_of_the_input() -> None:
    with pytest.raises(kgraph.RuleError, match="does not depend on its inputs"):
        kgraph.analyze(Net(lambda x, a, b: a.weight), torch.randn(2, WIDTH))


def test_biases_with_a_mean_keep_it() -> None:
    """N(.4, 2), whose mean here is four standard errors: with the model's own biases, over draws of the weights."""

    def draw(seed: int) -> nn.Sequential:
        torch.manual_seed(seed)
        net = nn.Sequential(nn.Linear(256, 256), nn.ReLU())
        net[0].bias = biases
        return net

    torch.manual_seed(0)
    biases = nn.Parameter(0.53 + 2 * torch.randn(256))
    x = torch.randn(16, 256)
    x = x / x.square().mean(1, keepdim=True).sqrt()
    with torch.no_grad():
        q = torch.stack([draw(seed)(x).square().mean() for seed in range(60)])
    row = kgraph.analyze(draw(0), x, inputs="white").final
    assert row.q == pytest.approx(float(q.mean()), rel=0.03)
