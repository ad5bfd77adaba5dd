"""The command line: what it calls, what it writes, how it fails."""

from __future__ import annotations

import io
import json
import pickle
import re
import sys
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from rich.console import Console
from synthetic import certificate, ledger, resnet, shaped
from torch import nn
from typer.testing import CliRunner

import kgraph
from kgraph import Certificate, terminal
from kgraph.cli import app
from kgraph.demo import DemoNet, model_and_input
from kgraph.errors import CaptureError
from kgraph.report import Comparison, Report
from kgraph.terminal import bar, spinner

FILE = "from torch import nn\ndef make(width=3): return nn.Linear(width, 2)\nnet = nn.ReLU()\nnothing = 3\n"


def failing(*draws: int, **options: Any) -> Certificate:
    return certificate(0.5)


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> list[tuple[str, Any, Any, dict[str, Any]]]:
    """A stand-in for the public calls that notes what it was asked for."""
    seen: list[tuple[str, Any, Any, dict[str, Any]]] = []
    before, after = Report(resnet(5)), Report(shaped(resnet(5)))

    def analyze(model: nn.Module, example_inputs: Any = None, **options: Any) -> Report:
        seen.append(("analyze", model, example_inputs, options))
        return before

    def transform(model: nn.Module, method: str = "tat", example_inputs: Any = None, **options: Any) -> nn.Module:
        seen.append(("transform", model, example_inputs, {"method": method, **options}))
        result = nn.Linear(3, 2)
        info = SimpleNamespace(before=before, after=after, ledger=ledger(), method=method)
        info.comparison = Comparison(before, after, ledger())
        info.certificate = failing
        result.kgraph = info  # pyright: ignore[reportArgumentType]
        return result

    def export_onnx(model: nn.Module, path: Path, example_inputs: Any = None, **options: Any) -> SimpleNamespace:
        seen.append(("export", model, example_inputs, options))
        Path(path).write_bytes(b"onnx")
        return SimpleNamespace(path=path, max_abs_error=1e-6)

    for call in (analyze, transform, export_onnx):
        monkeypatch.setattr(kgraph, call.__name__, call, raising=False)
    return seen


@pytest.fixture
def model(tmp_path: Path) -> str:
    (tmp_path / "user_model.py").write_text(FILE)
    return f"{tmp_path / 'user_model.py'}:make"


def run(*args: str) -> Any:
    return CliRunner().invoke(app, list(args))


def test_analyze_prints_the_report_in_100_columns(calls: list[Any], model: str) -> None:
    result = run("analyze", model, "--kwargs", '{"width": 7}', "--input", "4,7", "--mode", "train")
    assert result.exit_code == 0, result.output
    assert "PlainResNet (train mode)" in result.stdout and "max_pool2d" in result.stdout
    assert max(map(len, result.stdout.splitlines())) <= 100
    ((_, module, inputs, options),) = calls
    assert module.in_features == 7 and inputs[0].shape == (4, 7) and options == {"mode": "train"}


def test_seed_decides_the_weights(calls: list[Any], model: str) -> None:
    for seed in ("1", "1", "2"):
        run("analyze", model, "--seed", seed)
    first, same, other = (call[1].weight for call in calls)
    assert torch.equal(first, same) and not torch.equal(first, other)


def test_analyze_writes_html_and_json(calls: list[Any], model: str, tmp_path: Path) -> None:
    result = run("analyze", model, "--html", str(tmp_path / "r.html"), "--json", str(tmp_path / "r.json"))
    assert result.exit_code == 0 and "wrote" in result.stderr
    assert "<svg" in (tmp_path / "r.html").read_text()
    assert json.loads((tmp_path / "r.json").read_text())["model"] == "PlainResNet"


def test_json_to_stdout_is_nothing_but_json(calls: list[Any], model: str) -> None:
    assert json.loads(run("analyze", model, "--json", "-").stdout)["mode"] == "train"
    assert set(json.loads(run("transform", model, "--json", "-").stdout)) == {"before", "after", "ledger"}


def test_transform_passes_its_options_and_leaves_its_files(calls: list[Any], model: str, tmp_path: Path) -> None:
    out, onnx, html = (str(tmp_path / name) for name in ("model.pt", "model.onnx", "r.html"))
    options = ["--method", "dks", "--shortcut-weight", "0.8", "--seed", "3", "--whole"]
    result = run("transform", model, *options, "--out", out, "--onnx", onnx, "--html", html)
    assert result.exit_code == 0, result.output
    assert calls[0][3] == {"method": ["dks"], "shortcut_weight": 0.8, "seed": 3}
    assert "shape activation" in result.stdout and "maximal slope is 1.7" in result.stdout
    assert torch.load(out, weights_only=False).out_features == 2
    assert calls[1][0] == "export" and Path(onnx).exists() and "1.0e-06" in result.stderr
    assert "c 0 after" in Path(html).read_text()


def test_methods_combine(model: str) -> None:
    result = run("transform", model, "--method", "edge-of-chaos", "--method", "residual-scaling")
    assert "EdgeOfChaos" in result.output or "residual" in result.output
    refused = run("transform", model, "--method", "tat", "--method", "edge-of-chaos")
    assert refused.exit_code == 2 and "both set the model's weights" in refused.stderr


def test_export(calls: list[Any], model: str, tmp_path: Path) -> None:
    result = run("export", model, "--onnx", str(tmp_path / "m.onnx"), "--opset", "18", "--input", "1,16:long")
    assert result.exit_code == 0 and (tmp_path / "m.onnx").exists()
    assert calls[0][2][0].dtype == torch.int64 and calls[0][3] == {"opset": 18, "fold": True}
    run("export", model, "--onnx", str(tmp_path / "m.onnx"), "--no-fold")
    assert calls[1][3]["fold"] is False


def test_demo_leaves_its_files_and_says_what_it_did(calls: list[Any], tmp_path: Path) -> None:
    result = run("demo", "--out", str(tmp_path / "new"))
    assert result.exit_code == 0, result.output
    assert {path.name for path in (tmp_path / "new").iterdir()} == {"report.html", "model.onnx"}
    assert "before" in result.stdout and "changes: 20 x shape activation" in result.stdout
    assert len(result.stdout.splitlines()) < 24
    said = " ".join(result.stdout.split())
    assert "certificate promised: TAT" in said and "failed: slope 0.500" in said
    assert "Certificate: <span" in (tmp_path / "new" / "report.html").read_text()
    assert calls[1][3]["certificate"] == certificate(0.5)
    assert type(calls[0][1]) is DemoNet


CHAIN = (
    "from torch import nn\ndef make(): return nn.Sequential(*[nn.Linear(32, 32), nn.ReLU()] * 2, nn.Linear(32, 5))\n"
)


def test_verify_a_factory_and_a_saved_file(tmp_path: Path) -> None:
    (tmp_path / "chain.py").write_text(CHAIN)
    name, file = f"{tmp_path / 'chain.py'}:make", str(tmp_path / "shaped.pt")
    made = run("verify", name, "--method", "dks", "--json", "-", "-n", "3")
    found = json.loads(made.stdout)
    assert found["draws"] == 3 and found["method"].startswith("DKS") and made.exit_code == (0 if found["passed"] else 3)
    assert run("transform", name, "--method", "dks", "--out", file).exit_code == 0
    pages = [str(tmp_path / "v.html"), str(tmp_path / "v.json")]
    saved = run("verify", file, "--trust", "-n", "3", "--html", pages[0], "--json", pages[1])
    assert saved.exit_code == made.exit_code and "promised: DKS" in saved.stdout
    refused = run("verify", file, "--trust", "--method", "dks")
    assert refused.exit_code == 1 and "is transformed already" in refused.stderr.replace("\n", " ")
    assert json.loads(Path(pages[1]).read_text()) == found and "Certificate: <span" in Path(pages[0]).read_text()


def test_verify_that_fails_exits_with_3(calls: list[Any], model: str) -> None:
    result = run("verify", model, "--method", "tat")
    assert result.exit_code == 3 and "failed: slope 0.500" in result.stdout


def test_demo_model_has_50_layers_and_leaves_the_random_state() -> None:
    state = torch.get_rng_state()
    model, inputs = model_and_input()
    assert torch.equal(state, torch.get_rng_state())
    blocks = [m for m in model.modules() if isinstance(m, nn.Conv2d) and m.kernel_size == (3, 3)]
    assert len(blocks) + 1 == 50 and model(*inputs).shape == (2, 10)
    pickle.dumps(model)


def test_kgraph_errors_are_one_line_and_exit_2(calls: list[Any], model: str, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*args: Any, **kwargs: Any) -> None:
        raise CaptureError("The forward branches on data", node="if", source="user.py:3", hint="Use torch.where")

    monkeypatch.setattr(kgraph, "analyze", refuse)
    result = run("analyze", model)
    assert result.exit_code == 2 and result.stdout == ""
    assert result.stderr.strip() == ("error: The forward branches on data (at node 'if', user.py:3). Use torch.where.")


@pytest.mark.parametrize(
    ("args", "says"),
    [
        (["analyze"], "Missing argument"),
        (["nonsense"], "No such command"),
        (["analyze", "resnet"], "timm:NAME"),
        (["analyze", "no/file.py:make"], "there is no file"),
        (["analyze", "no_such_package:make"], "cannot import"),
        (["analyze", "torch.nn:Nonsense"], "has no 'Nonsense'"),
        (["analyze", "torch.nn:Linear"], "missing 2 required"),
        (["analyze", "math:pi"], "is a float"),
        (["analyze", "torch:rand", "--kwargs", '{"size": [2]}'], "returned a Tensor"),
        (["analyze", "torch.nn:ReLU", "--kwargs", "{width}"], "not JSON"),
        (["analyze", "torch.nn:ReLU", "--kwargs", "3"], "JSON object"),
        (["analyze", "torch.nn:ReLU", "--input", "a,b"], "write a shape"),
        (["analyze", "torch.nn:ReLU", "--input", "2,3:quux"], "unknown type"),
        (["analyze", "torch.nn:ReLU", "--mode", "test"], "train"),
        (["analyze", "torch.nn:ReLU", "--html", "/no/such/folder/r.html"], "cannot write"),
        (["analyze", "torch.nn:ReLU", "--html", "/dev/null"], "it is a device"),
        (["export", "torch.nn:ReLU", "--onnx", "/dev/null"], "it is a device"),
        (["transform", "torch.nn:ReLU", "--out", "/dev/null"], "it is a device"),
        (["demo", "--out", "/dev/null/a"], "cannot write /dev/null/a"),
        (["analyze", "torch.nn:ReLU", "--input", "2,999999999999999"], "cannot be made"),
        (["analyze", "torch.nn:ReLU", "--input", "99999999999999999999"], "cannot be made"),
        (["transform", "torch.nn:ReLU", "--method", "magic"], "dks"),
    ],
)
def test_wrong_usage_says_what_and_exits_1(calls: list[Any], args: list[str], says: str) -> None:
    result = run(*args)
    assert result.exit_code == 1
    words = " ".join(result.stderr.replace("│", " ").split())
    assert says in words and "Traceback" not in words


@pytest.mark.parametrize("command", ["analyze", "transform", "verify", "export", "demo"])
@pytest.mark.parametrize("seed", [str(2**80), str(-(2**63) - 1)])
def test_a_seed_of_more_than_63_bits_is_one_line(command: str, seed: str, tmp_path: Path) -> None:
    model = [] if command == "demo" else ["torch.nn:ReLU"]
    path = {"export": ["--onnx", str(tmp_path / "m.onnx")], "demo": ["--out", str(tmp_path)]}.get(command, [])
    result = run(command, *model, "--seed", seed, *path)
    assert result.exit_code == 2 and result.stderr.startswith(f"error: seed is {seed}. Pass a whole number")
    assert len(result.stderr.splitlines()) == 1 and not list(tmp_path.iterdir())


BROKEN = {
    "syntax": ("def make():\n    return nn.Linear(\n", "SyntaxError: .*:2\\)"),
    "import": ("x = 1\nimport no_such_package_here\n", "ModuleNotFoundError: .*no_such_package_here.*:2\\)"),
    "run time": ("def f():\n    return 1 / 0\nf()\n", "ZeroDivisionError: division by zero .*:2\\)"),
    "exit": ("import sys\n\nsys.exit('usage: train.py DATA')\n", "SystemExit: usage: train.py DATA .*:3\\)"),
    "bytes": ("x = '\0'\n", "(SyntaxError|ValueError): .*null bytes"),
    "factory": ("def make():\n    raise KeyError('width')\n", "KeyError: 'width' .*:2\\)"),
    "wrong call": ("def make(width):\n    return width\n", "TypeError: .*missing 1 required"),
    "forward": (
        "from torch import nn\nclass Net(nn.Module):\n    def forward(self, x):\n        return x @ self.missing\n"
        "make = Net\n",
        "AttributeError: .*missing.*:4",
    ),
}


@pytest.mark.parametrize("kind", BROKEN)
def test_a_broken_model_file_is_one_message_with_the_line(kind: str, tmp_path: Path) -> None:
    text, says = BROKEN[kind]
    path = tmp_path / f"broken_{kind.replace(' ', '_')}.py"
    path.write_text(text)
    result = run("analyze", f"{path}:make", "--input", "2,3")
    assert result.exit_code in (1, 2) and result.stdout == "" and isinstance(result.exception, SystemExit)
    assert "Traceback" not in result.stderr and "kgraph/naming.py" not in result.stderr
    words = " ".join(re.sub("[│╭╰╮╯─]", " ", result.stderr).split())
    assert re.search(says, words) and path.name in words.replace(" ", ""), words


def test_a_broken_package_names_its_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "broken_package_of_mine.py").write_text("\nraise RuntimeError('no GPU here')\n")
    monkeypatch.syspath_prepend(str(tmp_path))
    result = run("analyze", "broken_package_of_mine:make")
    assert result.exit_code == 1
    assert "RuntimeError: no GPU here (broken_package_of_mine.py:2)" in " ".join(result.stderr.replace("│", "").split())


def test_a_full_disk_behind_the_standard_output_is_one_line(
    calls: list[Any], model: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    full = open("/dev/full", "w")  # noqa: SIM115 (closing it would fail, too)
    monkeypatch.setattr(sys, "stdout", full)
    with pytest.raises(SystemExit) as ended:
        app(["analyze", model])
    assert ended.value.code == 2 and capsys.readouterr().err == "error: cannot print: No space left on device\n"
    with pytest.raises(OSError, match="No space"):
        full.close()


def test_places_are_checked_before_the_work(calls: list[Any], model: str, tmp_path: Path) -> None:
    for option in ("--html", "--json", "--out", "--onnx"):
        assert run("transform", model, option, str(tmp_path / "missing" / "file")).exit_code == 1
    assert not calls


def test_a_model_object_and_a_dotted_factory(calls: list[Any], model: str) -> None:
    assert run("analyze", model.replace(":make", ":net")).exit_code == 0
    assert run("analyze", "torch:nn.ReLU").exit_code == 0
    assert run("analyze", model.replace(":make", ":nothing")).exit_code == 1


def test_explain_prints_a_table_and_writes_json(tmp_path: Path) -> None:
    file = tmp_path / "net.py"
    file.write_text("from torch import nn\nnet = lambda: nn.Sequential(nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 8))\n")
    result = run("explain", f"{file}:net", "--input", "2,8", "--json", str(tmp_path / "e.json"))
    assert result.exit_code == 0 and "tanh instead" in result.stdout and "as it is" in result.stdout
    assert json.loads((tmp_path / "e.json").read_text())["effects"][0]["change"] == "as it is"


def test_timm_models(calls: list[Any], monkeypatch: pytest.MonkeyPatch) -> None:
    fake = SimpleNamespace(create_model=lambda name, **options: nn.Linear(1, options["classes"]))
    monkeypatch.setitem(sys.modules, "timm", fake)
    assert run("analyze", "timm:resnet50", "--kwargs", '{"classes": 5}').exit_code == 0
    assert calls[0][1].out_features == 5
    monkeypatch.setitem(sys.modules, "timm", None)
    result = run("analyze", "timm:resnet50")
    assert result.exit_code == 1 and "pip install timm" in result.stderr


@pytest.mark.parametrize("command", [[], ["analyze"], ["explain"], ["transform"], ["export"], ["verify"], ["demo"]])
def test_help_has_an_example(command: list[str]) -> None:
    result = run(*command, "--help")
    assert result.exit_code == 0 and "Example: kgraph" in result.stdout.replace("`", "")


def test_version() -> None:
    result = run("--version")
    assert result.exit_code == 0 and result.stdout.startswith("kgraph ")


@pytest.mark.parametrize("sign", [spinner, bar])
def test_signs_of_work_start_after_a_second_on_a_terminal(sign: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    screen = Console(file=io.StringIO(), force_terminal=True, width=60)
    with sign("quick", screen):
        pass
    assert "quick" not in screen.file.getvalue()  # pyright: ignore[reportAttributeAccessIssue]
    monkeypatch.setattr(terminal, "SHOWN_AFTER", 0.01)
    with sign("slow", screen) as progress:
        time.sleep(0.15)
        if progress is not None:
            progress(3, 7)
        time.sleep(0.25)
    shown = screen.file.getvalue()  # pyright: ignore[reportAttributeAccessIssue]
    assert "slow" in shown and ("3/7" in shown) == (sign is bar)


@pytest.mark.parametrize("sign", [spinner, bar])
def test_signs_of_work_are_silent_without_a_terminal(sign: Any) -> None:
    file = io.StringIO()
    with sign("working", Console(file=file)) as progress:
        assert progress is None
    assert file.getvalue() == ""
