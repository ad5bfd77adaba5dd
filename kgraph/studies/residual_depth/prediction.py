"""Prediction of a residual chain: |h_l - h_0| / |h_0| and gradients by layer, each with how it was obtained."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor, fx

from kgraph.depth_correlated import DepthWeights, autocovariance, chain_law
from kgraph.kernel import SAME, Pairs
from kgraph.propagate import Propagation
from kgraph.residual.chains import ResidualChain
from kgraph.residual.roles import fan_in, layers_by_role, stacked, tensor_of, weight_of
from kgraph.rules.weights import mean_square
from kgraph.studies.residual_depth.measure import correlated_roles, nodes_of

_LONGEST = 4000
"""Layers up to which the law of correlated weights, quadratic in them, is computed."""


@dataclass(frozen=True)
class Prediction:
    """Mean squares by layer, [L + 1] each, and the mean and standard deviation of ln(|h_L| / |h_0|).

    Attributes:
        forward: |h_l - h_0|^2 / |h_0|^2.
        backward: |p_l - p_L|^2 / |p_L|^2.
        ratio: |p_l|^2 / |p_L|^2.
        log_mean, log_sd: not a number where not predicted.
        how: how the numbers were obtained, or why there are none.
    """

    forward: Tensor
    backward: Tensor
    ratio: Tensor
    log_mean: float
    log_sd: float
    how: str


def predict_chain(
    module: fx.GraphModule, chain: ResidualChain, result: Propagation, generator: tuple[DepthWeights, float | None]
) -> Prediction:
    """The chain's law: by kernel propagation for independent weights, by the mean-field law for correlated ones.

    Args:
        module: flat graph.
        chain: one of its chains.
        result: kernels of all nodes.
        generator: of depth-correlated weights, where the model's record names it.
    """
    correlated = correlated_roles(module, chain)
    if correlated:
        return _correlated(module, chain, correlated, result, generator)
    if chain.between:
        return _none(chain, f"{', '.join(chain.between)} on the identity path correlates h_l with h_0")
    if any(branch.law == "drift" for block in chain.blocks for branch in block.branches):
        return _none(chain, "a nonlinearity after the last affine layer: the branches have a mean")
    return _independent(chain, result)


def _none(chain: ResidualChain, reason: str) -> Prediction:
    nothing = torch.full((chain.length + 1,), math.nan, dtype=torch.float64)
    return Prediction(nothing, nothing, nothing, math.nan, math.nan, f"not predicted: {reason}")


def _independent(chain: ResidualChain, result: Propagation) -> Prediction:
    """E[h_l . h_0] = w^l q_0, since the branches are uncorrelated with h_0: |h_l - h_0|^2 = q_l + q_0 - 2 w^l q_0."""
    parts = [result.kernels()[node].merged for node in nodes_of(chain) if node in result.kernels()]
    if len(parts) != chain.length + 1:
        return _none(chain, "not every sum of the chain has a kernel")
    q = torch.tensor([float(part.q) for part in parts], dtype=torch.float64)
    slope = torch.stack([part.slope[Pairs.UNIT, SAME] for part in parts]).double()
    weights = torch.tensor([1.0, *(block.shortcut_weight for block in chain.blocks)], dtype=torch.float64).cumprod(0)
    forward = ((q + (1 - 2 * weights) * q[0]) / q[0]).clamp_min(0)
    ratio = slope[-1] / slope
    back_weights = weights[-1] / weights
    levels = {result.kernels()[node].how.name for node in nodes_of(chain)}
    level = next(name for name in ("assumed", "sampled", "quadrature", "exact") if name in levels)
    mean, sd = _log_law(chain, q, result)
    alike = ", all positions taken as alike" if result.kernels()[nodes_of(chain)[0]].positions > 1 else ""
    how = f"kernel propagation, q' = q + alpha^2 q_branch ({level} at infinite width{alike})"
    return Prediction(forward, (ratio + 1 - 2 * back_weights).clamp_min(0), ratio, mean, sd, how)


def _log_law(chain: ResidualChain, q: Tensor, result: Propagation) -> tuple[float, float]:
    """ln(|h_L| / |h_0|) ~ N(sum b/2 - b/d, sum b/d), b = q_l+1 / q_l - 1, to second order in alpha.

    Of h with d independent entries, hence only where it has no positions. beta = 1/2, res-3: N(1/4 - 1/(2d), 1/(2d)).
    """
    kernel = result.kernels()[chain.blocks[0].source]
    if kernel.positions > 1 or any(block.shortcut_weight != 1 for block in chain.blocks):
        return math.nan, math.nan
    d = kernel.merged.size
    grown = q[1:] / q[:-1] - 1
    return float((grown / 2 - grown / d).sum()), math.sqrt(float(grown.sum()) / d)


def _correlated(
    module: fx.GraphModule,
    chain: ResidualChain,
    correlated: dict[str, list[fx.Node]],
    result: Propagation,
    generator: tuple[DepthWeights, float | None],
) -> Prediction:
    roles = layers_by_role(module, chain)
    branches = [branch for block in chain.blocks for branch in block.branches]
    alphas = {abs(branch.constant) for branch in branches}
    plain = len(branches) == chain.length and all(branch.exact for branch in branches) and len(chain.kinds) == 1
    whole = all(len(layers) == chain.length for layers in roles.values())
    if not plain or not whole or chain.between or any(block.shortcut_weight != 1 for block in chain.blocks):
        return _none(chain, "weights correlated across depth, in blocks other than plain res-1, res-2, res-3")
    if max(alphas) > min(alphas) * (1 + 1e-6):
        return _none(chain, "weights correlated across depth, with an alpha that changes along it")
    if chain.length > _LONGEST:
        return _none(chain, f"the law of correlated weights is computed up to {_LONGEST} layers")
    activation = branches[0].activation
    kernel = result.kernels().get(chain.blocks[0].source)
    assert activation is not None
    if kernel is None or kernel.positions > 1:
        return _none(chain, "weights correlated across depth, and h has positions")
    scales = [_fan_variance(module, layers) for layers in roles.values()]
    r = [_autocovariance(module, layers, generator) for layers in roles.values()]
    inner = (r[1], scales[1]) if len(r) > 1 else (None, 1.0)
    law = chain_law(
        activation.fn.dual, r[0], inner[0], chain.length, alphas.pop(), scales[0], inner[1], float(kernel.merged.q)
    )
    named = f"of {generator[0]}" if generator[0] != "iid" else "measured on the weights"
    how = f"mean-field law of correlated layers, autocovariance {named} (infinite width; gradients to first order)"
    return Prediction(law.forward, law.backward, law.backward + 1, math.nan, math.nan, how)


def _fan_variance(module: fx.GraphModule, layers: list[fx.Node]) -> float:
    weights = [tensor_of(module, weight_of(node)) for node in layers]
    return sum(fan_in(n, w) * mean_square(w) for n, w in zip(layers, weights, strict=True)) / len(layers)


def _autocovariance(
    module: fx.GraphModule, layers: list[fx.Node], generator: tuple[DepthWeights, float | None]
) -> Tensor:
    """r(0..L) of the generator; of the weights themselves, averaged over entries and depth, where they differ.

    Weights that were trained, or loaded, since they were drawn no longer have the generator's.
    """
    paths = stacked(module, layers)
    n = len(paths)
    power = torch.fft.rfft(paths, 2 * n, dim=0).abs().square().sum(1)
    sums = torch.fft.irfft(power, 2 * n)[:n] / torch.arange(n, 0, -1)
    measured = torch.cat([sums / sums[0], sums.new_zeros(1)])
    exact = autocovariance(generator[0], n, generator[1])
    error = math.sqrt(2 / paths.shape[1])
    return exact if generator[0] != "iid" and abs(float(exact[1] - measured[1])) < 5 * error else measured
