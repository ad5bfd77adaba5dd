"""ONNX export: the file reproduces the model, says what it should, leaks nothing; failures leave no trace."""

from __future__ import annotations

import json
import logging
import os
from pathlib import Path
from typing import Any

import onnx
import onnxruntime as ort
import pytest
import torch
from torch import Tensor, nn

import kgraph.export
from kgraph.errors import ExportError, FileError, InputError
from kgraph.export import OPSETS, OnnxExport, export_onnx
from kgraph.modules import PerLocationNorm, Scale, ShapedActivation, ShapedAttention, WeightedSum


def randn(*shape: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(0))


class Shaped(nn.Module):
    """A shaped residual network with every leaf module of kgraph."""

    def __init__(self) -> None:
        super().__init__()
        self.norm = PerLocationNorm(append_constant=True)
        self.conv = nn.Conv2d(4, 8, 3, padding=1)
        self.act = ShapedActivation(nn.Softplus(), 0.1876, 0.4069, -0.9213, 8.8787)
        self.act2 = ShapedActivation(nn.Softplus(beta=2.0), 0.1876, 0.4069, -0.9213, 8.8787)
        self.branch = nn.Conv2d(8, 8, 1)
        self.sum = WeightedSum([0.8, 0.6])
        self.attention = ShapedAttention(2)
        self.gain = Scale(1.5)

    def forward(self, x: Tensor) -> Tensor:
        y = self.act(self.conv(self.norm(x)))
        y = self.act2(self.sum(y, self.branch(y)))
        heads = y.reshape(y.shape[0], 2, 4, -1).mT
        return self.gain(self.attention(heads, heads, heads)).mean((1, 2))


def small_cnn() -> nn.Sequential:
    return nn.Sequential(
        nn.Conv2d(3, 8, 3, bias=False),
        nn.BatchNorm2d(8),
        nn.ReLU(),
        nn.Dropout(),
        nn.Flatten(),
        nn.Linear(288, 5),
    )


def exported_graph() -> nn.Module:
    model, dynamic = small_cnn().eval(), ({0: torch.export.Dim.DYNAMIC},)
    return torch.export.export(model, (randn(2, 3, 8, 8),), dynamic_shapes=dynamic, strict=False).module()


def tiny_bert() -> nn.Module:
    transformers = pytest.importorskip("transformers")
    sizes = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 64}
    return transformers.BertModel(transformers.BertConfig(vocab_size=100, max_position_embeddings=32, **sizes))


def ids() -> Tensor:
    return torch.arange(14).reshape(2, 7)


def session_of(path: Path) -> ort.InferenceSession:
    return ort.InferenceSession(str(path), providers=["CPUExecutionProvider"])


def assert_no_local_path(path: Path) -> None:
    content = path.read_bytes()
    for leak in (
        str(Path(torch.__file__).parent),
        str(Path(__file__).parent),
        str(Path.home()),
        "site-packages",
        '.py", line',
    ):
        assert leak.encode() not in content, leak


@pytest.fixture
def target(tmp_path: Path) -> Path:
    return tmp_path / "model.onnx"


@pytest.mark.parametrize(
    ("build", "inputs"),
    [
        (small_cnn, randn(2, 3, 8, 8)),
        (small_cnn, (randn(1, 3, 8, 8),)),
        (small_cnn, randn(3, 3, 8, 8)),
        (exported_graph, (randn(2, 3, 8, 8),)),
        (Shaped, randn(2, 3, 5, 5)),
        (tiny_bert, {"input_ids": ids()}),
        (tiny_bert, {"attention_mask": torch.ones_like(ids()), "input_ids": ids()}),
    ],
)
def test_file_reproduces_the_model_at_any_batch_size(build: Any, inputs: Any, target: Path) -> None:
    model = build()
    result = export_onnx(model, target, inputs)
    assert result == OnnxExport(target, result.max_abs_error, result.batch_sizes, 20)
    assert result.max_abs_error < 1e-5 and len(set(result.batch_sizes)) == 2
    assert [f.name for f in target.parent.iterdir()] == [target.name]
    assert_no_local_path(target)
    # A batch size that the export itself did not try, by names and an evaluation of our own.
    named = inputs if isinstance(inputs, dict) else {"": inputs if isinstance(inputs, Tensor) else inputs[0]}
    wide = {name: torch.cat([tensor] * 7)[:7] for name, tensor in named.items()}
    kgraph.export._set_training(model, False)
    with torch.no_grad():
        wanted = model(**wide) if "" not in wide else model(wide[""])
    session = session_of(target)
    feed = {entry.name: wide.get(entry.name, next(iter(wide.values()))).numpy() for entry in session.get_inputs()}
    first = torch.from_numpy(session.run(None, feed)[0])
    torch.testing.assert_close(first, wanted if isinstance(wanted, Tensor) else wanted[0], rtol=1e-4, atol=1e-5)


def test_timm_resnet(target: Path) -> None:
    timm = pytest.importorskip("timm")
    model = timm.create_model("resnet18")
    assert export_onnx(model, target, randn(2, 3, 64, 64)).max_abs_error < 1e-4
    assert model.training
    assert_no_local_path(target)


def test_softplus_is_one_node_and_shaped_constants_cost_no_more(target: Path) -> None:
    export_onnx(nn.Sequential(ShapedActivation(nn.Softplus(), 0.2, 0.4, -0.9, 8.9)), target, randn(2, 3))
    assert [node.op_type for node in onnx.load(target).graph.node] == ["Mul", "Add", "Softplus", "Mul", "Add"]


@pytest.mark.parametrize("opset", OPSETS)
def test_every_opset_is_honoured(opset: int, target: Path) -> None:
    assert export_onnx(nn.Linear(3, 4), target, randn(2, 3), opset=opset).opset == opset
    assert {entry.domain: entry.version for entry in onnx.load(target).opset_import}[""] == opset


class Mixed(nn.Module):
    """Keyword arguments out of order, a flag, nested outputs, a None, a non-batched tensor."""

    def forward(
        self, a: Tensor, table: Tensor, b: Tensor | None = None, *, double: bool = False
    ) -> dict[str, Tensor | tuple[Tensor, Tensor] | None]:
        assert b is not None
        total = (2 * a if double else a) - b @ table
        return {"total": total, "none": None, "pair": (a.isnan(), b.sum(0))}


def test_keywords_flags_and_nested_outputs(target: Path) -> None:
    inputs = {"b": randn(2, 4), "double": True, "table": randn(4, 3), "a": randn(2, 3)}
    assert export_onnx(Mixed(), target, inputs).max_abs_error < 1e-6
    session = session_of(target)
    dims = {entry.name: entry.shape for entry in session.get_inputs()}
    assert dims == {"a": ["batch", 3], "table": [4, 3], "b": ["batch", 4]}


def test_report_is_readable_by_onnxruntime(target: Path) -> None:
    report = {"method": "tat", "q": [1.0, 0.98], "name": "größe"}
    export_onnx(nn.Linear(3, 4), target, randn(2, 3), report=report)
    assert json.loads(session_of(target).get_modelmeta().custom_metadata_map["kgraph"]) == report
    export_onnx(nn.Linear(3, 4), target, randn(2, 3))
    assert "kgraph" not in session_of(target).get_modelmeta().custom_metadata_map


def test_training_flags_are_restored_one_by_one(target: Path) -> None:
    model, norm = small_cnn().train(), nn.BatchNorm2d(8).eval()
    model[1] = norm
    flags = [module.training for module in model.modules()]
    export_onnx(model, target, randn(2, 3, 8, 8))
    assert [module.training for module in model.modules()] == flags
    with pytest.raises(ExportError):
        export_onnx(nn.Sequential(model, Wrong()), target, randn(2, 3, 8, 8))
    assert [module.training for module in model.modules()] == flags
    assert norm.num_batches_tracked is not None and int(norm.num_batches_tracked) == 0


def test_console_and_loggers_stay_quiet(target: Path, capfd: pytest.CaptureFixture[str]) -> None:
    level = logging.getLogger("torch.onnx").level
    export_onnx(nn.Linear(3, 4), target, randn(2, 3))
    assert capfd.readouterr() == ("", "") and logging.getLogger("torch.onnx").level == level


def test_large_weights_go_to_a_second_file(target: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(kgraph.export, "SINGLE_FILE_LIMIT", 0)
    model = nn.Linear(300, 400)
    export_onnx(model, target, randn(2, 300))
    assert sorted(f.name for f in target.parent.iterdir()) == ["model.onnx", "model.onnx.data"]
    (found,) = session_of(target).run(None, {"input": randn(2, 300).numpy()})
    torch.testing.assert_close(torch.from_numpy(found), model(randn(2, 300)).detach(), rtol=1e-4, atol=1e-5)


class Wrong(nn.Module):
    """Computes one thing in torch and another in the exported graph."""

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        off = 1e-2 if torch.compiler.is_exporting() else 0.0
        return 2 * x, x + off


class FixedBatch(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x.reshape(2, -1)[:, :3] * int(x.shape[0])


class Unexportable(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x if x.sum().item() > 0 else -x


@pytest.mark.parametrize(
    ("model", "message"),
    [
        (Wrong(), "Output '.*' differs by 0.01 at batch size 2"),
        (FixedBatch(), "The model itself does not run at batch size 3"),
        (Unexportable(), "could not be exported"),
    ],
)
@pytest.mark.parametrize("existing", [b"precious", None])
def test_failure_leaves_no_trace(model: nn.Module, message: str, existing: bytes | None, target: Path) -> None:
    if existing is not None:
        target.write_bytes(existing)
    with pytest.raises(ExportError, match=message):
        export_onnx(model, target, randn(2, 3))
    left = {f.name: f.read_bytes() for f in target.parent.iterdir()}
    assert left == ({} if existing is None else {"model.onnx": existing})


def test_tolerance_is_relative_to_the_output_scale(target: Path) -> None:
    export_onnx(Wrong(), target, randn(2, 3), tolerance=0.02)
    export_onnx(Wrong(), target, 1e4 * randn(2, 3))
    export_onnx(nn.Linear(64, 3).half(), target, randn(2, 64).half())


def test_paths_that_cannot_be_written_fail_before_the_export(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def never(*_: Any, **__: Any) -> None:
        raise AssertionError("exported")

    monkeypatch.setattr(torch.onnx, "export", never)
    for path, message in [(tmp_path / "no" / "m.onnx", "there is no folder"), (tmp_path, "is a folder")]:
        with pytest.raises(FileError, match=message):
            export_onnx(nn.Linear(3, 4), path, randn(2, 3))
    monkeypatch.setattr("tempfile.mkdtemp", lambda *_, **__: os.mkdir(tmp_path))  # an OSError, also as root
    with pytest.raises(FileError, match="cannot write"):
        export_onnx(nn.Linear(3, 4), tmp_path / "m.onnx", randn(2, 3))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"opset": 17}, "opset must be 18 to 23"),
        ({"opset": 24}, "opset must be 18 to 23"),
        ({"tolerance": 0.0}, "tolerance"),
        ({"report": {"x": object()}}, "JSON"),
        ({"example_inputs": (randn(2, 3), randn(2, 3))}, "do not fit"),
        ({"example_inputs": {"other": randn(2, 3)}}, "do not fit"),
        ({"example_inputs": randn(0, 3)}, "one or more rows"),
        ({"model": torch.relu}, "nn.Module"),
    ],
)
def test_arguments_outside_their_domain(options: dict[str, Any], message: str, target: Path) -> None:
    arguments: dict[str, Any] = {"model": nn.Linear(3, 4), "example_inputs": randn(2, 3), **options}
    with pytest.raises(InputError, match=message):
        export_onnx(arguments.pop("model"), target, arguments.pop("example_inputs"), **arguments)
    assert not list(target.parent.iterdir())


def test_missing_onnx_names_the_extra(target: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(ExportError, match=r"pip install 'kgraph\[onnx\]'"):
        export_onnx(nn.Linear(3, 4), target, randn(2, 3))
