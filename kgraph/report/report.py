"""`Report`, what `kgraph.analyze` returns, and `Comparison`, what a transform did to a model."""

from __future__ import annotations

import shutil
import sys
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

import networkx as nx
from rich.console import Console, ConsoleOptions, RenderResult

from kgraph.analysis import Analysis, Ledger, NodeKernel
from kgraph.checks import choice, count, flag
from kgraph.errors import InputError
from kgraph.files import write_text
from kgraph.report import data
from kgraph.report.flags import KINDS
from kgraph.report.html import Attachment, Section, render
from kgraph.report.ledger import ledger_lines
from kgraph.report.plots import plot
from kgraph.report.rows import Row, make_rows
from kgraph.report.summary import summary_lines
from kgraph.report.table import PLAIN_WIDTH, compare_table, report_lines, to_text

if TYPE_CHECKING:
    from matplotlib.figure import Figure


@dataclass(frozen=True)
class Report:
    """An analysis with its views: print it, write it as HTML, JSON or CSV, plot it."""

    analysis: Analysis

    @property
    def nodes(self) -> tuple[NodeKernel, ...]:
        """Kernels of all nodes, in topological order."""
        return self.analysis.nodes

    @property
    def cosines(self) -> tuple[float, ...]:
        """The input c values."""
        return self.analysis.cosines

    @property
    def final(self) -> NodeKernel:
        """The node whose value the model returns."""
        return self.analysis.final

    def __getitem__(self, name: str) -> NodeKernel:
        return self.analysis[name]

    @cached_property
    def rows(self) -> tuple[Row, ...]:
        """All nodes with their flags."""
        return make_rows(self.analysis)

    @cached_property
    def summary(self) -> tuple[str, str, str]:
        """Three sentences: the model, what happens to q, what happens to c."""
        return summary_lines(self.analysis, self.rows)

    def flagged(self, *kinds: str) -> tuple[Row, ...]:
        """Rows with a flag (of one of these kinds, e.g. "collapse", "chaos", "explodes", "assumed")."""
        for kind in kinds:
            choice("kind", kind, KINDS)
        return tuple(row for row in self.rows if any(not kinds or f.kind in kinds for f in row.flags))

    def text(self, *, all_nodes: bool = False, width: int | None = None) -> str:
        """What `print(report)` shows; `all_nodes` also lists nodes that merely re-index."""
        flag("all_nodes", all_nodes)
        width = _width() if width is None else count("width", width)
        return to_text(report_lines(self.analysis, self.rows, self.summary, width, all_nodes), width)

    def to_dict(self) -> dict[str, Any]:
        """The analysis, summary and flags as JSON-ready data."""
        return data.report_dict(self.analysis, self.rows, self.summary)

    def to_json(self, path: str | Path | None = None) -> str:
        """JSON text, also written to `path`. Not-a-number and infinities are "nan", "inf", "-inf"."""
        return write_text(data.to_json(self.to_dict()), path)

    @classmethod
    def from_json(cls, text: str) -> Report:
        """The report that `to_json` wrote."""
        return cls(data.read_analysis(text))

    def to_csv(self, path: str | Path | None = None) -> str:
        """CSV text, a line a node, also written to `path`."""
        return write_text(data.to_csv(self.analysis, self.rows), path)

    def to_html(
        self, path: str | Path | None = None, ledger: Ledger | None = None, certificate: Attachment | None = None
    ) -> str:
        """One self-contained HTML page, also written to `path`; with a ledger, the changes are listed."""
        if ledger is not None and not isinstance(ledger, Ledger):
            raise InputError(f"ledger is {ledger!r}", hint="Pass the ledger of a transform's record")
        title = f"Kernel of {self.analysis.model}"
        return write_text(render(title, [self.section()], ledger, attached=_attached(certificate)), path)

    def plot(self) -> Figure:
        """Curves of q and c against depth as a matplotlib figure."""
        return plot([("", self.analysis, self.rows)])

    def to_networkx(self) -> nx.DiGraph:
        """The graph, each node with its numbers."""
        return data.to_networkx(self.analysis, self.rows)

    def section(self, label: str = "") -> Section:
        """This report as a part of a page."""
        if not isinstance(label, str):
            raise InputError(f"label is {label!r}", hint="Pass a text")
        return Section(label, self.analysis, self.rows, self.summary)

    def __str__(self) -> str:
        return self.text()

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        yield from report_lines(self.analysis, self.rows, self.summary, options.max_width)

    def _repr_html_(self) -> str:
        return render(self.analysis.model, [self.section()], compact=True)


@dataclass(frozen=True)
class Comparison:
    """A model before and after a transform, with the ledger of what was done."""

    before: Report
    after: Report
    ledger: Ledger

    def text(self, *, width: int | None = None, examples: int = 3) -> str:
        """What `print(comparison)` shows; `examples` changes of each kind."""
        width = _width() if width is None else count("width", width)
        return to_text(self._parts(width, count("examples", examples, 0)), width)

    def to_dict(self) -> dict[str, Any]:
        """Both reports and the ledger as JSON-ready data."""
        ledger = data.encode(self.ledger)
        return {"before": self.before.to_dict(), "after": self.after.to_dict(), "ledger": ledger}

    def to_json(self, path: str | Path | None = None) -> str:
        """JSON text, also written to `path`."""
        return write_text(data.to_json(self.to_dict()), path)

    def to_html(self, path: str | Path | None = None, certificate: Attachment | None = None) -> str:
        """One page with both sets of curves overlaid, the ledger and both tables, also written to `path`."""
        title = f"{self.after.analysis.model}: {self.ledger.method}"
        return write_text(render(title, self._sections(), self.ledger, attached=_attached(certificate)), path)

    def plot(self) -> Figure:
        """Both sets of curves, before dashed, as a matplotlib figure."""
        return plot([(s.label, s.analysis, s.rows) for s in self._sections()])

    def __str__(self) -> str:
        return self.text()

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        yield from self._parts(options.max_width)

    def _repr_html_(self) -> str:
        return render(self.after.analysis.model, self._sections(), self.ledger, compact=True)

    def _sections(self) -> list[Section]:
        return [self.before.section("before"), self.after.section("after")]

    def _parts(self, width: int, examples: int = 3) -> list[Any]:
        return [
            compare_table(self.before.summary, self.after.summary),
            *ledger_lines(self.ledger, width, examples),
        ]


def _attached(certificate: Attachment | None) -> list[Attachment]:
    if certificate is None:
        return []
    if not isinstance(certificate, Attachment):
        raise InputError(f"certificate is {certificate!r}", hint="Pass what shaped.kgraph.certificate() returned")
    return [certificate]


def _width() -> int:
    return shutil.get_terminal_size().columns if sys.stdout.isatty() else PLAIN_WIDTH
