"""The engine gives again what it gave: a few models here, all of them by `python tests/golden.py check`."""

from __future__ import annotations

from copy import deepcopy

import golden
import pytest
from zoo import ZOO


@pytest.mark.parametrize("name", ["mlp", "cnn", "hand_written", "two_inputs"])
def test_numbers_are_those_recorded(name: str) -> None:
    assert not golden.differences(name, golden.values(name))


def test_every_model_is_recorded() -> None:
    assert {path.stem for path in golden.FOLDER.glob("*.json")} == set(ZOO)


def test_changes_are_found() -> None:
    recorded = golden.recorded("cnn")
    node = next(name for name, row in recorded.items() if row["how"] in golden.TRUSTED)
    moved, worse, gone = deepcopy(recorded), deepcopy(recorded), deepcopy(recorded)
    moved[node]["numbers"][0] *= 1 + 1e-8
    worse[node]["how"] = "assumed"
    del gone[node]
    assert not golden.differences("cnn", recorded)
    assert all(len(golden.differences("cnn", rows)) == 1 for rows in (moved, worse, gone))
