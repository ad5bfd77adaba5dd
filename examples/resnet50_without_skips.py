"""Train ResNet-50 with neither skip connections nor normalization layers.

    python examples/resnet50_without_skips.py [--quick] [--figure FILE]

FIGURES
"""

from __future__ import annotations

import argparse
import copy
import importlib.util
import time
from collections.abc import Callable
from pathlib import Path

import torch
from digits import Curve, digits, draw_accuracy, he_initialized, train
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from rich.console import Console
from rich.table import Table
from torch import Tensor, nn

import kgraph
from kgraph.capture import capture
from kgraph.passes import Pipeline, RemoveNorms, ScaleResiduals, Workspace
from kgraph.report import Report

RATE, BATCH, SEED = 1e-4, 32, 0
FIGURE = Path(__file__).parent / "figures" / "resnet50_without_skips.png"
SHAPED, HE, BATCH_NORM = "kgraph, TAT", "He initialization", "BatchNorm"
COLORS = {SHAPED: "tab:blue", HE: "tab:orange", BATCH_NORM: "tab:gray"}

_libraries: list[torch.library.Library] = []  # referenced: the schemas go with the object


def create_resnet50() -> nn.Module:
    """timm's ResNet-50 for ten classes."""
    define_torchvision_operators()
    import timm

    return timm.create_model("resnet50", num_classes=10)


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


def variants(model: nn.Module, example: Tensor) -> dict[str, nn.Module]:
    """The networks to train; none has a skip connection."""
    shaped = kgraph.transform(model, method="tat", example_inputs=example, shortcut_weight=0, seed=SEED)
    return {
        SHAPED: shaped,
        HE: he_initialized(without_skips(model, example, norms=False)),
        BATCH_NORM: without_skips(model, example, norms=True),
    }


def table(curves: list[Curve]) -> Table:
    """Loss and accuracy at the end."""
    out = Table("ResNet-50 without skips", "loss, first 10 steps", "loss, last 10", "test accuracy", "seconds")
    for curve in curves:
        first, last = (sum(part) / len(part) for part in (curve.loss[:10], curve.loss[-10:]))
        out.add_row(curve.name, f"{first:.2f}", f"{last:.2f}", f"{curve.accuracy[-1]:.1%}", f"{curve.seconds:.0f}")
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
    """c values of all nodes on the way from the input to the output, one line an input cosine."""
    rows = [row.node for row in report.rows if row.trunk]
    for i in range(len(report.cosines)):
        axes.plot([n.depth for n in rows], [n.c[i] for n in rows], color=COLORS[name])


def main(arguments: list[str] | None = None) -> list[Curve]:
    """Train the three networks, print the table, save the picture."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="32x32 images, 4 steps")
    parser.add_argument("--figure", type=Path, default=FIGURE)
    options = parser.parse_args(arguments)
    size, steps, every = (32, 4, 2) if options.quick else (64, 120, 20)
    data = digits(upsampled(size))
    torch.manual_seed(SEED)
    start = time.perf_counter()
    networks = variants(create_resnet50(), data.x[:2])
    print(f"three networks compiled in {time.perf_counter() - start:.0f} s", flush=True)
    reports = {name: kgraph.analyze(network, data.x[:2]) for name, network in networks.items()}
    settings = {"steps": steps, "batch": BATCH, "rate": RATE, "seed": SEED, "every": every}
    curves = []
    for name, network in networks.items():
        curves.append(train(name, network, data, **settings))
        print(f"{name}: {curves[-1].accuracy[-1]:.1%} in {curves[-1].seconds:.0f} s", flush=True)
    Console().print(table(curves))
    draw(curves, reports, options.figure)
    return curves


if __name__ == "__main__":
    main()
