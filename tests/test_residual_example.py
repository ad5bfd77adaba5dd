"""The example of residual depth runs in its quick form, and its pictures are drawn."""

from __future__ import annotations

import importlib
from pathlib import Path

import pytest
import torch

EXAMPLES = Path(__file__).parents[1] / "examples"


def test_quick_form(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.syspath_prepend(EXAMPLES)
    pytest.importorskip("sklearn")
    layers, found, learnt = importlib.import_module("residual_depth").main(["--quick", "--figures", str(tmp_path)])
    iid = layers["iid"]
    assert iid[1.0].displacement.measured[-1] < 0.2 < iid[0.5].displacement.measured[-1] < 1.2
    assert iid[0.25].displacement.measured[-1] > 2
    assert bool((found.displacement[0] > 1).all()) and bool((found.displacement[-1] < 0).all())
    assert torch.equal(found.displacement.argmax(0), torch.zeros(9, dtype=torch.int64))
    final = {curve.name: curve.accuracy[-1] for curve in learnt}
    assert final["beta = 1/2"] > 0.5
    pictures = sorted(path.name for path in tmp_path.glob("*.png"))
    assert pictures == [f"residual_depth_{name}.png" for name in ("layers", "map", "training")]
