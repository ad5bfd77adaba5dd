"""Reports: what an analysis found, for people (table, HTML, plots) and for programs (JSON, CSV, networkx)."""

from kgraph.report.flags import Flag
from kgraph.report.ledger import ledger_lines, ledger_text
from kgraph.report.report import Comparison, Report
from kgraph.report.rows import Row

__all__ = ["Comparison", "Flag", "Report", "Row", "ledger_lines", "ledger_text"]
