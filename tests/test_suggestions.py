"""Misspelled names: what was meant; and options that are checked before the model is built."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch import nn
from typer.testing import CliRunner

import kgraph
from kgraph.cli import app
from kgraph.errors import InputError
from kgraph.suggestions import meant, no_node

X = torch.ones(2, 8)


def small() -> nn.Module:
    return nn.Sequential(nn.Linear(8, 8), nn.Tanh(), nn.Linear(8, 4))


@pytest.mark.parametrize(
    ("word", "says"),
    [("tta", "Did you mean 'tat'"), ("DSK", "Did you mean 'dks'"), ("zzz", "else"), (3, "else"), (None, "else")],
)
def test_the_nearest_name_or_nothing(word: object, says: str) -> None:
    assert meant(word, ["auto", "dks", "tat"], "else") == says


def test_a_node_that_is_nothing_like_another_lists_the_first() -> None:
    names = [f"conv{number}" for number in range(9)]
    assert "Known: conv0, conv1, conv2, conv3, conv4, conv5, conv6, conv7 and 1 more." in str(no_node("zzz", names))
    assert str(no_node("zzz", names[:2])) == "no node is called 'zzz'. Known: conv0, conv1."
    assert "Did you mean 'conv8'" in str(no_node("cnv8", names))


def test_calls_that_choose_say_what_was_meant() -> None:
    with pytest.raises(InputError, match=r"unknown method 'edge_of_chaos'. Did you mean 'edge-of-chaos'\? Pass 'auto'"):
        kgraph.transform(small(), "edge_of_chaos", X)
    with pytest.raises(InputError, match=r"mode is 'trian'. Did you mean 'train'\? Choose one of 'train', 'eval'"):
        kgraph.analyze(small(), X, mode="trian")
    with pytest.raises(InputError, match=r"mode is 'quick'. Choose one of"):
        kgraph.analyze(small(), X, mode="quick")
    name = kgraph.compare(small(), X, draws=2).rows[0].name
    with pytest.raises(InputError, match=f"Did you mean '{name}'"):
        kgraph.compare(small(), X, draws=2)[f"{name}x"]


BUILT = (
    "from pathlib import Path\nfrom torch import nn\n\n\ndef make():\n    Path('built').touch()\n    return nn.ReLU()\n"
)


@pytest.mark.parametrize(
    ("args", "says"),
    [
        (["transform", "--method", "tat", "--method", "ntk-chaos"], "both set the model's"),
        (["transform", "--shortcut-weight", "1.5"], "shortcut_weight is 1.5"),
        (["verify", "--shortcut-weight", "nan"], "shortcut_weight is nan"),
        (["verify", "--draws", "1"], "at least 2 draws"),
        (["verify", "--method", "magic"], "not one of"),
        (["export", "--opset", "9"], "opset must be 18 to 23"),
        (["analyze", "--mode", "trian"], "not one of"),
        (["analyze", "--html", "no/such/folder/r.html"], "cannot write"),
        (["analyze", "--seed", str(2**80)], "seed is"),
        (["explain", "--input", "2,a"], "write a shape"),
    ],
)
def test_options_are_checked_before_the_model_is_built(
    args: list[str], says: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "net.py").write_text(BUILT, encoding="utf-8")
    result = CliRunner().invoke(app, [args[0], "net.py:make", *args[1:]])
    assert result.exit_code in (1, 2)
    assert says in " ".join(result.stderr.replace("│", " ").split())
    assert not (tmp_path / "built").exists()


def test_the_control_builds_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "net.py").write_text(BUILT, encoding="utf-8")
    assert CliRunner().invoke(app, ["analyze", "net.py:make", "--input", "2,8"]).exit_code == 0
    assert (tmp_path / "built").exists()


def test_a_misspelled_factory(tmp_path: Path) -> None:
    result = CliRunner().invoke(app, ["analyze", "torch.nn:Linaer"])
    assert "did you mean 'Linear'" in " ".join(result.stderr.replace("│", " ").split())


def test_first_reads_do_not_depend_on_the_callers_modes() -> None:
    """Imports inside a meta device and another default type leave no such tensor behind in a module."""
    code = (
        "import sys, torch\n"
        "torch.set_default_dtype(torch.float16)\n"
        "with torch.device('meta'):\n"
        "    from kgraph import *\n"
        "for name, module in sorted(sys.modules.items()):\n"
        "    if name.startswith('kgraph'):\n"
        "        for key, value in vars(module).items():\n"
        "            if isinstance(value, torch.Tensor) and (value.is_meta or value.dtype == torch.float16):\n"
        "                print(name, key)\n"
    )
    done = subprocess.run([sys.executable, "-W", "ignore", "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout == ""
