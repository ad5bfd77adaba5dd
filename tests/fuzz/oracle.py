"""The oracle: the program itself in plain torch, drawn anew many times, on pairs of inputs of set cosines.

Nothing here knows a kernel rule. A network is what the program's constructor makes; moments are means over inputs,
channels and positions, and their errors come from independent networks.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from .program import Program, Shape, Statement

COSINES = (0.0, 0.5, 0.9)
ANGLE = 2e-3
"""Between an input and its neighbour, of which the slope is a difference quotient."""
FARTHER = 10.0
"""Times that angle, a second neighbour: with functions that jump, its quotient is smaller."""
JUMP = 1.15
"""Quotient of the two quotients from which on the slope is infinite."""
ROUNDING = 1e-3
"""Slopes below are those of float32's last digits, which jump: (1e-6 / ANGLE)^2 and less."""
QUANTITIES = ("q", "c 0", "c 0.5", "c 0.9", "c positions", "slope", "farther slope")


@dataclass(frozen=True)
class Estimate:
    """A mean over networks and its standard error; nan where the program does not determine it."""

    value: float
    error: float


Measured = dict[str, dict[str, Estimate]]
"""By value, by quantity."""


def measure(program: Program, width: int, networks: int, seed: int, dtype: torch.dtype = torch.float32) -> Measured:
    """q, c values, slope and c between positions of every value, NTK of the result.

    The number of inputs is proportional to the width, so that batch statistics converge with it.
    """
    generator = torch.Generator().manual_seed(seed)
    build = program.compiled(every=True)
    found: dict[str, list[Tensor]] = {}
    ntk: list[float] = []
    with torch.random.fork_rng(devices=[]):
        for _ in range(networks):
            torch.manual_seed(int(torch.randint(2**31, (), generator=generator)))
            network = build(width).to(dtype).train(program.mode == "train")
            x = probes(program, width, max(width // 4, 8)).to(torch.int64 if program.tokens else dtype)
            values = network(x)
            for statement in program.statements:
                found.setdefault(statement.name, []).append(_moments(values[statement.name].detach(), statement))
            ntk.append(_ntk(network, values[program.result.name], program.result.shape))
    measured = {name: _estimates(torch.stack(rows)) for name, rows in found.items()}
    measured[program.result.name]["ntk"] = _mean(torch.tensor(ntk, dtype=torch.float64))
    return _known(program, measured)


def _known(program: Program, measured: Measured) -> Measured:
    """Without what the inputs do not determine: token ids are equal or not, a fresh mask hides a small distance."""
    hidden = {"c 0.5", "c 0.9", "slope"} if program.tokens else {"slope"} if program.noisy else set()
    return {name: {k: e for k, e in row.items() if k not in hidden} for name, row in measured.items()}


def probes(program: Program, width: int, count: int) -> Tensor:
    """``count`` inputs of q = 1, then for every cosine as many that have it with them, then two neighbours each."""
    if program.tokens:
        return _token_probes(program.given, width, count)
    sizes, dim = program.given.sizes(width), program.given.channel_dim

    def unit(x: Tensor) -> Tensor:
        return x / x.square().mean(dim, keepdim=True).sqrt()

    first = unit(torch.randn(count, *sizes, dtype=torch.float64))
    rows = [first]
    for cosine in (*COSINES, math.cos(ANGLE), math.cos(FARTHER * ANGLE)):
        other = torch.randn(count, *sizes, dtype=torch.float64)
        other = unit(other - (other * first).mean(dim, keepdim=True) * first)
        rows.append(cosine * first + math.sqrt(1 - cosine**2) * other)
    return torch.cat(rows)


def _token_probes(given: Shape, width: int, count: int) -> Tensor:
    """Ids that differ within an input and from every input that it is compared with."""
    half = 4 * width
    even = torch.stack([torch.randperm(half)[: given.places[0]] for _ in range(count)])
    odd = torch.stack([torch.randperm(half)[: given.places[0]] for _ in range(count * (2 + len(COSINES)))])
    return torch.cat([2 * even, 2 * odd + 1])


def _moments(value: Tensor, statement: Statement) -> Tensor:
    """q, the covariances of the cosines, covariance of two positions, half the squared distances of neighbours."""
    flat = value.double().movedim(statement.shape.channel_dim, -1)
    flat = flat.reshape(3 + len(COSINES), -1, math.prod(statement.shape.places), flat.shape[-1])
    first, near, far = flat[0], flat[-2], flat[-1]
    q = flat[:-2].square().mean()
    covariances = [(first * other).mean() for other in flat[1:-2]]
    places = flat.shape[2]
    both = (flat[:-2].sum(2).square().mean() - places * q) / (places * (places - 1)) if places > 1 else q
    distances = [(first - other).square().mean() / 2 for other in (near, far)]
    return torch.stack([q, *covariances, both, *distances])


def _ntk(network: nn.Module, result: Tensor, shape: Shape) -> float:
    """Mean over channels of the squared gradient at one input and position: random signs for the channels."""
    parameters = [p for p in network.parameters() if p.requires_grad]
    if not parameters or not result.requires_grad:
        return 0.0
    last = result.movedim(shape.channel_dim, -1)
    places = last[0].reshape(-1, last.shape[-1])
    one = places[int(torch.randint(len(places), ()))]
    signs = torch.randint(0, 2, one.shape).to(one) * 2 - 1
    gradients = torch.autograd.grad((signs * one).sum(), parameters, allow_unused=True)
    return sum(float(g.double().square().sum()) for g in gradients if g is not None) / len(one)


def measure_kernels(program: Program, inputs: Tensor, width: int, networks: int, seed: int) -> Measured:
    """NNGP and NTK of the result, [batch, channels], between the inputs."""
    generator = torch.Generator().manual_seed(seed)
    build = program.compiled()
    found: dict[str, list[Tensor]] = {"nngp": [], "ntk": []}
    with torch.random.fork_rng(devices=[]):
        for _ in range(networks):
            torch.manual_seed(int(torch.randint(2**31, (), generator=generator)))
            network = build(width).double().train(program.mode == "train")
            result = network(inputs)
            found["nngp"].append((result @ result.T).detach() / result.shape[1])
            found["ntk"].append(_ntk_between(network, result))
    row = {}
    for name, matrices in found.items():
        stacked = torch.stack(matrices)
        for i in range(len(inputs)):
            row |= {f"{name} {i} {j}": _mean(stacked[:, i, j]) for j in range(i, len(inputs))}
    return {program.result.name: row}


def _ntk_between(network: nn.Module, result: Tensor) -> Tensor:
    """Products of the inputs' gradients, of one random sign a channel."""
    parameters = [p for p in network.parameters() if p.requires_grad]
    signs = torch.randint(0, 2, result.shape[1:]).to(result) * 2 - 1
    gradients = []
    for row in result:
        if not parameters or not row.requires_grad:
            return torch.zeros(len(result), len(result), dtype=torch.float64)
        parts = torch.autograd.grad((signs * row).sum(), parameters, retain_graph=True, materialize_grads=True)
        gradients.append(torch.cat([part.flatten() for part in parts]))
    stacked = torch.stack(gradients)
    return stacked @ stacked.T / result.shape[1]


def _mean(values: Tensor) -> Estimate:
    return Estimate(float(values.mean()), float(values.std()) / math.sqrt(len(values)))


def _estimates(rows: Tensor) -> dict[str, Estimate]:
    """Ratios of means over networks, [networks, moments], with the errors of their linear parts."""
    mean = rows.mean(0)
    q = float(mean[0])
    if not q > 0:
        return {"q": Estimate(q, 0.0)}
    found = {"q": _mean(rows[:, 0])}
    scales = [1.0] * (1 + len(COSINES)) + [1 / (1 - math.cos(angle)) for angle in (ANGLE, FARTHER * ANGLE)]
    for name, moment, scale in zip(QUANTITIES[1:], range(1, rows.shape[1]), scales, strict=True):
        ratio = mean[moment] / q
        parts = (rows[:, moment] - ratio * rows[:, 0]) / q
        found[name] = Estimate(scale * float(ratio), scale * float(parts.std()) / math.sqrt(len(rows)))
    near, far = found["slope"], found.pop("farther slope")
    if near.value > max(ROUNDING, JUMP * far.value + 4 * near.error):
        found["slope"] = Estimate(math.inf, 0.0)
    return found
