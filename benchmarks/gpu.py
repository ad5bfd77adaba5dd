"""A shaped network on a GPU: equal to its CPU float32 self in every mode, and what a training step costs.

    python benchmarks/gpu.py [--device cuda] [--batch 128] [--repeats 15]

Checks ``.to(device)``, gradients, channels_last, autocast (bfloat16, float16) and ``torch.compile`` of a
network that ``kgraph.transform`` made, then times forward + backward of the original (batch norm, relu, plain
sums) and of the shaped network in one run, alternating, and gives the ratio of the medians. Ends with one
PASS or FAIL line a check; the exit status is 1 if one fails, 0 on a machine without a GPU.
"""

from __future__ import annotations

import argparse
import copy
import statistics
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass

import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor, nn

SLOWEST = 1.10
"""A shaped step may take at most this many times the original's: norms went, a few scalings came."""


@dataclass(frozen=True)
class Check:
    """One comparison: a measured number and the largest one that passes."""

    name: str
    measured: float
    allowed: float

    @property
    def passed(self) -> bool:
        return self.measured <= self.allowed  # False for nan


class Block(nn.Module):
    """conv-norm-relu-conv-norm and a shortcut."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(width, width, 3, padding=1, bias=False)
        self.norm1 = nn.BatchNorm2d(width)
        self.conv2 = nn.Conv2d(width, width, 3, padding=1, bias=False)
        self.norm2 = nn.BatchNorm2d(width)
        self.act = nn.ReLU()

    def forward(self, x: Tensor) -> Tensor:
        y = self.norm2(self.conv2(self.act(self.norm1(self.conv1(x)))))
        return self.act(x + y)


def convnet(width: int = 64, depth: int = 6) -> nn.Module:
    """A small residual network for [N, 3, 32, 32] images and ten classes."""
    stem = [nn.Conv2d(3, width, 3, padding=1, bias=False), nn.BatchNorm2d(width), nn.ReLU()]
    head = [nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(width, 10)]
    return nn.Sequential(*stem, *(Block(width) for _ in range(depth)), *head)


def distance(found: Tensor, wanted: Tensor) -> float:
    """Largest difference, relative to the wanted tensor's largest entry."""
    return ((found.detach().cpu().double() - wanted.double()).abs().max() / wanted.abs().max()).item()


def gradient(model: nn.Module, x: Tensor) -> Tensor:
    """Gradient of the mean square output with respect to all parameters, as one vector."""
    parameters = [p for p in model.parameters() if p.requires_grad]
    gradients = torch.autograd.grad(model(x).float().square().mean(), parameters, allow_unused=True)
    return torch.cat([g.flatten().float() for g in gradients if g is not None])


def equality_checks(shaped: nn.Module, x: Tensor, device: str) -> list[Check]:
    """The shaped network in every mode against its CPU float32 output and gradient."""
    shaped = copy.deepcopy(shaped).eval()
    output, slope = shaped(x).detach(), gradient(shaped, x)
    model, x = copy.deepcopy(shaped).to(device), x.to(device)

    def autocast(dtype: torch.dtype) -> Tensor:
        with torch.autocast(torch.device(device).type, dtype):
            return model(x)

    def channels_last() -> Tensor:
        last = copy.deepcopy(model).to(memory_format=torch.channels_last)  # pyright: ignore[reportCallIssue]
        return last(x.contiguous(memory_format=torch.channels_last))

    return [
        Check("float32 output", distance(model(x), output), 1e-4),
        Check("float32 gradient", distance(gradient(model, x), slope), 1e-3),
        Check("channels_last output", distance(channels_last(), output), 1e-4),
        Check("compiled output", distance(torch.compile(model)(x), output), 1e-4),
        Check("autocast bfloat16 output", distance(autocast(torch.bfloat16), output), 5e-2),
        Check("autocast float16 output", distance(autocast(torch.float16), output), 1e-2),
    ]


def seconds(step: Callable[[], object], device: str) -> float:
    """Wall time of one step, with the device's queue empty before and after."""
    wait = torch.cuda.synchronize if torch.device(device).type == "cuda" else lambda: None
    wait()
    start = time.perf_counter()
    step()
    wait()
    return time.perf_counter() - start


def step_times(models: dict[str, nn.Module], x: Tensor, device: str, repeats: int) -> dict[str, float]:
    """Median time of forward + backward of each model; the models alternate, so that a drift hits both."""
    for model in models.values():
        for _ in range(3):  # compiles, picks kernels, fills the allocator
            gradient(model, x)
    times: dict[str, list[float]] = {name: [] for name in models}
    for _ in range(repeats):
        for name, model in models.items():
            times[name].append(seconds(lambda model=model: gradient(model, x), device))
    return {name: statistics.median(values) for name, values in times.items()}


def timing_checks(
    original: nn.Module, shaped: nn.Module, x: Tensor, device: str, repeats: int
) -> tuple[Table, list[Check]]:
    """The table of step times in train mode, and one check a mode."""
    table = Table("mode", "original ms", "shaped ms", "shaped / original", title="forward + backward, median")
    checks, x = [], x.to(device)
    pair = {"original": original, "shaped": shaped}
    pair = {name: copy.deepcopy(model).to(device).train() for name, model in pair.items()}
    for mode in ("eager", "compiled"):
        models = pair if mode == "eager" else {name: wrapped(model) for name, model in pair.items()}
        found = step_times(models, x, device, repeats)
        ratio = found["shaped"] / found["original"]
        table.add_row(mode, f"{found['original'] * 1e3:.2f}", f"{found['shaped'] * 1e3:.2f}", f"{ratio:.3f}")
        checks.append(Check(f"{mode} step, shaped / original", ratio, SLOWEST))
    return table, checks


def wrapped(model: nn.Module) -> nn.Module:
    """torch.compile as a module (its annotation says callable)."""
    compiled = torch.compile(model)
    assert isinstance(compiled, nn.Module)
    return compiled


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--batch", type=int, default=128)
    parser.add_argument("--repeats", type=int, default=15)
    options = parser.parse_args()
    console = Console()
    if torch.device(options.device).type == "cuda" and not torch.cuda.is_available():
        console.print("No GPU here: nothing to measure.")
        return 0
    import kgraph

    # TF32 rounds to 10 bits: it would hide an error of kgraph behind its own.
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = False
    x = torch.randn(options.batch, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    original = convnet()
    shaped = kgraph.transform(original, method="tat", example_inputs=(x[:4],))
    checks = equality_checks(shaped, x[:16], options.device)
    table, timings = timing_checks(original, shaped, x, options.device, options.repeats)
    name = torch.cuda.get_device_name() if torch.cuda.is_available() else options.device
    console.print(f"torch {torch.__version__} on {name}, batch {options.batch}", table)
    for check in (*checks, *timings):
        word = "PASS" if check.passed else "FAIL"
        console.print(f"{word}  {check.name}: {check.measured:.3g} (at most {check.allowed:.3g})")
    return 0 if all(check.passed for check in (*checks, *timings)) else 1


if __name__ == "__main__":
    sys.exit(main())
