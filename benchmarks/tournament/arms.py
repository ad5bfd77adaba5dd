"""What is done to a network before it is trained."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn

import kgraph

_NORMS = (nn.modules.batchnorm._BatchNorm, nn.LayerNorm, nn.GroupNorm)


class DynamicTanh(nn.Module):
    """``g tanh(a x) + b`` in place of LayerNorm: Zhu et al. 2025, arXiv 2503.10622."""

    def __init__(self, like: nn.LayerNorm) -> None:
        super().__init__()
        self.a = nn.Parameter(torch.tensor(0.5))
        self.gain = nn.Parameter(torch.ones(like.normalized_shape))
        self.bias = nn.Parameter(torch.zeros(like.normalized_shape))
        self.channels_first = type(like).__name__ == "LayerNorm2d"

    def forward(self, x: Tensor) -> Tensor:
        shape = (-1, 1, 1) if self.channels_first else (-1,)
        return self.gain.view(shape) * torch.tanh(self.a * x) + self.bias.view(shape)


def _replace(model: nn.Module, new: Callable[[nn.Module], nn.Module | None]) -> int:
    """Every submodule for which there is a new one; how many those were."""
    count = 0
    for parent in list(model.modules()):
        for name, child in list(parent.named_children()):
            if (made := new(child)) is not None:
                setattr(parent, name, made)
                count += 1
    return count


def _without_norm(module: nn.Module) -> nn.Module | None:
    """Nothing in its place; of timm's norm with an activation, the activation."""
    if isinstance(module, _NORMS):
        return getattr(module, "act", None) or nn.Identity()
    return None


def original(model: nn.Module, x: Tensor, seed: int) -> nn.Module:
    """As its authors wrote it."""
    return model


def he(model: nn.Module, x: Tensor, seed: int) -> nn.Module:
    """Norms removed; weights of variance 2 / fan_in, biases 0: He et al. 2015, arXiv 1502.01852."""
    _replace(model, _without_norm)
    for module in model.modules():
        if isinstance(module, (nn.Conv2d, nn.Linear, nn.ConvTranspose2d)):
            nn.init.kaiming_normal_(module.weight, nonlinearity="relu")
            if module.bias is not None:
                nn.init.zeros_(module.bias)
    return model


def dyt(model: nn.Module, x: Tensor, seed: int) -> nn.Module | None:
    """`DynamicTanh` in place of LayerNorm; None for a network without."""
    found = _replace(model, lambda module: DynamicTanh(module) if isinstance(module, nn.LayerNorm) else None)
    return model if found else None


def _by(method: str) -> Callable[[nn.Module, Tensor, int], nn.Module]:
    return lambda model, x, seed: kgraph.transform(model, method, x, seed=seed)


ARMS: dict[str, Callable[[nn.Module, Tensor, int], nn.Module | None]] = {
    "original": original,
    "he": he,
    "dyt": dyt,
    "dks": _by("dks"),
    "tat": _by("tat"),
}
