"""Train 100-layer networks without skip connections or normalization layers, as they are and transformed.

    python examples/deep_networks_on_digits.py [--quick] [--figure FILE]

FIGURES
"""

from __future__ import annotations

import argparse
import statistics
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from digits import Curve, Data, digits, draw_accuracy, he_initialized, train
from matplotlib.figure import Figure
from rich.console import Console
from rich.table import Table
from torch import Tensor, nn

import kgraph

RATE = 1e-4
EVERY = 10
FIGURE = Path(__file__).parent / "figures" / "deep_networks_on_digits.png"
COLORS = {"as it is": "tab:gray", "He initialization": "tab:orange", "kgraph, TAT": "tab:blue"}


@dataclass(frozen=True)
class Network:
    """A network, how its inputs are laid out, and the batch size it trains with."""

    name: str
    build: Callable[[int], nn.Module]
    layout: Callable[[Tensor], Tensor]
    batch: int


def mlp(depth: int) -> nn.Module:
    """``depth`` hidden layers of width 128 on the 64 pixels."""
    widths = [64, *[128] * depth]
    hidden = [m for a, b in zip(widths, widths[1:], strict=False) for m in (nn.Linear(a, b), nn.ReLU())]
    return nn.Sequential(*hidden, nn.Linear(128, 10))


def cnn(depth: int) -> nn.Module:
    """``depth`` 3x3 convolutions of width 32 on 4x4 locations, their average, a linear layer."""
    widths = [4, *[32] * depth]
    pairs = zip(widths, widths[1:], strict=False)
    hidden = [m for a, b in pairs for m in (nn.Conv2d(a, b, 3, padding=1), nn.ReLU())]
    return nn.Sequential(*hidden, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(32, 10))


def patches(images: Tensor) -> Tensor:
    """[N, 1, 8, 8] to [N, 4, 4, 4]: each 2x2 patch becomes one location of 4 channels, so no pixel is lost."""
    return nn.functional.pixel_unshuffle(images, 2)


NETWORKS = (
    Network("MLP", mlp, lambda images: images.flatten(1), batch=64),
    Network("CNN", cnn, patches, batch=32),
)


def variant(name: str, model: nn.Module, data: Data, seed: int) -> nn.Module:
    """The network to train under this name."""
    if name == "He initialization":
        return he_initialized(model)
    if name == "kgraph, TAT":
        return kgraph.transform(model, "tat", data.x[:2], seed=seed, per_location_norm=True)
    return model


def compare(network: Network, depth: int, steps: int, seeds: range) -> list[Curve]:
    """Curves of all variants and seeds."""
    data, curves = digits(network.layout), []
    for seed in seeds:
        for name in COLORS:
            torch.manual_seed(seed)
            model = variant(name, network.build(depth), data, seed)
            options = {"steps": steps, "batch": network.batch, "rate": RATE, "seed": seed, "every": EVERY}
            curve = train(name, model, data, **options)
            curves.append(curve)
            print(f"{network.name} seed {seed}, {name}: {curve.accuracy[-1]:.1%} in {curve.seconds:.0f} s", flush=True)
    return curves


def table(results: dict[str, list[Curve]]) -> Table:
    """Final accuracy of every seed, and the steps until every seed had 90 %."""
    out = Table("network", "variant", "accuracy by seed", "steps to 90 %", "seconds")
    for network, curves in results.items():
        for name in COLORS:
            same = [curve for curve in curves if curve.name == name]
            final = "  ".join(f"{curve.accuracy[-1]:.1%}" for curve in same)
            seconds = statistics.median(curve.seconds for curve in same)
            out.add_row(network, name, final, steps_to(same, 0.9), f"{seconds:.0f}")
    return out


def steps_to(curves: list[Curve], wanted: float) -> str:
    """First step looked at by which every seed has had the wanted accuracy."""
    first = [next((s for s, a in zip(c.steps, c.accuracy, strict=True) if a >= wanted), None) for c in curves]
    return "-" if None in first else str(max(step for step in first if step is not None))


def draw(results: dict[str, list[Curve]], depth: int, path: Path) -> None:
    """One panel a network."""
    figure = Figure(figsize=(9, 3.4), layout="constrained")
    for axes, (name, curves) in zip(figure.subplots(1, len(results), sharey=True), results.items(), strict=True):
        draw_accuracy(axes, curves, COLORS)
        axes.set_title(f"{depth}-layer {name}, no skips, no normalization")
    axes.legend(loc="center right")
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=110)


def main(arguments: list[str] | None = None) -> dict[str, list[Curve]]:
    """Train all variants, print the table, save the picture."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="10 layers, 20 steps, one seed")
    parser.add_argument("--figure", type=Path, default=FIGURE)
    options = parser.parse_args(arguments)
    depth, steps, seeds = (10, 20, range(1)) if options.quick else (100, 200, range(3))
    results = {network.name: compare(network, depth, steps, seeds) for network in NETWORKS}
    Console().print(table(results))
    draw(results, depth, options.figure)
    return results


if __name__ == "__main__":
    main()
