"""Train 100-layer networks without skip connections or normalization layers, as they are and transformed.

    python examples/deep_networks_on_digits.py [--quick] [--figure FILE]

Ordinary torch modules: a relu MLP of width 128 and a relu CNN of width 32 (3x3 convolutions on 4x4 places),
each with 100 hidden layers, on scikit-learn's bundled 8x8 digits. Adam at 1e-4, 200 steps of batch 64. Three
variants: as it is (PyTorch's initialization), He initialization on inputs normalized location
by location, and ``kgraph.transform(model, "tat", example, per_location_norm=True)``.

Test accuracy after 200 steps with seeds 0, 1, 2 (torch 2.13, CPU, one thread, about 5 s an MLP, 11 s a CNN):

         as it is                  He                        TAT
    MLP  10.0 %   8.4 %  10.0 %    30.9 %  18.7 %  36.9 %    92.2 %  95.8 %  96.0 %
    CNN   8.4 %   8.2 %  10.0 %    17.6 %  10.0 %   8.4 %    94.4 %  96.2 %  94.7 %

Every seed of TAT's MLP has had 90 % by step 60, of its CNN by step 110.

The learning rate matters. The transformed MLP, seed 0, after 200 steps:

    Adam  3e-5 96.7 %   1e-4 92.2 %   3e-4 94.4 %   1e-3 20.4 %
    SGD                 3e-4 86.9 %   1e-3 95.1 %   3e-3 96.4 %
"""

from __future__ import annotations

import argparse
import itertools
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
from kgraph.modules import PerLocationNorm

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
    hidden = [m for a, b in itertools.pairwise(widths) for m in (nn.Linear(a, b), nn.ReLU())]
    return nn.Sequential(*hidden, nn.Linear(128, 10))


def cnn(depth: int) -> nn.Module:
    """``depth`` 3x3 convolutions of width 32 on 4x4 locations, their average, a linear layer."""
    widths = [4, *[32] * depth]
    pairs = itertools.pairwise(widths)
    hidden = [m for a, b in pairs for m in (nn.Conv2d(a, b, 3, padding=1), nn.ReLU())]
    return nn.Sequential(*hidden, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(32, 10))


def patches(images: Tensor) -> Tensor:
    """[N, 1, 8, 8] to [N, 4, 4, 4]: a 2x2 patch becomes a location of 4 channels, no pixel is lost."""
    return nn.functional.pixel_unshuffle(images, 2)


NETWORKS = (
    Network("MLP", mlp, lambda images: images.flatten(1), batch=64),
    Network("CNN", cnn, patches, batch=64),
)


def variant(name: str, model: nn.Module, data: Data, seed: int) -> nn.Module:
    """The network to train under this name."""
    if name == "He initialization":
        return nn.Sequential(PerLocationNorm(), he_initialized(model))  # the inputs that TAT's network gets
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
            print(
                f"{network.name} seed {seed}, {name}: {curve.accuracy[-1]:.1%} in {curve.seconds:.0f} s",
                flush=True,
            )
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
    parser.add_argument("--quick", action="store_true", help="30 layers, 60 steps, one seed")
    parser.add_argument("--figure", type=Path, default=FIGURE)
    options = parser.parse_args(arguments)
    depth, steps, seeds = (30, 60, range(1)) if options.quick else (100, 200, range(3))
    results = {network.name: compare(network, depth, steps, seeds) for network in NETWORKS}
    Console().print(table(results))
    draw(results, depth, options.figure)
    return results


if __name__ == "__main__":
    main()
