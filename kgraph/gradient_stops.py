"""Stopped gradients: edges of a graph along which a value flows forwards and no gradient backwards.

``detach``, ``no_grad`` and ``inference_mode`` change no value, so no kernel, no region and no pattern depends on them:
a captured graph has no such nodes. Its edges remember them instead, in the metadata of the node that reads, and an
emitted module has a ``detach`` on every one (`insert_detaches`).
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
from torch import Tensor, fx

_aten = torch.ops.aten
_Inference = torch.inference_mode
DETACHES = {_aten.detach.default, _aten.detach_.default}
STOPS = "stops"
"""Metadata of a node: its `Stop` s."""


class Stop(NamedTuple):
    """One stopped edge: the number of the operand among all nodes in the reader's arguments, and ``file.py:line``."""

    at: int
    line: str


@contextmanager
def inference_as_no_grad() -> Iterator[None]:
    """Let ``torch.inference_mode`` be ``no_grad``, which stops the same gradients.

    A trace has no word for inference mode, and autograd refuses to save what was made in it.
    """
    own = _Inference.__enter__, _Inference.__exit__

    def enter(self: Any) -> None:
        self._as_no_grad = torch.set_grad_enabled(not self.mode)

    def leave(self: Any, exc_type: Any, exc_value: Any, traceback: Any) -> None:
        self._as_no_grad.__exit__(exc_type, exc_value, traceback)

    _Inference.__enter__, _Inference.__exit__ = enter, leave
    try:
        yield
    finally:
        _Inference.__enter__, _Inference.__exit__ = own


def operands(node: fx.Node) -> list[fx.Node]:
    """The nodes in the arguments, in order, each as often as it stands there."""
    found: list[fx.Node] = []
    fx.node.map_arg((node.args, node.kwargs), lambda n: found.append(n) or n)  # type: ignore[attr-defined]
    return found


def stops_of(node: fx.Node) -> tuple[Stop, ...]:
    return node.meta.get(STOPS, ())


def stop(reader: fx.Node, source: fx.Node, line: str) -> None:
    """Let no gradient flow from ``reader`` back to ``source``."""
    known = {one.at for one in stops_of(reader)}
    new = [Stop(at, line) for at, node in enumerate(operands(reader)) if node is source and at not in known]
    if new:
        reader.meta[STOPS] = (*stops_of(reader), *new)


def stopped(reader: fx.Node, source: fx.Node) -> str | None:
    """The line that stops the gradient from ``reader`` to ``source``; None where it flows along any of the edges."""
    lines = {one.at: one.line for one in stops_of(reader)}
    found = [lines.get(at) for at, node in enumerate(operands(reader)) if node is source]
    return found[0] if found and None not in found else None


def stopped_between(source: fx.Node, end: fx.Node, inside: Iterable[fx.Node]) -> str | None:
    """The line of a stop, where one stands on every way from ``end`` back to ``source`` through nodes ``inside``."""
    allowed, seen, queue, line = {*inside, end}, {end}, [end], None
    while queue:
        node = queue.pop()
        for before in dict.fromkeys(operands(node)):
            why = stopped(node, before)
            if why is not None:
                line = line or why
            elif before is source:
                return None
            elif before in allowed and before not in seen:
                seen.add(before)
                queue.append(before)
    return line


def read_instead(node: fx.Node, new: fx.Node, line: str | None = None, *, but: Callable[[fx.Node], bool] | None = None):
    """Let the readers of ``node`` read ``new``, through a stop where there is a line of one.

    Args:
        but: readers to leave alone.
    """
    for reader in list(node.users) if line is not None else ():
        if but is None or not but(reader):
            stop(reader, node, line or "")
    node.replace_all_uses_with(new, delete_user_cb=lambda reader: but is None or not but(reader))


def without_stops(meta: dict[str, Any]) -> dict[str, Any]:
    """Metadata for a node with other operands."""
    return {key: value for key, value in meta.items() if key != STOPS}


def note_detaches(graph: fx.Graph, line: Callable[[fx.Node], str]) -> None:
    """Mark the edges behind every detach, which is no operation of the canonical graph.

    ``detach_`` stops for whoever reads its tensor later.
    """
    found = [node for node in graph.nodes if node.target in DETACHES]
    live = _trained(graph) if found else set()
    order = {node: index for index, node in enumerate(graph.nodes)} if found else {}
    for node in found:
        source = node.args[0]
        if source not in live:
            continue
        readers = [(reader, node) for reader in node.users]
        if node.target is _aten.detach_.default:
            readers += [(reader, source) for reader in source.users if order[reader] > order[node]]
        for reader, read in readers:
            stop(reader, read, line(node))


def insert_detaches(graph: fx.Graph) -> None:
    """Put a ``detach`` on every stopped edge, in place; the marks go."""
    made: dict[fx.Node, fx.Node] = {}
    for reader in list(graph.nodes):
        marked = {one.at for one in reader.meta.pop(STOPS, ())}
        if not marked:
            continue
        counter = iter(range(len(operands(reader))))

        def operand(source: fx.Node, marked: set[int] = marked, counter: Any = counter) -> fx.Node:
            return _detached(graph, source, made) if next(counter) in marked and _floats(source) else source

        args, kwargs = fx.node.map_arg((reader.args, reader.kwargs), operand)  # type: ignore[misc]
        reader.args, reader.kwargs = args, kwargs  # type: ignore[assignment]


def _detached(graph: fx.Graph, source: fx.Node, made: dict[fx.Node, fx.Node]) -> fx.Node:
    if source not in made:
        with graph.inserting_after(source):
            made[source] = graph.call_function(_aten.detach.default, (source,))
        made[source].meta = without_stops(source.meta)
    return made[source]


def _floats(node: fx.Node) -> bool:
    """Whether a node's value can have a gradient; a node whose value nobody noted may."""
    value = node.meta.get("val")
    return value is None or (isinstance(value, Tensor) and (value.is_floating_point() or value.is_complex()))


def _trained(graph: fx.Graph) -> set[fx.Node]:
    """Nodes that a floating input or a parameter reaches: only there is a gradient that could be stopped."""
    found: set[fx.Node] = set()
    for node in graph.nodes:
        source = node.op == "placeholder" or (node.op == "get_attr" and _is_parameter(node))
        if (source and _floats(node)) or any(before in found for before in node.all_input_nodes):
            found.add(node)
    return found


def _is_parameter(node: fx.Node) -> bool:
    value: Any = node.graph.owning_module
    for part in str(node.target).split(".") if value is not None else ():
        value = getattr(value, part, None)
    return value is None or isinstance(value, torch.nn.Parameter)


__all__ = [
    "DETACHES",
    "STOPS",
    "Stop",
    "inference_as_no_grad",
    "insert_detaches",
    "note_detaches",
    "operands",
    "read_instead",
    "stop",
    "stopped",
    "stopped_between",
    "stops_of",
    "without_stops",
]
