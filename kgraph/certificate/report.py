"""What a certificate holds and how it prints: three lines in words, then a row a node."""

from __future__ import annotations

import html
import math
from dataclasses import dataclass, fields
from os import PathLike
from typing import Any

from rich.box import SIMPLE_HEAD
from rich.console import RenderableType
from rich.table import Table
from rich.text import Text

from kgraph.certificate.judge import NAMES, number
from kgraph.certificate.lines import finite_width, found_line, passed_line
from kgraph.files import write_text
from kgraph.report import data
from kgraph.report.html import Attachment
from kgraph.report.numbers import count, elide
from kgraph.studies.tables import LayerReport, shown
from kgraph.suggestions import no_node

FORMAT = "kgraph-certificate/1"
WIDE = 0.1
"""Spread of q over draws, relative, from which on one network is not the average one."""


@dataclass(frozen=True)
class Figure:
    """A measured number.

    Attributes:
        value: mean over draws (of a ratio: the ratio of the means).
        error: its standard error.
        spread: standard deviation over draws: what one network differs by.
    """

    value: float
    error: float
    spread: float

    def __str__(self) -> str:
        return f"{number(self.value)} +- {self.error:.2g}"


@dataclass(frozen=True)
class CertificateRow:
    """One node: measured, predicted and promised (nan where nothing is).

    Attributes:
        node, what: name, and who reads it ("input of relu_3", "before mean", "output").
        kind: "layer", "pool" or "output".
        width: channels.
        q, c, slope: measured; c for each of the certificate's cosines.
        predicted_q, predicted_c, predicted_slope: of the infinitely wide network (`kgraph.analyze`).
        promised_q, promised_c, promised_slope: of the method.
        departures: what of the promise does not hold here ("q", "c", "slope").
    """

    node: str
    what: str
    kind: str
    width: int
    q: Figure
    c: tuple[Figure, ...]
    slope: Figure
    predicted_q: float
    predicted_c: tuple[float, ...]
    predicted_slope: float
    promised_q: float
    promised_c: tuple[float, ...]
    promised_slope: float
    departures: tuple[str, ...] = ()

    @property
    def spread(self) -> float:
        """Relative spread of q over draws."""
        return self.q.spread / self.q.value if self.q.value > 0 else math.nan


@dataclass(frozen=True)
class Certificate(LayerReport, Attachment):
    """What an emitted module measures: `kgraph.transform(...).kgraph.certificate()`.

    Attributes:
        model, method: names.
        promise: in words; "" where the method makes none.
        rows: one a node, in graph order.
        output: node of the first output.
        cosines: of the pairs of inputs.
        inputs: what they were.
        draws, pairs, seed: of the measurement.
        notes: remarks.
    """

    model: str
    method: str
    promise: str
    rows: tuple[CertificateRow, ...]
    output: str
    cosines: tuple[float, ...]
    inputs: str
    draws: int
    pairs: int
    seed: int
    notes: tuple[str, ...] = ()

    @property
    def final(self) -> CertificateRow:
        """The row of the output."""
        return next(row for row in self.rows if row.node == self.output)

    @property
    def passed(self) -> bool | None:
        """Whether the promise is kept; None where the method makes none.

        C within .03 and the slope within 10 % at the output and before pools, q within 10 % wherever it is promised,
        each up to the measurement's error: Student's 95 % interval of the mean over draws.
        """
        return not self.broken if self.promise else None

    @property
    def broken(self) -> tuple[CertificateRow, ...]:
        """Rows for which it is not."""
        return tuple(row for row in self.rows if row.departures and ("q" in row.departures or row.kind != "layer"))

    @property
    def departing(self) -> tuple[CertificateRow, ...]:
        """All rows where something departs from the plan, inner layers' C and slope included."""
        return tuple(row for row in self.rows if row.departures)

    @property
    def narrow(self) -> tuple[CertificateRow, ...]:
        """Rows before nonlinear layers whose q has a spread above 10 % of it."""
        return tuple(row for row in self.rows if row.kind == "layer" and row.spread > WIDE)

    @property
    def words(self) -> tuple[str, str, str]:
        """Three lines: what was promised, what the module measures, whether that is the same and where it departs."""
        name = self.method
        first = f"promised: {self.promise or f'{name} promises nothing about q, C and slope'}"
        return first, found_line(self), passed_line(self)

    def __getitem__(self, node: str) -> CertificateRow:
        """The row of a node.

        Raises:
            InputError: there is none.
        """
        for row in self.rows:
            if row.node == node:
                return row
        raise no_node(node, [row.node for row in self.rows])

    def to_dict(self) -> dict[str, Any]:
        """JSON-ready data; not-a-number and infinities are "nan", "inf", "-inf"."""
        known = {field.name: data.encode(getattr(self, field.name)) for field in fields(self)}
        return {"format": FORMAT, "passed": self.passed, "words": list(self.words), "warning": self.warning, **known}

    def to_json(self, path: str | PathLike[str] | None = None) -> str:
        """JSON text, also written to ``path``."""
        return write_text(data.to_json(self.to_dict()), path)

    @property
    def warning(self) -> str:
        """What finite width does to it; "" where the spread of q is small."""
        return finite_width(self.narrow)

    def as_section(self) -> str:
        """Three lines and the table, as a part of an HTML page."""
        colour = {True: "info", False: "bad", None: "info"}[self.passed]
        lines = "".join(f"<li>{html.escape(line)}</li>" for line in self.words)
        verdict = {True: "passed", False: "failed", None: "no promise"}[self.passed]
        head = f'<h2>Certificate: <span class="flag {colour}">{verdict}</span></h2>'
        table = html.escape(self.text(all_nodes=True, width=120))
        return f'{head}<ul>{lines}</ul><div class="scroll"><pre>{table}</pre></div>'

    def _parts(self, width: int, all_nodes: bool) -> list[RenderableType]:
        style = {True: "bold green", False: "bold red", None: "bold"}[self.passed]
        parts: list[RenderableType] = [
            Text(line, style=style if i == 2 else "bold") for i, line in enumerate(self.words)
        ]
        if self.warning:
            parts.append(Text(self.warning, style="yellow"))
        picked = [self.rows[i] for i in self._shown(all_nodes)]
        given = f"C {_brief(self.cosines[0])}"
        heads = ["node", "q", "+-", "sd", "pred", given, "+-", "pred", "plan", "slope", "+-", "pred", "plan", "off"]
        parts += [Text(""), _fitted(heads, [_cells(row) for row in picked], width)]
        if len(picked) < len(self.rows):
            hidden = count(len(self.rows) - len(picked), "row")
            parts.append(Text(f"{hidden} hidden (all_nodes=True shows all)", style="dim"))
        return parts + [Text(f"note: {note}", style="dim") for note in self.notes]

    def _shown(self, all_nodes: bool) -> list[int]:
        """Rows to print: some of many, always those of pools and outputs and the first that departs."""
        first = next((i for i, row in enumerate(self.rows) if row.departures), 0)
        ends = (i for i, row in enumerate(self.rows) if row.kind != "layer")
        return sorted({*shown(len(self.rows), all_nodes), first, *ends})


def _fitted(heads: list[str], lines: list[list[str]], width: int) -> Table:
    """The table, names cut to what the numbers leave."""
    sizes = [max(len(line[i]) for line in [heads, *lines]) for i in range(1, len(heads))]
    room = max(8, width - sum(sizes) - len(sizes))
    table = Table(box=SIMPLE_HEAD, padding=0, pad_edge=False, show_edge=False)
    for i, head in enumerate(heads):
        table.add_column(head, no_wrap=True, justify="left" if i in (0, len(sizes)) else "right")
    for line in lines:
        table.add_row(*(Text(cell) for cell in (elide(line[0], room), *line[1:])))
    return table


def _cells(row: CertificateRow) -> list[str]:
    spread = f"{row.spread:.0%}" if row.spread > WIDE else ""
    cells = [row.node, _brief(row.q.value), _error(row.q), spread, _brief(row.predicted_q)]
    for figure, predicted, promised in (
        (row.c[0], row.predicted_c[0], row.promised_c[0]),
        (row.slope, row.predicted_slope, row.promised_slope),
    ):
        cells += [_brief(figure.value), _error(figure), _brief(predicted), _brief(promised)]
    return [*cells, " ".join(NAMES[name] for name in row.departures)]


def _brief(value: float) -> str:
    """``.995``, ``-.012``, ``1.148``, ``37.8``."""
    return number(value).replace("0.", ".", 1) if abs(value) < 1 else number(value)


def _error(figure: Figure) -> str:
    if figure.error < 5e-4:
        return f"{figure.error:.0e}".replace("e-0", "e-")
    return _brief(figure.error)
