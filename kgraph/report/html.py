"""Reports as one HTML file: no scripts, nothing loaded from outside, light and dark."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from itertools import islice

from jinja2 import Environment, PackageLoader, Template
from markupsafe import Markup

from kgraph.analysis import Analysis, Ledger, NodeKernel
from kgraph.report.ledger import arrow, group, headline
from kgraph.report.numbers import cosine, count, plain, short
from kgraph.report.rows import Row
from kgraph.report.summary import ntk_line
from kgraph.report.svg import Chart, Curve, Point, chart

#: Kinds of flags that a chart marks with a ring.
Q_KINDS = frozenset({"not finite", "dead", "explodes", "vanishes"})
C_KINDS = frozenset({"collapse", "chaos"})
MOST_ALARMS = 40
MOST_ROWS_IN_A_CELL = 400


class Attachment(ABC):
    """What else belongs on a page, between the ledger and the tables."""

    @abstractmethod
    def as_section(self) -> str:
        """It as HTML."""


@dataclass(frozen=True)
class Section:
    """One analysis as the template sees it."""

    label: str
    """"" for a report of its own, "before" or "after" in a comparison."""
    analysis: Analysis
    rows: tuple[Row, ...]
    summary: tuple[str, ...]

    def anchor(self, row: Row) -> str:
        """Name of the table row that a point in a chart leads to."""
        return f"kg-{self.label}-{row.node.name}"

    def alarms(self) -> tuple[Row, ...]:
        """The first rows with a red or yellow flag."""
        alarming = (row for row in self.rows if any(flag.severity != "info" for flag in row.flags))
        return tuple(islice(alarming, MOST_ALARMS))

    def brief(self) -> tuple[Row, ...]:
        """The rows that a notebook cell shows: none folded, of huge models the first and all flagged."""
        rows = [row for row in self.rows if not row.folded]
        return tuple(row for i, row in enumerate(rows) if i < MOST_ROWS_IN_A_CELL or row.flags)


def render(
    title: str,
    sections: Sequence[Section],
    ledger: Ledger | None = None,
    compact: bool = False,
    attached: Sequence[Attachment] = (),
) -> str:
    """The page; with `compact` only its body, for a notebook cell (style and charts, tables closed)."""
    return _template().render(
        title=title,
        sections=sections,
        charts=[q_chart(sections), c_chart(sections)],
        ledger=ledger,
        groups=group(ledger.changes) if ledger else {},
        headline=headline(ledger) if ledger else "",
        compact=compact,
        attached=[Markup(one.as_section()) for one in attached],
    )


def q_chart(sections: Sequence[Section]) -> Chart:
    """q against depth on a log axis, one curve for each section."""
    curves = [
        _curve(
            section,
            section.label or "q",
            f"kg-s0 {section.label}",
            [row.node.q for row in section.rows],
            Q_KINDS,
        )
        for section in sections
    ]
    return chart("q value", "q (log scale)", curves, log=True, y_range=(0.1, 10.0))


def c_chart(sections: Sequence[Section]) -> Chart:
    """c against depth, one curve for each input cosine of each section."""
    curves = []
    for section in sections:
        for i, given in enumerate(section.analysis.cosines):
            label = f"c {plain(given)} {section.label}".strip()
            values = [row.node.c[i] for row in section.rows]
            curves.append(_curve(section, label, f"kg-s{1 + i % 6} {section.label}", values, C_KINDS))
    return chart("c values", "cosine of two inputs", curves, log=False, y_range=(0.0, 1.0))


def hover(row: Row, section: Section) -> str:
    """What hovering over a point shows."""
    node = row.node
    given = ", ".join(f"c({plain(a)}) = {cosine(b)}" for a, b in zip(section.analysis.cosines, node.c, strict=True))
    lines = [
        f"{node.name} ({node.op}){', ' + section.label if section.label else ''}",
        f"depth {node.depth}, q = {short(node.q)}, slope = {short(node.slope)}, NTK = {short(node.ntk)}",
        given,
        row.flag_text,
    ]
    return "\n".join(line for line in lines if line)


def _curve(section: Section, label: str, css: str, values: Sequence[float], kinds: frozenset[str]) -> Curve:
    points = [
        Point(row.x, value, hover(row, section), section.anchor(row), marked=_marked(row, kinds))
        for row, value in zip(section.rows, values, strict=True)
    ]
    trunk = any(row.trunk for row in section.rows)
    line = [point for point, row in zip(points, section.rows, strict=True) if row.trunk or not trunk]
    dots = [point for point, row in zip(points, section.rows, strict=True) if trunk and not row.trunk and row.live]
    return Curve(label, css, tuple(line), tuple(dots) if section.label != "before" else ())


def _marked(row: Row, kinds: frozenset[str]) -> bool:
    return any(flag.severity == "bad" and flag.kind in kinds for flag in row.flags)


def _source(node: NodeKernel) -> str:
    shape = "×".join(map(str, node.shape))
    return " · ".join(part for part in (shape, node.source) if part)


@cache
def _template() -> Template:
    loader = PackageLoader("kgraph.report", "")
    environment = Environment(loader=loader, autoescape=True, trim_blocks=True, lstrip_blocks=True)
    environment.filters |= {"short": short, "cosine": cosine, "plain": plain}
    environment.filters |= {"arrow": arrow, "place": _source, "count": count, "ntk_line": ntk_line}
    environment.globals["style"] = Markup(environment.get_template("report.css").render())
    return environment.get_template("report.html.j2")
