"""Lines in errors and reports are the user's own, whatever the folders above their file are called."""

from __future__ import annotations

import importlib.util
import itertools
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType

import pytest
import torch

import kgraph
from kgraph.capture import capture
from kgraph.errors import CaptureError
from kgraph.site import is_library_file, site_of

SOURCE = """
from torch import nn

class Model(nn.Module):
    def __init__(self):
        super().__init__()
        self.layer = nn.Linear(4, 4)

class Asks(Model):
    def forward(self, x):
        if self.layer(x).mean() < 0:  # the line
            return x
        return self.layer(x)

class Plain(Model):
    def forward(self, x):
        return self.layer(x).sinh()  # the operation
"""
COUNT = itertools.count()


@pytest.fixture(params=["kgraph", "kgraph/examples", "torch/nn", "torch/utils", "kgraph/kgraph"])
def mine(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[ModuleType]:
    """A module of the user's in such a folder."""
    folder = tmp_path / request.param
    folder.mkdir(parents=True)
    file = folder / f"mine_{next(COUNT)}.py"
    file.write_text(SOURCE)
    spec = importlib.util.spec_from_file_location(file.stem, file)
    assert spec and spec.loader
    module = sys.modules[file.stem] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    yield module
    del sys.modules[file.stem]


def line_of(mark: str) -> int:
    return next(number for number, line in enumerate(SOURCE.splitlines(), 1) if mark in line)


def test_errors_name_the_users_line(mine: ModuleType) -> None:
    with pytest.raises(CaptureError) as caught:
        kgraph.analyze(mine.Asks(), torch.randn(2, 4))
    assert caught.value.source == f"{mine.__name__}.py:{line_of('# the line')}"


def test_nodes_know_the_users_line(mine: ModuleType) -> None:
    for front_end in ("trace", "export"):
        graph = capture(mine.Plain(), torch.randn(2, 4), front_end=front_end)
        sources = {node.name: site_of(node).source for node in graph.module.graph.nodes}
        assert sources["sinh"] == f"{mine.__name__}.py:{line_of('# the operation')}"


def test_libraries_are_known_by_their_own_folders() -> None:
    assert is_library_file(torch.nn.functional.__file__ or "")
    assert is_library_file(capture.__code__.co_filename)
    assert not is_library_file(__file__)
    assert not is_library_file(str(Path(torch.__file__).parent) + "vision/ops.py")
