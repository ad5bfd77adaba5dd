"""Weights, gains, sums and norms after a transform."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import zoo
from torch import Tensor, nn
from transformed import QUICK, SLOW, assert_same, chain, record, shaped, state

import kgraph
from kgraph import DKS
from kgraph.capture import capture
from kgraph.modules import PerLocationNorm, WeightedSum
from kgraph.passes.remove_norms import NORMS


@pytest.mark.parametrize("name", [*QUICK, *SLOW])
def test_no_norm_is_left_and_weights_preserve_q(name: str) -> None:
    _, inputs, result = shaped(name)
    graph = capture(result, inputs, verify=False).module.graph
    assert not [n.name for n in graph.nodes if n.target in NORMS]
    for bias in [p for key, p in result.named_parameters() if key.endswith("bias") and p.ndim == 1]:
        assert not bias.any()
    for module in result.modules():
        if isinstance(module, nn.Linear):
            assert float(module.weight.detach().square().mean()) * module.in_features == pytest.approx(1, rel=0.05)


def test_missing_biases_are_added() -> None:
    model, inputs, result = shaped("dcgan_generator")
    added = set(dict(result.named_parameters())) - set(dict(model.named_parameters()))
    assert added == {"0.bias", "3.bias", "6.bias"}
    out = result.train()(inputs)
    out.sum().backward()
    assert all(dict(result.named_parameters())[name].grad is not None for name in added)


def test_shortcut_weight_zero_removes_skip_and_projection() -> None:
    model, inputs = zoo.build("resnet18")
    result = kgraph.transform(model, "tat", inputs, shortcut_weight=0)
    names = dict(result.named_parameters())
    assert not [name for name in names if "downsample" in name]
    assert not [m for m in result.modules() if isinstance(m, WeightedSum)]
    assert record(result).ledger.counts()["remove shortcut"] == 8
    result(inputs).sum().backward()
    assert all(p.grad is not None for p in names.values())


class Subtract(nn.Module):
    """x - f(x), and three equal branches."""

    def __init__(self, width: int = 16) -> None:
        super().__init__()
        self.enter = nn.Linear(width, width)
        self.inner = nn.Sequential(nn.Tanh(), nn.Linear(width, width))
        self.branches = nn.ModuleList(nn.Sequential(nn.Tanh(), nn.Linear(width, width)) for _ in range(3))
        self.leave = nn.Sequential(nn.Tanh(), nn.Linear(width, 4))

    def forward(self, x: Tensor) -> Tensor:
        x = self.enter(x)
        x = x - self.inner(x)
        one, two, three = (branch(x) for branch in self.branches)
        return self.leave(one + two + three)


def test_signs_and_equal_branches() -> None:
    result = kgraph.transform(Subtract(), DKS(zeta=1.05), torch.randn(2, 16))
    weights = [m.weights for m in result.modules() if isinstance(m, WeightedSum)]
    first = next(w for w in weights if min(w) < 0)
    assert first[1] < 0 < first[0] and sum(w * w for w in first) == pytest.approx(1)
    assert first[0] == pytest.approx(record(result).shortcut_weight)
    rest = sorted(tuple(round(w * w, 12) for w in own) for own in weights if own is not first)
    assert rest == [(0.5, 0.5), (round(2 / 3, 12), round(1 / 3, 12))]


@pytest.mark.filterwarnings("ignore::FutureWarning")
@pytest.mark.parametrize("kind", ["weight", "spectral", "old weight", "old spectral"])
def test_parametrizations_are_folded(kind: str) -> None:
    model = chain(nn.Tanh(), nn.Tanh())
    wrap: dict[str, Any] = {
        "weight": nn.utils.parametrizations.weight_norm,
        "spectral": nn.utils.parametrizations.spectral_norm,
        "old weight": nn.utils.weight_norm,
        "old spectral": nn.utils.spectral_norm,
    }
    wrap[kind](model[2])
    model(torch.randn(2, 16))
    before = state(model)
    result = kgraph.transform(model, "dks", torch.randn(2, 16))
    assert_same(before, state(model))
    assert {"2.weight", "2.bias"} <= set(dict(result.named_parameters()))
    assert not [name for name in result.state_dict() if "parametrizations" in name or name.startswith("2.weight_")]
    assert any("folded" in note and "2.weight" in note for note in record(result).ledger.notes)
    gram = result.get_parameter("2.weight") @ result.get_parameter("2.weight").T
    assert torch.allclose(gram, torch.eye(16), atol=1e-5)


def test_weight_standardization_is_removed() -> None:
    *_, result = shaped("nf_resnet50")
    ledger = record(result).ledger
    assert ledger.counts()["remove weight normalization"] == 53
    assert not [entry for entry in ledger.kept if "normaliz" in entry.what]
    weight = result.get_parameter("stages.0.0.conv1.weight").flatten(1)
    assert torch.allclose(weight @ weight.T, torch.eye(len(weight)), atol=1e-4)


def test_layer_scale_and_skip_init_are_neutralized() -> None:
    *_, convnext = shaped("convnext_atto")
    gains = [p for name, p in convnext.named_parameters() if name.endswith("gamma")]
    assert len(gains) == 12 and all(bool((p == 1).all()) for p in gains)
    assert record(convnext).ledger.counts()["neutralize gain"] == 12

    class SkipInit(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.enter, self.inner, self.leave = (nn.Linear(16, 16) for _ in range(3))
            self.gain = nn.Parameter(torch.zeros(()))

        def forward(self, x: Tensor) -> Tensor:
            x = self.enter(x)
            return self.leave(torch.tanh(x + self.gain * self.inner(torch.tanh(x))))

    result = kgraph.transform(SkipInit(), "dks", torch.randn(2, 16))
    assert float(result.get_parameter("gain").detach()) == 1 and record(result).ledger.unmet == ()


def test_position_embeddings_are_rescaled() -> None:
    class Positions(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.token, self.place = nn.Embedding(50, 32), nn.Parameter(torch.randn(8, 32))
            self.inner, self.leave = nn.Linear(32, 32), nn.Linear(32, 4)

        def forward(self, ids: Tensor) -> Tensor:
            return self.leave(torch.tanh(self.inner(self.token(ids) + self.place)))

    result = kgraph.transform(Positions(), "dks", torch.randint(0, 50, (2, 8)))
    assert record(result).ledger.unmet == () and record(result).ledger.counts()["restore q"] >= 1
    after = record(result).after.analysis
    assert after["linear"].q == pytest.approx(1, abs=1e-6)


def test_per_location_norm() -> None:
    model, inputs = zoo.build("cnn")
    result = kgraph.transform(model, "dks", inputs, per_location_norm=True)
    assert record(result).ledger.counts()["per-location norm"] == 1
    (norm,) = (m for m in result.modules() if isinstance(m, PerLocationNorm))
    assert torch.allclose(norm(inputs).square().mean(1), torch.ones(2, 32, 32), atol=1e-4)
    assert torch.allclose(result.eval()(inputs), result(7 * inputs), atol=1e-4)
