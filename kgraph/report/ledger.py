"""The ledger of a transform as text: what changed, what was kept and why, what was not understood."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import groupby

from rich.box import SIMPLE_HEAD
from rich.console import RenderableType
from rich.table import Table
from rich.text import Text

from kgraph.analysis import Change, Ledger
from kgraph.report.numbers import count, elide
from kgraph.report.table import PLAIN_WIDTH, to_text


def ledger_lines(ledger: Ledger, width: int = PLAIN_WIDTH, examples: int = 3) -> list[RenderableType]:
    """Changes grouped by kind with counts and examples, then what was kept, then what was not met (red)."""
    parts: list[RenderableType] = [Text(headline(ledger), style="bold"), Text("")]
    if ledger.changes:
        parts.append(_changes(group(ledger.changes), width, examples))
    if ledger.kept:
        parts += [Text("kept", style="bold"), *_kept(ledger.kept, examples, width)]
    if ledger.unmet:
        parts += [
            Text("not met", style="bold red"),
            *(Text(f"  {line}", style="red") for line in ledger.unmet),
        ]
    return parts + [Text(f"note: {note}", style="dim") for note in ledger.notes]


def ledger_text(ledger: Ledger, width: int = PLAIN_WIDTH, examples: int = 3) -> str:
    """The same as plain text."""
    return to_text(ledger_lines(ledger, width, examples), width)


def headline(ledger: Ledger) -> str:
    """One sentence with the three counts; a transform that did nothing says so."""
    done = count(len(ledger.changes), "change") if ledger.changes else "nothing was changed"
    unmet = f", {len(ledger.unmet)} not met" if ledger.unmet else ""
    return f"{ledger.method}: {done}, {len(ledger.kept)} kept{unmet}"


def group(changes: Sequence[Change]) -> dict[str, list[Change]]:
    """Changes by `what`, in order of first appearance."""
    groups: dict[str, list[Change]] = {}
    for change in changes:
        groups.setdefault(change.what, []).append(change)
    return groups


def _changes(groups: dict[str, list[Change]], width: int, examples: int) -> Table:
    table = Table(box=SIMPLE_HEAD, padding=(0, 1, 0, 0), pad_edge=False, show_edge=False, width=width)
    table.add_column("count", justify="right", no_wrap=True)
    table.add_column("what", width=min(24, max(map(len, groups))))
    table.add_column("at", ratio=4, no_wrap=True)
    table.add_column("before → after", ratio=6)
    table.add_column("why", ratio=5)
    for what, changes in groups.items():
        for i, change in enumerate(changes[:examples]):
            head = (Text(str(len(changes)), style="bold green"), Text(what)) if i == 0 else (Text(""), Text(""))
            why = change.why if i == 0 or change.why != changes[i - 1].why else ""
            at = elide(change.node, max(8, width // 6))
            table.add_row(*head, Text(at), Text(arrow(change)), Text(why, style="dim"))
        if len(changes) > examples:
            table.add_row("", "", Text(f"… and {len(changes) - examples} more", style="dim"), "", "")
    return table


def arrow(change: Change) -> str:
    """ "before → after", or the one that is given."""
    return " → ".join(side for side in (change.before, change.after) if side)


def _kept(kept: Sequence[Change], examples: int, width: int) -> list[Text]:
    """One line for each reason: how many, which ones, why."""
    lines = []
    key = lambda change: (change.what, change.why)  # noqa: E731
    for (what, why), same in groupby(sorted(kept, key=key), key):
        names = [change.node for change in same]
        more = f" and {len(names) - examples} more" if len(names) > examples else ""
        shown = ", ".join(elide(name, max(8, width // 3)) for name in names[:examples])
        lines.append(Text.assemble(f"  {len(names)} ", f"{what}: {shown}{more}", (f" ({why})" if why else "", "dim")))
    return lines
