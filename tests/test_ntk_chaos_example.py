"""The DCGAN example runs: its quick form, in this process, with the picture in a temporary folder."""

from __future__ import annotations

import importlib
from pathlib import Path

import pytest

EXAMPLES = Path(__file__).parents[1] / "examples"


def test_dcgan_on_digits(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("sklearn")
    monkeypatch.syspath_prepend(EXAMPLES)
    figure = tmp_path / "figures" / "dcgan.png"
    order, chaos = importlib.import_module("dcgan_on_digits").main(["--quick", "--figure", str(figure)])
    assert order.r < 1 < chaos.r
    assert order.border < 0.95 and chaos.border == pytest.approx(1, abs=1e-3)
    assert order.checkerboard > 5 * chaos.checkerboard
    assert order.sample_checkerboard > 2 * chaos.sample_checkerboard
    assert figure.stat().st_size < 200_000
