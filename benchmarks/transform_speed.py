"""What compiling ResNet-152 costs, next to one training step of it: python benchmarks/transform_speed.py

Times the propagation of the kernel through a captured graph, `kgraph.transform` without the captures it
makes, those captures, and a training step (forward + backward) of the model as it is, one after the other.
Medians, and the ratios to the training step, which a busy machine changes less than the seconds.
"""

from __future__ import annotations

import argparse
import os
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path
from unittest import mock

import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor, nn

import kgraph
from kgraph.capture import Graph, capture
from kgraph.propagate import propagate

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "examples"))
from resnet50_without_skips import define_torchvision_operators

PROPAGATION, TRANSFORM, CAPTURE, STEP = (
    "propagation after capture",
    "transform besides capture",
    "captures of the transform",
    "training step, forward + backward",
)
ALLOWED = {PROPAGATION: 0.5, TRANSFORM: 5.0}  # seconds


def seconds(call: Callable[[], object]) -> float:
    """Wall time of one call."""
    start = time.perf_counter()
    call()
    return time.perf_counter() - start


def training_step(model: nn.Module, x: Tensor) -> None:
    """Forward and backward."""
    model.zero_grad()
    nn.functional.cross_entropy(model(x), torch.zeros(len(x), dtype=torch.long)).backward()


def transform_seconds(model: nn.Module, example: Tensor) -> tuple[float, float]:
    """Time of a transform besides its captures, and of these captures."""
    captures: list[float] = []

    def timed_capture(*args: object, **kwargs: object) -> Graph:
        start = time.perf_counter()
        graph = capture(*args, **kwargs)  # type: ignore[arg-type]
        captures.append(time.perf_counter() - start)
        return graph

    with mock.patch("kgraph.api.capture", timed_capture):
        total = seconds(lambda: kgraph.transform(model, "tat", example))
    return total - sum(captures), sum(captures)


def measure(name: str, size: int, batch: int, repeats: int) -> dict[str, list[float]]:
    """All times, in the order in which they are taken in turn."""
    define_torchvision_operators()
    import timm

    torch.manual_seed(0)
    model, x = timm.create_model(name), torch.randn(batch, 3, size, size)
    graph = capture(model, x[:2])
    propagate(graph)  # the first call fills caches: quadrature nodes, sampled draws
    training_step(model, x)
    times: dict[str, list[float]] = {key: [] for key in (PROPAGATION, TRANSFORM, CAPTURE, STEP)}
    for _ in range(repeats):
        times[PROPAGATION].append(seconds(lambda: propagate(graph)))
        besides, captures = transform_seconds(model, x[:2])
        times[TRANSFORM].append(besides)
        times[CAPTURE].append(captures)
        times[STEP].append(seconds(lambda: training_step(model, x)))
    return times


def table(times: dict[str, list[float]], title: str) -> Table:
    """Medians, ranges, ratios to the training step, targets."""
    out = Table("what", "median, s", "range, s", "in training steps", "target, s", title=title)
    step = statistics.median(times[STEP])
    for what, found in times.items():
        median = statistics.median(found)
        spread = f"{min(found):.2f} to {max(found):.2f}"
        allowed = f"< {ALLOWED[what]:g}" if what in ALLOWED else ""
        out.add_row(what, f"{median:.2f}", spread, f"{median / step:.2f}", allowed)
    return out


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--model", default="resnet152", help="any timm model")
    parser.add_argument("--size", type=int, default=224, help="height and width of the images")
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--repeats", type=int, default=3)
    options = parser.parse_args()
    times = measure(options.model, options.size, options.batch, options.repeats)
    shape = f"{options.batch} x 3 x {options.size} x {options.size}"
    load = f", load {os.getloadavg()[0]:.1f}" if hasattr(os, "getloadavg") else ""
    machine = f"{torch.get_num_threads()} threads of {os.cpu_count()} cores{load}"
    Console().print(table(times, f"{options.model}, {shape}, {machine}"))


if __name__ == "__main__":
    main()
