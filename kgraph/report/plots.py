"""Curves of q and c as a matplotlib figure."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from kgraph.analysis import Analysis
from kgraph.errors import KGraphError
from kgraph.report.numbers import plain
from kgraph.report.rows import Row

if TYPE_CHECKING:
    from matplotlib.figure import Figure


def plot(sections: Sequence[tuple[str, Analysis, Sequence[Row]]]) -> Figure:
    """q (log axis) and c against depth, side by side; of two sections the first is dashed.

    Raises:
        KGraphError: matplotlib is not installed.
    """
    try:
        import matplotlib.pyplot as plt
    except ImportError as error:
        raise KGraphError("Plots need matplotlib", hint="Install it with: pip install 'kgraph[plot]'") from error
    figure, (q_axes, c_axes) = plt.subplots(1, 2, figsize=(11, 4), layout="constrained")
    dashes = ["-"] if len(sections) == 1 else ["--", "-"]
    for (label, analysis, rows), dash in zip(sections, dashes, strict=True):
        line = [row for row in rows if row.trunk] or list(rows)
        x = [row.x for row in line]
        q = [row.node.q if row.node.q > 0 else float("nan") for row in line]
        q_axes.plot(x, q, dash, color="C0", label=label or "q", marker=".", markersize=3)
        for i, given in enumerate(analysis.cosines):
            c = [row.node.c[i] for row in line]
            name = f"input c = {plain(given)} {label}".strip()
            c_axes.plot(x, c, dash, color=f"C{i % 10}", label=name, marker=".", markersize=3)
    q_axes.set(xlabel="depth (nonlinear layers)", ylabel="q value", yscale="log", title=sections[-1][1].model)
    c_axes.set(xlabel="depth (nonlinear layers)", ylabel="c value", title="cosine of two inputs")
    c_axes.axhline(1.0, color="0.7", linewidth=0.8, zorder=0)
    q_axes.legend()
    c_axes.legend(bbox_to_anchor=(1.02, 1.0), loc="upper left")
    return figure
