"""Numbers of every node of the zoo as `kgraph.analyze` gave them: what a change of the engine must give again.

`python tests/golden.py check` prints what differs, `python tests/golden.py write` takes today's numbers instead; a
model's name after it does so for that model alone. They are no truth: where a change is right and they are wrong,
they are written anew, and the commit says how that is known.
"""

from __future__ import annotations

import json
import math
import sys
import warnings
from pathlib import Path
from typing import Any

import torch
from zoo import ZOO, build

import kgraph

FOLDER = Path(__file__).parent / "reference" / "golden"
TRUSTED = ("exact", "quadrature")
RELATIVE = 1e-10
DIGITS = 13
Rows = dict[str, dict[str, Any]]
"""By node: how, q, c values, slope, NTK."""


def values(name: str) -> Rows:
    """Today's numbers of a model of the zoo, in the mode in which it is built."""
    model, inputs = build(name)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        report = kgraph.analyze(model.double(), _double(inputs))
    return {
        node.name: {"how": node.how, "numbers": [_short(v) for v in (node.q, *node.c, node.slope, node.ntk)]}
        for node in report.nodes
    }


def _double(inputs: Any) -> Any:
    if isinstance(inputs, torch.Tensor):
        return inputs.double() if inputs.is_floating_point() else inputs
    if isinstance(inputs, dict):
        return {key: _double(value) for key, value in inputs.items()}
    return type(inputs)(_double(value) for value in inputs)


def _short(value: float) -> float:
    return float(f"{value:.{DIGITS}g}")


def recorded(name: str) -> Rows:
    return json.loads((FOLDER / f"{name}.json").read_text())


def write(name: str) -> None:
    lines = [f"{json.dumps(node)}: {json.dumps(row)}" for node, row in values(name).items()]
    FOLDER.mkdir(exist_ok=True)
    (FOLDER / f"{name}.json").write_text("{\n" + ",\n".join(lines) + "\n}\n")


def differences(name: str, found: Rows) -> list[str]:
    """Nodes that are new or gone, whose label is worse, or whose trusted numbers moved by more than rounding."""
    before, lines = recorded(name), []
    lines += [f"{name}: {node} is gone" for node in before if node not in found]
    lines += [f"{name}: {node} is new" for node in found if node not in before]
    for node in before.keys() & found.keys():
        old, new = before[node], found[node]
        if old["how"] in TRUSTED and new["how"] not in TRUSTED:
            lines.append(f"{name}: {node} was {old['how']} and is {new['how']}")
        elif old["how"] in TRUSTED and not all(map(_same, old["numbers"], new["numbers"])):
            lines.append(f"{name}: {node} ({old['how']}) was {old['numbers']} and is {new['numbers']}")
    return lines


def _same(old: float, new: float) -> bool:
    return math.isclose(old, new, rel_tol=RELATIVE, abs_tol=RELATIVE) or (math.isnan(old) and math.isnan(new))


def main(action: str, *names: str) -> int:
    failed = False
    for name in names or ZOO:
        if action == "write":
            write(name)
            continue
        lines = differences(name, values(name))
        failed = failed or bool(lines)
        print(*lines or [f"{name}: the same"], sep="\n", flush=True)
    return int(failed)


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:]))
