"""Time of kernels on real inputs, beside neural-tangents on a CPU: python benchmarks/gram_speed.py

The plot (examples/figures/gram_speed.png) is of time against depth and against the number of input pairs:
OMP_NUM_THREADS=1 python benchmarks/gram_speed.py --plot

Models have no biases. torch splits large tensors among threads: on a busy machine OMP_NUM_THREADS=1 is faster.
"""

from __future__ import annotations

import argparse
import copy
import statistics
import time
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.nn import functional

import kgraph
from kgraph.capture import capture

FIGURE = Path(__file__).parents[1] / "examples" / "figures" / "gram_speed.png"
NEURAL_TANGENTS = {"relu MLP, depth 20": (6.2, 0.19e-3), "WideResNet-28": (15.5, 3.7)}
"""Seconds of neural-tangents 0.6.6 on a CPU: first call (tracing and compilation included), then warm."""
TARGETS = {"relu MLP, depth 20": (100.0, 0.0), "WideResNet-28": (10.0, 2.0)}
DEPTHS = (10, 20, 40, 80, 160)
INPUTS = (2, 4, 8, 16, 32, 64)


def mlp(depth: int, width: int = 16) -> nn.Module:
    """Relu layers; kernels do not depend on the width."""
    layers: list[nn.Module] = []
    for _ in range(depth):
        layers += [nn.Linear(width, width, bias=False), nn.ReLU()]
    return nn.Sequential(*layers, nn.Linear(width, 1, bias=False))


class PreActivation(nn.Module):
    """relu, conv, relu, conv beside the identity, or a convolution where the shape changes."""

    def __init__(self, inputs: int, width: int, stride: int) -> None:
        super().__init__()
        self.first = nn.Conv2d(inputs, width, 3, stride, 1, bias=False)
        self.second = nn.Conv2d(width, width, 3, 1, 1, bias=False)
        changes = stride > 1 or inputs != width
        self.shortcut = nn.Conv2d(inputs, width, 3, stride, 1, bias=False) if changes else nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        y = self.first(functional.relu(x))
        return self.shortcut(x) + self.second(functional.relu(y))


def wide_resnet(blocks: int = 4, width: int = 16) -> nn.Module:
    """WideResNet-28 for four blocks a group; each group twice as wide."""
    layers: list[nn.Module] = [nn.Conv2d(3, width, 3, 1, 1, bias=False)]
    inputs = width
    for group in range(3):
        for block in range(blocks):
            outputs = width * 2**group
            layers.append(PreActivation(inputs, outputs, 2 if group and not block else 1))
            inputs = outputs
    return nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(inputs, 10, bias=False))


def seconds(call: Callable[[], object], runs: int) -> float:
    """The best of several."""
    times = []
    for _ in range(runs):
        start = time.perf_counter()
        call()
        times.append(time.perf_counter() - start)
    return min(times)


def first_and_warm(model: nn.Module, x: Tensor, runs: int) -> tuple[float, float]:
    """Seconds of the first call on a model (the median of five fresh ones), and of a call on a captured graph."""
    fresh = [copy.deepcopy(model) for _ in range(5)]
    first = statistics.median(seconds(lambda: kgraph.kernels(one, x), 1) for one in fresh)  # noqa: B023
    graph = capture(model, x)
    return first, seconds(lambda: kgraph.kernels(graph, x), runs)


def compare() -> None:
    # A process's first capture by either front end imports and fills torch's own tables: said, but not counted.
    for depth in (1, 20):
        other = seconds(lambda: kgraph.kernels(mlp(depth, 12), torch.randn(2, 12)), 1)  # noqa: B023
        print(f"the process's first model of {depth} layers: {other * 1e3:.1f} ms")
    generator = torch.Generator().manual_seed(0)
    cases = [
        ("relu MLP, depth 20", mlp(20), torch.randn(2, 16, generator=generator, dtype=torch.float64), 20),
        ("WideResNet-28", wide_resnet(), torch.randn(2, 3, 32, 32, generator=generator, dtype=torch.float64), 3),
    ]
    print(f"{'':20} {'call':6} {'kgraph':>10} {'neural-tangents':>16} {'ratio':>7} {'target':>7}")
    for name, model, x, runs in cases:
        first, warm = first_and_warm(model.double(), x, runs)
        for call, ours, theirs, target in zip(
            ("first", "warm"), (first, warm), NEURAL_TANGENTS[name], TARGETS[name], strict=True
        ):
            wanted = f"{target:6.0f}x" if target else ""
            print(f"{name:20} {call:6} {ours * 1e3:7.1f} ms {theirs * 1e3:13.2f} ms {theirs / ours:6.1f}x {wanted:>7}")
        exported = seconds(lambda: capture(model, x, front_end="export"), 2)  # noqa: B023
        traced = seconds(lambda: capture(model, x, front_end="trace"), 2)  # noqa: B023
        print(f"{'':20} of it capture: {exported * 1e3:.1f} ms by torch.export, {traced * 1e3:.1f} ms by tracing")


def growth() -> tuple[list[float], list[float]]:
    """Warm seconds by depth (two inputs), and by number of inputs (depth 20)."""
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(max(INPUTS), 16, generator=generator)
    by_depth, by_inputs = [], []
    for depth in DEPTHS:
        graph = capture(mlp(depth), x[:2])
        by_depth.append(seconds(lambda: kgraph.kernels(graph, x[:2]), 10))  # noqa: B023
        print(f"depth {depth:4}: {by_depth[-1] * 1e3:8.2f} ms")
    images = torch.randn(max(INPUTS), 3, 8, 8, generator=generator)
    graph = capture(wide_resnet(1), images[:2])
    for count in INPUTS:
        by_inputs.append(seconds(lambda: kgraph.kernels(graph, images[:count]), 2))  # noqa: B023
        print(f"pairs {count * (count + 1) // 2:4}: {by_inputs[-1] * 1e3:8.2f} ms")
    return by_depth, by_inputs


def plot(by_depth: list[float], by_inputs: list[float]) -> None:
    import matplotlib.pyplot as plt

    figure, (left, right) = plt.subplots(1, 2, figsize=(9, 3.4), layout="constrained")
    left.plot(DEPTHS, [t * 1e3 for t in by_depth], "o-")
    left.set(xlabel="hidden layers", ylabel="time (ms)", title="relu MLP, two inputs", xlim=0, ylim=0)
    pairs = [n * (n + 1) // 2 for n in INPUTS]
    right.plot(pairs, by_inputs, "o-")
    right.set(xlabel="pairs of inputs", ylabel="time (s)", title="WideResNet-10, 8 × 8 images", xlim=0, ylim=0)
    figure.savefig(FIGURE, dpi=150)
    print(f"saved {FIGURE}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--plot", action="store_true", help="time against depth and pairs instead, and plot it")
    if parser.parse_args().plot:
        plot(*growth())
    else:
        compare()


if __name__ == "__main__":
    main()
