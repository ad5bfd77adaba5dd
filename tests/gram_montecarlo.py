"""Brute force for kernels on real inputs: wide finite networks, every weight drawn anew, and what to expect of them.

Weights of affine layers, tables and recurrent layers are drawn as independent Gaussians of the variances that the
tensors have; gains and shifts of norms, and parameters used entry by entry, stay as they are.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

import kgraph

SIGMAS = 4.0
DRIFT = 2.5
"""Finite width moves a kernel by at most this over the width, relative, at every layer.

A mean of n squared rectified Gaussians has relative variance (E z^4 / 2) / (E z^2 / 2)^2 - 1 = 5 over n, more than that
of a smooth activation; a function of it with curvature 1 moves by half of that variance.
"""
WIDTH = 512
CHANNELS = 128
DRAWN = (nn.Linear, nn.modules.conv._ConvNd, nn.Embedding, nn.RNNBase, nn.MultiheadAttention)


class Net(nn.Module):
    """Named layers and how they are put together: ``forward(self, x)``."""

    def __init__(self, forward: Callable[..., Tensor], **layers: nn.Module | nn.Parameter) -> None:
        super().__init__()
        self._forward = forward
        for name, layer in layers.items():
            setattr(self, name, layer)

    def forward(self, x: Tensor) -> Tensor:
        return self._forward(self, x)


@dataclass(frozen=True)
class Case:
    """A network, one that is wrong about it in the way to be told apart, and inputs.

    Attributes:
        right, wrong: make the networks; ``wrong``'s kernel must not pass for ``right``'s.
        x: inputs.
        layers: affine layers in a row, counted for the finite-width allowance.
        width: of the narrowest sum over channels.
        draws: of all weights.
        train: mode.
    """

    right: Callable[[], nn.Module]
    wrong: Callable[[], nn.Module]
    x: Callable[[], Tensor]
    layers: int = 2
    width: int = WIDTH
    draws: int = 100
    train: bool = False


def _drawn(model: nn.Module) -> Iterator[tuple[nn.Parameter, float]]:
    """Every parameter that is drawn, and the size that its variance is one over."""
    for module in model.modules():
        if not isinstance(module, DRAWN):
            continue
        transposed = isinstance(module, nn.modules.conv._ConvTransposeNd)
        for parameter in module.parameters(recurse=False):
            if parameter.ndim == 1:
                yield parameter, 0.0
            elif isinstance(module, nn.Embedding):
                yield parameter, 1.0
            else:
                yield (
                    parameter,
                    parameter.numel() / parameter.shape[0]
                    if not transposed
                    else (
                        parameter.numel() / parameter.shape[1] / module.groups  # type: ignore[operator]
                    ),
                )


def prepared(model: nn.Module, train: bool, gain: float = 1.5, bias: float = 0.3) -> nn.Module:
    """The model in float64 with sw2 = ``gain`` and sb2 = ``bias``^2 exactly, its biases of mean zero."""
    generator = torch.Generator().manual_seed(0)
    model = model.double().train(train)
    with torch.no_grad():
        for parameter, fan_in in _drawn(model):
            x = torch.randn(parameter.shape, generator=generator, dtype=torch.float64)
            x = x - x.mean() if parameter.ndim == 1 else x
            size = bias if not fan_in else math.sqrt((gain if fan_in > 1 else 1.0) / fan_in)
            parameter.copy_(size * x / x.square().mean().sqrt())
    return model


def _draws(model: nn.Module, count: int) -> Iterator[None]:
    """The model with all weights drawn anew, ``count`` times."""
    generator = torch.Generator().manual_seed(1)
    sizes = [(p, float(p.detach().square().mean().sqrt())) for p, _ in _drawn(model)]
    for _ in range(count):
        with torch.no_grad():
            for parameter, size in sizes:
                parameter.normal_(0.0, size, generator=generator)
        yield


def _moments(found: list[Tensor]) -> tuple[Tensor, Tensor]:
    stacked = torch.stack(found)
    return stacked.mean(0), stacked.std(0) / math.sqrt(len(found))


def measured_nngp(model: nn.Module, x: Tensor, draws: int) -> tuple[Tensor, Tensor]:
    """Mean and standard error of (1/C) sum_c f_c(x) f_c(x') over draws of all weights."""
    found = []
    torch.manual_seed(2)
    with torch.no_grad():
        for _ in _draws(model, draws):
            y = model(x).flatten(1)
            found.append(y @ y.T / y.shape[1])
    return _moments(found)


def measured_ntk(model: nn.Module, x: Tensor, draws: int, parametrization: str) -> tuple[Tensor, Tensor]:
    """Mean and standard error of (1/C) sum_c <df_c(x)/dp, df_c(x')/dp>, all parameters p."""
    parameters = list(model.parameters())
    speeds = [1.0 if parametrization == "standard" else float(p.detach().square().mean()) for p in parameters]
    found = []
    torch.manual_seed(2)
    for _ in _draws(model, draws):
        y = model(x).flatten(1)
        rows = torch.eye(y.numel(), dtype=y.dtype).reshape(-1, *y.shape)
        jacobian = torch.autograd.grad(y, parameters, rows, is_grads_batched=True, allow_unused=True)
        total = torch.zeros(len(y), len(y), dtype=y.dtype)
        for speed, part in zip(speeds, jacobian, strict=True):
            if part is None:
                continue
            flat = part.reshape(*y.shape, -1)
            total += speed * torch.einsum("acp,bcp->ab", flat, flat) / y.shape[1]
        found.append(total)
    return _moments(found)


SEEDS = 3


def predicted(model: nn.Module, x: Tensor, kernel: str, **options: Any) -> tuple[Tensor, Tensor]:
    """A kernel and the standard error of its joint draws: from several seeds where it is sampled, else 0."""
    found = []
    for seed in range(SEEDS):
        result = kgraph.kernels(model, x, seed=seed, with_ntk=kernel == "ntk", **options)
        found.append(getattr(result, kernel))
        if result.how in ("exact", "quadrature"):
            return found[0], torch.zeros(())
    mean, error = _moments(found)
    scale = mean.diagonal().abs().sqrt()
    pooled = (error / torch.outer(scale, scale)).square().mean().sqrt()
    return mean, pooled * torch.outer(scale, scale)


def tolerance(kernel: Tensor, errors: tuple[Tensor, Tensor], case: Case, factor: float = 1.0) -> Tensor:
    """Four standard errors of either side and the finite-width allowance, of the size of the q values."""
    scale = kernel.diagonal().abs().sqrt()
    allowed = factor * DRIFT * case.layers / case.width
    return SIGMAS * (errors[0].square() + errors[1].square()).sqrt() + allowed * torch.outer(scale, scale)


def check_nngp(case: Case, **options: Any) -> None:
    """The prediction is within the tolerance of brute force, the wrong network's is not."""
    model = prepared(case.right(), case.train)
    x = case.x()
    found, drawn = predicted(model, x, "nngp", **options)
    wrong = kgraph.nngp(prepared(case.wrong(), case.train), x, **options)
    measured, error = measured_nngp(model, x, case.draws)
    _compare(found, wrong, measured, tolerance(found, (error, drawn), case))


def check_ntk(case: Case, parametrization: str) -> None:
    """As `check_nngp`, for the NTK: its terms are products of a forward and a backward mean, each drifts."""
    model = prepared(case.right(), case.train)
    x = case.x()
    found, drawn = predicted(model, x, "ntk", parametrization=parametrization)
    wrong = kgraph.ntk(prepared(case.wrong(), case.train), x, parametrization=parametrization)
    measured, error = measured_ntk(model, x, case.draws, parametrization)
    _compare(found, wrong, measured, tolerance(found, (error, drawn), case, 2.0))


def _compare(found: Tensor, wrong: Tensor, measured: Tensor, allowed: Tensor) -> None:
    error, missed = (found - measured).abs(), (wrong - measured).abs()
    assert bool((error <= allowed).all()), f"predicted\n{found}\nmeasured\n{measured}\nallowed\n{allowed}"
    assert bool((missed > allowed).any()), f"the wrong\n{wrong}\npasses for\n{measured}\nwithin\n{allowed}"


def vectors(features: int = 8) -> Tensor:
    """Three inputs, two of them alike."""
    x = torch.randn(3, features, generator=torch.Generator().manual_seed(3), dtype=torch.float64)
    x[1] = 0.7 * x[0] + 0.5 * x[1]
    return x


def images(size: int = 4) -> Tensor:
    x = torch.randn(3, 3, size, size, generator=torch.Generator().manual_seed(4), dtype=torch.float64)
    x[1] = 0.7 * x[0] + 0.5 * x[1]
    return x


def sequences(length: int = 4, features: int = 6) -> Tensor:
    x = torch.randn(3, length, features, generator=torch.Generator().manual_seed(5), dtype=torch.float64)
    x[1] = 0.7 * x[0] + 0.5 * x[1]
    return x


def tokens() -> Tensor:
    return torch.tensor([[0, 1, 2, 3], [0, 2, 1, 1], [4, 4, 2, 0]])


def dense(inputs: int = WIDTH, outputs: int = WIDTH, *, bias: bool = True) -> nn.Linear:
    return nn.Linear(inputs, outputs, bias)


def conv(inputs: int = CHANNELS, outputs: int = CHANNELS, size: int = 3, **options: Any) -> nn.Conv2d:
    return nn.Conv2d(inputs, outputs, size, **{"padding": size // 2, **options})
