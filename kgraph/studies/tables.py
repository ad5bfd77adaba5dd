"""What reports by layer share: how they print, the choice of rows, text and HTML; and scales of fluctuations."""

from __future__ import annotations

import html
import math
from abc import ABC, abstractmethod
from collections.abc import Iterable, Sequence

from rich.box import SIMPLE_HEAD
from rich.console import Console, ConsoleOptions, RenderableType, RenderResult
from rich.table import Table
from rich.text import Text

from kgraph.checks import count as count_of
from kgraph.checks import flag
from kgraph.report.numbers import short
from kgraph.report.table import PLAIN_WIDTH, to_text

SCALES: dict[str, tuple[int, int]] = {
    "V": (2, 0),
    "D": (1, 1),
    "F": (1, 1),
    "A": (0, 2),
    "B": (0, 2),
    "P": (0, 2),
    "Q": (0, 2),
}
"""Powers of K and of Theta that make each tensor a pure number: V/K^2, D/(K Theta), ..., Q/Theta^2."""
MOST_ROWS = 24
_ROUNDING = 1e-12


class LayerReport(ABC):
    """A report of lines and a table of layers: prints as text, in rich and in notebooks."""

    @abstractmethod
    def _parts(self, width: int, all_nodes: bool) -> list[RenderableType]:
        """What is printed, top to bottom; ``all_nodes`` lists every layer of a deep network."""

    def text(self, *, width: int = PLAIN_WIDTH, all_nodes: bool = False) -> str:
        """What `print` shows; ``all_nodes`` lists every layer of a deep network."""
        flag("all_nodes", all_nodes)
        return to_text(self._parts(count_of("width", width), all_nodes), width)

    def __str__(self) -> str:
        return self.text()

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        yield from self._parts(options.max_width, False)

    def _repr_html_(self) -> str:
        return as_html(self._parts(PLAIN_WIDTH, False), PLAIN_WIDTH)


def unit(name: str, K: float, Theta: float) -> float:
    """``K^a Theta^b`` of the tensor, nan where it vanishes."""
    k, theta = SCALES[name]
    value = K**k * (Theta**theta if theta else 1.0)
    return value if value else math.nan


def head_of(name: str, n: str = "n") -> str:
    """``V/nK²``, ``F/nKΘ``: a tensor's relative size as a column head."""
    k, theta = SCALES[name]
    powers = "".join(symbol + ("²" if power == 2 else "") for symbol, power in (("K", k), ("Θ", theta)) if power)
    return f"{name}/{n}{powers}"


def brief(value: float, digits: int = 2) -> str:
    """Two significant digits in at most seven characters: "-0.0012", "4.1e-4", "12"."""
    if abs(value) < _ROUNDING:
        return "0"
    return f"{value:.{digits}g}" if 1e-3 <= abs(value) < 99.5 else short(float(f"{value:.{digits}g}"))


def shown(count: int, all_nodes: bool) -> list[int]:
    """Rows to show: all of a few; of many the first ones and then ever fewer, the last among them."""
    if all_nodes or count <= MOST_ROWS:
        return list(range(count))
    ratio = (count / 4) ** (1 / (MOST_ROWS - 5))
    return sorted({0, 1, 2, 3, *(min(count, round(4 * ratio**i)) - 1 for i in range(MOST_ROWS - 4)), count - 1})


def table_of(heads: Sequence[str], left: int, rows: Iterable[Sequence[str]]) -> Table:
    """A table whose first ``left`` columns are words and the others numbers."""
    table = Table(box=SIMPLE_HEAD, padding=(0, 1, 0, 0), pad_edge=False, show_edge=False)
    for i, head in enumerate(heads):
        table.add_column(head, no_wrap=True, justify="left" if i < left or head == "how" else "right")
    for row in rows:
        table.add_row(*(Text(cell) for cell in row))
    return table


def as_html(parts: Iterable[RenderableType], width: int) -> str:
    """The same text for a notebook."""
    return f'<pre style="font-family: monospace; line-height: 1.3">{html.escape(to_text(parts, width))}</pre>'
