"""What a newcomer ran into: named errors instead of tracebacks, nothing that silently does nothing."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import zoo
from torch import Tensor, nn
from typer.testing import CliRunner

import kgraph
from kgraph.cli import app
from kgraph.errors import InputError, ModelError
from kgraph.naming import NamingError, load_model

SOURCE = "from torch import nn\ndef build(): return nn.Sequential(nn.Linear(4, 4), nn.Tanh())"


def mlp() -> nn.Module:
    return nn.Sequential(nn.Linear(8, 16), nn.ReLU(), nn.Linear(16, 16), nn.ReLU(), nn.Linear(16, 3))


class Block(nn.Module):
    """h + W2 tanh(W1 norm(h)), the sum going into the next block's norm."""

    def __init__(self, width: int = 8) -> None:
        super().__init__()
        self.norm, self.first, self.last = nn.LayerNorm(width), nn.Linear(width, width), nn.Linear(width, width)

    def forward(self, h: Tensor) -> Tensor:
        return h + self.last(torch.tanh(self.first(self.norm(h))))


@pytest.mark.parametrize("method", [kgraph.NTKChaos(), kgraph.EdgeOfChaos(remove_norms=True)])
def test_norms_behind_scaled_residuals_are_removed(method: Any) -> None:
    """The norm reads a sum that `ResidualScaling` made, which has no kernel from before the passes."""
    model = nn.Sequential(nn.Linear(8, 8), Block(), Block(), Block(), nn.Linear(8, 3))
    shaped = kgraph.transform(model, [kgraph.ResidualScaling(), method], torch.randn(2, 8))
    counts = shaped.kgraph.ledger.counts()
    assert counts["remove LayerNorm"] == counts["scale residual branch"] == 3
    assert not any(isinstance(module, nn.LayerNorm) for module in shaped.modules())


class Activated(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv, self.norm = nn.Conv2d(8, 8, 3, padding=1), nn.BatchNorm2d(8)

    def forward(self, x: Tensor) -> Tensor:
        return x + torch.relu(self.norm(self.conv(x)))


@pytest.mark.parametrize("training", [True, False])
def test_before_and_after_are_of_one_mode(training: bool) -> None:
    """Norms stay in place under ResidualScaling: batch statistics before, running ones after would tell nothing."""
    x = torch.randn(2, 8, 6, 6)
    shaped = kgraph.transform(nn.Sequential(Activated(), Activated()).train(training), "residual-scaling", x)
    record = shaped.kgraph
    assert record.before.analysis.mode == record.after.analysis.mode == ("train" if training else "eval")
    assert record.after.final.q == pytest.approx(kgraph.analyze(shaped, x).final.q, rel=1e-9)


def test_chains_of_one_block_are_no_silent_success() -> None:
    model = nn.Sequential(Block(), nn.Linear(8, 3))
    ledger = kgraph.transform(model, "residual-scaling", torch.randn(2, 8)).kgraph.ledger
    assert not ledger.changes
    assert "every chain of residual blocks has one block" in ledger.unmet[0]


def test_exponent_of_an_unscaled_chain_is_readable() -> None:
    text = str(kgraph.residual_depth(nn.Sequential(Block(), Block()), torch.randn(2, 8), draws=2))
    assert "alpha = 1 = L^0\n" in text


def test_isometry_of_attention_is_measured() -> None:
    """Forward derivatives do not exist for fused attention: the composite form is taken."""
    model, x = zoo.build("vit_tiny")
    report = kgraph.isometry(model, x, probes=2)
    assert report.measured is not None
    assert report.measured.mean > 0


class _Attention(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first, self.last = nn.Linear(8, 8), nn.Linear(8, 8)

    def forward(self, x: Tensor) -> Tensor:
        h = torch.tanh(self.first(x))
        return torch.tanh(self.last(nn.functional.scaled_dot_product_attention(h, h, h)))


def test_isometry_of_attention_has_the_jacobian() -> None:
    torch.manual_seed(0)
    model, x = _Attention(), torch.randn(1, 4, 8)
    report = kgraph.isometry(model, x, start="input", end="output")
    jacobian: Any = torch.autograd.functional.jacobian(model.double(), x.double())
    values = torch.linalg.svdvals(jacobian.reshape(32, 32))
    assert report.measured is not None
    assert report.measured.mean == pytest.approx(float(values.square().mean()), rel=1e-6)


@pytest.mark.parametrize(
    ("x", "what"),
    [
        (torch.full((2, 8), float("nan")), "the Jacobian .* cannot be measured: a value there is not finite"),
        (torch.zeros(0, 8), "the example inputs have no rows"),
    ],
)
def test_isometry_names_unusable_inputs(x: Tensor, what: str) -> None:
    with pytest.raises(InputError, match=what):
        kgraph.isometry(mlp(), x)


@pytest.mark.parametrize("call", [kgraph.isometry, kgraph.montecarlo, kgraph.empirical_ntk])
def test_nothing_is_measured_on_the_meta_device(call: Any) -> None:
    with torch.device("meta"):
        model = mlp()
    with pytest.raises(ModelError, match=r"0\.weight is on the meta device"):
        call(model, torch.empty(2, 8, device="meta"))


@pytest.mark.parametrize("x", [torch.randn(2, 7), torch.ones(2, 8, dtype=torch.long)])
def test_empirical_ntk_names_wrong_inputs(x: Tensor) -> None:
    with pytest.raises(InputError, match=r"Sequential does not run on the example inputs of shapes"):
        kgraph.empirical_ntk(mlp(), x)


def test_cli_names_a_missing_folder(tmp_path: Path) -> None:
    (tmp_path / "own.py").write_text(
        "from torch import nn\ndef build(): return nn.Sequential(nn.Linear(4, 4), nn.Tanh())"
    )
    out = tmp_path / "missing" / "model.pt"
    result = CliRunner().invoke(app, ["transform", f"{tmp_path / 'own.py'}:build", "--out", str(out)])
    assert result.exit_code != 0
    assert "cannot write" in result.output
    assert "Traceback" not in result.output


@pytest.mark.filterwarnings("ignore:.*LeafSpec.*:FutureWarning")
def test_cli_saves_what_torch_loads(tmp_path: Path) -> None:
    (tmp_path / "mine.py").write_text(
        "from torch import nn\ndef build(): return nn.Sequential(nn.Linear(4, 4), nn.Tanh())"
    )
    out = tmp_path / "model.pt"
    result = CliRunner().invoke(app, ["transform", f"{tmp_path / 'mine.py'}:build", "--whole", "--out", str(out)])
    assert result.exit_code == 0, result.output
    assert torch.load(out, weights_only=False)(torch.randn(2, 4)).shape == (2, 4)


def test_broken_timm_is_named(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """A torchvision that was built for another torch raises a RuntimeError when timm imports it."""
    (tmp_path / "timm.py").write_text("raise RuntimeError('operator torchvision::nms does not exist')")
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.delitem(__import__("sys").modules, "timm", raising=False)
    with pytest.raises(NamingError, match="importing timm for 'timm:resnet18' failed: RuntimeError: operator torchv"):
        load_model("timm:resnet18")


def test_demo_says_what_is_promised_and_what_its_width_makes_of_it(tmp_path: Path) -> None:
    """What the average keeps of three colours, and what a width of 16 to 64 makes of the plan."""
    result = CliRunner().invoke(app, ["demo", "--out", str(tmp_path)])
    assert result.exit_code == 0, result.output
    said = " ".join(result.output.split())
    assert "not met: C(0) from input to linear is planned to be 0, and the analysis finds 0.04" in said
    assert said.count("is planned to be") == 1 and "an average over positions keeps of two inputs" in said
    assert "C(0) = 0, slope 1.5 and q = 1 at the output" in said and "finite width: at width" in said
