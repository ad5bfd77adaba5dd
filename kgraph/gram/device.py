"""Where kernels are computed: on the device of the inputs, with the same random numbers on every device."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Generator, Tensor
from torch.utils import _pytree as pytree

_CPU = torch.device("cpu")
_WITHOUT_FLOAT64 = ("mps", "meta")


def device_of(x: Any) -> torch.device:
    """Device of the first tensor among the inputs."""
    return next((leaf.device for leaf in pytree.tree_leaves(x) if isinstance(leaf, Tensor)), _CPU)


def computing_device(x: Any) -> torch.device:
    """The inputs' own device where it holds float64, else the CPU."""
    device = device_of(x)
    return _CPU if device.type in _WITHOUT_FLOAT64 else device


def on(device: torch.device) -> AbstractContextManager[Any]:
    """Makes tensors on ``device`` unless told otherwise; nothing at all where torch does so already."""
    return nullcontext() if torch.get_default_device() == device else device


def here(value: Any) -> Any:
    """Tensors moved to where the others are; numbers without dimensions mix with those of any device."""
    device = torch.get_default_device()
    return pytree.tree_map_only(Tensor, lambda x: x.to(device) if x.ndim else x, value)


def away(value: Any) -> Any:
    """Tensors moved to the CPU, where the captured model is."""
    return pytree.tree_map_only(Tensor, Tensor.cpu, value)


def normal(shape: tuple[int, ...], generator: Generator) -> Tensor:
    """Standard Gaussian float64 numbers of a generator on the CPU."""
    return here(torch.randn(shape, generator=generator, dtype=torch.float64, device=_CPU))


def sobol(count: int, dimensions: int, generator: Generator) -> Tensor:
    """Scrambled Sobol points in the unit cube in random order, [count, dimensions]."""
    with on(_CPU):
        seed = int(torch.randint(0, 2**31, (), generator=generator))
        points = torch.quasirandom.SobolEngine(dimensions, scramble=True, seed=seed).draw(count, dtype=torch.float64)
        points = points[torch.randperm(count, generator=generator)]
    return here(points)


def uniform(shape: tuple[int, ...], generator: Generator) -> Tensor:
    """Float64 numbers in [0, 1) of a generator on the CPU."""
    return here(torch.rand(shape, generator=generator, dtype=torch.float64, device=_CPU))


__all__ = ["away", "computing_device", "device_of", "here", "normal", "on", "sobol", "uniform"]
