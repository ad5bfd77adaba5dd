"""The tournament of benchmarks/training.py in short: its networks and arms are what they say, its record resumes."""

from __future__ import annotations

import math
import sys
from pathlib import Path

import pytest
import torch
from sklearn.datasets import load_digits
from torch import Tensor, nn

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "benchmarks"))

import training
from tournament import runs
from tournament.arms import ARMS, DynamicTanh
from tournament.nets import NETS
from tournament.runs import Outcome, Run, missing, record, recorded, train

NORMS = (nn.modules.batchnorm._BatchNorm, nn.LayerNorm, nn.GroupNorm)


@pytest.fixture
def digits(monkeypatch: pytest.MonkeyPatch) -> None:
    """Digits in place of clothes: 8x8 images on 32x32."""
    found = load_digits()
    x = nn.functional.interpolate(torch.tensor(found.images, dtype=torch.float32)[:, None] / 8 - 1, scale_factor=4)
    y = torch.tensor(found.target)

    def data() -> tuple[Tensor, Tensor, Tensor, Tensor]:
        return x[:1400], y[:1400], x[1400:], y[1400:]

    monkeypatch.setattr(runs, "_data", data)


@pytest.mark.parametrize("name", NETS)
def test_networks_take_images_and_he_has_no_norms(name: str) -> None:
    x = torch.randn(2, 1, 32, 32)
    model = NETS[name]()
    assert any(isinstance(module, NORMS) for module in model.modules())
    plain = ARMS["he"](NETS[name](), x, 0)
    assert plain is not None and not any(isinstance(module, NORMS) for module in plain.modules())
    assert model.eval()(x).shape == plain.eval()(x).shape == (2, 10)


def test_dynamic_tanh_replaces_layer_norms_only() -> None:
    x = torch.randn(2, 1, 32, 32)
    vit = ARMS["dyt"](NETS["vit"](), x, 0)
    assert vit is not None and not any(isinstance(module, nn.LayerNorm) for module in vit.modules())
    assert sum(isinstance(module, DynamicTanh) for module in vit.modules()) == 13  # two a block, one behind them
    assert ARMS["dyt"](NETS["resnet18"](), x, 0) is None


@pytest.mark.parametrize(("arm", "least", "most"), [("tat", 0.8, 1.0), ("dks", 0.8, 1.0), ("he", 0.0, 0.65)])
def test_fifty_layers_without_norms_learn_when_transformed(digits: None, arm: str, least: float, most: float) -> None:
    found = train(Run("mlp50", arm, "adam", 3e-4, 0), steps=120)
    assert least < found.accuracy <= most and math.isfinite(found.last)


def test_a_loss_that_explodes_is_recorded_as_such(digits: None) -> None:
    found = train(Run("dcgan", "original", "sgd", 1e9, 0), steps=20)
    assert found.accuracy == 0 and found.last == math.inf


def test_the_record_resumes_and_makes_a_table(tmp_path: Path) -> None:
    file = tmp_path / "runs.jsonl"
    grid = [Run("resnet18", "dks", "adam", rate, seed) for rate in (1e-3, 3e-3) for seed in (0, 1)]
    for run, accuracy in zip(grid[:3], (0.8, 0.7, 0.77), strict=True):
        record(run, Outcome(accuracy, 2.3, 0.5, 1.0), file)
    assert recorded(file)[grid[1]].accuracy == 0.7 and list(missing(grid, file)) == [grid[3]]
    assert training.best(recorded(file), "resnet18", "dks", "adam") == (0.77, [0.77], 3e-3)  # .8 and .7 are .75
    assert training.best(recorded(file), "resnet18", "he", "adam") is None
    shown = training.table(recorded(file), "adam")
    assert shown.row_count == 1
    assert training.markdown(recorded(file), "adam").splitlines()[-1] == "| resnet18 |  |  |  | 77.0 (0.003) |  |"


def test_the_plan_repeats_the_best_rate_and_its_neighbours() -> None:
    found = {Run("vit", "dks", "adam", rate, 0): Outcome(1 - abs(rate - 1e-2)) for rate in runs.RATES["adam"]}
    planned = training.plan(["vit"], ["dks"], "adam", 3, found)
    assert len({run for run in planned if run.seed == 0}) == 6
    assert {run.rate for run in planned if run.seed == 2} == {3e-3, 1e-2, 3e-2}
