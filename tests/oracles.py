"""An oracle for the rules: the finite network itself, at two widths, extrapolated to infinite width.

A network is drawn anew ``draws`` times. Inputs have q = 1 at every position, exact cosines and as many channels as
the network is wide, so that everything that differs from infinite width is O(1/width) and falls with it:

    m(inf) = 2 m(W) - m(W/2) + O(1/W^2),   standard error sqrt(4 s(W)^2 + s(W/2)^2)

Nothing here is read from the library but the numbers that are checked.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
from scipy import stats
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from kgraph.capture import capture
from kgraph.kernel import DIFF, SAME, Kernel, Pairs
from kgraph.propagate import Propagation, propagate

COSINES = (0.0, 0.5, 0.9)
SIGMAS = 4.0
SECOND_ORDER = 24.0
"""Allowance for what the extrapolation leaves: ``SECOND_ORDER / W^2`` of q."""

Build = Callable[[int], nn.Module]


@dataclass(frozen=True)
class Probe:
    """What is fed to a network and how its output is read.

    Attributes:
        positions: sizes of the input's position dimensions.
        last: channels are the last dimension of the input (sequences), else dimension 1 (images).
        out: dimension of the output that holds channels.
        width: the larger of the two widths.
        draws: networks drawn at either width.
        mode: "train" or "eval".
        groups: independent sets of inputs that each network sees.
    """

    positions: tuple[int, ...] = ()
    last: bool = True
    out: int = -1
    width: int = 128
    draws: int = 24
    mode: str = "eval"
    groups: int = 24

    def shape(self, width: int) -> tuple[int, ...]:
        """Shape of one input."""
        return (*self.positions, width) if self.last else (width, *self.positions)


IMAGE = Probe((6, 6), last=False, out=1, width=64, draws=12, groups=4)
SEQUENCE = Probe((8,), width=64, draws=16, groups=8)
VECTOR = Probe()


class Body(nn.Module):
    """A function of the input and some layers; the first of them makes a Gaussian field of the input."""

    def __init__(self, function: Callable[..., Tensor], *layers: nn.Module) -> None:
        super().__init__()
        self.function, self.layers = function, nn.ModuleList(layers)

    def forward(self, x: Tensor) -> Tensor:
        first, *rest = self.layers
        return self.function(first(x), *rest)


def dense(width: int) -> nn.Module:
    return nn.Linear(width, width)


def pixelwise(width: int) -> nn.Module:
    return nn.Conv2d(width, width, 1)


def vectors(function: Callable[..., Tensor], *layers: Build) -> Build:
    """``function(u, *layers)`` with u the output of a linear layer."""
    return lambda width: Body(function, dense(width), *(layer(width) for layer in layers))


def images(function: Callable[..., Tensor], *layers: Build) -> Build:
    """``function(u, *layers)`` with u the output of a 1 x 1 convolution."""
    return lambda width: Body(function, pixelwise(width), *(layer(width) for layer in layers))


def biased(layer: nn.Module, bias: float = 0.5) -> nn.Module:
    """The layer with a constant bias."""
    assert isinstance(layer.bias, Tensor)
    nn.init.constant_(layer.bias, bias)
    return layer


@dataclass(frozen=True)
class Moment:
    """A measured number with its standard error."""

    value: float
    error: float


def probes(probe: Probe, width: int, generator: torch.Generator) -> Tensor:
    """Rows a, then rows b for every cosine, ``groups`` of each."""
    shape = probe.shape(width)
    z = torch.randn((1 + len(COSINES), probe.groups, *shape), generator=generator, dtype=torch.float64)
    z = z if probe.last else z.movedim(2, -1)

    def unit(x: Tensor) -> Tensor:
        return x / x.square().mean(-1, keepdim=True).sqrt()

    a, rows = unit(z[0]), [unit(z[0])]
    for cosine, other in zip(COSINES, z[1:], strict=True):
        apart = unit(other - (other * a).mean(-1, keepdim=True) * a)
        rows.append(cosine * a + math.sqrt(1 - cosine**2) * apart)
    x = torch.cat(rows)
    return (x if probe.last else x.movedim(-1, 1)).contiguous()


def network(build: Build, width: int, seed: int, mode: str) -> nn.Module:
    """A fresh network; the global generator is left as it was.

    Weights of affine layers have the same second moment at every tap and biases theirs in every draw, so that one
    network's analysis holds for all.
    """
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = build(width).double().train(mode == "train")
    affine = [m for m in model.modules() if isinstance(m, nn.Linear | nn.modules.conv._ConvNd)]
    for parameter in (p for m in affine for p in m.parameters(recurse=False)):
        dims = (0, 1) if parameter.ndim > 1 else (0,)
        taps = parameter.detach().square().mean(dims, keepdim=True)
        parameter.data *= (taps.mean() / taps.clamp_min(1e-300)).sqrt()
        if not _set_by_hand(parameter):
            fan_in = parameter[0].numel() if parameter.ndim > 1 else width
            parameter.data *= (3 * fan_in * taps.mean()).rsqrt()
    return model


def _set_by_hand(parameter: nn.Parameter) -> bool:
    """Constants, and weights drawn with another variance than PyTorch's."""
    values = parameter.detach()
    fan_in = values[0].numel() if values.ndim > 1 else len(values)
    return bool((values == values.flatten()[0]).all()) or float(3 * fan_in * values.square().mean()) > 1.3


def _entries(y: Tensor, channel: int) -> Tensor:
    """[inputs a and b, groups, positions, channels]."""
    rows = y.movedim(channel, -1).reshape(len(y), -1, y.shape[channel])
    return rows.reshape(1 + len(COSINES), -1, *rows.shape[1:])


def _between(u: Tensor, v: Tensor) -> float:
    """Mean of u_i v_j over channels and pairs of different positions; [groups, positions, channels] each."""
    count = u.shape[1]
    if count == 1:
        return float("nan")
    return float((u.sum(1) * v.sum(1) - (u * v).sum(1)).mean()) / (count * (count - 1))


def _one(model: nn.Module, probe: Probe, width: int, generator: torch.Generator) -> dict[str, float]:
    x = probes(probe, width, generator)
    direction = torch.randn(x.shape, generator=generator, dtype=torch.float64)
    with torch.random.fork_rng(devices=[]), sdpa_kernel(SDPBackend.MATH):
        torch.manual_seed(int(torch.randint(2**31, (), generator=generator)))
        y, tangent = torch.func.jvp(model, (x,), (direction,))
        again = torch.func.jvp(model, (x,), (direction,))[1]  # dropout: another mask
    rows, slope = _entries(y, probe.out), float((tangent * again).mean())
    found = {"q": float(rows[0].square().mean()), "mean": float(rows.mean()), "slope": slope}
    found["q(i,j)"] = _between(rows[0], rows[0])
    for cosine, row in zip(COSINES, rows[1:], strict=True):
        found[f"cov({cosine})"] = float((rows[0] * row).mean())
        found[f"cov({cosine})(i,j)"] = _between(rows[0], row)
    return found


def measure(build: Build, probe: Probe) -> dict[str, Moment]:
    """Moments of the output, extrapolated to infinite width."""
    tables = []
    for width in (probe.width, probe.width // 2):
        generator = torch.Generator().manual_seed(width + 7)
        with torch.no_grad():
            drawn = [
                _one(network(build, width, 1000 * width + i, probe.mode), probe, width, generator)
                for i in range(probe.draws)
            ]
        tables.append({name: torch.tensor([d[name] for d in drawn], dtype=torch.float64) for name in drawn[0]})
    wide, narrow = tables

    def error(name: str) -> float:
        return math.sqrt((4 * float(wide[name].var()) + float(narrow[name].var())) / probe.draws)

    return {name: Moment(float(2 * wide[name].mean() - narrow[name].mean()), error(name)) for name in wide}


def propagated(build: Build, probe: Probe, seed: int = 0, width: int = 0) -> Propagation:
    """The analysis of one network of the larger width."""
    width = width or probe.width
    model = network(build, width, seed, probe.mode).float()
    return propagate(capture(model, torch.randn(2, *probe.shape(width))), mode=probe.mode)


def predicted(result: Propagation) -> dict[str, float]:
    """The same numbers, from the last node's kernel."""
    kernel: Kernel = list(result.kernels().values())[-1]
    part = kernel.merged
    found = {"q": part.q, "q(i,j)": part.cov[Pairs.SELF, DIFF], "slope": part.slope[Pairs.UNIT, SAME]}
    for i, cosine in enumerate(COSINES):
        found[f"cov({cosine})"], found[f"cov({cosine})(i,j)"] = part.cov[i, SAME], part.cov[i, DIFF]
    error = part.how.error * float(part.q)  # of draws, where there are any
    return {"mean": part.mean, "drawn": error, **{name: float(value) for name, value in found.items()}}


def _extrapolated(build: Build, probe: Probe, seed: int) -> dict[str, float]:
    """The prediction treated as the measurement is: PyTorch's biases, say, have variance O(1/width)."""
    wide, narrow = (predicted(propagated(build, probe, seed, width)) for width in (probe.width, probe.width // 2))
    found = {name: 2 * wide[name] - narrow[name] for name in wide}
    return found | {"drawn": math.hypot(2 * wide["drawn"], narrow["drawn"])}


def disagreements(build: Build, probe: Probe, *, skip: tuple[str, ...] = ()) -> list[tuple[str, float, float, float]]:
    """Numbers that differ by more than four standard errors + O(1/W^2): (name, predicted, measured, allowed)."""
    ours = _extrapolated(build, probe, 7000)
    sigmas = float(stats.t.isf(stats.norm.sf(SIGMAS), probe.draws - 1))  # of as many draws
    found = []
    for name, moment in measure(build, probe).items():
        if name in skip or math.isnan(moment.value):
            continue
        scale = abs(ours[name]) / ours["q"] if name == "slope" else 1.0
        allowed = sigmas * moment.error + SECOND_ORDER / probe.width**2 * abs(ours["q"])
        allowed += SIGMAS * max(scale, 1.0) * ours["drawn"]
        if not abs(moment.value - ours[name]) <= allowed:
            found.append((name, ours[name], moment.value, allowed))
    return found


def ntk_ratio(build: Build, probe: Probe) -> Moment:
    """Sum over parameters of squared gradients of one output entry, over the predicted NTK (standard form)."""
    generator, ratios = torch.Generator().manual_seed(5), []
    expected = float(list(propagated(build, probe).kernels().values())[-1].merged.ntk[Pairs.SELF, SAME])
    for seed in range(4 * probe.draws):
        model = network(build, probe.width, seed, probe.mode)
        out = model(probes(probe, probe.width, generator)[:1])
        entry = out.reshape(-1)[int(torch.randint(out.numel(), (), generator=generator))]
        gradients = torch.autograd.grad(entry, list(model.parameters()), materialize_grads=True)
        ratios.append(sum(float(g.square().sum()) for g in gradients) / expected)
    found = torch.tensor(ratios)
    return Moment(float(found.mean()), float(found.std()) / len(found) ** 0.5)


IMAGE_TRAIN, SEQUENCE_TRAIN, VECTOR_TRAIN = (replace(p, mode="train") for p in (IMAGE, SEQUENCE, VECTOR))
