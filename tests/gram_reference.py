"""The cases of reference/nngp_ntk.json as torch modules whose measured weight variances are exactly the declared."""

from __future__ import annotations

import json
import math
from functools import cache
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

FILE = Path(__file__).parent / "reference" / "nngp_ntk.json"
WIDTH = 64


@cache
def reference() -> dict[str, Any]:
    return json.loads(FILE.read_text())


def array(stored: dict[str, Any]) -> Tensor:
    return torch.tensor(stored["data"], dtype=torch.float64).reshape(stored["shape"])


def shuffled(shape: tuple[int, ...], std: float) -> Tensor:
    """As many entries std as -std, shuffled: E[w] = 0 and E[w^2] = std^2 exactly at every tap, and no row sums to 0."""
    count = math.prod(shape[:2])
    signs = torch.tensor([1.0, -1.0], dtype=torch.float64).repeat(-(-count // 2))[:count]
    signs = signs[torch.randperm(count, generator=torch.Generator().manual_seed(0))]
    if not signs.reshape(shape[:2]).sum(1).any():  # of one row, say: it would not see the mean of what it reads
        signs[0] = -signs[0]
    return (std * signs).reshape(*shape[:2], *(1 for _ in shape[2:])).expand(shape).clone()


def quantiles(count: int, std: float) -> Tensor:
    """Biases that are Gaussian as the reference's are: in equal steps of probability, E[b] = 0, E[b^2] = std^2."""
    steps = (torch.arange(count, dtype=torch.float64) + 0.5) / count
    values = torch.erfinv(2 * steps - 1)
    return std * values / values.square().mean().sqrt() if count > 1 else torch.full((1,), std, dtype=torch.float64)


def set_moments(layer: nn.Module, spec: dict[str, Any], fan_in: int) -> nn.Module:
    assert isinstance(layer.weight, Tensor)
    layer.weight.data = shuffled(tuple(layer.weight.shape), spec["W_std"] / math.sqrt(fan_in))
    if layer.bias is not None:
        assert isinstance(layer.bias, Tensor)
        layer.bias.data = quantiles(len(layer.bias), spec["b_std"] or 0.0)
    return layer.double()


class Function(nn.Module):
    """A named function as a module, so that its node can be found."""

    def __init__(self, function: Any) -> None:
        super().__init__()
        self.function = function

    def forward(self, x: Tensor) -> Tensor:
        return self.function(x)


class Chain(nn.Module):
    """Layers l0, l1, ... one after the other."""

    def __init__(self, layers: list[nn.Module]) -> None:
        super().__init__()
        for i, layer in enumerate(layers):
            self.add_module(f"l{i}", layer)

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.children():
            x = layer(x)
        return x


class Parallel(nn.Module):
    """Branches b0, b1, ... of the same input, merged."""

    def __init__(self, branches: list[nn.Module], merge: str) -> None:
        super().__init__()
        self.merge = merge
        for i, branch in enumerate(branches):
            self.add_module(f"b{i}", branch)

    def forward(self, x: Tensor) -> Tensor:
        first, *rest = [branch(x) for branch in self.children()]
        if self.merge == "concat":
            return torch.cat([first, *rest], 1)
        for other in rest:
            first = first + other
        return first


class Attention(nn.Module):
    """Single-head attention: softmax at 1/d with tied queries and keys, or none at 1/sqrt(d) with many heads."""

    def __init__(self, spec: dict[str, Any], width: int) -> None:
        super().__init__()
        self.heads, self.softmax = spec["heads"], spec["mechanism"] == "SOFTMAX"
        key_std = math.sqrt(spec["W_key_std"] * spec["W_query_std"]) if self.softmax else spec["W_key_std"]
        query_std = key_std if self.softmax else spec["W_query_std"]
        bias_free = {"b_std": None}
        self.key = set_moments(nn.Linear(width, WIDTH, False), {"W_std": key_std, **bias_free}, width)
        if not self.softmax:
            self.query = set_moments(nn.Linear(width, WIDTH, False), {"W_std": query_std, **bias_free}, width)
        self.value = set_moments(nn.Linear(width, WIDTH, False), {"W_std": spec["W_value_std"], **bias_free}, width)
        out = {"W_std": spec["W_out_std"], "b_std": spec["b_std"]}
        self.out = set_moments(nn.Linear(WIDTH, WIDTH, spec["b_std"] is not None), out, WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        k, v = self.key(x), self.value(x)
        if self.softmax:
            mixed = nn.functional.scaled_dot_product_attention(k, k, v, scale=1 / k.shape[-1])
            return self.out(mixed)
        q = self.query(x)
        logits = (q / math.sqrt(WIDTH)) @ k.transpose(-1, -2)
        return self.out(logits @ v)


class ChannelNorm(nn.Module):
    """LayerNorm over the channels of every position."""

    def forward(self, x: Tensor) -> Tensor:
        y = x.movedim(1, -1)
        return nn.functional.layer_norm(y, y.shape[-1:], eps=1e-12).movedim(-1, 1)


class Builder:
    """Builds modules layer by layer, following the number of channels."""

    def __init__(self, channels: int) -> None:
        self.channels = channels

    def chain(self, specs: list[dict[str, Any]]) -> Chain:
        return Chain([getattr(self, f"_{spec['op'].lower()}")(spec) for spec in specs])

    def _dense(self, spec: dict[str, Any]) -> nn.Module:
        before, self.channels = self.channels, spec.get("width", WIDTH)
        return set_moments(nn.Linear(before, self.channels, spec["b_std"] is not None), spec, before)

    def _conv(self, spec: dict[str, Any]) -> nn.Module:
        circular = spec["padding"] == "CIRCULAR"
        padding = 0 if spec["padding"] == "VALID" else 1
        mode = "circular" if circular else "zeros"
        bias = spec["b_std"] is not None
        layer = nn.Conv2d(self.channels, WIDTH, spec["k"], spec["strides"], padding, bias=bias, padding_mode=mode)
        fan_in, self.channels = self.channels * math.prod(spec["k"]), WIDTH
        return set_moments(layer, spec, fan_in)

    def _convtranspose(self, spec: dict[str, Any]) -> nn.Module:
        layer = nn.ConvTranspose2d(self.channels, WIDTH, spec["k"], spec["strides"], bias=spec["b_std"] is not None)
        fan_in, self.channels = self.channels * math.prod(spec["k"]), WIDTH
        return set_moments(layer, spec, fan_in)

    def _relu(self, spec: dict[str, Any]) -> nn.Module:
        return nn.ReLU()

    def _leakyrelu(self, spec: dict[str, Any]) -> nn.Module:
        return nn.LeakyReLU(spec["alpha"])

    def _erf(self, spec: dict[str, Any]) -> nn.Module:
        return Function(torch.erf)

    def _gelu(self, spec: dict[str, Any]) -> nn.Module:
        return nn.GELU()

    def _sin(self, spec: dict[str, Any]) -> nn.Module:
        return Function(torch.sin)

    def _num(self, spec: dict[str, Any]) -> nn.Module:
        return {"tanh": nn.Tanh, "silu": nn.SiLU}[spec["fn"]]()

    def _layernorm(self, spec: dict[str, Any]) -> nn.Module:
        if spec.get("axis") == [-1] and self.image:
            return ChannelNorm()
        return nn.LayerNorm(self.channels, eps=1e-12, elementwise_affine=False)

    image = False

    def _avgpool(self, spec: dict[str, Any]) -> nn.Module:
        return nn.AvgPool2d(tuple(spec["k"]), tuple(spec["strides"]))

    def _sumpool(self, spec: dict[str, Any]) -> nn.Module:
        window = math.prod(spec["k"])
        return Function(lambda x: window * nn.functional.avg_pool2d(x, tuple(spec["k"]), tuple(spec["strides"])))

    def _globalavgpool(self, spec: dict[str, Any]) -> nn.Module:
        return Function(lambda x: x.mean((2, 3)))

    def _flatten(self, spec: dict[str, Any]) -> nn.Module:
        return nn.Flatten()

    def _dropout(self, spec: dict[str, Any]) -> nn.Module:
        return nn.Dropout(1 - spec["rate"])

    def _selfattention(self, spec: dict[str, Any]) -> nn.Module:
        layer = Attention(spec, self.channels)
        self.channels = WIDTH
        return layer

    def _parallel(self, spec: dict[str, Any]) -> nn.Module:
        before, after, branches = self.channels, [], []
        for branch in spec["branches"]:
            self.channels = before
            branches.append(self.chain(branch))
            after.append(self.channels)
        self.channels = sum(after) if spec["merge"] == "concat" else after[0]
        return Parallel(branches, spec["merge"])


def build(case: dict[str, Any]) -> tuple[nn.Module, Tensor, Tensor | None]:
    """The case's module (float64, train mode) and its inputs in PyTorch's layout."""
    inputs = reference()["inputs"]
    x1 = _layout(array(inputs[case["x1"]]))
    x2 = _layout(array(inputs[case["x2"]])) if case["x2"] else None
    image = x1.ndim == 4
    builder = Builder(x1.shape[1] if image else x1.shape[-1])
    builder.image = image
    layers: list[nn.Module] = []
    sizes = x1
    for spec in case["layers"]:
        if spec["op"] == "Dense" and sizes.ndim == 2:
            builder.channels = sizes.shape[1]
        layers += list(builder.chain([spec]).children())
        with torch.no_grad():
            sizes = layers[-1](sizes)
    return Chain(layers), x1, x2


def _layout(x: Tensor) -> Tensor:
    return x.movedim(-1, 1).contiguous() if x.ndim == 4 else x


def as_stored(x: Tensor, places: int) -> Tensor:
    """[n1, n2, *places, *places] with the axes of each place next to each other."""
    order = [2 + side * places + i for i in range(places) for side in (0, 1)]
    return x.permute(0, 1, *order)
