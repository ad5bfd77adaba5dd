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

    A draw without the batch dimension is one number for all inputs of a batch: known, like any other constant. Where
    the forward holds the batch to a number, a draw of that many rows has that dimension.
    """
    tags, value = getattr(node.target, "tags", ()), node.meta.get("val")
    if torch.Tag.nondeterministic_seeded not in tags or not isinstance(value, Tensor):
        return False
    if not value.is_floating_point() or value.ndim < 2:
        return value.is_floating_point() and value.ndim > 0 and isinstance(value.shape[0], torch.SymInt)
    return isinstance(value.shape[0], torch.SymInt) or value.shape[0] == _fixed_batch(node.graph)


def _fixed_batch(graph: fx.Graph) -> int | None:
    """Size of a batch that the forward holds to one number, above 1."""
    inputs = [n.meta.get("val") for n in graph.nodes if n.op == "placeholder"]
    sizes = {v.shape[0] for v in inputs if isinstance(v, Tensor) and v.ndim > 0}
    return next((size for size in sizes if isinstance(size, int) and size > 1 and len(sizes) == 1), None)


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
