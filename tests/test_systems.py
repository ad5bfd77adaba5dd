"""Methods alone and together: what composes, what is refused, and what the record of several says."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

import pytest
import torch
from torch import nn

import kgraph
from kgraph.errors import InputError
from kgraph.passes.base import Pass
from kgraph.passes.reinitialize import Reinitialize
from kgraph.passes.scale_residuals import ScaleResiduals
from kgraph.systems import System, resolve_methods
from kgraph.systems.system import Aspect


@dataclass(frozen=True)
class Weights(System):
    """Gaussian weights, nothing else."""

    label: ClassVar[str] = "test-weights"

    @property
    def sets(self) -> frozenset[Aspect]:
        return frozenset({"weights"})

    def passes(self) -> tuple[Pass, ...]:
        return (Reinitialize("gaussian"),)


@dataclass(frozen=True)
class Sums(System):
    """Residual sums of a given shortcut weight."""

    label: ClassVar[str] = "test-sums"
    weight: float = 0.9

    @property
    def sets(self) -> frozenset[Aspect]:
        return frozenset({"residuals"})

    def passes(self) -> tuple[Pass, ...]:
        return (ScaleResiduals(self.weight),)


class Residual(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(64, 64), nn.Linear(64, 64)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.first(x)
        return x + self.second(torch.tanh(x))


X = torch.randn(3, 64, generator=torch.Generator().manual_seed(0))


def test_two_systems_do_both() -> None:
    shaped: Any = kgraph.transform(Residual(), [Weights(), Sums(0.6)], X)
    record = shaped.kgraph
    whats = [change.what for change in record.ledger.changes]
    assert any("re-draw linear" in what for what in whats) and any("residual" in what for what in whats)
    assert record.method == (Weights(), Sums(0.6)) and record.targets is None and record.shortcut_weight is None
    assert "Weights() + Sums(weight=0.6)" in record.ledger.method
    assert record.after.analysis["linear"].q == pytest.approx(record.before.analysis["x"].q, rel=0.2)
    assert torch.isfinite(shaped(X)).all() and "Weights" in str(record.comparison)


def test_one_system_by_name() -> None:
    shaped: Any = kgraph.transform(Residual(), "test-weights", X)
    assert shaped.kgraph.method == Weights()


@pytest.mark.parametrize(
    ("methods", "message"),
    [
        ([Weights(), Weights()], "Weights and Weights both set the model's weights"),
        (["dks", Sums()], "DKS and Sums both set the model's residuals"),
        ([], "list of methods is empty"),
        ([Weights(), "nonsense"], "unknown method 'nonsense'"),
    ],
    ids=["same", "dks", "empty", "unknown"],
)
def test_refused(methods: Any, message: str) -> None:
    with pytest.raises(InputError, match=message):
        resolve_methods(methods)
    with pytest.raises(InputError, match=message):
        kgraph.transform(Residual(), methods, X)


def test_options_of_shaping_are_refused() -> None:
    with pytest.raises(InputError, match="shortcut_weight is an option of DKS and TAT"):
        kgraph.transform(Residual(), Weights(), X, shortcut_weight=0.5)
    with pytest.raises(InputError, match="has no shaping targets"):
        kgraph.shaping_targets(Residual(), Weights(), X)  # type: ignore[arg-type]
