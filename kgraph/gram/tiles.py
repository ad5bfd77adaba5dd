"""A Gram matrix in tiles: ranges of inputs against ranges of inputs, each with its own rows, where memory is short."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from types import TracebackType
from typing import Any, Generic, TypeVar

import torch
from rich.console import Console
from rich.progress import Progress
from torch import Tensor

from kgraph.capture import Graph
from kgraph.channel_dims import channel_dim
from kgraph.errors import InputError
from kgraph.gram.places import total_places
from kgraph.gram.result import NodeGram
from kgraph.gram.rows import Rows
from kgraph.site import concrete_shape

LIVE_BLOCKS = 4
"""Blocks of the largest size alive at once: what an operation reads and writes, a shortcut, and a temporary."""
_LAYERS = ("aten.conv", "aten.linear", "aten.addmm", "aten.embedding")
Range = tuple[int, int]
T = TypeVar("T")


@dataclass(frozen=True)
class Tile:
    """Rows ``first`` and columns ``second`` of the Gram matrix; ``index`` are the inputs that it needs."""

    first: Range
    second: Range
    index: Tensor
    rows: Rows
    n1: int
    n2: int | None


def positions_of(graph: Graph) -> int:
    """Most positions that an input, or the output of a layer with weights, has."""
    most = 1
    for node in graph.module.graph.nodes:
        value = node.meta.get("val")
        if not isinstance(value, Tensor) or not value.is_floating_point() or value.ndim < 3:
            continue
        if node.op == "placeholder" or str(node.target).startswith(_LAYERS):
            channel = channel_dim(node, value.ndim)
            shape = concrete_shape(value)
            most = max(most, total_places([s for i, s in enumerate(shape) if i not in (0, channel)]))
    return most


def bytes_of_a_row(graph: Graph, layout: str, tangents: int) -> int:
    """Memory that one pair of inputs takes while its kernel and that many tangents are computed."""
    positions = positions_of(graph)
    numbers = {"full": positions**2, "exchangeable": 2}.get(layout, positions)
    return numbers * 8 * LIVE_BLOCKS * (1 + tangents)


def needs_whole_batch(graph: Graph, mode: str) -> bool:
    """Whether a normalization computes its statistics over the inputs."""
    return mode == "train" and any("batch_norm" in str(n.target) for n in graph.module.graph.nodes)


def tile_size(rows: int) -> int:
    """Largest t whose t x t tile, with every input's own pair, has no more rows; 0 if none."""
    size = 0
    while (size + 1) ** 2 + 2 * (size + 1) <= rows:
        size += 1
    return size


def too_large(cause: str, needed: float, memory_gib: float, *, averaging: bool = False) -> InputError:
    return InputError(
        f"the Gram matrix needs about {needed / 2**30:.3g} GiB, over memory_gib={memory_gib:g}, and {cause}",
        hint="Raise memory_gib, or pass fewer or smaller inputs"
        + (', or average over positions: positions="stationary"' if averaging else ""),
    )


def _ranges(start: int, count: int, size: int) -> list[Range]:
    return [(low, min(low + size, start + count)) for low in range(start, start + count, size)]


def tiles(n1: int, n2: int | None, size: int) -> list[Tile]:
    """Tiles of the matrix; without a second set those on and above the diagonal."""
    lines = _ranges(0, n1, size)
    if n2 is not None:
        return [_cross(a, b) for a in lines for b in _ranges(n1, n2, size)]
    return [_square(a) if i == j else _cross(a, b) for i, a in enumerate(lines) for j, b in enumerate(lines) if i <= j]


def _square(a: Range) -> Tile:
    index = torch.arange(*a)
    if len(index) == 1:  # a captured graph takes two inputs or more
        index = index.repeat(2)
    return Tile(a, a, index, Rows.square(len(index)), a[1] - a[0], None)


def _cross(a: Range, b: Range) -> Tile:
    one, two = a[1] - a[0], b[1] - b[0]
    return Tile(a, b, torch.cat([torch.arange(*a), torch.arange(*b)]), Rows.cross(one, two), one, two)


def inputs_of(tile: Tile, leaves: Sequence[Any]) -> list[Any]:
    """Placeholders' values at the tile's inputs."""
    return [x[tile.index.to(x.device)] if isinstance(x, Tensor) else x for x in leaves]


def assembled(parts: list[tuple[Tile, NodeGram]], n1: int, n2: int | None) -> NodeGram:
    """The whole matrices of one node."""
    last = max((gram for _, gram in parts), key=lambda gram: gram.how)

    def whole(number: Callable[[NodeGram], Tensor]) -> Tensor:
        return _placed([(tile, number(gram)) for tile, gram in parts], last.places, n1, n2)

    apart = None if last.one_minus_c is None else whole(lambda gram: gram.one_minus_c)  # type: ignore[return-value]
    tangents = {name: whole(lambda gram, name=name: gram.tangents[name]) for name in last.tangents}
    return replace(last, nngp=whole(lambda gram: gram.nngp), tangents=tangents, one_minus_c=apart)


def _placed(parts: list[tuple[Tile, Tensor]], places: tuple[int, ...], n1: int, n2: int | None) -> Tensor:
    shift = 0 if n2 is None else n1
    whole = parts[0][1].new_empty(n1, n1 if n2 is None else n2, *parts[0][1].shape[2:])
    for tile, x in parts:
        rows, columns = slice(*tile.first), slice(tile.second[0] - shift, tile.second[1] - shift)
        whole[rows, columns] = x
        if n2 is None and tile.first != tile.second:
            whole[columns, rows] = _turned(x, len(places))
    return whole


def _turned(x: Tensor, axes: int) -> Tensor:
    """K(b, a) from K(a, b): with every pair of positions their axes trade places too."""
    if x.ndim != 2 + 2 * axes:
        return x.transpose(0, 1)
    return x.permute(1, 0, *range(2 + axes, 2 + 2 * axes), *range(2, 2 + axes))


class Bar(Generic[T]):
    """Goes through pieces of work; after a second a progress bar appears on a terminal."""

    def __init__(self, pieces: list[T], what: str = "Gram matrix") -> None:
        self.pieces, self.what = pieces, what
        self.bar = Progress(console=Console(stderr=True), transient=True)

    def __enter__(self) -> Bar[T]:
        return self

    def __exit__(self, kind: type[BaseException] | None, value: BaseException | None, at: TracebackType | None) -> None:
        self.bar.stop()

    def __iter__(self) -> Iterator[T]:
        task = self.bar.add_task(self.what, total=len(self.pieces))
        start = time.monotonic()
        for piece in self.pieces:
            yield piece
            self.bar.advance(task)
            if time.monotonic() - start > 1 and self.bar.console.is_terminal and not self.bar.live.is_started:
                self.bar.start()
