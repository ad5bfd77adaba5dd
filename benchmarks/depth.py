"""CPU seconds of capture, analyze and transform against depth: near-linear where twice the depth takes twice as long.

python benchmarks/depth.py                                    # 250 to 2000 layers, a few minutes
python benchmarks/depth.py --kind residual --depths 1000 2000
python benchmarks/depth.py --kind tanh --depths 1000 10000 --method dks
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor, nn

import kgraph
from kgraph.capture import capture

WIDTH, CHANNELS = 16, 8


class Block(nn.Module):
    """h + Linear(relu(Linear(h)))."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, WIDTH)

    def forward(self, h: Tensor) -> Tensor:
        return h + self.second(torch.relu(self.first(h)))


def chain(layers: int, activation: type[nn.Module]) -> tuple[nn.Module, Tensor]:
    """Linear(16) and an activation, again and again."""
    pairs = [module for _ in range(layers) for module in (nn.Linear(WIDTH, WIDTH), activation())]
    return nn.Sequential(*pairs, nn.Linear(WIDTH, WIDTH)), torch.randn(2, WIDTH)


def residual(blocks: int) -> tuple[nn.Module, Tensor]:
    """A residual MLP."""
    layers = [Block() for _ in range(blocks)]
    return nn.Sequential(nn.Linear(WIDTH, WIDTH), *layers, nn.Linear(WIDTH, 4)), torch.randn(2, WIDTH)


def convolutional(layers: int) -> tuple[nn.Module, Tensor]:
    """Conv2d(8, 8, 3, padding=1) and tanh on 4 x 4 positions."""
    pairs = [m for _ in range(layers) for m in (nn.Conv2d(CHANNELS, CHANNELS, 3, padding=1), nn.Tanh())]
    return nn.Sequential(*pairs, nn.Conv2d(CHANNELS, CHANNELS, 1)), torch.randn(2, CHANNELS, 4, 4)


MODELS: dict[str, Callable[[int], tuple[nn.Module, Tensor]]] = {
    "tanh": lambda depth: chain(depth, nn.Tanh),
    "relu": lambda depth: chain(depth, nn.ReLU),
    "residual": residual,
    "conv": convolutional,
}


@dataclass(frozen=True)
class Timing:
    """Seconds; analyze and transform without the capture that is a part of them."""

    depth: int
    capture: float
    analyze: float
    transform: float


def seconds(call: Callable[[], Any]) -> float:
    """Processor seconds of this process, one thread: on a busy machine the clock would time the others."""
    start = time.process_time()
    call()
    return time.process_time() - start


def measure(kind: str, depth: int, method: str) -> Timing:
    """Time one model."""
    torch.manual_seed(0)
    model, x = MODELS[kind](depth)
    captured = min(seconds(lambda: capture(model, x)) for _ in range(2))
    analyzed = seconds(lambda: kgraph.analyze(model, x))
    transformed = seconds(lambda: kgraph.transform(model, method, x))
    return Timing(depth, captured, max(analyzed - captured, 0.0), max(transformed - captured, 0.0))


def table(kind: str, method: str, timings: list[Timing]) -> Table:
    """A row for each depth; in brackets how much longer than the depth before."""
    shown = Table(title=f"{kind}, {method}: seconds (times the row above)")
    for head in ("depth", "capture", "analyze, without capture", "transform, without capture", "ms a layer"):
        shown.add_column(head, justify="right")
    for before, now in zip([None, *timings], timings, strict=False):
        cells = [_cell(now, before, name) for name in ("capture", "analyze", "transform")]
        ratio = f" ({now.depth / before.depth:.1f})" if before else ""
        shown.add_row(f"{now.depth}{ratio}", *cells, f"{1e3 * now.transform / now.depth:.2f}")
    return shown


def _cell(now: Timing, before: Timing | None, name: str) -> str:
    value = getattr(now, name)
    ratio = f" ({value / getattr(before, name):.1f})" if before and getattr(before, name) > 0 else ""
    return f"{value:.2f}{ratio}"


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kind", nargs="+", choices=MODELS, default=list(MODELS))
    parser.add_argument("--depths", nargs="+", type=int, default=[250, 500, 1000, 2000])
    parser.add_argument("--method", choices=("tat", "dks"), default="tat")
    options = parser.parse_args()
    torch.set_num_threads(1)
    measure(options.kind[0], options.depths[0], options.method)  # what is done once: imports, tables
    for kind in options.kind:
        timings = [measure(kind, depth, options.method) for depth in options.depths]
        Console().print(table(kind, options.method, timings))


if __name__ == "__main__":
    main()
