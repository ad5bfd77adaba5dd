"""Where a graph node comes from: module call, source line, shape."""

from __future__ import annotations

import os
import re
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache
from pathlib import PurePath
from typing import Any

import torch
from torch import Tensor, fx

from kgraph.errors import KGraphError, RuleError

_SOURCE = re.compile(r'File "([^"]+)", line (\d+), in (\w+)')
_LIBRARIES = tuple(os.path.dirname(os.path.abspath(file)) + os.sep for file in (torch.__file__, __file__))
"""The folders of the packages themselves: a user's checkout may well be called torch or kgraph."""


@dataclass(frozen=True)
class Site:
    """Origin of one node.

    Attributes:
        path: dotted path of the innermost module whose forward made the node ("" is the model itself).
        call: which call of that module (0 for the first).
        ancestors: paths of the modules around it, outermost first.
        source: ``file.py:line`` of the innermost line that is not PyTorch's own, or "".
        shape: shape of the tensor at the example inputs, () when the node is no tensor.
    """

    path: str = ""
    call: int = 0
    ancestors: tuple[str, ...] = ()
    source: str = ""
    shape: tuple[int, ...] = ()

    @property
    def key(self) -> tuple[str, int]:
        """Identity of the module call."""
        return self.path, self.call


_NOWHERE = Site()


def site_of(node: fx.Node) -> Site:
    """The node's site; an empty one for nodes that a pass made."""
    return node.meta.get("site", _NOWHERE)


def shape_of(node: fx.Node) -> tuple[int, ...]:
    """Concrete shape of the node's tensor at the example inputs."""
    return site_of(node).shape


_RAISED = (ArithmeticError, AttributeError, LookupError, RuntimeError, TypeError, ValueError)
"""What an operation raises when it is run on values that it was not written for."""


@contextmanager
def located(node: fx.Node) -> Iterator[None]:
    """Whatever an operation raises names its node and source line.

    Raises:
        RuleError: the operation, or its rule, failed on what stands for the input.
    """
    hint = "Write it with other operations, or leave it out of the model that is analysed"
    with _named(node, f"{node.target} does not run on what stands for the input", hint):
        yield


@contextmanager
def computed(node: fx.Node) -> Iterator[None]:
    """The same where a node's rule has run, and its numbers are computed.

    Raises:
        RuleError: a law failed on numbers that it should take.
    """
    hint = "That is a fault of kgraph's, please report it with the model; kgraph.analyze may know the node"
    with _named(node, f"the kernel of {node.target} could not be computed", hint):
        yield


@contextmanager
def _named(node: fx.Node, what: str, hint: str) -> Iterator[None]:
    source = site_of(node).source or None
    try:
        yield
    except KGraphError as error:
        if error.node is not None:
            raise
        raise type(error)(error.what, node=node.name, source=source, hint=error.hint) from error
    except _RAISED as error:
        reason = str(error).strip().splitlines()[0] if str(error).strip() else "no reason given"
        what = f"{what}: {type(error).__name__}: {reason}"
        raise RuleError(what, node=node.name, source=source, hint=hint) from error


def read_site(node: fx.Node) -> Site:
    """Build the site from the metadata that torch.export leaves on a node."""
    stack = node.meta.get("nn_module_stack") or {}
    entries = [
        (key, path) for key, (path, _) in stack.items() if isinstance(path, str) and not key.startswith("_empty")
    ]
    paths = tuple(path for _, path in entries)
    call = _call_index(entries[-1][0]) if entries else 0
    return Site(
        path=paths[-1] if paths else "",
        call=call,
        ancestors=paths[:-1],
        source=source_line(node.meta.get("stack_trace") or ""),
        shape=concrete_shape(node.meta.get("val")),
    )


def _call_index(key: str) -> int:
    _, mark, index = key.rpartition("@")
    return int(index) if mark and index.isdigit() else 0


def source_line(trace: str) -> str:
    """Innermost ``file.py:line`` of a stack trace that lies outside PyTorch and kgraph."""
    frames = [(file, line) for file, line, _ in _SOURCE.findall(trace)]
    own = [frame for frame in frames if not is_library_file(frame[0])]
    file, line = (own or frames or [("", "")])[-1]
    return f"{PurePath(file).name}:{line}" if file else ""


@cache
def is_library_file(file: str) -> bool:
    """Whether a source file is part of PyTorch or of kgraph, not of the user's code."""
    return file.startswith(_LIBRARIES)


def concrete_shape(value: Any) -> tuple[int, ...]:
    """Shape with symbolic sizes replaced by the sizes seen at capture."""
    if not isinstance(value, Tensor):
        return ()
    return tuple(_hint(size) for size in value.shape)


def _hint(size: Any) -> int:
    return int(size.node.hint) if isinstance(size, torch.SymInt) else int(size)
