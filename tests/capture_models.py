"""Small models that try one habit of model authors each, for the tests of capture."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
import zoo
from torch import Tensor, nn
from torch.nn import functional

import kgraph


class Functional(nn.Module):
    """Activations as functions and methods, in and out of place, and numbers from either side."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(8, 8), nn.Linear(8, 8)

    def forward(self, x: Tensor) -> Tensor:
        x = functional.gelu(self.a(x), approximate="tanh")
        x = functional.leaky_relu(self.b(x), 0.2, inplace=True).tanh()
        x = 1.0 - functional.relu(-x) / 2 + x**2
        x += torch.sigmoid(x).mul(0.5)
        return functional.softmax(x, dim=-1)


class Residual(nn.Module):
    """A chain with residual sums through modules of a list."""

    def __init__(self, depth: int) -> None:
        super().__init__()
        self.layers = nn.ModuleList(nn.Linear(8, 8) for _ in range(depth))
        self.act = nn.Tanh()

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.layers:
            x = x + self.act(layer(x))
        return x


class Reused(nn.Module):
    """One block called several times, its activation under two names, tied weights."""

    def __init__(self) -> None:
        super().__init__()
        act = nn.ReLU(inplace=True)
        self.block = nn.Sequential(nn.Linear(8, 8), act, nn.Linear(8, 8), act)
        self.act = self.other = act
        self.tied = nn.Linear(8, 8, bias=False)
        self.tied.weight = self.block[0].weight
        self.unused = nn.Linear(8, 8)

    def forward(self, x: Tensor) -> Tensor:
        for _ in range(3):
            x = self.other(self.act(self.block(x)))
        return self.tied(x)


class Sizes(nn.Module):
    """Shapes read off tensors, the batch size among them, and branches on sizes that are known."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.head = nn.Conv2d(3, 4, 3, padding="same"), nn.Linear(4 * 64, 6)

    def forward(self, x: Tensor) -> Tensor:
        batch, channels, height, width = x.shape
        x = self.conv(x)
        if x.size(1) != channels and x.dim() == 4 and x.dtype.is_floating_point:
            x = x.view(batch, -1, height * width)
        x = self.head(x.reshape(x.size(0), -1))
        return x.view(x.shape[0], *x.shape[1:]).expand(batch, -1)


class Pieces(nn.Module):
    """Several tensors out of one operation, indexing, concatenation."""

    def __init__(self) -> None:
        super().__init__()
        self.enter, self.scale = nn.Linear(8, 24), nn.Parameter(torch.ones(8))
        self.register_buffer("shift", torch.zeros(8), persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        a, b, c = self.enter(x).chunk(3, -1)
        best = (a * self.scale + self.shift).max(dim=-1, keepdim=True).values
        x = torch.cat([a[:, ::2], b[..., :3], c[:, None, 1], best], dim=1)
        return torch.stack(x.split([4, 5], 1)[0].unbind(1), 1).T.T


class Shortcut(nn.Module):
    """A block of a plain residual network: strided, with a padded identity in place of a projection."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.norm = nn.Conv2d(4, 8, 3, 2, 1, bias=False), nn.BatchNorm2d(8)

    def forward(self, x: Tensor) -> Tensor:
        identity = functional.pad(x[:, :, ::2, ::2], (0, 0, 0, 0, 2, 2))
        return functional.relu(self.norm(self.conv(x)) + identity)


class Dropouts(nn.Module):
    """Functional dropout and batch norm that read ``self.training``."""

    def __init__(self) -> None:
        super().__init__()
        self.enter, self.leave = nn.Linear(8, 16), nn.Linear(16, 4)
        self.register_buffer("mean", torch.zeros(16))
        self.register_buffer("var", torch.ones(16))

    def forward(self, x: Tensor) -> Tensor:
        x = functional.batch_norm(self.enter(x), self.mean, self.var, training=self.training)
        return self.leave(functional.dropout(functional.relu(x), 0.5, self.training))


class Writes(nn.Module):
    """Writes to parts of tensors, which become scatters, and to a tensor that a view is read of."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(8, 8)

    def forward(self, x: Tensor) -> Tensor:
        x = self.layer(x)
        y = torch.zeros_like(x)
        y[:, 1:4] = x[:, :3]
        x[:, 0] = 1.0
        x[:, 2:] += y[:, :6]
        part = x[:, 4:]
        x.mul_(3.0)
        return part + y[:, :4].tanh_()


class Structured(nn.Module):
    """Nested inputs, keywords, constants and a dictionary out."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(8, 8)

    def forward(self, pair: Any, *, scale: float = 1.0, mask: Tensor | None = None) -> dict[str, Any]:
        x = self.layer(pair[0]) * scale + pair[1]["x"]
        return {"out": x if mask is None else x * mask, "all": [x, (x.shape[0], None)]}


class Branch(nn.Module):
    """Branches on a tensor's value."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(8, 8)

    def forward(self, x: Tensor) -> Tensor:
        x = self.layer(x)
        if x.sum() > 0:  # the line
            return torch.relu(x)
        return x


class Constant(nn.Module):
    """Makes a tensor that is no part of its state."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(8, 8)

    def forward(self, x: Tensor) -> Tensor:
        return self.layer(x) + torch.arange(8.0)


class Memory(nn.Module):
    """Stores a tensor on itself, as models that show their features do."""

    features: Tensor | None = None

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(8, 8)

    def forward(self, x: Tensor) -> Tensor:
        self.features = self.layer(x)
        return torch.relu(self.features)


class FixedBatch(nn.Module):
    """Runs at one batch size only."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(8, 8)

    def forward(self, x: Tensor) -> Tensor:
        return self.layer(x).view(2, 4, 2).relu()


class Hidden(nn.Module):
    """Takes another path in train mode, and a branch that proxies miss."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(8, 8)

    def forward(self, x: Tensor) -> Tensor:
        return self.layer(x) if isinstance(x, Tensor) else torch.relu(self.layer(x))


def sequential(*layers: nn.Module) -> nn.Module:
    return nn.Sequential(nn.Linear(8, 8), *layers, nn.Linear(8, 4))


X, IMAGES = torch.randn(2, 8), torch.randn(2, 3, 8, 8)

ZOO = ("mlp", "cnn", "unet", "resnet18", "densenet121", "vit_tiny", "swin_tiny", "swiglu", "siamese", "two_inputs")
MODELS: dict[str, Callable[[], tuple[nn.Module, Any]]] = {
    "functional": lambda: (Functional(), X),
    "residual": lambda: (Residual(4), X),
    "reused": lambda: (Reused(), X),
    "sizes": lambda: (Sizes(), IMAGES),
    "pieces": lambda: (Pieces(), X),
    "shortcut": lambda: (Shortcut(), torch.randn(2, 4, 8, 8)),
    "dropouts": lambda: (Dropouts(), X),
    "structured": lambda: (
        Structured(),
        {"pair": (X, {"x": torch.randn(2, 8)}), "scale": 2.0, "mask": torch.ones(2, 8)},
    ),
    "inplace_relu": lambda: (sequential(nn.ReLU(inplace=True), nn.Linear(8, 8), nn.ReLU6(inplace=True)), X),
    "dropout_modules": lambda: (sequential(nn.Dropout(0.3), nn.Linear(8, 8), nn.AlphaDropout(0.2), nn.SELU()), X),
    "norms": lambda: (sequential(nn.BatchNorm1d(8), nn.ReLU(), nn.LayerNorm(8), nn.SiLU(), nn.GroupNorm(2, 8)), X),
    "parametrized": lambda: (sequential(nn.utils.parametrizations.weight_norm(nn.Linear(8, 8)), nn.Tanh()), X),
    "transformed": lambda: (kgraph.transform(zoo.build("cnn")[0], "dks", zoo.build("cnn")[1]), zoo.build("cnn")[1]),
    **{name: partial(zoo.build, name) for name in ZOO},
}
"""Models by name; builders, for a test may change what it gets."""

REFUSED = {
    "writes": lambda: (Writes(), X),  # a proxy takes no assignment
    "gru": lambda: zoo.build("gru"),  # hands its weights over in a list
    "gpt2": lambda: zoo.build("gpt2"),  # makes its own positions and mask
    "branch": lambda: (Branch(), X),
    "constant": lambda: (Constant(), X),
    "memory": lambda: (Memory(), X),
    "fixed_batch": lambda: (FixedBatch(), X),
    "hidden": lambda: (Hidden(), X),
}
"""Models that proxies cannot follow, or not faithfully."""
