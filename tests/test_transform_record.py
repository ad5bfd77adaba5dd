"""The record of a transform: what it says stays true, through copies, pickles and loaded state dicts."""

from __future__ import annotations

import copy
import io
import json
from collections.abc import Callable

import pytest
import torch
from torch import nn
from transformed import chain, record

import kgraph
from kgraph.emitted import EmittedModule
from kgraph.record import STALE

pytestmark = pytest.mark.filterwarnings("ignore:.*LeafSpec.*:FutureWarning")  # PyTorch, about its own pytree


def pickled(module: EmittedModule) -> EmittedModule:
    file = io.BytesIO()
    torch.save(module, file)
    file.seek(0)
    return torch.load(file, weights_only=False)


COPIES: dict[str, Callable[[EmittedModule], EmittedModule]] = {
    "itself": lambda module: module,
    "deepcopy": copy.deepcopy,
    "torch.save": pickled,
    "copy of a copy": lambda module: copy.deepcopy(pickled(copy.deepcopy(module))),
}


def fresh() -> tuple[nn.Module, EmittedModule]:
    model = chain(nn.ReLU(), nn.ReLU())
    return model, kgraph.transform(model, "tat", torch.randn(2, 16))


@pytest.mark.parametrize("how", COPIES)
def test_loading_a_state_dict_is_noted(how: str) -> None:
    model, result = fresh()
    module = COPIES[how](result)
    assert record(module).stale == "" and STALE not in str(record(module).after)
    assert record(module).after is record(module).emitted
    module.load_state_dict(model.state_dict())
    assert record(module).stale == STALE
    assert record(module).after.analysis.notes[0] == STALE
    assert record(module).after.nodes == record(module).emitted.nodes
    assert record(module).comparison.ledger.notes[0] == STALE and "kgraph.analyze" in str(record(module).comparison)
    assert record(module).before.analysis.notes == ()


@pytest.mark.parametrize("how", COPIES)
def test_the_note_survives(how: str) -> None:
    model, result = fresh()
    result.load_state_dict(model.state_dict())
    assert record(COPIES[how](result)).stale == STALE


@pytest.mark.parametrize("how", ["deepcopy", "torch.save"])
def test_copies_are_noted_apart(how: str) -> None:
    model, result = fresh()
    other = COPIES[how](result)
    other.load_state_dict(model.state_dict())
    assert record(other).stale and not record(result).stale


def test_loading_into_a_part_is_noted_and_a_failed_load_is_too() -> None:
    model, result = fresh()
    result.get_submodule("0").load_state_dict(model.get_submodule("0").state_dict())
    assert record(result).stale
    _, result = fresh()
    with pytest.raises(RuntimeError, match="Missing key"):
        result.load_state_dict({"0.weight": torch.zeros(16, 16)})
    assert record(result).stale and not result.get_parameter("0.weight").any()


def test_what_does_not_load_is_not_noted() -> None:
    _, result = fresh()
    result(torch.randn(2, 16)).sum().backward()
    result.state_dict()
    result.train().eval().double().float()
    assert record(result).stale == ""


def test_analyze_describes_the_module_as_it_is() -> None:
    _, result = fresh()
    result.load_state_dict({key: 2 * value for key, value in result.state_dict().items()})
    now, then = kgraph.analyze(result.eval(), torch.randn(2, 16)), record(result).after
    assert now.final.q == pytest.approx(64 * then.final.q, rel=1e-6)  # three linear layers of twice the weights
    assert now.analysis.notes == ()


def test_an_export_never_stores_a_stale_report(tmp_path: object) -> None:
    onnx = pytest.importorskip("onnx")
    _, result = fresh()
    result.load_state_dict({key: 2 * value for key, value in result.state_dict().items()})
    path = f"{tmp_path}/model.onnx"
    kgraph.export_onnx(result.eval(), path, torch.randn(2, 16))
    stored = {entry.key: entry.value for entry in onnx.load(path).metadata_props}
    nodes = json.loads(stored["kgraph"])["nodes"]
    assert nodes[-1]["q"] == pytest.approx(64, rel=1e-6)
