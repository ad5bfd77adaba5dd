"""Kernel rules against closed forms and against the finite network (4 standard errors + O(1/width))."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import kgraph
from kgraph import algebra
from kgraph.capture import capture
from kgraph.kernel import SAME, Gaussian, Pairs, Part, Root
from kgraph.maps import relu
from kgraph.propagate import propagate, summarize
from kgraph.rules.table import rule

WIDTH = 512


def gaussian(name: str, q: float = 1.0) -> Part:
    """A fresh Gaussian part whose cosines are the inputs'; positions uncorrelated."""
    c = Pairs().inputs
    cov = torch.stack([c * q, 0 * c], 1)
    slope = torch.stack([torch.full_like(c, q), 0 * c], 1)
    return Part(8, cov, slope, 0 * cov, 0.0, frozenset({Root(name)}))


class Net(nn.Module):
    """Two wide linear layers around a body given as a function of two independent Gaussian vectors."""

    def __init__(self, body, width: int = WIDTH) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(width, width), nn.Linear(width, width)
        self.out = nn.Linear(width, width)
        self.body = body

    def forward(self, x: Tensor) -> Tensor:
        return self.out(self.body(self.a(x), self.b(x)))


def predicted(model: nn.Module, example: Tensor, mode: str = "eval") -> kgraph.report.Report:
    return kgraph.analyze(model, example, mode=mode)


def assert_agrees(model: nn.Module, example: Tensor, mode: str = "eval", draws: int = 6) -> None:
    """Every node that is not marked as assumed agrees with the finite network."""
    report = predicted(model, example, mode)
    measured = kgraph.montecarlo(model, example, mode=mode, draws=draws)
    certain = {row.name for row in report.nodes if row.how != "assumed"}
    wrong = [d for d in measured.disagreements(report.analysis) if d[0] in certain]
    assert not wrong, wrong


def test_linear_is_exact() -> None:
    model = nn.Linear(64, 32)
    row = predicted(model, torch.randn(2, 64)).final
    weight, bias = model.weight.detach().double(), model.bias.detach().double()
    q = 64 * weight.square().mean() + bias.square().mean()
    c = (0.5 * 64 * weight.square().mean() + bias.square().mean()) / q
    assert row.q == pytest.approx(float(q), rel=1e-12)
    assert row.c[1] == pytest.approx(float(c), rel=1e-12)
    assert row.how == "exact"


def test_relu_chain_has_the_arc_cosine_kernel() -> None:
    model = nn.Sequential(nn.Linear(64, 64, bias=False), nn.ReLU())
    row = predicted(model, torch.randn(2, 64)).final
    theta = math.acos(0.5)
    expected = (math.sin(theta) + (math.pi - theta) * 0.5) / math.pi
    assert row.c[1] == pytest.approx(expected, rel=1e-12)
    assert row.slope == pytest.approx(1.0, rel=1e-12)


def test_slope_is_the_derivative_of_c() -> None:
    model = nn.Sequential(nn.Linear(64, 64), nn.Tanh(), nn.Linear(64, 64), nn.GELU(), nn.Linear(64, 8))
    graph = capture(model, torch.randn(2, 64))
    near = summarize(graph, propagate(graph, pairs=Pairs(cosines=(1 - 1e-6,)))).final
    assert near.slope == pytest.approx((1 - near.c[0]) / 1e-6, rel=1e-4)


def test_a_doubled_tensor_has_four_times_the_kernel() -> None:
    part = gaussian("w")
    doubled = algebra.add(part, part)
    assert torch.allclose(doubled.cov, 4 * part.cov)
    independent = algebra.add(part, gaussian("v"))
    assert torch.allclose(independent.cov, 2 * part.cov), "the independent rule would be wrong for u + u"


def test_x_plus_relu_x_is_one_function() -> None:
    part = gaussian("w")
    both = algebra.add(part, algebra.apply(relu(), part))
    assert float(both.q) == pytest.approx(2.5, rel=1e-9)  # E[x^2 (2 if x > 0 else 1)^2] = (4 + 1) / 2
    assert float(part.q + 0.5 * part.q) == 1.5, "what independence would say"


def test_relu_after_a_post_activation_sum_uses_the_true_law() -> None:
    sum_ = algebra.add(algebra.apply(relu(), gaussian("w")), gaussian("v"))
    result = algebra.apply(relu(), sum_)
    u, v = torch.randn(2, 2_000_000, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    square = torch.relu(torch.relu(u) + v).square()
    error = float(square.std() / len(square) ** 0.5)
    assert float(result.q) == pytest.approx(float(square.mean()), abs=4 * error + 5e-3)
    assert abs(float(result.q) - float(sum_.q) / 2) > 0.3, "a zero-mean Gaussian would have half"
    assert result.how.name == "sampled"


def test_slices_of_one_layer_are_independent() -> None:
    row = predicted(Net(lambda a, b: F.glu(torch.cat([a, b], -1))), torch.randn(2, WIDTH)).nodes
    glu = next(r for r in row if "glu" in r.op or r.op == "mul")
    assert glu.q > 0
    part = gaussian("w")
    left, right = algebra.slice_part(part, 0, 4, "of 8"), algebra.slice_part(part, 4, 8, "of 8")
    assert left.independent(right) and not left.independent(part)
    assert torch.allclose(algebra.multiply(left, right).cov, part.cov.square())


BODIES = {
    "sum": lambda a, b: torch.relu(a) + b,
    "swish by hand": lambda a, b: a * torch.sigmoid(a) + b,
    "gate": lambda a, b: a * torch.sigmoid(b),
    "concat then relu": lambda a, b: torch.relu(torch.cat([2 * a, b], -1)[..., :WIDTH]),
    "relu after post-activation sum": lambda a, b: torch.relu(torch.relu(a) + b),
    "rotation": lambda a, b: a * 0.6 + torch.cat([-a[..., WIDTH // 2 :], a[..., : WIDTH // 2]], -1) * 0.8,
    "layer norm after relu": lambda a, b: F.layer_norm(torch.relu(a), (WIDTH,)),
    "rms norm after relu": lambda a, b: F.rms_norm(torch.relu(a), (WIDTH,)),
    "hardswish": lambda a, b: F.hardswish(3 * a),
    "product of shared": lambda a, b: a * torch.tanh(a),
}


@pytest.mark.parametrize("name", list(BODIES))
def test_bodies_agree_with_the_network(name: str) -> None:
    assert_agrees(Net(BODIES[name]), torch.randn(2, WIDTH))


CONVOLUTIONS = {
    "padded": nn.Conv2d(32, 64, 3, padding=1),
    "strided": nn.Conv2d(32, 64, 3, stride=2, padding=1),
    "dilated": nn.Conv2d(32, 64, 3, padding=2, dilation=2),
    "grouped": nn.Conv2d(32, 64, 3, padding=1, groups=4),
    "depthwise": nn.Conv2d(32, 64, 3, padding=1, groups=32),
    "circular": nn.Conv2d(32, 64, 3, padding=1, padding_mode="circular"),
    "transposed": nn.ConvTranspose2d(32, 64, 4, stride=2, padding=1),
}


@pytest.mark.parametrize("name", list(CONVOLUTIONS))
def test_convolutions_agree_with_the_network(name: str) -> None:
    model = nn.Sequential(nn.Conv2d(3, 32, 1), CONVOLUTIONS[name], nn.ReLU(), nn.Conv2d(64, 64, 1))
    assert_agrees(model, torch.randn(2, 3, 12, 12), draws=10)


def test_padding_lowers_the_average_q_by_the_taps_that_miss() -> None:
    conv = nn.Conv2d(8, 8, 3, padding=1, bias=False)
    nn.init.constant_(conv.weight, 1 / math.sqrt(72))
    row = predicted(conv, torch.randn(2, 8, 5, 5)).final
    assert row.q == pytest.approx((13 / 15) ** 2, rel=1e-6)  # 3 taps an axis over 5 positions miss twice


def test_average_pooling_mixes_positions() -> None:
    model = nn.Sequential(nn.Conv2d(3, 64, 1, bias=False), nn.ReLU(), nn.AdaptiveAvgPool2d(1))
    rows = predicted(model, torch.randn(2, 3, 8, 8)).nodes
    relu_row, pooled = rows[-2], rows[-1]
    expected = relu_row.q / 64 + (1 - 1 / 64) * relu_row.q * relu_row.c_positions
    assert pooled.q == pytest.approx(expected, rel=1e-12)


def test_max_pooling_agrees_with_the_network() -> None:
    model = nn.Sequential(nn.Conv2d(3, 256, 1), nn.ReLU(), nn.MaxPool2d(2), nn.Conv2d(256, 64, 1))
    assert_agrees(model, torch.randn(2, 3, 12, 12))


@pytest.mark.parametrize("mode", ["train", "eval"])
@pytest.mark.parametrize(
    "norm", [nn.BatchNorm2d(128), nn.GroupNorm(8, 128), nn.InstanceNorm2d(128), nn.GroupNorm(1, 128)], ids=repr
)
def test_norms_agree_with_the_network(norm: nn.Module, mode: str) -> None:
    model = nn.Sequential(nn.Conv2d(3, 128, 1), nn.ReLU(), norm, nn.Conv2d(128, 64, 1))
    assert_agrees(model, torch.randn(2, 3, 12, 12), mode=mode)


def test_layer_norm_subtracts_the_mean() -> None:
    """After a relu the mean is sqrt(1/(2 pi)); a rule without it (an RMS norm) is far off."""
    body = nn.Sequential(nn.Linear(64, 64, bias=False), nn.ReLU(), nn.LayerNorm(64, eps=0.0))
    row = predicted(body, torch.randn(2, 64)).final
    relu_c0 = 1 / math.pi
    mean_square = 1 / math.pi  # m^2 / q of a relu
    assert row.c[0] == pytest.approx((relu_c0 - mean_square) / (1 - mean_square), abs=1e-9)
    assert abs(row.c[0] - relu_c0) > 0.3


def test_attention_agrees_with_the_network() -> None:
    class Attention(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.qkv, self.out = nn.Linear(128, 384), nn.Linear(128, 128)

        def forward(self, x: Tensor) -> Tensor:
            q, k, v = self.qkv(x).reshape(x.shape[0], x.shape[1], 3, 4, 32).permute(2, 0, 3, 1, 4).unbind(0)
            y = F.scaled_dot_product_attention(q, k, v)
            return self.out(y.transpose(1, 2).reshape(x.shape))

    assert_agrees(Attention(), torch.randn(2, 12, 128), draws=10)


def test_dropout_grows_q_in_train_mode_only() -> None:
    model = nn.Sequential(nn.Linear(64, 64), nn.Dropout(0.25))
    rows = predicted(model, torch.randn(2, 64), "train").nodes
    assert rows[-1].q == pytest.approx(rows[-2].q / 0.75)
    rows = predicted(model, torch.randn(2, 64), "eval").nodes
    assert rows[-1].q == rows[-2].q


def test_an_unknown_operation_is_drawn_and_says_so() -> None:
    """Nothing counts as the identity: cumsum over channels of n unit Gaussians has mean q (n + 1) / 2."""

    class Cumulative(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a = nn.Linear(64, 64, bias=False)
            nn.init.orthogonal_(self.a.weight)

        def forward(self, x: Tensor) -> Tensor:
            return torch.cumsum(self.a(x), -1)

    row = predicted(Cumulative(), torch.randn(2, 64)).final
    assert row.how == "sampled"
    error = float(row.note.removeprefix("+-"))
    assert error < 0.5
    assert row.q == pytest.approx(32.5, rel=4 * error)


def test_a_tensor_minus_its_own_average_is_not_taken_as_independent() -> None:
    class Mixer(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a = nn.Conv2d(3, 128, 1, bias=False)

        def forward(self, x: Tensor) -> Tensor:
            y = self.a(x)
            return F.avg_pool2d(y, 2).repeat_interleave(2, -1).repeat_interleave(2, -2) - y

    row = predicted(Mixer(), torch.randn(2, 3, 8, 8)).final
    conv = predicted(Mixer(), torch.randn(2, 3, 8, 8)).nodes[1]
    assert row.how in ("sampled", "assumed")
    if row.how == "sampled":
        assert row.q == pytest.approx(0.75 * conv.q, rel=0.1)  # independence would say 1.25


def test_two_rules_for_one_operation_are_refused() -> None:
    with pytest.raises(kgraph.RuleError, match="two rules"):
        rule(torch.ops.aten.linear.default)(lambda context, x: x)


def test_the_ntk_matches_the_empirical_one() -> None:
    """Standard parametrization: sum over parameters of squared gradients, per output unit."""
    width, draws = 512, 12
    x = torch.randn(1, width, generator=torch.Generator().manual_seed(1))
    x = x / x.square().mean().sqrt()
    ratios = []
    for seed in range(draws):
        torch.manual_seed(seed)
        model = nn.Sequential(nn.Linear(width, width), nn.ReLU(), nn.Linear(width, 1))
        result = propagate(capture(model, torch.randn(2, width)))
        kernel = list(result.kernels().values())[-1]
        gradients = torch.autograd.grad(model(x)[0, 0], list(model.parameters()))
        measured = sum(float(g.double().square().sum()) for g in gradients)
        ratios.append(measured / float(kernel.merged.ntk[Pairs.SELF, SAME]))
    error = float(torch.tensor(ratios).std()) / draws**0.5
    assert sum(ratios) / draws == pytest.approx(1.0, abs=4 * error + 4 / width)
    assert error < 0.05


def test_a_wrong_rule_fails_the_comparison(monkeypatch: pytest.MonkeyPatch) -> None:
    """Negative control: taking x * sigmoid(x) as a product of independent tensors is noticed."""

    def independent(left: Part, right: Part, combine) -> None:
        return None

    monkeypatch.setattr(algebra, "_common_function", independent)
    monkeypatch.setattr(algebra, "entangled", lambda left, right: False)
    monkeypatch.setattr(Part, "independent", lambda self, other: True)
    assert isinstance(gaussian("w").expr, Gaussian)
    with pytest.raises(AssertionError):
        assert_agrees(Net(BODIES["product of shared"]), torch.randn(2, WIDTH))
