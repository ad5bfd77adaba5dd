"""Whether a transformed network trains as well as its original: python benchmarks/training.py [--run] [--nets resnet18]

Fashion-MNIST, 200 steps of 64 images, every rate of a grid: the original, He initialization without norms, DyT in place
of LayerNorm, DKS and TAT. Runs are recorded one by one in docs/figures/training.jsonl and never made twice; without
--run the table of what is recorded is printed. The best of a grid is the rate of the highest mean accuracy over seeds.
"""

from __future__ import annotations

import argparse
import os
import statistics
import sys
from collections import defaultdict
from pathlib import Path

from rich.console import Console
from rich.progress import track
from rich.table import Table

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "examples"))
from resnet50_without_skips import define_torchvision_operators

TORCHVISION = define_torchvision_operators()  # referenced: the schemas go with the object

from tournament.arms import ARMS  # noqa: E402
from tournament.nets import NETS, WITH_SKIPS  # noqa: E402
from tournament.runs import RATES, Outcome, Run, missing, record, recorded, train  # noqa: E402

FILE = Path(__file__).resolve().parents[1] / "docs" / "figures" / "training.jsonl"


def best(found: dict[Run, Outcome], net: str, arm: str, optimizer: str) -> tuple[float, list[float], float] | None:
    """Mean accuracy, those of the seeds, and the rate that is best; None where nothing is recorded."""
    by_rate: dict[float, list[float]] = defaultdict(list)
    for run, outcome in found.items():
        if (run.net, run.arm, run.optimizer) == (net, arm, optimizer) and not outcome.note:
            by_rate[run.rate].append(outcome.accuracy)
    if not by_rate:
        return None
    rate = max(by_rate, key=lambda rate: (statistics.mean(by_rate[rate]), len(by_rate[rate])))
    return statistics.mean(by_rate[rate]), by_rate[rate], rate


def table(found: dict[Run, Outcome], optimizer: str) -> Table:
    """A row a network, a column an arm: accuracy in percent over the seeds, and its rate."""
    shown = Table(title=f"test accuracy in %, {optimizer}: mean over seeds of the best rate (its range; the rate)")
    for head in ("network", *ARMS):
        shown.add_column(head, justify="left" if head == "network" else "right")
    for net in NETS:
        cells = [best(found, net, arm, optimizer) for arm in ARMS]
        if any(cells):
            shown.add_row(net if net in WITH_SKIPS else f"{net} (no skips)", *map(_cell, cells))
    return shown


def markdown(found: dict[Run, Outcome], optimizer: str) -> str:
    """The same for a page: best mean accuracy in percent, and its rate."""
    lines = [f"| network | {' | '.join(ARMS)} |", f"| --- |{' --- |' * len(ARMS)}"]
    for net in NETS:
        cells = [best(found, net, arm, optimizer) for arm in ARMS]
        if any(cells):
            name = net if net in WITH_SKIPS else f"{net} (no skips)"
            lines.append(f"| {name} | {' | '.join(f'{100 * c[0]:.1f} ({c[2]:g})' if c else '' for c in cells)} |")
    return "\n".join(lines)


def _cell(cell: tuple[float, list[float], float] | None) -> str:
    if cell is None:
        return ""
    mean, seeds, rate = cell
    spread = f"{100 * min(seeds):.1f}..{100 * max(seeds):.1f}; " if len(seeds) > 1 else ""
    return f"{100 * mean:.1f} ({spread}{rate:g})"


def plan(nets: list[str], arms: list[str], optimizer: str, seeds: int, found: dict[Run, Outcome]) -> list[Run]:
    """The whole grid with the first seed, the middle first; then an arm's best rate and its neighbours with others."""
    grid = RATES[optimizer]
    inside_out = sorted(grid, key=lambda rate: abs(grid.index(rate) - 2.9))
    first = [Run(net, arm, optimizer, rate, 0) for rate in inside_out for net in nets for arm in arms]
    more = []
    for net in nets:
        for arm in arms:
            cell = best({r: o for r, o in found.items() if r.seed == 0}, net, arm, optimizer)
            at = grid.index(cell[2]) if cell is not None else 0
            near = grid[max(at - 1, 0) : at + 2] if cell is not None else ()
            more += [Run(net, arm, optimizer, rate, seed) for seed in range(1, seeds) for rate in near]
    return first + more


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--run", action="store_true", help="train what is not recorded yet")
    parser.add_argument("--nets", nargs="*", default=list(NETS), choices=list(NETS))
    parser.add_argument("--arms", nargs="*", default=list(ARMS), choices=list(ARMS))
    parser.add_argument("--optimizer", default="adam", choices=list(RATES))
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--markdown", action="store_true", help="print the table for a page")
    parser.add_argument("--file", type=Path, default=FILE)
    args = parser.parse_args()
    if args.run:
        args.file.parent.mkdir(parents=True, exist_ok=True)
        for seeds in (1, args.seeds):
            runs = plan(args.nets, args.arms, args.optimizer, seeds, recorded(args.file))
            for run in track(list(missing(runs, args.file)), "training"):
                record(run, train(run), args.file)
    found = recorded(args.file)
    if args.markdown:
        print(markdown(found, args.optimizer))
    else:
        Console(width=170).print(table(found, args.optimizer))


if __name__ == "__main__":
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    main()
