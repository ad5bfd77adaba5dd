"""Train ResNet-50 with neither skip connections nor normalization layers.

    python examples/resnet50_without_skips.py [--quick] [--seeds N] [--figure FILE]

timm's ResNet-50 on scikit-learn's digits, upsampled to 64x64 with 3 channels. Adam at 1e-4, batch 32, 120 steps.
Three variants, none with skip connections: ``kgraph.transform(model, method="tat", shortcut_weight=0)``; relus with
He initialization and no normalization; relus with BatchNorm.

Test accuracy after 120 steps, seed 0 (torch 2.13, CPU, two threads, about a minute a network if idle):
transformed 94.4 %, He initialization 80.4 %, BatchNorm 10.4 %.
"""

from __future__ import annotations

import argparse
import copy
import importlib.util
import statistics
import time
from collections.abc import Callable
from pathlib import Path

import torch
from digits import Curve, Data, digits, draw_accuracy, he_initialized, train
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from rich.console import Console
from rich.table import Table
from torch import Tensor, nn

import kgraph
from kgraph.capture import capture
from kgraph.passes import Pipeline, RemoveNorms, ScaleResiduals, Workspace
from kgraph.report import Report

RATE, BATCH = 1e-4, 32
FIGURE = Path(__file__).parent / "figures" / "resnet50_without_skips.png"
SHAPED, HE, BATCH_NORM = "kgraph, TAT", "He initialization", "BatchNorm"
COLORS = {SHAPED: "tab:blue", HE: "tab:orange", BATCH_NORM: "tab:gray"}

_libraries: list[torch.library.Library] = []  # referenced: the schemas go with the object


def create(name: str) -> nn.Module:
    """timm's model of this name for ten classes.

    By default timm starts the last BatchNorm of each block with a gain of zero. Without skip connections
    nothing would pass (`kgraph.analyze` says so: q = 0): no fair comparison.
    """
    define_torchvision_operators()
    import timm

    return timm.create_model(name, num_classes=10, zero_init_last=False)


def define_torchvision_operators() -> None:
    """Let timm import torchvision beside a torch of another build, such as CPU-only torch from another index.

    Torchvision's compiled extension does not load there, and its import then fails because two operators have
    no schema. The network uses neither. Where the extension loads, this does nothing.
    """
    spec = importlib.util.find_spec("torchvision")
    if spec is None or spec.origin is None or hasattr(torch.ops.torchvision, "nms"):
        return
    for extension in Path(spec.origin).parent.glob("_C*"):
        try:
            torch.ops.load_library(extension)
        except OSError:
            continue
        return
    library = torch.library.Library("torchvision", "FRAGMENT")
    for name in ("nms", "qnms"):
        library.define(f"{name}(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
    _libraries.append(library)


def upsampled(size: int) -> Callable[[Tensor], Tensor]:
    """[N, 1, 8, 8] to [N, 3, size, size] of mean 0 and variance 1."""

    def layout(images: Tensor) -> Tensor:
        large = nn.functional.interpolate(images, size=(size, size), mode="bilinear").expand(-1, 3, -1, -1)
        return (large - large.mean()) / large.std()

    return layout


def without_skips(model: nn.Module, example: Tensor, *, norms: bool) -> nn.Module:
    """A copy whose residual sums are their residual branches alone, with or without normalization layers.

    `kgraph.transform` runs these same passes; here they run by themselves.
    """
    work = Workspace(capture(copy.deepcopy(model), example))
    skips = ScaleResiduals(shortcut_weight=0)
    Pipeline((skips,) if norms else (RemoveNorms(), skips)).run(work)
    return work.graph.emit().train()


def variants(model: nn.Module, example: Tensor, seed: int) -> dict[str, nn.Module]:
    """The networks to train; none has a skip connection."""
    shaped = kgraph.transform(model, method="tat", example_inputs=example, shortcut_weight=0, seed=seed)
    return {
        SHAPED: shaped,
        HE: he_initialized(without_skips(model, example, norms=False)),
        BATCH_NORM: without_skips(model, example, norms=True),
    }


def table(curves: list[Curve]) -> Table:
    """Loss at both ends and final accuracy of every seed, and the median of the seconds."""
    out = Table("without skips", "loss, first 10 steps", "last 10 steps", "test accuracy", "seconds")
    for name in COLORS:
        same = [curve for curve in curves if curve.name == name]
        first = "  ".join(f"{statistics.mean(curve.loss[:10]):.2f}" for curve in same)
        last = "  ".join(f"{statistics.mean(curve.loss[-10:]):.2f}" for curve in same)
        final = "  ".join(f"{curve.accuracy[-1]:.1%}" for curve in same)
        out.add_row(name, first, last, final, f"{statistics.median(curve.seconds for curve in same):.0f}")
    return out


def draw(curves: list[Curve], reports: dict[str, Report], path: Path) -> None:
    """Accuracy on the left; on the right what the kernel does with depth."""
    figure = Figure(figsize=(10, 3.6), layout="constrained")
    left, right = figure.subplots(1, 2)
    draw_accuracy(left, curves, COLORS)
    left.set_title("ResNet-50 without skip connections")
    left.legend()
    for name, report in reports.items():
        draw_cosines(right, name, report)
    right.set(xlabel="depth (nonlinear layers)", ylabel="cosine of two inputs", ylim=(0, 1.02))
    right.set_title("at initialization, for input cosines 0, 0.5, 0.9")
    right.grid(alpha=0.3)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=110)


def draw_cosines(axes: Axes, name: str, report: Report) -> None:
    """c values on the way from the input to the output, one line an input cosine."""
    by_depth = {row.node.depth: row.node for row in report.rows if row.trunk}  # the last node of each depth
    for i in range(len(report.cosines)):
        axes.plot(list(by_depth), [node.c[i] for node in by_depth.values()], color=COLORS[name])


def compare(model: str, data: Data, steps: int, every: int, seed: int) -> tuple[list[Curve], dict[str, Report]]:
    """Curves of the three networks, and their reports at initialization."""
    torch.manual_seed(seed)
    start = time.perf_counter()
    networks = variants(create(model), data.x[:2], seed)
    reports = {name: kgraph.analyze(network, data.x[:2]) for name, network in networks.items()}
    print(f"three networks compiled and analysed in {time.perf_counter() - start:.0f} s", flush=True)
    settings = {"steps": steps, "batch": BATCH, "rate": RATE, "seed": seed, "every": every}
    curves = []
    for name, network in networks.items():
        curve = train(name, network, data, **settings)
        print(f"seed {seed}, {name}: {curve.accuracy[-1]:.1%} in {curve.seconds:.0f} s", flush=True)
        curves.append(curve)
    return curves, reports


def main(arguments: list[str] | None = None) -> list[Curve]:
    """Train the three networks, print the table, save the picture."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="ResNet-26, 32x32 images, 6 steps")
    parser.add_argument("--seeds", type=int, default=1, help="run with seeds 0, 1, ...")
    parser.add_argument("--figure", type=Path, default=FIGURE)
    options = parser.parse_args(arguments)
    model, size, steps, every = ("resnet26", 32, 6, 6) if options.quick else ("resnet50", 64, 120, 10)
    data, curves = digits(upsampled(size)), []
    for seed in range(options.seeds):
        found, reports = compare(model, data, steps, every, seed)
        curves += found
        draw(curves, reports, options.figure)  # after every seed: the next one takes minutes
    Console().print(table(curves))
    return curves


if __name__ == "__main__":
    main()
