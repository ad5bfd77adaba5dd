"""A vanilla 10,000-layer tanh CNN: captured, transformed, run forward and backward.

    python examples/ten_thousand_layers.py [--quick] [--depth N] [--seed N]

10,000 3x3 convolutions of 16 channels on 2x2 places, a tanh behind each; ``kgraph.transform(model, "edge-of-chaos")``;
eight inputs with q = 1. Seed 0, torch 2.13, one CPU thread: transform 63 s, forward and backward 1.6 s; 48 s of
processor time in all.

    q of the last convolution over the first's                        1.106
    norm of the gradient at the first convolution over the last's     1.001

With Gaussian weights of the same variances 500 layers suffice to lose both.
"""

from __future__ import annotations

import argparse
import time
from dataclasses import dataclass

import torch
from torch import Tensor, nn

import kgraph

CHANNELS, PLACES = 16, 2


@dataclass(frozen=True)
class Run:
    """Seconds, and what is left at the other end of the network."""

    depth: int
    transform_seconds: float
    run_seconds: float
    q_ratio: float
    gradient_ratio: float


def cnn(depth: int) -> nn.Sequential:
    """``depth`` 3x3 convolutions and as many tanh: no skips, no normalization."""
    return nn.Sequential(*[m for _ in range(depth) for m in (nn.Conv2d(CHANNELS, CHANNELS, 3, padding=1), nn.Tanh())])


def inputs(count: int, seed: int) -> Tensor:
    """Noise with q = 1 at every place."""
    x = torch.randn(count, CHANNELS, PLACES, PLACES, generator=torch.Generator().manual_seed(seed))
    return x / x.square().mean(1, keepdim=True).sqrt()


def ratios(model: nn.Module, x: Tensor, seed: int) -> tuple[float, float]:
    """q of the last convolution over the first's, and the norm of the loss's gradient at the first over the last's."""
    convolutions = [m for m in model.modules() if isinstance(m, nn.Conv2d)]
    values: list[Tensor] = []

    def keep(module: nn.Module, given: object, value: Tensor) -> None:
        value.retain_grad()
        values.append(value)

    hooks = [layer.register_forward_hook(keep) for layer in (convolutions[0], convolutions[-1])]
    y = model(x)
    (y * torch.randn(y.shape, generator=torch.Generator().manual_seed(seed))).sum().backward()
    for hook in hooks:
        hook.remove()
    first, last = values
    assert first.grad is not None and last.grad is not None
    q = float(last.detach().square().mean() / first.detach().square().mean())
    return q, float(first.grad.norm() / last.grad.norm())


def measure(depth: int, seed: int = 0, distribution: str = "delta-orthogonal") -> Run:
    """Build, transform, one forward and backward."""
    x = inputs(8, seed)
    start = time.perf_counter()
    system = kgraph.EdgeOfChaos(distribution=distribution)  # type: ignore[arg-type]
    model = kgraph.transform(cnn(depth), system, x, seed=seed)
    transformed = time.perf_counter()
    q, gradient = ratios(model, x, seed)
    return Run(depth, transformed - start, time.perf_counter() - transformed, q, gradient)


def main(arguments: list[str] | None = None) -> Run:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="500 layers")
    parser.add_argument("--depth", type=int, default=10_000)
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args(arguments)
    run = measure(500 if options.quick else options.depth, options.seed)
    print(f"{run.depth} layers: transform {run.transform_seconds:.1f} s, forward and backward {run.run_seconds:.1f} s")
    print(f"q of the last layer over the first's {run.q_ratio:.3f}, gradients the other way {run.gradient_ratio:.3f}")
    return run


if __name__ == "__main__":
    main()
