"""`import kgraph` brings in nothing that is slow to import: names are looked up when they are used."""

from __future__ import annotations

import ast
import pkgutil
import subprocess
import sys
from pathlib import Path

import pytest

import kgraph

HEAVY = (
    "torch",
    "scipy",
    "networkx",
    "sympy",
    "rich",
    "typer",
    "jinja2",
    "matplotlib",
    "numpy",
    "onnx",
    "transformers",
)


def run(code: str) -> str:
    return subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True).stdout


def imported_for_type_checkers() -> dict[str, str]:
    tree = ast.parse(Path(kgraph.__file__).read_text(encoding="utf-8"))
    block = next(node for node in tree.body if isinstance(node, ast.If))
    found: dict[str, str] = {}
    for node in block.body:
        assert isinstance(node, ast.ImportFrom) and node.module is not None
        found |= {alias.name: node.module for alias in node.names}
    return found


def test_nothing_heavy_is_imported() -> None:
    assert run(f"import sys, kgraph; print([m for m in {HEAVY!r} if m in sys.modules])").strip() == "[]"


def test_type_checkers_see_what_is_there() -> None:
    assert imported_for_type_checkers() == kgraph._WHERE
    assert sorted(kgraph.__all__) == sorted(kgraph._WHERE)
    assert set(kgraph.__all__) <= set(dir(kgraph))


def test_no_module_has_a_public_name() -> None:
    """Importing it would put it in the name's place."""
    assert not {m.name for m in pkgutil.iter_modules(kgraph.__path__)} & set(kgraph.__all__)


def test_names_and_modules_are_found() -> None:
    code = "from kgraph import *; import kgraph; print(nngp is kgraph.gram.nngp, kgraph.passes.__name__)"
    assert run(code).split() == ["True", "kgraph.passes"]
    with pytest.raises(AttributeError, match="module 'kgraph' has no attribute 'tranform'"):
        kgraph.tranform  # noqa: B018  # type: ignore[attr-defined]


def test_the_package_runs_as_a_command() -> None:
    found = subprocess.run([sys.executable, "-m", "kgraph", "--help"], check=True, capture_output=True, text=True)
    assert "analyze" in found.stdout


def test_the_command_line_shows_help_without_what_is_heavy() -> None:
    """Typer and rich make the help; the control is a command that needs a model."""
    code = (
        "import sys; from typer.testing import CliRunner; from kgraph.cli import app; r = CliRunner().invoke(app, {!r})"
    )
    look = f"print(r.exit_code, [m for m in {HEAVY!r} if m in sys.modules and m not in ('rich', 'typer')])"
    assert run(f"{code.format(['--help'])}; {look}").strip() == "0 []"
    assert "torch" in run(f"{code.format(['analyze', 'torch.nn:Nonsense'])}; {look}")
