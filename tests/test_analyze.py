"""What `kgraph.analyze` takes: weights computed by hooks, and models on the meta device."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import zoo
from torch import Tensor, nn
from torch.nn import functional
from transformed import assert_same, chain, state

import kgraph
from kgraph.errors import KGraphError
from kgraph.report import Report

# ---- weights computed by forward hooks or parametrizations

WRAPS: dict[str, Callable[..., nn.Module]] = {
    "old weight": nn.utils.weight_norm,
    "old spectral": nn.utils.spectral_norm,
    "weight": nn.utils.parametrizations.weight_norm,
    "spectral": nn.utils.parametrizations.spectral_norm,
}
SCALED = {"old weight": "weight_g", "weight": "parametrizations.weight.original0"}


def wrapped(kind: str) -> tuple[nn.Module, Tensor]:
    model = chain(nn.Tanh(), nn.Tanh())
    WRAPS[kind](model.get_submodule("2"))
    return model, torch.randn(2, 16)


@pytest.mark.filterwarnings("ignore::FutureWarning")
@pytest.mark.parametrize("mode", ["train", "eval"])
@pytest.mark.parametrize("kind", WRAPS)
def test_computed_weights_are_read_at_their_present_value(kind: str, mode: str) -> None:
    """q' = fan_in E[W^2] q + E[b^2] with the W that the module itself uses next."""
    model, x = wrapped(kind)
    model(x)
    if kind in SCALED:
        with torch.no_grad():
            model.get_parameter(f"2.{SCALED[kind]}").mul_(3)
    model.train(mode == "train")
    before = state(model)
    report = kgraph.analyze(model, x)
    assert_same(before, state(model))
    model(x)
    layer: Any = model.get_submodule("2")
    weight, bias = layer.weight.detach().double(), layer.bias.detach().double()
    expected = float(weight.square().mean() * 16) * report["tanh"].q + float(bias.square().mean())
    # one more power iteration moves a spectral norm a little; a weight norm not at all
    assert report["linear_1"].q == pytest.approx(expected, rel=0.05 if "spectral" in kind else 1e-5)
    noted = any("2.weight" in note and "forward hook" in note for note in report.analysis.notes)
    assert noted == kind.startswith("old")


@pytest.mark.filterwarnings("ignore::FutureWarning")
def test_a_hooked_module_called_twice() -> None:
    class Shared(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner, self.leave = nn.utils.weight_norm(nn.Conv1d(4, 4, 3)), nn.Conv1d(4, 2, 1)

        def forward(self, x: Tensor) -> Tensor:
            return self.leave(torch.relu(self.inner(self.inner(x))))

    report = kgraph.analyze(Shared(), torch.randn(2, 4, 9))
    assert [node.op for node in report.nodes] == ["input", "conv1d", "conv1d", "relu", "conv1d"]


# ---- the meta device


class Everything(nn.Module):
    """Layer scale, a class token and a position table beside an embedding."""

    def __init__(self) -> None:
        super().__init__()
        self.table = nn.Embedding(50, 32)
        self.place, self.gain = nn.Parameter(torch.randn(8, 32)), nn.Parameter(torch.full((32,), 1e-6))
        self.token = nn.Parameter(torch.randn(1, 1, 32))
        self.inner, self.leave = nn.Linear(32, 32), nn.Linear(32, 4)

    def forward(self, ids: Tensor) -> Tensor:
        x = self.table(ids) + self.place
        x = torch.cat([self.token.expand(len(x), -1, -1), x], 1)
        return self.leave(functional.relu(x + self.gain * self.inner(x)))


NORMS: dict[str, Callable[[], nn.Module]] = {
    "layer": lambda: nn.Sequential(nn.Linear(8, 8), nn.LayerNorm(8), nn.ReLU(), nn.Linear(8, 4)),
    "rms": lambda: nn.Sequential(nn.Linear(8, 8), nn.RMSNorm(8), nn.ReLU(), nn.Linear(8, 4)),
    "batch": lambda: nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU(), nn.Conv2d(8, 4, 1)),
    "group": lambda: nn.Sequential(nn.Conv2d(3, 8, 3), nn.GroupNorm(2, 8), nn.ReLU(), nn.Conv2d(8, 4, 1)),
    "instance": lambda: nn.Sequential(
        nn.Conv2d(3, 8, 3), nn.InstanceNorm2d(8, affine=True), nn.ReLU(), nn.Conv2d(8, 4, 1)
    ),
    "prelu": lambda: nn.Sequential(nn.Linear(8, 8), nn.PReLU(8), nn.Linear(8, 4)),
    "embedding": lambda: nn.Sequential(nn.Embedding(10, 8), nn.Linear(8, 4)),
    "transposed": lambda: nn.Sequential(nn.ConvTranspose2d(8, 8, 1, groups=2), nn.ReLU(), nn.Conv2d(8, 4, 1)),
}


def declared(model: nn.Module) -> nn.Module:
    """What the analysis says it assumes, as values: fan_in E[W^2] = 1, biases 0, everything else as built."""
    for module in model.modules():
        if isinstance(module, (nn.Linear, nn.Conv2d, nn.ConvTranspose2d)):
            fan_in = module.weight[0].numel() if not isinstance(module, nn.ConvTranspose2d) else 4
            module.weight.data.fill_(fan_in**-0.5)
            assert module.bias is not None
            module.bias.data.zero_()
        if isinstance(module, nn.Embedding):
            weight = module.weight.data
            module.weight.data = (weight - weight.mean()) / weight.std(unbiased=False)
    return model


@pytest.mark.parametrize("mode", ["train", "eval"])
@pytest.mark.parametrize("name", NORMS)
def test_a_meta_model_is_the_model_with_the_values_it_assumes(name: str, mode: str) -> None:
    with torch.device("meta"):
        empty = NORMS[name]()
    found, real = kgraph.analyze(empty, mode=mode), kgraph.analyze(declared(NORMS[name]()), mode=mode)
    assert all(p.is_meta for p in empty.parameters())
    for one, other in zip(found.nodes, real.nodes, strict=True):
        assert one.op == other.op and (one.q, one.slope) == pytest.approx((other.q, other.slope), rel=1e-5)
        assert (*one.c, one.ntk) == pytest.approx((*other.c, other.ntk), rel=1e-5, abs=1e-6)
    text = " ".join(found.analysis.notes)
    assert "fan_in E[W^2] = 1" in text and "not PyTorch's default" in text and "bias 0" in text
    assert not any("meta" in note for note in real.analysis.notes)


def notes_of(report: Report) -> str:
    return " ".join(report.analysis.notes)


def test_meta_resnet_takes_no_memory_and_says_what_it_assumed() -> None:
    with torch.device("meta"):
        model, _ = zoo.build("resnet18")
    report = kgraph.analyze(model, torch.randn(2, 3, 64, 64, device="meta"))
    real, inputs = zoo.timm_model("resnet18", zero_init_last=False)
    # batch norms undo the weights' scale: with all gains 1 the real model has the same c values and slope
    other = kgraph.analyze(real, inputs)
    one, two = ([node for node in r.nodes if node.op == "relu"][-1] for r in (report, other))
    assert one.c == pytest.approx(two.c, abs=0.02) and one.slope == pytest.approx(two.slope, rel=0.05)
    for words in ("gain 1 of norms: bn1.weight", "running variance 1", "bias 0 of affine layers: fc.bias"):
        assert words in notes_of(report)
    assert all(p.is_meta for p in model.parameters())


def test_meta_embedding_wider_than_memory() -> None:
    with torch.device("meta"):
        model = nn.Sequential(nn.Embedding(1 << 24, 1 << 16), nn.Linear(1 << 16, 1 << 16), nn.LayerNorm(1 << 16))
    report = kgraph.analyze(model, torch.zeros(2, 8, dtype=torch.long, device="meta"))
    assert report.final.q == pytest.approx(1, abs=1e-4) and report.final.c == pytest.approx((0, 0.5, 0.9), abs=1e-6)


def test_meta_parameters_of_no_known_layer() -> None:
    with torch.device("meta"):
        model = Everything()
    report = kgraph.analyze(model, torch.zeros(2, 8, dtype=torch.long, device="meta"))
    text = notes_of(report)
    assert "factor 1: gain" in text and "0 where it is added or concatenated" in text and "place" in text
    assert report["add_1"].q > 0


def test_meta_masks_have_no_stand_in() -> None:
    class Masked(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = nn.Linear(8, 8)
            self.register_buffer("mask", torch.ones(8, dtype=torch.bool))

        def forward(self, x: Tensor) -> Tensor:
            return torch.where(self.get_buffer("mask"), self.layer(x), 0.0)

    with torch.device("meta"):
        model = Masked()
    with pytest.raises(KGraphError, match=r"where needs the values of mask.*Build the model on the CPU"):
        kgraph.analyze(model)
