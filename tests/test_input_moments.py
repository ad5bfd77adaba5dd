"""Inputs as they are: second moments of a batch, against its own loops and against networks that are run on it."""

from __future__ import annotations

import math

import pytest
import torch
from sklearn.datasets import load_digits
from torch import Tensor, nn

import kgraph
from kgraph import InputMoments
from kgraph.errors import InputError
from kgraph.input_moments import check_possible


def digits(count: int = 64) -> Tensor:
    """Real images, [N, 1, 8, 8], in [0, 1]."""
    return torch.tensor(load_digits().images[:count] / 16.0, dtype=torch.float32)[:, None]


def test_moments_are_those_of_loops() -> None:
    x = torch.randn(3, 2, 2, 2, generator=torch.Generator().manual_seed(0)).double() + 0.5
    flat = x.reshape(3, 2, 4)
    q = flat.square().mean()
    found = {"c": [], "c_within": [], "c_apart": []}
    for n in range(3):
        for m in range(3):
            for p in range(4):
                for r in range(4):
                    if (n, p) != (m, r):
                        name = "c" if p == r else "c_within" if n == m else "c_apart"
                        found[name].append(float((flat[n, :, p] * flat[m, :, r]).mean() / q))
    moments = InputMoments.of(x)
    assert moments.q == pytest.approx(float(q))
    for name, values in found.items():
        assert getattr(moments, name) == pytest.approx(sum(values) / len(values)), name


def test_white_is_the_default() -> None:
    model, x = nn.Sequential(nn.Conv2d(1, 32, 1), nn.Tanh(), nn.Conv2d(32, 8, 3)), torch.randn(8, 1, 8, 8)
    default, white = kgraph.analyze(model, x), kgraph.analyze(model, x, inputs=InputMoments())
    assert [(r.q, r.c, r.ntk) for r in default.nodes] == [(r.q, r.c, r.ntk) for r in white.nodes]
    assert not any("white" in note for note in default.analysis.notes)


class Net(nn.Module):
    """Convolutions without borders, a global average, a head: nothing that averages over positions is unlike."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.stem, self.mix = nn.Conv2d(1, width, 2, bias=False), nn.Conv2d(width, width, 1, bias=False)
        self.head = nn.Linear(width, width, bias=False)
        for layer, fan_in in ((self.stem, 4), (self.mix, width), (self.head, width)):
            nn.init.normal_(layer.weight, std=fan_in**-0.5)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.mix(self.stem(x)).mean((2, 3)))


def test_a_linear_network_sees_the_data() -> None:
    """q and c of the head on real images, over drawn networks; as white noise the pool leaves almost nothing."""
    x = digits()
    report = kgraph.analyze(Net(256), x, inputs="data")
    white = kgraph.analyze(Net(256), x)
    qs, covs = [], []
    for seed in range(40):
        torch.manual_seed(seed)
        with torch.no_grad():
            y = Net(256)(x)
        qs.append(y.square().mean())
        covs.append((y.sum(0).square().mean() - y.square().sum(0).mean()) / (len(x) * (len(x) - 1)))
    q, cov = torch.stack(qs), torch.stack(covs)
    # pairs of windows stand for pairs of pixels: pixels of the border are read less often, and are darker
    assert report.final.q == pytest.approx(float(q.mean()), rel=0.35)
    assert report.final.c[0] == pytest.approx(float(cov.mean() / q.mean()), abs=0.1)
    assert white.final.q < 0.2 * float(q.mean())
    assert report.analysis.inputs and "inputs with" in report.summary[0]
    assert any("inputs='data'" in note for note in white.analysis.notes)


def test_vectors_are_exact() -> None:
    """A layer on vectors: q = sw2 q_x, c as it was; the slope is one of cosines."""
    torch.manual_seed(0)
    x = torch.randn(200, 64) + 1.0
    layer = nn.Linear(64, 512, bias=False)
    moments = InputMoments.of(x)
    report = kgraph.analyze(nn.Sequential(layer, nn.ReLU()), x, inputs="data")
    row = report["linear"]
    assert row.how == "exact"
    assert row.q == pytest.approx(64 * float(layer.weight.detach().double().square().mean()) * moments.q, rel=1e-6)
    assert row.c == pytest.approx(report.analysis.cosines) and row.c[0] == pytest.approx(moments.c)
    assert row.slope == pytest.approx(1.0)
    c = moments.c
    angle = (math.sqrt(1 - c * c) + (math.pi - math.acos(c)) * c) / math.pi  # arc-cosine kernel of relu
    assert report.final.c[0] == pytest.approx(angle, rel=1e-9)
    y = torch.relu(layer(x)).detach()
    drawn = (y.sum(0).square().mean() - y.square().sum(0).mean()) / (200 * 199) / y.square().mean()
    assert report.final.c[0] == pytest.approx(float(drawn), abs=0.05)


def test_functions_of_images_are_assumed() -> None:
    """Neighbouring pixels are more alike than distant ones, which two numbers do not hold."""
    report = kgraph.analyze(nn.Sequential(nn.Conv2d(1, 16, 1), nn.ReLU()), digits(), inputs="data")
    assert report["conv2d"].how == "exact"
    assert report.final.how == "assumed" and "neighbouring positions" in report.final.note
    direct = kgraph.analyze(nn.Tanh(), torch.randn(8, 64), inputs="data").final
    assert direct.how == "assumed" and "second moments" in direct.note


def test_inputs_of_several_sizes_are_assumed_behind_functions() -> None:
    """The mean of tanh^2 over inputs of q .1 and 10 is not its value at their average; a norm makes them alike."""
    torch.manual_seed(0)
    x = torch.randn(64, 64)
    x = x / x.square().mean(1, keepdim=True).sqrt() * torch.tensor([0.1, 10.0]).repeat(32)[:, None].sqrt()
    net = nn.Sequential(nn.Linear(64, 512), nn.Tanh(), nn.Linear(512, 64))
    nn.init.normal_(net[0].weight, std=64**-0.5)
    report = kgraph.analyze(net, x, inputs="data")
    assert InputMoments.of(x).spread == pytest.approx(9.9 / 10.1)
    assert report["linear"].how == "exact" and "98 %" in report.analysis.inputs
    assert report["tanh"].how == report.final.how == "assumed" and "mean squares" in report["tanh"].note
    assert abs(float(net[:2](x).detach().square().mean()) / report["tanh"].q - 1) > 0.2
    normed = kgraph.analyze(nn.Sequential(nn.LayerNorm(64), *net), x, inputs="data")
    assert normed["tanh"].how == "quadrature"


@pytest.mark.parametrize(
    ("call", "word"),
    [
        (lambda: kgraph.analyze(nn.Linear(4, 4), torch.randn(2, 4), inputs="real"), "inputs"),
        (lambda: kgraph.analyze(nn.Linear(4, 4), torch.ones(3, 4), inputs="data"), "all the same"),
        (lambda: kgraph.analyze(nn.Linear(4, 4), torch.zeros(3, 4), inputs="data"), "zero"),
        (lambda: InputMoments(q=-1.0), "q is -1.0"),
        (lambda: InputMoments(spread=-0.1), "spread"),
        (lambda: InputMoments(c=1.0), "cosines"),
        (lambda: InputMoments(c_within=float("nan")), "c_within"),
        (lambda: InputMoments.of(torch.randn(1, 4)), "at least 2"),
    ],
)
def test_wrong_inputs_are_named(call, word: str) -> None:
    with pytest.raises(InputError, match=word):
        call()


@pytest.mark.parametrize("cosines", [(0.2, -0.5, 0.0), (0.2, 0.1, 0.9), (-1.0, 0.5, 0.5)])
def test_cosines_that_no_two_inputs_have(cosines: tuple[float, float, float]) -> None:
    """Some sum of their entries would have a negative mean square; averages over positions had one."""
    model = nn.Sequential(nn.Conv2d(3, 8, 1), nn.AdaptiveAvgPool2d(1))
    with pytest.raises(InputError, match="no two inputs of 16 positions have cosines"):
        kgraph.analyze(model, torch.randn(2, 3, 4, 4), inputs=InputMoments(1.0, *cosines))


def test_measured_cosines_are_possible() -> None:
    for x in (torch.randn(3, 2, 2, 2), torch.randn(2, 1, 4) - 3, torch.randn(4, 3, 2).relu()):
        centred = x - x.mean(dim=tuple(range(2, x.ndim)), keepdim=True)
        for one in (x, centred):
            check_possible(InputMoments.of(one), one[0, 0].numel())
