"""Reports as plain data: JSON and back, CSV, networkx."""

from __future__ import annotations

import csv
import io
import json
import math
import types
from collections.abc import Sequence
from dataclasses import MISSING, fields, is_dataclass
from typing import Any, get_args, get_origin, get_type_hints

import networkx as nx

from kgraph.analysis import Analysis, Change, Ledger, NodeKernel
from kgraph.errors import InputError
from kgraph.report.numbers import plain
from kgraph.report.rows import Row

FORMAT = "kgraph-report/1"
_FLOATS = {"inf": math.inf, "-inf": -math.inf, "nan": math.nan}


def encode(value: Any) -> Any:
    """Dataclasses and tuples to dicts and lists; nan and infinities, which JSON lacks, to strings."""
    if isinstance(value, float):
        return value if math.isfinite(value) else str(value)
    if is_dataclass(value) and not isinstance(value, type):
        return {field.name: encode(getattr(value, field.name)) for field in fields(value)}
    return [encode(item) for item in value] if isinstance(value, list | tuple) else value


def decode(kind: Any, value: Any) -> Any:
    """The inverse of `encode`, guided by the declared type."""
    if kind is float:
        return _FLOATS[value] if isinstance(value, str) else float(value)
    if get_origin(kind) is tuple:
        return tuple(decode(get_args(kind)[0], item) for item in value)
    if isinstance(kind, types.UnionType):
        return None if value is None else decode(get_args(kind)[0], value)
    if kind in (NodeKernel, Analysis, Change, Ledger):
        hints = get_type_hints(kind)
        given = [field.name for field in fields(kind) if field.name in value or field.default is MISSING]
        return kind(**{name: decode(hints[name], value[name]) for name in given})
    return value


def report_dict(analysis: Analysis, rows: Sequence[Row], summary: Sequence[str]) -> dict[str, Any]:
    """The analysis, with its summary and each node's flags added."""
    data = {"format": FORMAT, "summary": list(summary), **encode(analysis)}
    for node, row in zip(data["nodes"], rows, strict=True):
        node["flags"] = [{"kind": f.kind, "text": f.text, "severity": f.severity} for f in row.flags]
    return data


def read_analysis(text: str) -> Analysis:
    """The analysis in the JSON of a report.

    Raises:
        InputError: the text is not the JSON of a report.
    """
    try:
        return decode(Analysis, json.loads(text))
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise InputError(f"This is not a kgraph report ({error!r})", hint="Pass what to_json() returned") from error


def to_json(data: dict[str, Any]) -> str:
    """Valid JSON: fails rather than write NaN."""
    return json.dumps(data, indent=1, allow_nan=False, ensure_ascii=False)


def to_csv(analysis: Analysis, rows: Sequence[Row]) -> str:
    """A line a node, all digits."""
    heads = [f"c_{plain(c)}" for c in analysis.cosines]
    plain_fields = [field.name for field in fields(NodeKernel) if field.name not in ("c", "shape", "inputs")]
    file = io.StringIO()
    writer = csv.writer(file, lineterminator="\n")
    writer.writerow([*plain_fields, *heads, "shape", "inputs", "flags"])
    for row in rows:
        node = row.node
        shape = "x".join(map(str, node.shape))
        values = [getattr(node, name) for name in plain_fields]
        writer.writerow([*values, *node.c, shape, " ".join(node.inputs), row.flag_text])
    return file.getvalue()


def to_networkx(analysis: Analysis, rows: Sequence[Row]) -> nx.DiGraph:
    """The graph of rows; each node carries its NodeKernel's fields and `flags`, `trunk`."""
    graph = nx.DiGraph(model=analysis.model, mode=analysis.mode, output=analysis.output, cosines=analysis.cosines)
    for row in rows:
        values = {field.name: getattr(row.node, field.name) for field in fields(row.node)}
        name = values.pop("name")
        graph.add_node(name, **values, flags=[flag.kind for flag in row.flags], trunk=row.trunk)
    for row in rows:
        graph.add_edges_from((name, row.node.name) for name in row.node.inputs)
    return graph
