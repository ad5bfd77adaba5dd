"""The lines above the table: what the model is, what happens to q, what happens to c."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable

from kgraph.analysis import Analysis, NodeKernel
from kgraph.report.flags import Q_RANGE, farthest, nearest
from kgraph.report.flow import Flow
from kgraph.report.numbers import cosine, count, elide, plain, short
from kgraph.report.rows import Row


def summary_lines(analysis: Analysis, rows: tuple[Row, ...]) -> tuple[str, str, str]:
    """Three sentences: the model, q, c."""
    flow = Flow(analysis)
    return model_line(analysis), q_line(flow), c_line(analysis, rows)


def model_line(analysis: Analysis) -> str:
    """What was analysed, and how surely."""
    layers = max((node.depth for node in analysis.nodes), default=0)
    ways = Counter(node.how for node in analysis.nodes)
    unsure = [f"{ways[how]} {how}" for how in ("sampled", "assumed") if ways[how]]
    parts = [
        f"{analysis.model} ({analysis.path or analysis.mode + ' mode'}): {count(len(analysis.nodes), 'node')}",
        f"{count(layers, 'nonlinear layer')} deep",
        *([f"inputs with {analysis.inputs}"] if analysis.inputs else []),
        f"kernel in {_seconds(analysis.seconds)}",
        *unsure,
    ]
    return ", ".join(parts)


def q_line(flow: Flow) -> str:
    """Where q goes along the trunk."""
    line = flow.main_line
    bad = next((node for node in line if not math.isfinite(node.q)), None)
    if bad is not None:
        return f"q is not finite from {_name(bad)} on"
    dead = next((node for node in line if node.q == 0), None)
    if dead is not None:
        return f"q is 0 from {_name(dead)} on: the output carries no signal"
    if not line:
        return "q: no node depends on an input"
    top, bottom = max(line, key=lambda n: n.q), min(line, key=lambda n: n.q)
    if top.q > Q_RANGE * flow.q_most:
        return _moves("explodes", _last(flow, top, lambda q: q <= flow.q_most), top)
    if bottom.q < flow.q_input / Q_RANGE:
        return _moves("vanishes", _last(flow, bottom, lambda q: q >= flow.q_input), bottom)
    if top.q > Q_RANGE * flow.q_input and flow.first_norm is not None:
        begin, norm = short(flow.q_input), flow.first_norm
        path = f"q is {begin} in the embedding, {short(norm.q)} behind {_name(norm)} (norms set it)"
        return f"{path} and arrives at {short(line[-1].q)}{_logits(flow)}"
    if top.q - bottom.q < 5e-3 * top.q:
        return f"q stays at {short(line[-1].q)}{_logits(flow)}"
    return f"q stays in [{short(bottom.q)}, {short(top.q)}] and arrives at {short(line[-1].q)}{_logits(flow)}"


def _logits(flow: Flow) -> str:
    """What the size of logits over a vocabulary means: of V Gaussian ones the cross entropy is about log V + q / 2.

    E[log sum exp] of V of variance q is log V + q / 2 while q is far below 2 log V; a target's own logit is 0 on
    average.
    """
    final = flow.analysis.final
    parents = flow.parents(final)
    if not (flow.embedded and final.op in ("linear", "addmm", "matmul", "mm") and parents and parents[0].shape):
        return ""
    words, width = final.shape[-1], parents[0].shape[-1]
    if words <= width:
        return ""
    loss, least = math.log(words) + final.q / 2, math.log(words)
    verdict = "" if final.q < least / 2 else ", so that the softmax is far from even"
    if final.q >= 2 * least:
        return f"; logits over {words:,} tokens of that size leave the first loss far above log V = {least:.2f}"
    return f"; a first loss of about {loss:.2f} (log V = {least:.2f}) over {words:,} tokens{verdict}"


def c_line(analysis: Analysis, rows: tuple[Row, ...]) -> str:
    """Where the cosines of distinct inputs end up."""
    final = analysis.final
    fate = _fate(analysis, final)
    slope = f"slope {short(final.slope)}"
    return f"{fate}; {slope}{_ntk(analysis, final)}{_where(rows)}{_max_slope(analysis)}"


def _fate(analysis: Analysis, final: NodeKernel) -> str:
    far, near = farthest(analysis)[0], nearest(analysis)[0]
    if far is None:
        return "c: no pair of distinct inputs was given"
    if math.isnan(final.q):
        first = next(node for node in analysis.nodes if math.isnan(node.q))
        return f"the q value is not known from {first.name} on, a function that is not defined for every Gaussian"
    if any(math.isnan(c) for c in final.c):
        return "the output is 0: inputs have no cosine there"
    moved = (final.c[far] - analysis.cosines[far]) / (1 - analysis.cosines[far])
    if moved >= 0.95:
        return f"{_arrive(analysis, far)}: the output hardly tells inputs apart"
    if near is not None and _diverged(analysis, near):
        return f"{_arrive(analysis, near)}: similar inputs are torn apart (chaos)"
    given = " / ".join(plain(c) for c in analysis.cosines)
    arrived = " / ".join(cosine(c) for c in final.c)
    verdict = "distinct inputs look alike" if moved >= 0.5 else "distinct inputs stay distinct"
    return f"inputs with cosine {given} arrive with {arrived}: {verdict}"


def _diverged(analysis: Analysis, near: int) -> bool:
    final = analysis.final
    return 1 - final.c[near] > 2 * (1 - analysis.cosines[near]) and final.slope > 1


def _arrive(analysis: Analysis, index: int) -> str:
    given, arrived = plain(analysis.cosines[index]), cosine(analysis.final.c[index])
    return f"inputs with cosine {given} arrive with cosine {arrived}"


def _where(rows: tuple[Row, ...]) -> str:
    kinds = {"collapse": "collapse at", "chaos": "chaos from"}
    for row in rows:
        for flag in row.flags:
            if flag.kind in kinds and flag.severity == "bad":
                return f", {kinds[flag.kind]} {_name(row.node)} (layer {row.node.depth})"
    return ""


def knows_ntk(analysis: Analysis) -> bool:
    """Whether any node's NTK is known (a report written without it has none)."""
    return any(not math.isnan(node.ntk) for node in analysis.nodes)


def ntk_line(analysis: Analysis) -> str:
    """What the ntk column holds."""
    return f"ntk: the NTK of an input with itself, {analysis.parametrization} parametrization"


def _ntk(analysis: Analysis, final: NodeKernel) -> str:
    if math.isnan(final.ntk):
        return ""
    return f", NTK {short(final.ntk)} ({analysis.parametrization} parametrization)"


def _max_slope(analysis: Analysis) -> str:
    if analysis.max_slope is None:
        return ""
    where = f" ({analysis.max_slope_at})" if analysis.max_slope_at else ""
    return f", maximal slope of a subnetwork {short(analysis.max_slope)}{where}"


def _moves(verb: str, begin: NodeKernel, end: NodeKernel) -> str:
    if begin is end:
        return f"q {verb}: {short(end.q)} at {_name(end)}"
    change = f"{short(begin.q)} to {short(end.q)}"
    return f"q {verb} by a factor {short(end.q / begin.q)} between {_name(begin)} and {_name(end)} ({change})"


def _last(flow: Flow, end: NodeKernel, calm: Callable[[float], bool]) -> NodeKernel:
    """The last node of the trunk before `end` whose q has not yet passed the input's."""
    begin = flow.main_line[0]
    for node in flow.main_line:
        if node is end:
            return begin
        if calm(node.q):
            begin = node
    return begin


def _name(node: NodeKernel) -> str:
    return elide(node.name, 40)


def _seconds(seconds: float) -> str:
    return f"{seconds * 1e3:.0f} ms" if seconds < 1 else f"{seconds:.1f} s"
