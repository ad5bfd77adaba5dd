"""Noise that a forward draws for itself (a VAE's code, a random mask): another draw for every input.

E[n(a) n(a)] = E[n^2]      E[n(a) n(b)] = E[n]^2      slope = NTK = 0
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, fx

from kgraph.how import assumed, sampled
from kgraph.kernel import SAME, Kernel, Pairs, Part
from kgraph.roots import Root, Roots

_ENTRIES = 100_000
_NORMAL = ("randn", "normal")


def draws_noise(node: fx.Node) -> bool:
    """Whether a node makes random numbers for every input of the batch out of known arguments.

    A draw without the batch dimension is one number for all inputs of a batch: known, like any other constant.
    """
    tags, value = getattr(node.target, "tags", ()), node.meta.get("val")
    if torch.Tag.nondeterministic_seeded not in tags or not isinstance(value, Tensor):
        return False
    return value.is_floating_point() and value.ndim > 0 and isinstance(value.shape[0], torch.SymInt)


def noise_kernel(node: fx.Node, channel: int, args: tuple[Any, ...], kwargs: dict[str, Any], pairs: Pairs) -> Kernel:
    """Moments of the noise, measured on draws of the operation itself."""
    target: Any = node.target
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(0)
        first: Tensor = target(*args, **kwargs)
        repeats = range(min(_ENTRIES // max(first.numel(), 1), _ENTRIES // 100))
        draws = torch.stack([first, *(target(*args, **kwargs) for _ in repeats)]).double().cpu()
    q, mean = float(draws.square().mean()), float(draws.mean())
    cov = torch.full((len(pairs.inputs), 2), mean**2, dtype=torch.float64)
    cov[Pairs.SELF, SAME] = q
    nothing, shape = torch.zeros_like(cov), tuple(first.shape)
    error = float(draws.square().std() / (max(q, 1e-300) * draws.numel() ** 0.5))
    name = str(target)
    how = sampled(error) if any(f".{kind}." in name for kind in _NORMAL) else assumed("its noise counts as Gaussian")
    axes = tuple(
        ((("b" if i == 0 else "c" if i == channel else "p"), size),) if size > 1 else () for i, size in enumerate(shape)
    )
    part = Part(shape[channel], cov, nothing, nothing, mean, Roots({Root(node.name)}), how=how)
    return Kernel((part,), axes)
