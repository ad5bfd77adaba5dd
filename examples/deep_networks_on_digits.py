"""Train 100-layer networks without skip connections or normalization layers, as they are and transformed.

    python examples/deep_networks_on_digits.py [--quick] [--figure examples/figures/deep_networks_on_digits.png]

FIGURES
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import matplotlib
import torch
from rich.console import Console
from rich.table import Table
from sklearn.datasets import load_digits
from sklearn.model_selection import train_test_split
from torch import Tensor, nn

import kgraph

matplotlib.use("agg")  # a file, no window
from matplotlib import pyplot as plt  # noqa: E402

LEARNING_RATE = 1e-4
EVALUATIONS = 20
FIGURE = Path(__file__).parent / "figures" / "deep_networks_on_digits.png"


@dataclass(frozen=True)
class Data:
    """Images and labels to train on and to test on."""

    x: Tensor
    y: Tensor
    test_x: Tensor
    test_y: Tensor


@dataclass(frozen=True)
class Case:
    """A network, how its inputs are laid out, and the batch size it trains with."""

    name: str
    build: Callable[[int], nn.Module]
    layout: Callable[[Tensor], Tensor]
    batch: int


@dataclass(frozen=True)
class Run:
    """Test accuracy after some numbers of steps."""

    case: str
    kind: str
    seed: int
    steps: tuple[int, ...]
    accuracy: tuple[float, ...]
    seconds: float


def mlp(depth: int) -> nn.Module:
    """``depth`` hidden layers of width 128 on the 64 pixels."""
    widths = [64, *[128] * depth]
    hidden = [m for a, b in zip(widths, widths[1:], strict=False) for m in (nn.Linear(a, b), nn.ReLU())]
    return nn.Sequential(*hidden, nn.Linear(128, 10))


def cnn(depth: int) -> nn.Module:
    """``depth`` 3x3 convolutions of width 32 on 4x4 locations, then an average over the locations."""
    widths = [4, *[32] * depth]
    pairs = zip(widths, widths[1:], strict=False)
    hidden = [m for a, b in pairs for m in (nn.Conv2d(a, b, 3, padding=1), nn.ReLU())]
    return nn.Sequential(*hidden, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(32, 10))


def as_vector(images: Tensor) -> Tensor:
    """[N, 8, 8] to [N, 64]: one location of 64 channels."""
    return images.flatten(1)


def as_grid(images: Tensor) -> Tensor:
    """[N, 8, 8] to [N, 4, 4, 4]: every 2x2 patch becomes a location of 4 channels, so no pixel is lost."""
    return nn.functional.pixel_unshuffle(images[:, None], 2)


def digits(layout: Callable[[Tensor], Tensor]) -> Data:
    """scikit-learn's bundled 8x8 digits, scaled to [-1, 1], a quarter kept for testing."""
    bunch = load_digits()
    images = layout(torch.tensor(bunch.images, dtype=torch.float32) / 8 - 1)
    labels = torch.tensor(bunch.target)
    x, test_x, y, test_y = train_test_split(images, labels, test_size=0.25, random_state=0)
    return Data(x, y, test_x, test_y)


def accuracy(model: nn.Module, x: Tensor, y: Tensor) -> float:
    """Share of right answers."""
    model.eval()
    with torch.no_grad():
        right = (model(x).argmax(1) == y).float().mean()
    model.train()
    return right.item()


def train(model: nn.Module, data: Data, batch: int, steps: int, seed: int) -> tuple[list[int], list[float]]:
    """Adam on random batches; test accuracy before, after, and regularly in between."""
    generator = torch.Generator().manual_seed(seed)
    optimizer = torch.optim.Adam(model.parameters(), LEARNING_RATE)
    every = max(steps // EVALUATIONS, 1)
    at, found = [0], [accuracy(model, data.test_x, data.test_y)]
    for step in range(1, steps + 1):
        rows = torch.randint(len(data.x), (batch,), generator=generator)
        optimizer.zero_grad()
        nn.functional.cross_entropy(model(data.x[rows]), data.y[rows]).backward()
        optimizer.step()
        if step % every == 0 or step == steps:
            at.append(step)
            found.append(accuracy(model, data.test_x, data.test_y))
    return at, found


def run(case: Case, depth: int, steps: int, seed: int, shaped: bool) -> Run:
    """Build, transform if asked to, train."""
    data = digits(case.layout)
    torch.manual_seed(seed)
    model = case.build(depth)
    start = time.perf_counter()
    if shaped:
        model = kgraph.transform(model, "tat", data.x[:2], seed=seed, per_location_norm=True)
    print("transform", time.perf_counter()-start, flush=True)
    start = time.perf_counter()
    at, found = train(model, data, case.batch, steps, seed)
    kind = "TAT" if shaped else "as is"
    return Run(case.name, kind, seed, tuple(at), tuple(found), time.perf_counter() - start)


CASES = (Case("MLP", mlp, as_vector, 64), Case("CNN", cnn, as_grid, 32))
if __name__ == "__main__":
    import sys
    torch.set_num_threads(2)
    for case in CASES:
        for shaped in (True, False):
            r = run(case, int(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3]), shaped)
            print(r, flush=True)
