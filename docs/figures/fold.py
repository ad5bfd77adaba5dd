"""Draws fold.svg, one residual block in ONNX before and after folding: python docs/figures/fold.py"""

from __future__ import annotations

import math
import tempfile
from pathlib import Path
from xml.sax.saxutils import escape

import networkx as nx
import onnx
import torch
from torch import Tensor, nn

import kgraph

FILE = Path(__file__).with_name("fold.svg")
WIDTH, HEIGHT, STEP, COLUMN = 104, 22, 34, 320
CONSTANTS = {"Mul", "Add"}
STYLE = (
    "text{font:12px sans-serif;text-anchor:middle;fill:#222}.head{font-weight:bold}"
    ".layer{fill:#dbe7f5;stroke:#4a78a8}.act{fill:#e3f1df;stroke:#5a9150}.sum{fill:#f2f2f2;stroke:#888}"
    ".constant{fill:#fbe0d8;stroke:#c2502c}.edge{fill:none;stroke:#777;marker-end:url(#tip)}"
)
TIP = (
    '<marker id="tip" markerWidth="7" markerHeight="6" refX="7" refY="3" orient="auto">'
    '<path d="M0 0L7 3L0 6Z"/></marker>'
)


class Block(nn.Module):
    """The stem and the first block of a ResNet."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Sequential(self.layer(3, 8), nn.LeakyReLU(0.1), nn.AvgPool2d(2))
        self.branch = nn.Sequential(self.layer(8, 8), nn.LeakyReLU(0.1), self.layer(8, 8))
        self.act = nn.LeakyReLU(0.1)
        self.head = nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, 5))

    @staticmethod
    def layer(before: int, after: int) -> nn.Sequential:
        return nn.Sequential(nn.Conv2d(before, after, 3, padding=1, bias=False), nn.BatchNorm2d(after))

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        return self.head(self.act(self.branch(x) + x))


def graph_of(path: Path) -> nx.DiGraph:
    """Nodes of an ONNX file by number, with their kind and whether they read a number of the file."""
    graph, makers = nx.DiGraph(), dict[str, int]()
    model = onnx.load(path).graph
    numbers = {tensor.name for tensor in model.initializer if not math.prod(tensor.dims) > 1}
    for number, node in enumerate(model.node):
        constant = node.op_type in CONSTANTS and any(name in numbers for name in node.input)
        graph.add_node(number, kind=node.op_type, constant=constant)
        graph.add_edges_from((makers[name], number) for name in node.input if name in makers)
        makers |= dict.fromkeys(node.output, number)
    return graph


def kind_of(node: dict[str, object]) -> str:
    if node["constant"]:
        return "constant"
    kinds = {"Conv": "layer", "Gemm": "layer", "Relu": "act", "LeakyRelu": "act", "Clip": "act"}
    return kinds.get(str(node["kind"]), "sum")


def column(graph: nx.DiGraph, title: str, left: int) -> tuple[list[str], int]:
    """One graph from top to bottom; values that skip levels go round on the right."""
    places: dict[int, tuple[float, float]] = {}
    for level, nodes in enumerate(nx.topological_generations(graph)):
        for lane, node in enumerate(sorted(nodes)):
            places[node] = left + 80 + lane * (WIDTH + 12), 40 + level * STEP
    lines = [f'<text class="head" x="{left + 80}" y="22">{escape(title)}</text>']
    for one, other in sorted(graph.edges):
        (x0, y0), (x1, y1) = places[one], places[other]
        if y1 - y0 > STEP and x0 == x1:
            side = x0 + WIDTH / 2
            path = f"M{side} {y0 + HEIGHT / 2}C{side + 50} {y0 + 20} {side + 50} {y1} {side} {y1 + HEIGHT / 2}"
        elif y1 - y0 > STEP:
            path = f"M{x0} {y0 + HEIGHT}V{y1 + HEIGHT / 2}H{x1 + WIDTH / 2}"
        else:
            path = f"M{x0} {y0 + HEIGHT}L{x1} {y1}"
        lines.append(f'<path class="edge" d="{path}"/>')
    for node, (x, y) in sorted(places.items()):
        data = graph.nodes[node]
        shape = f'x="{x - WIDTH / 2}" y="{y}" width="{WIDTH}" height="{HEIGHT}" rx="4"'
        lines.append(f'<rect class="{kind_of(data)}" {shape}/><text x="{x}" y="{y + 15}">{escape(data["kind"])}</text>')
    return lines, 40 + round(max(y for _, y in places.values()))


def draw() -> str:
    """The picture."""
    torch.manual_seed(0)
    model, x = Block(), torch.randn(2, 3, 12, 12)
    shaped = kgraph.transform(model, "tat", x)
    lines: list[str] = []
    bottom = 0
    with tempfile.TemporaryDirectory() as folder:
        for place, (title, fold) in enumerate((("before", False), ("folded", True))):
            result = kgraph.export_onnx(shaped, Path(folder) / "model.onnx", x, fold=fold)
            graph = graph_of(result.path)
            drawn, end = column(graph, f"{title}: {len(graph)} nodes", place * COLUMN)
            lines, bottom = lines + drawn, max(bottom, end)
    size = f'width="{2 * COLUMN}" height="{bottom}" viewBox="0 0 {2 * COLUMN} {bottom}"'
    head = f'<svg xmlns="http://www.w3.org/2000/svg" {size}>'
    return "\n".join([head, f"<style>{STYLE}</style><defs>{TIP}</defs>", *lines, "</svg>", ""])


if __name__ == "__main__":
    FILE.write_text(draw(), encoding="utf-8")
