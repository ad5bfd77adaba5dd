"""What compiling ResNet-152 costs, next to one training step of it: python benchmarks/transform_speed.py

Times the propagation of the kernel through a captured graph, `kgraph.transform` without the captures it
makes, those captures, and a training step (forward + backward) of the model as it is, one after the other.
Medians, processor time included (on a busy machine and one thread, the nearest to what an idle one would take),
and the ratios to the training step.
"""

from __future__ import annotations

import argparse
import os
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple
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
    "one training step",
)
ALLOWED = {PROPAGATION: 0.5, TRANSFORM: 5.0}  # seconds


class Time(NamedTuple):
    """Wall time and processor time of all threads, in seconds."""

    wall: float
    cpu: float


def now() -> Time:
    """Readings of both clocks."""
    return Time(time.perf_counter(), time.process_time())


def since(start: Time) -> Time:
    """Time passed since then."""
    end = now()
    return Time(end.wall - start.wall, end.cpu - start.cpu)


def seconds(call: Callable[[], object]) -> Time:
    """Time of one call."""
    start = now()
    call()
    return since(start)


def training_step(model: nn.Module, x: Tensor) -> None:
    """Forward and backward."""
    model.zero_grad()
    nn.functional.cross_entropy(model(x), torch.zeros(len(x), dtype=torch.long)).backward()


def transform_seconds(model: nn.Module, example: Tensor) -> tuple[Time, Time]:
    """Time of a transform besides its captures, and of these captures."""
    captures: list[Time] = []

    def timed_capture(*args: object, **kwargs: object) -> Graph:
        start = now()
        graph = capture(*args, **kwargs)  # type: ignore[arg-type]
        captures.append(since(start))
        return graph

    with mock.patch("kgraph.api.capture", timed_capture):
        total = seconds(lambda: kgraph.transform(model, "tat", example))
    inside = Time(sum(c.wall for c in captures), sum(c.cpu for c in captures))
    return Time(total.wall - inside.wall, total.cpu - inside.cpu), inside


def measure(name: str, size: int, batch: int, repeats: int) -> dict[str, list[Time]]:
    """All times, in the order in which they are taken in turn."""
    define_torchvision_operators()
    import timm

    torch.manual_seed(0)
    model, x = timm.create_model(name), torch.randn(batch, 3, size, size)
    graph = capture(model, x[:2])
    propagate(graph)  # the first call fills caches: quadrature nodes, sampled draws
    training_step(model, x)
    times: dict[str, list[Time]] = {key: [] for key in (PROPAGATION, TRANSFORM, CAPTURE, STEP)}
    for _ in range(repeats):
        times[PROPAGATION].append(seconds(lambda: propagate(graph)))
        besides, captures = transform_seconds(model, x[:2])
        times[TRANSFORM].append(besides)
        times[CAPTURE].append(captures)
        times[STEP].append(seconds(lambda: training_step(model, x)))
    return times


def table(times: dict[str, list[Time]], title: str) -> Table:
    """Medians, ranges, ratios to the training step, targets."""
    out = Table("seconds", "median", "range", "processor", "in steps", "target", title=title)
    step = statistics.median(found.wall for found in times[STEP])
    for what, found in times.items():
        wall = [one.wall for one in found]
        median, cpu = statistics.median(wall), statistics.median(one.cpu for one in found)
        spread = f"{min(wall):.2f} to {max(wall):.2f}"
        allowed = f"< {ALLOWED[what]:g}" if what in ALLOWED else ""
        out.add_row(what, f"{median:.2f}", spread, f"{cpu:.2f}", f"{median / step:.2f}", allowed)
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
