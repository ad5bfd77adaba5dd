"""What reports say, and that they say it where it happens."""

from __future__ import annotations

import csv
import io
import json
import math
from dataclasses import FrozenInstanceError, replace
from typing import Any

import pytest
from rich.console import Console
from synthetic import COSINES, NAN, analysis, node, relu_chain, resnet, shaped, tanh_chaos

from kgraph.errors import InputError
from kgraph.report import Report
from kgraph.report.numbers import cosine, elide, short
from kgraph.report.svg import steps

ALL = {"relu": relu_chain, "tanh": tanh_chaos, "resnet": resnet}


def kinds(report: Report) -> dict[str, list[str]]:
    return {row.node.name: [flag.kind for flag in row.flags] for row in report.flagged()}


# ---- flags: where, and once


def test_relu_chain_collapses_once_where_c_passes_95_percent() -> None:
    report = Report(relu_chain(50))
    (row,) = report.flagged("collapse")
    before = report[row.node.inputs[0]]
    assert before.c[0] <= 0.95 < row.node.c[0]
    assert row.flags[0].severity == "bad"
    assert kinds(report) == {row.node.name: ["collapse", "positions"]}
    assert f"collapse at {row.node.name}" in report.summary[2] and "hardly tells inputs apart" in report.summary[2]


def test_shallow_relu_chain_has_no_flags() -> None:
    report = Report(relu_chain(5))
    assert kinds(report) == {}
    assert "distinct inputs look alike" in report.summary[2]


def test_tanh_chaos_is_flagged_where_the_squared_distance_doubled() -> None:
    report = Report(tanh_chaos())
    (row,) = report.flagged("chaos")
    assert row.node.c[2] < 0.8 <= report[row.node.inputs[0]].c[2]
    assert "torn apart (chaos)" in report.summary[2] and "x -> head" in report.summary[2]


def test_ordered_network_is_not_chaos_though_c_falls() -> None:
    nodes = [node("x", "input"), node("norm", "batch_norm", ["x"], c=(0, 0.3, 0.7), slope=0.9)]
    assert kinds(Report(analysis(nodes))) == {}


@pytest.mark.parametrize(("gain", "kind", "verb"), [(8.0, "explodes", "explodes"), (0.5, "vanishes", "vanishes")])
def test_q_out_of_range_is_flagged_once(gain: float, kind: str, verb: str) -> None:
    report = Report(relu_chain(20, gain))
    (row,) = report.flagged(kind)
    assert not 1e-3 <= row.node.q <= 1e3 and 1e-3 <= report[row.node.inputs[0]].q <= 1e3
    assert f"q {verb} by a factor" in report.summary[1]


def test_q_that_stays_is_said_to_stay() -> None:
    assert Report(relu_chain(4)).summary[1] == "q stays in [1, 2] and arrives at 1"
    assert Report(shaped(resnet(4))).summary[1] == "q stays at 1"


def test_a_large_input_is_no_explosion() -> None:
    nodes = [node("x", "input", q=1e5), node("fc", "linear", ["x"], q=2e5)]
    assert kinds(Report(analysis(nodes))) == {}


def test_recovery_ends_an_event_and_a_second_collapse_is_flagged_again() -> None:
    high = (0.97, 0.98, 0.99)
    cs = [COSINES, high, high, (0.0, 0.5, 0.9), high]
    nodes = [node(f"n{i}", "op", [f"n{i - 1}"] if i else [], c=c) for i, c in enumerate(cs)]
    assert [row.node.name for row in Report(analysis(nodes)).flagged("collapse")] == ["n1", "n4"]


def test_a_branch_warns_and_the_trunk_alarms() -> None:
    high = (0.97, 0.98, 0.99)
    nodes = [node("x", "input"), node("gate", "sigmoid", ["x"], c=high), node("mul", "mul", ["x", "gate"])]
    report = Report(analysis(nodes))
    (flag,) = report.rows[1].flags
    assert (flag.severity, flag.text) == ("warn", "inputs collapse here (branch)")
    assert not report.rows[1].trunk and report.rows[2].trunk
    collapsed = replace(nodes[2], c=high)
    assert [r.flags[0].severity for r in Report(analysis([*nodes[:2], collapsed])).flagged()] == [
        "warn",
        "bad",
    ]


def test_constants_and_probabilities_are_not_collapses() -> None:
    ones = (1.0, 1.0, 1.0)
    nodes = [
        node("x", "input"),
        node("pos", "get_attr", c=ones, q=1e-9),
        node("scaled", "mul", ["pos"], c=ones, q=1e-9),
        node("probabilities", "softmax", ["x"], c=ones, q=1e-6),
        node("out", "add", ["x", "scaled", "probabilities"]),
    ]
    assert kinds(Report(analysis(nodes))) == {}


def test_sampled_and_assumed_are_flagged_with_their_notes() -> None:
    report = Report(resnet(3))
    assert [flag.text for flag in report.rows[-4].flags] == ["sampled +-1.2e-03"]
    assert report.flagged("assumed")[0].flag_text == "assumed: no rule for mystery"
    assert "1 sampled, 1 assumed" in report.summary[0]


def test_dead_branch_is_a_remark_and_a_dead_output_an_alarm() -> None:
    dead = {"q": 0.0, "c": (NAN, NAN, NAN), "slope": NAN}
    nodes = [node("x", "input"), node("gain", "mul", ["x"], **dead), node("add", "add", ["x", "gain"])]
    report = Report(analysis(nodes))
    assert [(f.kind, f.severity) for f in report.rows[1].flags] == [("dead", "info")]
    report = Report(analysis([*nodes, node("out", "mul", ["add"], **dead)]))
    assert report.rows[3].flags[0].severity == "bad"
    assert "q is 0 from out on" in report.summary[1] and "no cosine" in report.summary[2]


@pytest.mark.parametrize("q", [math.inf, NAN])
def test_q_that_is_not_finite(q: float) -> None:
    report = Report(analysis([node("x", "input"), node("exp", "exp", ["x"], q=q, c=(NAN,) * 3, slope=math.inf)]))
    assert report.flagged("not finite") and "not finite from exp on" in report.summary[1]
    assert str(report) and report.to_html()


# ---- text


@pytest.mark.parametrize("name", ALL)
@pytest.mark.parametrize("width", [80, 100, 160])
def test_text_fits_its_width(name: str, width: int) -> None:
    text = Report(ALL[name]()).text(width=width)
    assert max(map(len, text.splitlines())) <= width


def test_print_without_a_terminal_has_100_columns_and_no_colour(capsys: pytest.CaptureFixture[str]) -> None:
    print(Report(resnet(5)))
    text = capsys.readouterr().out
    assert 80 < max(map(len, text.splitlines())) <= 100 and "\x1b" not in text
    head = next(line for line in text.splitlines() if line.startswith("name"))
    assert head.split() == [
        "name",
        "module",
        "op",
        "q",
        "c",
        "0",
        "c",
        "0.5",
        "c",
        "0.9",
        "slope",
        "how",
        "flags",
    ]


def test_module_column_goes_where_names_tell_the_modules_and_room_is_short() -> None:
    head = next(line for line in Report(resnet()).text(width=72).splitlines() if line.startswith("name"))
    assert "module" not in head and "flags" in head


def test_long_names_lose_their_middle_and_numbers_stay_whole() -> None:
    long = "encoder.blocks.11.attention.output.projection.linear"
    nodes = [node("x", "input"), node("b" * 60 + "_end", "linear", ["x"], q=1.2345e-5, module=long)]
    line = next(line for line in Report(analysis(nodes)).text().splitlines() if line.startswith("bbb"))
    assert "…" in line and "_end" in line and "linear" in line and "1.2e-5" in line


def test_reindexing_is_folded_unless_flagged_or_asked_for() -> None:
    report = Report(relu_chain(3))
    assert "\nflatten " not in str(report) and "1 row hidden" in str(report)
    assert "\nflatten " in report.text(all_nodes=True) and "hidden" not in report.text(all_nodes=True)
    nodes = [
        node("x", "input"),
        node("flat", "flatten", ["x"], how="assumed"),
        node("fc", "linear", ["flat"]),
    ]
    assert "\nflat " in str(Report(analysis(nodes)))
    averaging = [node("x", "input"), node("flat", "flatten", ["x"], q=0.5), node("fc", "linear", ["flat"])]
    assert "\nflat " in str(Report(analysis(averaging)))


def test_rich_console_gets_colours() -> None:
    console = Console(file=io.StringIO(), force_terminal=True, width=120, color_system="standard")
    with console.capture() as capture:
        console.print(Report(resnet()))
    assert "\x1b[1;31mq explodes here" in capture.get()


def test_numbers_are_short_and_honest() -> None:
    assert [short(v) for v in (0, 1, 0.98123, 1234.5, 1.23e5, 1e-4, NAN, -math.inf)] == [
        "0", "1", "0.981", "1234", "1.2e5", "1e-4", "-", "-inf",
    ]  # fmt: skip
    assert [cosine(v) for v in (0.0, 0.31831, 0.9999, 1 - 2e-9, 1.0, -0.25, -1e-9, NAN)] == [
        "0", "0.318", "1-1e-4", "1-2e-9", "1", "-0.25", "0", "-",
    ]  # fmt: skip
    assert elide("abcdefghij", 5) == "ab…ij" and elide("abc", 5) == "abc"
    assert steps(0, 60, 8) == [0, 10, 20, 30, 40, 50, 60] and steps(0, 1, 6) == [0, 0.2, 0.4, 0.6, 0.8, 1]


# ---- data


@pytest.mark.parametrize("name", ALL)
def test_json_round_trip(name: str, tmp_path: Any) -> None:
    report = Report(ALL[name]())
    text = report.to_json(tmp_path / "r.json")
    json.loads(text, parse_constant=lambda constant: pytest.fail(f"{constant} is not JSON"))
    assert (tmp_path / "r.json").read_text(encoding="utf-8") == text
    again = Report.from_json(text)
    assert again.to_json() == text and again.final.c == report.final.c
    assert json.loads(text)["nodes"][0]["name"] == "x"
    with pytest.raises(InputError, match="not a kgraph report"):
        Report.from_json("{}")


def test_csv_has_a_line_a_node_with_all_digits() -> None:
    report = Report(resnet(3))
    lines = list(csv.DictReader(io.StringIO(report.to_csv())))
    assert len(lines) == len(report.nodes)
    assert float(lines[-1]["c_0.9"]) == report.final.c[2] and lines[-2]["flags"] == "assumed: no rule for mystery"


def test_networkx_has_the_edges_and_the_numbers() -> None:
    graph = Report(resnet(3)).to_networkx()
    assert set(graph.predecessors("layers_0_add")) == {"stem", "layers_0_conv1"}
    assert graph.nodes["odd"]["flags"] == ["assumed"] and graph.nodes["head"]["q"] == 8.0


def test_report_passes_through_and_is_frozen() -> None:
    report = Report(relu_chain(3))
    assert report.final.name == "fc" and report["features_1"].op == "relu" and report.cosines == COSINES
    with pytest.raises(InputError, match="Did you mean features_1"):
        report["features_1_"]
    with pytest.raises(FrozenInstanceError):
        report.analysis = relu_chain(2)  # pyright: ignore[reportAttributeAccessIssue]
