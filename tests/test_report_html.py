"""Reports as HTML pages and as plots, and what a transform's report shows."""

from __future__ import annotations

import builtins
import json
import re
import xml.etree.ElementTree as ElementTree
from dataclasses import replace
from html.parser import HTMLParser
from typing import Any

import pytest
from synthetic import COSINES, analysis, ledger, node, relu_chain, resnet, shaped, tanh_chaos

from kgraph.errors import KGraphError
from kgraph.report import Comparison, Report, ledger_text

ALL = {"relu": relu_chain, "tanh": tanh_chaos, "resnet": resnet}


class _Page(HTMLParser):
    """Checks that tags are balanced; collects attributes and ids."""

    VOID = frozenset({"meta", "input", "line", "br", "circle"})

    def __init__(self, text: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.ids: list[str] = []
        self.links: list[str] = []
        self.tags: list[str] = []
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        values = dict(attrs)
        self.ids += [v for k, v in values.items() if k == "id" and v]
        self.links += [v for k, v in values.items() if k in ("href", "src") and v]
        if tag not in self.VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.handle_starttag(tag, attrs)
        if tag not in self.VOID:
            self.open.pop()

    def handle_endtag(self, tag: str) -> None:
        if tag not in self.VOID:
            assert self.open.pop() == tag


@pytest.mark.parametrize("name", ALL)
def test_html_is_one_offline_file(name: str, tmp_path: Any) -> None:
    report = Report(ALL[name](150 if name != "tanh" else 10))
    text = report.to_html(tmp_path / "r.html", ledger=ledger())
    page = _Page(text)
    assert page.open == [] and "script" not in page.tags and "link" not in page.tags
    assert len(set(page.ids)) == len(page.ids)
    assert page.links and all(link.startswith("#") and link[1:] in page.ids for link in page.links)
    assert "http" not in text and "prefers-color-scheme: dark" in text
    assert (tmp_path / "r.html").stat().st_size < 2e6
    for svg in re.findall(r"<svg.*?</svg>", text, flags=re.S):
        root = ElementTree.fromstring(svg)
        numbers = [float(root_part.get(key, "0")) for root_part in root.iter() for key in ("cx", "cy", "x1", "y1")]
        assert all(0 <= number <= 600 for number in numbers)
        assert any(element.tag == "title" and "depth" in (element.text or "") for element in root.iter())


def test_html_escapes_names() -> None:
    nodes = [node("x", "input", module="<script>alert(1)</script>", source="<b>")]
    text = Report(analysis(nodes, model="<i>&")).to_html()
    assert "<script" not in text and "&lt;i&gt;&amp;" in text and "&lt;b&gt;" in text


def test_html_of_huge_models_stays_small_where_it_can() -> None:
    text = Report(relu_chain(1500))._repr_html_()
    assert (
        text.count("<circle") < 2500
        and len(text) < 2e6
        and "features_41: inputs collapse" in text
        and "<html" not in text
    )


def test_extreme_q_can_be_drawn() -> None:
    for q in (1.7e308, 5e-324, 0.0):
        assert "<svg" in Report(analysis([node("x", "input"), node("y", "mul", ["x"], q=q)])).to_html()


def test_comparison_shows_both_and_the_ledger(tmp_path: Any) -> None:
    comparison = Comparison(Report(resnet()), Report(shaped(resnet())), ledger())
    text = str(comparison)
    assert max(map(len, text.splitlines())) <= 100
    for part in ("q explodes by a factor", "q stays at 1", "… and 17 more", "maximal slope is 1.7"):
        assert part in text
    page = _Page(comparison.to_html(tmp_path / "c.html"))
    assert page.open == [] and len(set(page.ids)) == len(page.ids)
    assert "c 0.9 before" in comparison.to_html() and "c 0.9 after" in comparison.to_html()
    assert set(json.loads(comparison.to_json())) == {"before", "after", "ledger"}
    assert "<svg" in comparison._repr_html_() and len(comparison.plot().axes) == 2


def test_ledger_text_groups_and_counts() -> None:
    text = ledger_text(ledger(), width=100)
    assert ledger().counts() == {"shape activation": 20, "remove BatchNorm": 1}
    assert "TAT(eta=0.9): 21 changes, 5 kept, 1 not met" in text
    assert "5 softmax: attn.0, attn.1, attn.2 and 2 more (not an activation)" in text
    empty = replace(ledger(), changes=(), kept=(), unmet=(), notes=())
    assert ledger_text(empty) == "TAT(eta=0.9): nothing was changed, 0 kept"


def test_plot_draws_a_line_for_each_cosine() -> None:
    figure = Report(tanh_chaos()).plot()
    q_axes, c_axes = figure.axes
    assert q_axes.get_yscale() == "log" and len(c_axes.get_lines()) == len(COSINES) + 1


def test_plot_without_matplotlib_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    real = builtins.__import__

    def refuse(name: str, *args: Any, **kwargs: Any) -> Any:
        if name.startswith("matplotlib"):
            raise ImportError(name)
        return real(name, *args, **kwargs)

    monkeypatch.setattr(builtins, "__import__", refuse)
    with pytest.raises(KGraphError, match="pip install"):
        Report(relu_chain(2)).plot()
