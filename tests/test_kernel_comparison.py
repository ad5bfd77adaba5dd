"""Predictions beside measurements of the finite network: agreement, a negative control, table and picture."""

from __future__ import annotations

import dataclasses
import sys
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from kgraph import node_moments
from kgraph.empirical import empirical_ntk
from kgraph.errors import InputError
from kgraph.kernel_comparison import KernelComparison, compare


def mlp(width: int = 192) -> nn.Sequential:
    layers = [nn.Linear(12, width), nn.ReLU(), nn.Linear(width, width), nn.ReLU(), nn.Linear(width, 8)]
    return nn.Sequential(*layers)


def convnet() -> nn.Sequential:
    first, second = nn.Conv2d(3, 48, 3, padding=1), nn.Conv2d(48, 48, 3, padding=1, stride=2)
    return nn.Sequential(
        first, nn.ReLU(), nn.BatchNorm2d(48), second, nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(48, 4)
    )


@pytest.fixture(scope="module")
def comparison() -> KernelComparison:
    torch.manual_seed(0)
    return compare(mlp(), torch.randn(3, 12))


def test_mlp_agrees(comparison: KernelComparison) -> None:
    assert comparison.disagreements() == []
    assert [row.op for row in comparison.rows] == ["input", "linear", "relu", "linear", "relu", "linear"]
    assert [row.depth for row in comparison.rows] == [0, 0, 1, 1, 2, 2]
    assert comparison.rows[0].q_error == 0 and comparison.left_out == ()
    assert comparison.slack == pytest.approx(3 / 192)
    assert comparison.ntk.shape == comparison.ntk_measured.shape == comparison.ntk_error.shape == (3, 3)


@pytest.mark.parametrize("training", [False, True])
@pytest.mark.parametrize("parametrization", ["standard", "ntk"])
def test_smooth_images_through_a_convnet(training: bool, parametrization: str) -> None:
    """Three input channels and alike neighbours: what needs the signs of taps; batch statistics in train mode."""
    x = nn.functional.interpolate(torch.randn(4, 3, 3, 3), (8, 8), mode="bilinear")
    model = convnet().train(training)
    before = {name: t.clone() for name, t in model.state_dict().items()}
    result = compare(model, x, parametrization=parametrization)
    assert result.disagreements() == []
    assert result.mode == ("train" if training else "eval")
    assert all(torch.equal(t, before[name]) for name, t in model.state_dict().items())


def test_chance_correlations_of_taps_average_out(monkeypatch: pytest.MonkeyPatch) -> None:
    """One input channel: permutations alone keep the correlations of its taps, which smooth images see."""
    torch.manual_seed(6)
    model = nn.Sequential(nn.Conv2d(1, 32, 5, padding=2), nn.ReLU(), nn.Flatten(), nn.Linear(32 * 36, 4))
    x = nn.functional.interpolate(torch.randn(2, 1, 2, 2), (6, 6), mode="bilinear")
    assert compare(model, x, draws=16).disagreements() == []
    monkeypatch.setattr(node_moments, "flip_taps", lambda model, generator: None)
    assert compare(model, x, draws=16).disagreements() != []


def test_tokens_by_name() -> None:
    """Sequence outputs are compared at equal positions."""

    class Tokens(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.table, self.one, self.two = nn.Embedding(20, 128), nn.Linear(128, 128), nn.Linear(128, 40)

        def forward(self, ids: Tensor) -> Tensor:
            return self.two(torch.relu(self.one(self.table(ids))))

    result = compare(Tokens(), {"ids": torch.randint(0, 20, (2, 6))})
    assert result.disagreements() == []
    assert len(result.rows) == 4
    assert max(map(len, str(result).splitlines())) <= 100


def test_a_wrong_prediction_is_noticed(comparison: KernelComparison) -> None:
    """Negative control: an NTK without one layer's part, and a q of another weight variance, disagree."""
    x = torch.randn(3, 12)
    model = mlp()
    part = compare(model, x, draws=12)
    without = empirical_ntk(model, x, multipliers={"2.weight": 0.0}).matrix
    assert {d[0] for d in dataclasses.replace(part, ntk=without).disagreements()} == {"output"}
    row = comparison["relu_1"]
    wrong = dataclasses.replace(row, q=2 * row.q)
    found = dataclasses.replace(comparison, rows=(wrong,)).disagreements()
    assert [d[:2] for d in found] == [("relu_1", "q")]
    assert "!" in str(dataclasses.replace(comparison, rows=(wrong,)))


def test_table(comparison: KernelComparison) -> None:
    text = str(comparison)
    assert "0 disagreements" in text and "!" not in text
    assert max(map(len, text.splitlines())) <= 100
    assert all(row.name in text for row in comparison.rows)
    assert "(0, 1)" in text


def test_plot(comparison: KernelComparison, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    comparison.plot(tmp_path / "kernels.png")
    assert (tmp_path / "kernels.png").stat().st_size > 10_000
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    with pytest.raises(InputError, match="matplotlib"):
        comparison.plot(tmp_path / "again.png")


def test_refusals(comparison: KernelComparison) -> None:
    with pytest.raises(InputError, match="draws is 1"):
        compare(mlp(), torch.randn(2, 12), draws=1)
    with pytest.raises(InputError, match="one input"):
        compare(mlp(), torch.randn(1, 12))
    with pytest.raises(InputError, match="no node"):
        comparison["nope"]
