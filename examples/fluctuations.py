"""Orthogonal against Gaussian weights in narrow deep networks: fluctuations at initialization, and training.

    python examples/fluctuations.py [--quick] [--figure FILE]

Upper row: V/K^2, F/(K Theta) and B/Theta^2 of a critical tanh chain, n times the relative variance of a layer's q, the
correlation of the NTK with the features, the off-diagonal NTK. Lines: ``kgraph.fluctuations``; dots with two standard
errors: ``kgraph.measure_fluctuations`` over 800 draws of width 32. Under Gaussian weights all grow like the depth,
orthogonal ones saturate by depth 20 (V/K^2 at depth 20: 12.0 against -1.91; at depth 40: 25.1 against -1.95).

Lower row: the same chains of width 20 between 64 pixels and 10 classes on scikit-learn's digits, 200 steps of
gradient descent on all 1347 images at once, learning rate 0.05, no biases. Test accuracy, mean
and range over 10 seeds (torch 2.13, CPU):

    depth   orthogonal                  Gaussian
        5   92.0 %  (90.2 to 93.8 %)    88.5 %  (86.7 to 92.2 %)
       20   91.5 %  (86.7 to 94.2 %)    65.2 %  (43.3 to 87.3 %)
       40   93.3 %  (91.3 to 94.4 %)    37.3 %  (20.4 to 54.4 %)

The learning rate matters less than the law: 0.03 gives 86.3, 85.1, 88.5 % against 80.1, 53.8, 34.9 %; 0.1 gives 95.3,
94.5, 76.3 % (some seeds at depth 40 diverge) against 93.6, 69.8, 17.3 %.
"""

from __future__ import annotations

import argparse
import itertools
import time
from dataclasses import dataclass
from pathlib import Path

import torch
from digits import Curve, Data, digits, draw_accuracy, test_accuracy
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from rich.console import Console
from rich.table import Table
from torch import Tensor, nn

import kgraph
from kgraph.initializers import reinitialize_weight_

FIGURE = Path(__file__).parent / "figures" / "fluctuations.png"
COLORS = {"orthogonal": "tab:blue", "gaussian": "tab:orange"}
LABELS = {"orthogonal": "orthogonal", "gaussian": "Gaussian"}
PANELS = {"V": "V / K²", "F": "F / KΘ", "B": "B / Θ²"}
RATE = 0.05
WIDTH = 20


@dataclass(frozen=True)
class Spread:
    """Predicted and measured fluctuations of one law."""

    predicted: kgraph.Fluctuations
    measured: kgraph.MeasuredFluctuations


def chain(widths: list[int]) -> nn.Sequential:
    """Linear layers without biases, tanh between them."""
    layers = [m for a, b in itertools.pairwise(widths) for m in (nn.Linear(a, b, bias=False), nn.Tanh())]
    return nn.Sequential(*layers[:-1])


def spreads(depth: int, draws: int, width: int = 32) -> dict[str, Spread]:
    """Both laws, with C_W = 1: the critical point of tanh."""
    results = {}
    for law in COLORS:
        options = {"distribution": law, "weight_variance": 1.0, "parametrization": "ntk"}
        model = chain([width] * (depth + 1))
        measured = kgraph.measure_fluctuations(model, draws=draws, **options)
        results[law] = Spread(kgraph.fluctuations(model, **options), measured)
        print(f"{law}: {len(measured.disagreements())} of {3 * depth} numbers disagree", flush=True)
    return results


def normalized(images: Tensor) -> Tensor:
    """[N, 1, 8, 8] to [N, 64] with q = 1 for every image."""
    pixels = images.flatten(1)
    return pixels / pixels.square().mean(1, keepdim=True).sqrt()


def network(depth: int, law: str, seed: int) -> nn.Sequential:
    """``depth`` hidden layers with weights of variance 1 / width_in."""
    generator = torch.Generator().manual_seed(seed)
    model = chain([64, *[WIDTH] * depth, 10])
    for weight in model.parameters():
        reinitialize_weight_(weight, distribution="suo" if law == "orthogonal" else "gaussian", generator=generator)
    return model


def descend(name: str, model: nn.Module, data: Data, steps: int, seed: int, rate: float, every: int = 10) -> Curve:
    """Gradient descent on all images at once."""
    optimizer = torch.optim.SGD(model.parameters(), rate)
    accuracy, losses, start = [test_accuracy(model, data)], [], time.perf_counter()
    for step in range(1, steps + 1):
        loss = nn.functional.cross_entropy(model(data.x), data.y)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
        if step % every == 0:
            accuracy.append(test_accuracy(model, data))
    at = tuple(range(0, steps + 1, every))
    return Curve(name, seed, at, tuple(accuracy), tuple(losses), time.perf_counter() - start)


def compare(depths: tuple[int, ...], steps: int, seeds: range, rate: float) -> dict[int, list[Curve]]:
    """Curves of both laws and all seeds by depth."""
    data, results = digits(normalized), {}
    for depth in depths:
        runs = itertools.product(COLORS, seeds)
        results[depth] = [descend(law, network(depth, law, s), data, steps, s, rate) for law, s in runs]
        print(f"depth {depth} trained", flush=True)
    return results


def table(results: dict[int, list[Curve]]) -> Table:
    """Final test accuracy by depth and law: mean, worst and best seed; training loss."""
    out = Table("depth", "weights", "accuracy", "worst", "best", "training loss")
    for (depth, curves), law in itertools.product(results.items(), COLORS):
        same = [curve for curve in curves if curve.name == law]
        final = [curve.accuracy[-1] for curve in same]
        loss = sum(curve.loss[-1] for curve in same) / len(same)
        mean = sum(final) / len(final)
        out.add_row(str(depth), law, f"{mean:.1%}", f"{min(final):.1%}", f"{max(final):.1%}", f"{loss:.3f}")
    return out


def draw_spread(axes: Axes, name: str, spread: Spread, law: str) -> None:
    """One tensor of one law by layer: the recursion as a line, measurements as dots with two standard errors."""
    nodes = spread.predicted.nodes
    axes.plot(
        range(1, len(nodes) + 1),
        [node.scaled[name] for node in nodes],
        color=COLORS[law],
        label=f"{LABELS[law]} weights",
    )
    dots = [i for i in (2, 3, 5, 7, *range(10, 101, 5)) if i <= len(nodes)]
    measured = [spread.measured.nodes[i - 1] for i in dots]
    values, errors = [n.scaled[name] for n in measured], [2 * n.error[name] for n in measured]
    label = f"{spread.measured.draws} draws of width {measured[0].width_in}"
    axes.errorbar(dots, values, errors, fmt="o", ms=3, color=COLORS[law], capsize=2, lw=1, label=label)
    axes.grid(alpha=0.3)


def draw(results: dict[str, Spread], trained: dict[int, list[Curve]], path: Path) -> None:
    """Fluctuations above, the orthogonal ones also magnified; training below."""
    figure = Figure(figsize=(10, 6.6), layout="constrained")
    upper, lower = figure.subplots(2, 3)
    for axes, (name, title) in zip(upper, PANELS.items(), strict=True):
        for law, spread in results.items():
            draw_spread(axes, name, spread, law)
        axes.set(xlabel="layer", title=title)
        close = axes.inset_axes((0.17, 0.57, 0.32, 0.39))
        draw_spread(close, name, results["orthogonal"], "orthogonal")
        close.tick_params(labelsize="small")
    figure.legend(*upper[0].get_legend_handles_labels(), loc="outside upper center", ncols=4)
    for axes, (depth, curves) in zip(lower, trained.items(), strict=False):
        draw_accuracy(axes, curves, COLORS)
        axes.set_title(f"digits, {depth} layers of width {WIDTH}")
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=110)


def main(arguments: list[str] | None = None) -> tuple[dict[str, Spread], dict[int, list[Curve]]]:
    """Measure, train, print the table, save the picture."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="20 layers, 100 draws, one seed, 60 steps")
    parser.add_argument("--rate", type=float, default=RATE, help="learning rate")
    parser.add_argument("--figure", type=Path, default=FIGURE)
    options = parser.parse_args(arguments)
    depth, draws, steps, seeds = (20, 100, 60, range(1)) if options.quick else (40, 800, 200, range(10))
    results = spreads(depth, draws)
    trained = compare((5, 20, 40), steps, seeds, options.rate)
    Console().print(table(trained))
    draw(results, trained, options.figure)
    return results, trained


if __name__ == "__main__":
    main()
