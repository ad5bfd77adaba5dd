"""`kgraph transform --out` and what reads it: without running what the file holds."""

from __future__ import annotations

import os
import pickle
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from typer.testing import CliRunner

import kgraph
from kgraph import saved
from kgraph.cli import app
from kgraph.errors import InputError, ModelError
from kgraph.saved import Recipe, SavedModel

pytestmark = pytest.mark.filterwarnings("ignore:.*LeafSpec.*:FutureWarning")  # PyTorch, about its own pytree

NET = """
from torch import nn
class Block(nn.Module):
    def __init__(self, width):
        super().__init__()
        self.inner, self.act = nn.Linear(width, width), nn.ReLU()
    def forward(self, x):
        return x + self.act(self.inner(x))
def build(width=8):
    return nn.Sequential(nn.Linear(8, width), Block(width), nn.Tanh(), nn.Linear(width, 2))
"""
ASKED = ["--input", "2,8", "--method", "dks", "--seed", "5"]


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "net.py").write_text(NET)
    return tmp_path


def run(*args: str) -> Any:
    return CliRunner().invoke(app, list(args))


def words(result: Any) -> str:
    return " ".join(result.stderr.replace("│", " ").split())


def transformed(*more: str) -> None:
    result = run("transform", "net.py:build", *ASKED, *more)
    assert result.exit_code == 0, result.output


def build(width: int = 8) -> nn.Module:
    space: dict[str, Any] = {"__name__": "net_for_load"}
    exec(NET, space)
    return space["build"](width)


def test_what_out_writes_is_read_by_all_commands(here: Path) -> None:
    transformed("--out", "shaped.pt", "--whole", "--json", "first.json")
    wanted = torch.load("shaped.pt", weights_only=False)
    transformed("--out", "shaped.pt", "--kwargs", "{}")
    read = run("analyze", "shaped.pt", "--input", "2,8", "--html", "r.html")
    assert read.exit_code == 0 and "Sequential" in read.stdout, read.output
    assert run("export", "shaped.pt", "--onnx", "m.onnx").exit_code == 0
    x = torch.randn(4, 8)
    onnxruntime = pytest.importorskip("onnxruntime")
    (found,) = onnxruntime.InferenceSession("m.onnx").run(None, {"input": x.numpy()})
    torch.testing.assert_close(torch.from_numpy(found), wanted.eval()(x).detach(), rtol=1e-4, atol=1e-5)


def test_the_file_holds_no_pickled_object(here: Path) -> None:
    transformed("--out", "shaped.pt")
    data = torch.load("shaped.pt", weights_only=True)  # would raise
    assert data["format"] == saved.FORMAT and data["recipe"]["model"] == "net.py:build"


def test_load_in_python_needs_only_the_model(here: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    transformed("--out", "shaped.pt", "--kwargs", '{"width": 16}')
    whole = kgraph.transform(build(16), "dks", torch.randn(2, 8), seed=6)  # other draws: all weights come from the file
    monkeypatch.chdir("/")
    (here / "net.py").write_text("raise RuntimeError('must not run')")
    shaped = kgraph.load(here / "shaped.pt", build(16))
    held = torch.load(here / "shaped.pt", weights_only=True)
    assert list(shaped.state_dict()) == list(held["state"]) == list(whole.state_dict())
    assert all(torch.equal(a, b) for a, b in zip(shaped.state_dict().values(), held["state"].values(), strict=True))
    assert not torch.equal(shaped(torch.ones(2, 8)), whole(torch.ones(2, 8)))
    assert shaped.training and shaped.kgraph.stale and "psi" in repr(shaped.kgraph.targets)
    loss = shaped(torch.ones(2, 8)).sum()
    loss.backward()


@pytest.mark.parametrize(
    ("change", "says"),
    [
        (lambda data: data["state"].pop("0.weight"), "0.weight is not in the file"),
        (lambda data: data["state"].update(new=torch.ones(2)), "new is only in the file"),
        (lambda data: data["state"].update({"0.weight": torch.ones(8, 9)}), r"0.weight is \(8, 8\).*\(8, 9\)"),
        (lambda data: data["state"].update({"0.weight": torch.ones(8, 8).half()}), "float16 in the file"),
        (lambda data: data["state"]["0.weight"].mul_(1.5), "does not give the outputs"),
        (lambda data: data["outputs"].clear(), "does not give the outputs"),
        (lambda data: data["recipe"].update(shortcut_weight=0.5), "not the one that was saved|the constant|outputs"),
        (lambda data: data.update(code="0"), "graph is not the one"),
    ],
)
def test_what_differs_is_named(change: Any, says: str, here: Path) -> None:
    transformed("--out", "shaped.pt")
    data = torch.load("shaped.pt", weights_only=True)
    kgraph.load("shaped.pt", build())  # the control
    change(data)
    torch.save(data, "other.pt")
    with pytest.raises(ModelError, match=says):
        kgraph.load("other.pt", build())
    result = run("analyze", "other.pt")
    assert result.exit_code == 2 and "Traceback" not in result.stderr


def test_another_model_is_named(here: Path) -> None:
    transformed("--out", "shaped.pt")
    with pytest.raises(ModelError, match=r"0\.weight is \(16, 8\)"):
        kgraph.load("shaped.pt", build(16))
    with pytest.raises(ModelError, match=r"torch\.nn\.Module"):
        kgraph.load("shaped.pt", "net.py:build")  # type: ignore[arg-type]


class Evil:
    """Unpickled, it makes a folder."""

    def __reduce__(self) -> Any:
        return os.mkdir, ("was-run",)


@pytest.mark.parametrize("content", [Evil(), {"format": saved.FORMAT, "recipe": Evil()}, nn.Linear(2, 2)])
def test_pickled_objects_need_trust(content: Any, here: Path) -> None:
    torch.save(content, "other.pt")
    for command in ("analyze", "export", "transform"):
        result = run(command, "other.pt")
        assert result.exit_code == 2 and "reading those runs code" in words(result) and "--trust" in words(result)
    with pytest.raises(InputError, match="runs code"):
        kgraph.load("other.pt", build())
    assert not (here / "was-run").exists()
    if isinstance(content, nn.Module):
        assert run("analyze", "other.pt", "--trust").exit_code == 0


FOREIGN = {
    "a package": ("torch.nn:ReLU", ""),
    "another folder's file": ("../elsewhere/net.py:build", ""),
    "a changed file": ("net.py:build", "0" * 64),
    "what the file imports": ("net.py:os.mkdir", None),
    "no factory": ("net", ""),
}


@pytest.mark.parametrize("kind", FOREIGN)
def test_a_file_does_not_choose_the_code_that_runs(kind: str, here: Path) -> None:
    """Only a factory that lies by the file, as it was, is run without --trust."""
    (here / "net.py").write_text(f"import os\n{NET}")
    (here.parent / "elsewhere").mkdir(exist_ok=True)
    (here.parent / "elsewhere" / "net.py").write_text("raise RuntimeError('was run')")
    transformed("--out", "shaped.pt")
    data = torch.load("shaped.pt", weights_only=True)
    name, source = FOREIGN[kind]
    data["recipe"] |= {"model": name, "kwargs": '{"path": "was-run"}'}
    data["recipe"]["source"] = data["recipe"]["source"] if source is None else source
    torch.save(data, "other.pt")
    result = run("analyze", "other.pt")
    assert result.exit_code in (1, 2) and not (here / "was-run").exists()
    assert any(says in words(result) for says in ("--trust", "itself", "does not name a model")), words(result)
    assert "was run" not in words(result)


def test_a_saved_file_finds_its_factory_beside_it(here: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    transformed("--out", "shaped.pt")
    (here / "work").mkdir()
    monkeypatch.chdir(here / "work")
    assert run("analyze", "../shaped.pt").exit_code == 0
    (here / "net.py").write_text(f"{NET}\n# another day\n")
    changed = run("analyze", "../shaped.pt")
    assert changed.exit_code == 2 and "as it was: net.py:build" in words(changed) and "kgraph.load(" in words(changed)
    monkeypatch.chdir(here)
    assert run("analyze", "shaped.pt", "--trust").exit_code == 0


def test_other_files_are_named(here: Path) -> None:
    torch.save(build().state_dict(), "weights.pt")
    torch.save(torch.ones(2), "tensor.pt")
    (here / "text.pt").write_text("hello")
    (here / "empty.pt").write_text("")
    (here / "cut.pt").write_bytes((here / "weights.pt").read_bytes()[:300])
    (here / "list.pkl").write_bytes(pickle.dumps([1, 2]))
    says = {
        "weights.pt": "holds weights only",
        "tensor.pt": "holds a Tensor",
        "missing.pt": "there is no file",
        "empty.pt": "cannot be read as a saved model",
    }
    for name in ("weights.pt", "tensor.pt", "missing.pt", "empty.pt", "text.pt", "cut.pt", "list.pkl"):
        for more in ([], ["--trust"]):
            result = run("analyze", name, *more)
            assert result.exit_code == 2 and says.get(name, "error: ") in words(result), result.output
            assert "Traceback" not in result.stderr and len(result.stderr.splitlines()) == 1
    assert "path/to/file.py:FACTORY" in words(run("analyze", "net.py"))
    with pytest.raises(InputError, match="path"):
        kgraph.load(0, build())  # type: ignore[arg-type]


def test_options_that_do_not_go_together(here: Path) -> None:
    transformed("--out", "shaped.pt")
    assert "leave it out" in words(run("analyze", "shaped.pt", "--kwargs", '{"width": 3}'))
    assert "--whole" in words(run("transform", "shaped.pt", "--out", "again.pt"))
    assert not Path("again.pt").exists()


class Noisy(nn.Module):
    """Draws noise in eval mode, has a non-persistent buffer and returns a dictionary."""

    mask: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.Sequential(nn.Linear(4, 4), nn.Tanh(), nn.Linear(4, 4))
        self.register_buffer("mask", torch.ones(4), persistent=False)

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        y = self.layers(x) * self.mask
        return {"mean": y, "count": torch.ones(2, dtype=torch.int64)}


def test_buffers_that_no_state_dict_keeps_are_compared(tmp_path: Path) -> None:
    model = Noisy()
    recipe = Recipe("net:Noisy", "{}", 0, "", ("tat",), None)
    saved.save(kgraph.transform(model, "tat", torch.randn(2, 4)), tmp_path / "a.pt", recipe)
    assert isinstance(saved.read(tmp_path / "a.pt"), SavedModel)
    kgraph.load(tmp_path / "a.pt", model)
    model.mask.mul_(2)
    with pytest.raises(ModelError, match="constant mask"):
        kgraph.load(tmp_path / "a.pt", model)


@pytest.mark.parametrize("method", ["edge-of-chaos", "ntk-chaos", "residual-scaling"])
def test_every_method_comes_back(method: str, here: Path) -> None:
    result = run("transform", "net.py:build", "--input", "2,8", "--method", method, "--out", "shaped.pt")
    assert result.exit_code == 0 and run("analyze", "shaped.pt").exit_code == 0, result.output
