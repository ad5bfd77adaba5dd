"""The report as a rich table that fits the width it is given."""

from __future__ import annotations

import io
from collections.abc import Iterable, Sequence

from rich.box import SIMPLE_HEAD
from rich.console import Console, RenderableType
from rich.table import Table
from rich.text import Text

from kgraph.analysis import Analysis
from kgraph.report.flags import Flag
from kgraph.report.numbers import cosine, count, elide, plain, short
from kgraph.report.rows import Row
from kgraph.report.summary import knows_ntk, ntk_line

#: Width of text that does not go to a terminal.
PLAIN_WIDTH = 100
STYLES = {"bad": "bold red", "warn": "yellow", "info": "dim"}
HOW = {"quadrature": "quad"}
_NAMES = ("name", "module", "op")
_SHARES = {"name": 20, "module": 18, "op": 12, "flags": 20}  # smallest useful widths


def node_table(analysis: Analysis, rows: Sequence[Row], width: int, all_nodes: bool = False) -> Table:
    """A row a node: name, module, op, q, c for up to three input cosines, slope, ntk (where known), how, flags.

    Where the width is short, long names lose their middle; the module column goes if the names tell
    the modules.
    """
    shown = [row for row in rows if all_nodes or not row.folded]
    picked = pick(len(analysis.cosines))
    ntk = ["ntk"] if knows_ntk(analysis) else []
    heads = ["q", *(f"c {plain(analysis.cosines[i])}" for i in picked), "slope", *ntk, "how"]
    cells = [_cells(row, picked, bool(ntk)) for row in shown]
    numbers = [max([len(head), *(len(line[i]) for line in cells)]) for i, head in enumerate(heads)]
    texts = {
        "name": [row.node.name for row in shown],
        "module": [row.node.module for row in shown],
        "op": [row.node.op for row in shown],
        "flags": [row.flag_text for row in shown],
    }
    room = width - sum(numbers) - len(heads) - len(texts) + 1
    need = {head: _need(head, lines) for head, lines in texts.items()}
    need["flags"] = min(need["flags"], _SHARES["flags"])  # they may wrap
    if sum(need.values()) > room and all(_tells_module(row) for row in shown):
        room += 1
        del texts["module"]
    widths = share(texts, room)
    table = Table(box=SIMPLE_HEAD, padding=0, pad_edge=False, show_edge=False)
    names = [head for head in _NAMES if head in texts]
    for head in names:
        table.add_column(head, width=widths[head], no_wrap=True)
    for head, size in zip(heads, numbers, strict=True):
        table.add_column(head, width=size, no_wrap=True, justify="left" if head == "how" else "right")
    table.add_column("flags", width=widths["flags"])
    for i, (row, line) in enumerate(zip(shown, cells, strict=True)):
        short_names = (elide(texts[head][i], widths[head]) for head in names)
        table.add_row(*(Text(cell) for cell in (*short_names, *line)), flag_text(row.flags))
    return table


def report_lines(
    analysis: Analysis, rows: Sequence[Row], summary: Iterable[str], width: int, all_nodes: bool = False
) -> list[RenderableType]:
    """Summary, table, notes: everything `print(report)` shows."""
    folded = sum(row.folded for row in rows)
    parts: list[RenderableType] = [Text(line, style="bold") for line in summary]
    parts += [Text(""), node_table(analysis, rows, width, all_nodes)]
    if folded and not all_nodes:
        parts.append(Text(f"{count(folded, 'row')} hidden: only re-indexing (all_nodes=True shows all)", style="dim"))
    if knows_ntk(analysis):
        parts.append(Text(ntk_line(analysis), style="dim"))
    parts += [Text(f"note: {note}", style="dim") for note in analysis.notes]
    return parts


def compare_table(before: Sequence[str], after: Sequence[str]) -> Table:
    """The summary lines of two reports side by side."""
    table = Table(box=SIMPLE_HEAD, padding=(0, 2, 0, 0), pad_edge=False, show_edge=False, expand=True)
    table.add_column("before", ratio=1)
    table.add_column("after", ratio=1)
    for one, other in zip(before, after, strict=True):
        table.add_row(Text(one), Text(other))
    return table


def flag_text(flags: Iterable[Flag]) -> Text:
    """Flags joined by "; ", coloured by severity."""
    return Text("; ").join(Text(flag.text, style=STYLES[flag.severity]) for flag in flags)


def to_text(parts: Iterable[RenderableType], width: int = PLAIN_WIDTH) -> str:
    """Plain text, without colours or trailing blanks."""
    console = Console(file=io.StringIO(), width=width, color_system=None, force_terminal=False, legacy_windows=False)
    with console.capture() as capture:
        for part in parts:
            console.print(part)
    return "\n".join(line.rstrip() for line in capture.get().rstrip().splitlines())


def pick(count: int, most: int = 3) -> list[int]:
    """Indices of at most `most` of `count` columns, ends included."""
    if count <= most:
        return list(range(count))
    return sorted({round(i * (count - 1) / (most - 1)) for i in range(most)})


def share(texts: dict[str, list[str]], room: int) -> dict[str, int]:
    """Widths of the text columns: what they need if it fits, else the room shared fairly."""
    need = {head: _need(head, lines) for head, lines in texts.items()}
    widths = {head: min(size, _SHARES[head]) for head, size in need.items()}
    while (excess := sum(widths.values()) - room) > 0 and max(widths.values()) > 6:
        widest = max(widths, key=lambda head: widths[head])
        widths[widest] -= min(excess, 1)
    while sum(widths.values()) < room and (short_of := [h for h in need if widths[h] < need[h]]):
        widths[min(short_of, key=lambda head: widths[head])] += 1
    return widths


def _cells(row: Row, picked: Sequence[int], ntk: bool) -> list[str]:
    node = row.node
    return [
        short(node.q),
        *(cosine(node.c[i]) for i in picked),
        short(node.slope),
        *([short(node.ntk)] if ntk else []),
        HOW.get(node.how, node.how),
    ]


def _need(head: str, lines: Iterable[str]) -> int:
    return max([len(head), *map(len, lines)])


def _tells_module(row: Row) -> bool:
    return row.node.name.startswith(row.node.module.replace(".", "_"))
