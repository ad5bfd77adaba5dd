"""Analyses made by hand, in the shapes that real models produce: for tests of what reads an Analysis."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import replace
from typing import Any

import numpy as np

from kgraph.analysis import Analysis, Change, Ledger, NodeKernel
from kgraph.certificate import Certificate, CertificateRow, Figure

COSINES = (0.0, 0.5, 0.9)
NAN = float("nan")


def node(
    name: str,
    op: str,
    inputs: Iterable[str] = (),
    depth: int = 0,
    q: float = 1.0,
    c: Iterable[float] = COSINES,
    **more: Any,
) -> NodeKernel:
    """A node with the fields that matter."""
    fields = {"module": "", "shape": (2, 64, 8, 8), "source": "model.py:12", "c_positions": 0.0, "slope": 1.0}
    fields |= {"mean": 0.0, "how": "exact", "note": ""} | more
    return NodeKernel(name=name, op=op, inputs=tuple(inputs), depth=depth, q=q, c=tuple(c), **fields)


def analysis(nodes: Sequence[NodeKernel], **more: Any) -> Analysis:
    """An analysis whose output is the last node."""
    fields = {"model": "Net", "mode": "train", "cosines": COSINES, "positions": "exchangeable"}
    fields |= {"output": nodes[-1].name, "seconds": 0.012, "max_slope": None, "max_slope_at": "", "notes": ()}
    return Analysis(nodes=tuple(nodes), **(fields | more))


def relu_c(c: float) -> float:
    """C map of relu."""
    return (math.sqrt(1 - c * c) + (math.pi - math.acos(c)) * c) / math.pi


def relu_chain(layers: int = 50, gain: float = 2.0) -> Analysis:
    """A chain of convolutions and relus: q is multiplied by gain / 2 a layer, all cosines tend to 1."""
    nodes = [node("x", "input", shape=(2, 3, 8, 8))]
    q, c, p = 1.0, list(COSINES), 0.0
    for i in range(layers):
        conv, relu = f"features.{2 * i}", f"features.{2 * i + 1}"
        nodes.append(
            node(conv.replace(".", "_"), "conv2d", [nodes[-1].name], i, gain * q, c, module=conv, c_positions=p)
        )
        q, c, p = gain * q / 2, [relu_c(value) for value in c], relu_c(p)
        nodes.append(node(relu.replace(".", "_"), "relu", [nodes[-1].name], i + 1, q, c, module=relu, c_positions=p))
    nodes.append(node("flatten", "flatten", [nodes[-1].name], layers, q, c))
    nodes.append(node("fc", "linear", ["flatten"], layers, q, c, module="fc", shape=(2, 10), c_positions=NAN))
    return analysis(nodes, model="Vgg", notes=("captured in train mode",))


def tanh_chaos(layers: int = 10, sw2: float = 4.0) -> Analysis:
    """Linear and tanh with large weights: the maps by Gauss-Hermite quadrature."""
    points, weights = np.polynomial.hermite_e.hermegauss(60)
    weights = weights / weights.sum()

    def covariance(q: float, c: float) -> float:
        one, other = points[:, None], c * points[:, None] + math.sqrt(1 - c * c) * points[None]
        return float((weights[:, None] * weights * np.tanh(math.sqrt(q) * one) * np.tanh(math.sqrt(q) * other)).sum())

    nodes = [node("x", "input")]
    q, c, slope = 1.0, list(COSINES), 1.0
    for i in range(layers):
        z = sw2 * q
        more = {"module": f"layers.{i}", "slope": slope}
        nodes.append(node(f"layers_{i}_linear", "linear", [nodes[-1].name], i, z, c, **more))
        q = covariance(z, 1.0)
        slope *= z * float((weights * (1 - np.tanh(math.sqrt(z) * points) ** 2) ** 2).sum()) / q
        c = [covariance(z, value) / q for value in c]
        more = {"module": f"layers.{i}", "slope": slope, "how": "quadrature"}
        nodes.append(node(f"layers_{i}_act", "tanh", [nodes[-1].name], i + 1, q, c, **more))
    return analysis(nodes, model="DeepTanh", mode="eval", max_slope=slope, max_slope_at="x -> head")


def resnet(blocks: int = 30) -> Analysis:
    """Unnormalized residual blocks (q doubles in each), a sampled pool, a constant, an assumed op."""
    nodes = [node("x", "input"), node("stem", "conv2d", ["x"], module="stem")]
    q, c = 1.0, list(COSINES)
    for i in range(blocks):
        trunk, depth, at = nodes[-1].name, 2 * i, f"layers.{i}"
        name = at.replace(".", "_")
        branch = [relu_c(value) for value in c]
        nodes.append(node(f"{name}_relu1", "relu", [trunk], depth + 1, q / 2, branch, module=f"{at}.relu1"))
        nodes.append(node(f"{name}_conv1", "conv2d", [nodes[-1].name], depth + 1, q, branch, module=f"{at}.conv1"))
        c, q = [(one + other) / 2 for one, other in zip(c, branch, strict=True)], 2 * q
        nodes.append(node(f"{name}_add", "add", [trunk, nodes[-1].name], depth + 1, q, c, module=at))
    depth = 2 * blocks
    nodes.append(node("pool", "max_pool2d", [nodes[-1].name], depth, q, c, how="sampled", note="+-1.2e-03"))
    nodes.append(node("pos_embed", "get_attr", (), 0, 1e-6, (1.0, 1.0, 1.0), slope=0.0))
    nodes.append(node("odd", "mystery", ["pool", "pos_embed"], depth, q, c, how="assumed", note="no rule for mystery"))
    nodes.append(node("head", "linear", ["odd"], depth, q, c, module="head", shape=(2, 1000)))
    return analysis(nodes, model="PlainResNet", max_slope=1.5, max_slope_at="stem -> head")


def shaped(before: Analysis) -> Analysis:
    """What a transform would make of it: q at 1, cosines nearly kept."""
    nodes = [
        replace(n, q=1.0, c=tuple(v + 0.3 * (1 - v) * n.depth / 100 for v in COSINES)) if n.inputs else n
        for n in before.nodes
    ]
    return replace(before, nodes=tuple(nodes))


def ledger() -> Ledger:
    """A ledger with all of its parts."""
    shape = [Change(f"layers.{i}.relu1", "shape activation", "TAT", "ReLU", "ShapedActivation") for i in range(20)]
    remove = [Change("bn", "remove BatchNorm", "shaped without it", "BatchNorm2d(64)", "Identity")]
    kept = [Change(f"attn.{i}", "softmax", "not an activation", "", "") for i in range(5)]
    unmet = ("maximal slope is 1.7, wanted 1.5",)
    return Ledger("TAT(eta=0.9)", (*shape, *remove), tuple(kept), unmet, ("weights were not re-drawn",))


def certificate(slope: float = 1.0) -> Certificate:
    """Two rows, of which the output promises a slope of 1."""
    exact = Figure(1.0, 1e-3, 0.3)
    cosines = tuple(Figure(c, 1e-3, 2e-3) for c in (0.0, 0.5, 0.9))
    row = CertificateRow(
        "stem", "input of relu", "layer", 16, exact, cosines, exact, 1.0, (0.0, 0.5, 0.9), 1.0, 1.0, (NAN,) * 3, NAN
    )
    final = replace(row, node="head", what="output", kind="output", slope=Figure(slope, 1e-3, 1e-3), promised_slope=1.0)
    final = replace(final, departures=("slope",) if slope != 1 else ())
    words = "TAT: slope 1 and q = 1 at the output"
    return Certificate("PlainResNet", "TAT", words, (row, final), "head", (0.0, 0.5, 0.9), "white inputs", 4, 8, 0)
