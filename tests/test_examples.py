"""The examples run: their quick form, in this process, with the picture in a temporary folder."""

from __future__ import annotations

import importlib
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

EXAMPLES = Path(__file__).parents[1] / "examples"
PICTURE_LIMIT = 200_000  # bytes; pictures are part of the repository


@pytest.fixture
def load(monkeypatch: pytest.MonkeyPatch) -> Any:
    """Imports an example as if its folder were where it was started."""
    monkeypatch.syspath_prepend(EXAMPLES)

    def load_example(name: str) -> ModuleType:
        return importlib.import_module(name)

    return load_example


def test_deep_networks_train_only_when_transformed(load: Any, tmp_path: Path) -> None:
    figure = tmp_path / "figures" / "deep.png"
    results = load("deep_networks_on_digits").main(["--quick", "--figure", str(figure)])
    assert set(results) == {"MLP", "CNN"}
    for curves in results.values():
        final = {curve.name: curve.accuracy[-1] for curve in curves}
        assert final["kgraph, TAT"] > final["as it is"] + 0.3
    assert figure.stat().st_size < PICTURE_LIMIT


def test_resnet_without_skips_learns(load: Any, tmp_path: Path) -> None:
    pytest.importorskip("timm")
    figure = tmp_path / "resnet.png"
    curves = load("resnet50_without_skips").main(["--quick", "--figure", str(figure)])
    loss = {curve.name: curve.loss for curve in curves}["kgraph, TAT"]
    assert min(loss[-2:]) < loss[0] - 0.1
    assert figure.stat().st_size < PICTURE_LIMIT


@pytest.mark.parametrize("picture", sorted(EXAMPLES.glob("figures/*.png")), ids=lambda path: path.name)
def test_pictures_are_small(picture: Path) -> None:
    assert picture.stat().st_size < PICTURE_LIMIT
