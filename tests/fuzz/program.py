"""A random network as source text: one statement a line, so that every row of a report finds its value."""

from __future__ import annotations

import re
import tempfile
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path
from typing import Any

from torch import nn

PRELUDE = '''\
import math

import torch
from torch import nn
from torch.nn import functional as F


def settled(tensor, std, center=False):
    """The tensor with exactly the mean square of its law, and mean 0 if ``center``: one network speaks for all."""
    with torch.no_grad():
        tensor -= tensor.mean(-1, keepdim=True) if center else 0
        return tensor.mul_(std / tensor.square().mean().sqrt())


def drawn(layer, weight="default", gain=1.0, bias="default"):
    """The layer with its parameters of another law than PyTorch's own."""
    fan_in = layer.weight[0].numel()
    stds = {"default": (3 * fan_in) ** -0.5, "normal": gain * fan_in**-0.5}
    stds["xavier"] = (2 / (fan_in + layer.weight.shape[0] * fan_in / layer.weight.shape[1])) ** 0.5
    if weight == "orthogonal":
        nn.init.orthogonal_(layer.weight, gain)
    else:
        if weight != "default":
            nn.init.normal_(layer.weight)
        settled(layer.weight, stds[weight])
    if layer.bias is not None:
        if bias in ("zero", "constant"):
            nn.init.constant_(layer.bias, 0.3 if bias == "constant" else 0.0)
        else:
            if bias != "default":
                (nn.init.normal_ if bias == "normal" else nn.init.uniform_)(layer.bias)
            settled(layer.bias, stds["default"] if bias == "default" else 0.4, center=True)
    return layer
'''


_OF_CHANNELS = r"nn\.(Linear|Conv|Embedding|RNN|GRU|LSTM|Bilinear|BatchNorm|GroupNorm|InstanceNorm)|nn\.PReLU\(\w"
_SUMS_CHANNELS = r"nn\.(Linear|Conv|Embedding|RNN|GRU|LSTM|Bilinear)"
_OVER_POSITIONS = r"nn\.Linear\(\d+, \d+"
_JUMPING = ("torch.sign", "torch.round", "hardshrink", "threshold", " > 0")


@dataclass(frozen=True)
class Shape:
    """What the dimensions of a value behind the batch are.

    Attributes:
        halves: number of channels in units of half the width.
        places: sizes of the position dimensions.
        first: whether the channels come before the positions, as for convolutions, or last, as for linear layers.
    """

    halves: int
    places: tuple[int, ...] = ()
    first: bool = False

    @property
    def channels(self) -> str:
        """Number of channels as an expression of the width ``w``."""
        return {1: "w // 2", 2: "w"}.get(self.halves, f"{self.halves} * w // 2")

    @property
    def channel_dim(self) -> int:
        return 1 if self.first else 1 + len(self.places)

    def sizes(self, width: int) -> tuple[int, ...]:
        """Sizes behind the batch."""
        channels = self.halves * width // 2
        return (channels, *self.places) if self.first else (*self.places, channels)


@dataclass(frozen=True)
class Statement:
    """``name = text``, made of ``reads`` and of the layers that ``text`` calls."""

    name: str
    text: str
    reads: tuple[str, ...]
    shape: Shape


@dataclass(frozen=True)
class Program:
    """A network: its layers, its statements, the value returned.

    Attributes:
        seed: what it was generated from.
        layers: constructor text by name of the attribute, in the order of construction.
        statements: in order.
        given: shape of the input ``x``; of token ids, the shape of their embedding.
        tokens: whether the input is token ids.
        mode: "train" or "eval".
        steady: whether its kernel is the same at every width, as it is without PyTorch's own biases.
    """

    seed: int
    layers: dict[str, str]
    statements: tuple[Statement, ...]
    given: Shape
    tokens: bool = False
    mode: str = "eval"
    steady: bool = False

    @property
    def result(self) -> Statement:
        return self.statements[-1]

    @property
    def text(self) -> str:
        return "\n".join([*self.layers.values(), *(s.text for s in self.statements)])

    @property
    def told(self) -> bool:
        """Whether layers tell which dimension the channels are: one at least, and none that sums over positions.

        Behind a layer over positions, those are what its units are, and kgraph calls the former channels positions.
        """
        texts = self.layers.values()
        told = self.tokens or any(re.search(_OF_CHANNELS, text) for text in texts)
        return told and not any(re.search(_OVER_POSITIONS, text) for text in texts)

    @property
    def ambiguous(self) -> bool:
        """Whether the only layers sum over positions, so that those are what kgraph takes for channels."""
        texts = list(self.layers.values())
        over = [text for text in texts if re.search(_OVER_POSITIONS, text)]
        return (
            bool(over)
            and not self.tokens
            and not any(re.search(_SUMS_CHANNELS, text) for text in texts if text not in over)
        )

    @property
    def tabled(self) -> bool:
        """Whether few random numbers are used entry by entry: kgraph takes those there are, the oracle's differ."""
        return "settled(torch.randn(" in self.text or '"uniform")' in self.text  # biases

    @property
    def jumps(self) -> bool:
        """Whether a function in it may jump."""
        return any(name in self.text for name in _JUMPING)

    @property
    def noisy(self) -> bool:
        """Whether two runs of one network differ."""
        return self.mode == "train" and "ropout" in self.text

    def ending_with(self, name: str) -> Program:
        """The program that returns the value called ``name``, without what that does not need."""
        needed, kept = {name}, []
        for statement in reversed(self.statements):
            if statement.name in needed:
                needed.update(statement.reads)
                kept.append(statement)
        return replace(self, statements=tuple(reversed(kept)))._with_used_layers()

    def _with_used_layers(self) -> Program:
        body = " ".join(s.text for s in self.statements)
        return replace(self, layers={n: t for n, t in self.layers.items() if re.search(rf"self\.{n}\b", body)})

    def lines(self) -> dict[str, int]:
        """Line of every statement in the source, by name."""
        start = len(self._head()) + 1
        return {s.name: start + i for i, s in enumerate(self.statements)}

    def _head(self) -> list[str]:
        layers = [f"        {text}" for text in self.layers.values()]
        return [
            *PRELUDE.splitlines(),
            "",
            "",
            f"class Program(nn.Module):  # seed {self.seed}, {self.mode} mode",
            "    def __init__(self, w):",
            "        super().__init__()",
            *layers,
            "",
            "    def forward(self, x):",
        ]

    def source(self, every: bool = False) -> str:
        """The module's text; with ``every``, its forward returns all values by name."""
        body = [f"        {s.name} = {s.text}" for s in self.statements]
        named = ", ".join(f'"{s.name}": {s.name}' for s in self.statements)
        return "\n".join(
            [*self._head(), *body, f"        return {'{' + named + '}' if every else self.result.name}", ""]
        )

    def compiled(self, every: bool = False) -> Made:
        """The class, run from a file so that stack traces know its lines."""
        return _compiled(self.source(every), f"program_{self.seed}{'_every' if every else ''}.py")


@dataclass(frozen=True)
class Made:
    """A compiled program: its class, of one argument, the width; and the file that it stands in."""

    build: Any
    file: str

    def __call__(self, width: int) -> nn.Module:
        return self.build(width)


@cache
def _folder() -> tempfile.TemporaryDirectory[str]:
    return tempfile.TemporaryDirectory(prefix="fuzz")


def _compiled(source: str, name: str) -> Made:
    path = Path(_folder().name) / name
    path.write_text(source)
    space: dict[str, Any] = {"__name__": path.stem}
    exec(compile(source, str(path), "exec"), space)
    return Made(space["Program"], name)
