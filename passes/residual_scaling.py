"""Residual branches times alpha_L = L^-beta, and weights that are correlated across depth.

A block h + V g(h) becomes `WeightedSum` of weights (1, alpha_L): a constant multiply that is not trained, and that
`fold_residual_weights` moves into V. L counts the residual sums of the block's own chain.

Source: Marion, Fermanian, Biau, Vert 2022, arXiv 2206.06929.
"""

from __future__ import annotations

import math
from collections.abc import Set as AbstractSet
from dataclasses import dataclass

import torch
from torch import fx

from kgraph.canonical import operation_name
from kgraph.depth_correlated import DepthWeights, displacement_exponent, draw_paths
from kgraph.gradient_stops import operands, stop, stopped_between, without_stops
from kgraph.modules import WeightedSum
from kgraph.passes.base import Pass, Workspace, owner_path
from kgraph.residual.branches import LINEAR, Branch
from kgraph.residual.chains import Block, FoundChains, ResidualChain, find_chains
from kgraph.residual.roles import (
    bias_of,
    copied_layers,
    fan_in,
    layers_by_role,
    obstacle,
    parameter_uses,
    shared_layers,
    weight_of,
)
from kgraph.rules.weights import mean_square

BETA, ALPHA = "residual_beta", "residual_alpha"
"""Node metadata: what a sum was scaled with."""
_NOTHING = 1e-6
"""Share of q below which a branch is not there."""


def chains_of(work: Workspace) -> FoundChains:
    """The residual chains of the graph under rewriting."""
    return find_chains(work.graph.module, work.is_random)


def choose_beta(
    chain: ResidualChain, weights: DepthWeights, hurst: float | None, shared: AbstractSet[fx.Node] = frozenset()
) -> float:
    """The largest displacement exponent of the chain's branches: nothing explodes, the largest part stays.

    Args:
        shared: affine nodes with one parameter for all blocks. What they add points the same way in every block,
            and adds up as a smooth path does, unless their input is centred and independent from block to block.
    """
    branches = [branch for block in chain.blocks for branch in block.branches]
    smooth = {branch for branch in branches if branch.affine[-1] in shared and _alike(branch, shared)}
    return max(1.0 if one in smooth else displacement_exponent(weights, hurst, one.law) for one in branches)


def _alike(branch: Branch, shared: AbstractSet[fx.Node]) -> bool:
    return branch.law != "centred" or all(node in shared for node in branch.affine)


@dataclass(frozen=True)
class ScaleBranches(Pass):
    """Multiply every residual branch by L^-beta.

    Args:
        beta: the exponent; None: by block type and generator.
        weights, hurst: the generator that ``beta=None`` is about.
    """

    beta: float | None = None
    weights: DepthWeights = "iid"
    hurst: float | None = None

    def rewrite(self, work: Workspace) -> None:
        found = chains_of(work)
        for node, reason in found.left_out:
            work.keep(node, "sum", f"not understood as a residual block: {reason}")
        if not found.chains:
            work.unmet.append("the model has no chain of residual blocks h + branch(h): nothing was scaled")
        elif all(chain.length == 1 for chain in found.chains):
            work.unmet.append("every chain of residual blocks has one block, and 1^-beta = 1: nothing was scaled")
        new: dict[fx.Node, fx.Node] = {}
        for chain in found.chains:
            self._scale(work, chain, new)

    def _scale(self, work: Workspace, chain: ResidualChain, new: dict[fx.Node, fx.Node]) -> None:
        shared = shared_layers(work.graph.module, chain)
        beta = choose_beta(chain, self.weights, self.hurst, shared) if self.beta is None else self.beta
        if chain.length == 1:
            work.keep(chain.blocks[0].sum, "residual branch", "its chain has one block: 1^-beta = 1")
            return
        alpha = chain.length**-beta
        generator = "shared" if shared else self.weights
        chosen = "given" if self.beta is not None else f"of {', '.join(chain.kinds)} blocks with {generator} weights"
        copied = self.weights == "iid" and copied_layers(work.graph.module, chain)
        for block in chain.blocks:
            new[block.sum] = _replace(work, block, new, alpha, beta, f"beta = {beta:g}, {chosen}, L = {chain.length}")
        work.notes.append(_summary(chain, alpha, beta) + _same(shared, copied) + _silent(work, chain))

    def broken(self, work: Workspace) -> str:
        """Every scaled sum still closes a block of its chain, and alpha is that of the chain's length."""
        scaled = {node for node in work.nodes if BETA in node.meta}
        kept = {
            block.sum
            for chain in chains_of(work).chains
            for block in chain.blocks
            if block.sum in scaled and chain.length ** -block.sum.meta[BETA] == block.sum.meta[ALPHA]
        }
        return f"{', '.join(n.name for n in scaled - kept)} no longer close a block of their chain" * (kept != scaled)


def _summary(chain: ResidualChain, alpha: float, beta: float) -> str:
    constants = {branch.constant for block in chain.blocks for branch in block.branches} - {1.0, -1.0}
    already = f"; constants that stood there already were kept ({_listed(constants)})" if constants else ""
    on_path = f"; {', '.join(chain.between)} stands on the identity path" if chain.between else ""
    drift = any(branch.law == "drift" for block in chain.blocks for branch in block.branches)
    drifts = "; a nonlinearity follows the last affine layer, and its means add up over depth" if drift else ""
    kinds = ", ".join(chain.kinds)
    head = f"chain {chain.name}: L = {chain.length}, {kinds}, alpha = {alpha:.6g} = {chain.length}^-{beta:g}"
    return head + already + on_path + drifts


def _same(shared: AbstractSet[fx.Node], copied: AbstractSet[fx.Node] | bool) -> str:
    """A word on blocks that are not independent of one another."""
    said = "; its blocks share weights, whose branches add up over depth" if shared else ""
    return said + "; its blocks are copies of one draw: draw them anew, or pass beta=1" * bool(copied)


def _silent(work: Workspace, chain: ResidualChain) -> str:
    """A word on branches that are next to nothing as they are initialized (zero-initialized gains, LayerScale)."""
    kernels = work.before().kernels()
    pairs = [(branch.end, block.source) for block in chain.blocks for branch in block.branches]
    shares = [
        float(kernels[b].merged.q) / float(kernels[h].merged.q) for b, h in pairs if b in kernels and h in kernels
    ]
    if not shares or max(shares) > _NOTHING:
        return ""
    return f"; its branches are next to nothing as initialized (q of branch / q <= {max(shares):.1g})"


def _listed(constants: set[float]) -> str:
    return ", ".join(f"{c:.4g}" for c in sorted(constants)[:3])


def _replace(
    work: Workspace, block: Block, new: dict[fx.Node, fx.Node], alpha: float, beta: float, why: str
) -> fx.Node:
    """One `WeightedSum` for the block's whole sum; weights that the sum had already are multiplied in.

    ``new``: the sums replaced so far, which later blocks, of this chain or another, were found to read.
    """
    own = [(block.shortcut, block.shortcut_term), *((b.end, alpha * b.term) for b in block.branches)]
    terms = [(new.get(node, node), weight) for node, weight in own]
    before = " + ".join(node.name for node, _ in terms)
    after = " + ".join(node.name if w == 1 else f"{w:.6g} {node.name}" for node, w in terms)
    graph, node = work.graph.module.graph, block.sum
    path = work.add_module(f"{owner_path(work, node)}weighted_sum", WeightedSum([w for _, w in terms]))
    with graph.inserting_before(node):
        call = graph.call_module(path, tuple(term for term, _ in terms))
    call.meta = {key: value for key, value in without_stops(node.meta).items() if key != "group_size"}
    call.meta |= {BETA: beta, ALPHA: alpha}
    sums = _sums(node, {term for term, _ in terms})
    for term, _ in terms:
        if (line := stopped_between(term, node, sums)) is not None:
            stop(call, term, line)
    work.record(node, "scale residual branch", why, before, after)
    node.replace_all_uses_with(call)
    return call


def _sums(node: fx.Node, terms: set[fx.Node]) -> set[fx.Node]:
    """The sums that lie between a sum and its terms."""
    found, queue = set[fx.Node](), [node]
    for last in queue:
        new = {before for before in operands(last) if before not in terms} - found
        found |= new
        queue += new
    return found


@dataclass(frozen=True)
class DrawDepthCorrelated(Pass):
    """Draw the affine layers of residual branches with entries that are correlated across the blocks of a chain.

        W_l[i, j] = path_ij(l) / sqrt(fan_in), biases 0

    Layers that stand at the same place of equal blocks (V, the inner W, ...) share a depth axis; different places
    and entries are independent.
    """

    weights: DepthWeights = "rbf"
    hurst: float | None = None

    def rewrite(self, work: Workspace) -> None:
        generator = work.generator
        uses = parameter_uses(work.graph.module)
        for chain in chains_of(work).chains:
            for role, layers in layers_by_role(work.graph.module, chain).items():
                reason = obstacle(work.graph.module, layers, uses)
                if reason:
                    for node in layers:
                        work.keep(node, "weight", f"not drawn along depth: {reason}")
                    continue
                self._draw(work, role, layers, generator)

    def _draw(self, work: Workspace, role: str, layers: list[fx.Node], generator: torch.Generator) -> None:
        weights = [work.tensor(weight_of(node)) for node in layers]
        paths = draw_paths(self.weights, len(layers), weights[0].numel(), generator, self.hurst)
        name = self.weights if self.hurst is None else f"{self.weights}, H = {self.hurst:g}"
        for node, weight, row in zip(layers, weights, paths, strict=True):
            before = f"std {mean_square(weight) ** 0.5:.3g}"
            drawn = row.reshape(weight.shape) / math.sqrt(fan_in(node, weight))
            with torch.no_grad():
                weight.copy_(drawn.to(weight))
            bias = bias_of(node)
            if bias is not None and bias.op == "get_attr":
                with torch.no_grad():
                    work.tensor(bias).zero_()
            after = f"std {mean_square(weight) ** 0.5:.3g}, bias 0"
            work.record(node, "draw along depth", f"{name}: {role}", before, after)

    def broken(self, work: Workspace) -> str:
        uses = parameter_uses(work.graph.module)
        bad = []
        for chain in chains_of(work).chains:
            for role, layers in layers_by_role(work.graph.module, chain).items():
                if obstacle(work.graph.module, layers, uses):
                    continue
                weights = [work.tensor(weight_of(node)) for node in layers]
                variance = [fan_in(n, w) * mean_square(w) for n, w in zip(layers, weights, strict=True)]
                mean = sum(variance) / len(variance)
                if not weights[0].is_meta and abs(mean - 1) > 1e-3 + 8 * math.sqrt(2 / weights[0].numel()):
                    bad.append(f"{role} has fan_in E[W^2] = {mean:.3g}")
        return "; ".join(bad)


@dataclass(frozen=True)
class FoldResidualWeights(Pass):
    """Move the weights of residual sums into the branches' last affine layers: for inference, never before training.

    (1, alpha) becomes (1, 1), V becomes alpha V and its bias alpha b. Effective learning rates change with it.
    """

    def rewrite(self, work: Workspace) -> None:
        uses = parameter_uses(work.graph.module)
        for block in (block for chain in chains_of(work).chains for block in chain.blocks):
            module = work.module(block.sum)
            if not isinstance(module, WeightedSum):
                continue
            folded = {branch.end: branch.term for branch in block.branches if _foldable(work, branch, uses)}
            for branch in block.branches:
                if branch.end in folded:
                    self._fold(work, branch)
                else:
                    work.keep(branch.end, "residual weight", "a normalization or nonlinearity follows the last layer")
            terms = zip(block.sum.args, module.weights, strict=True)
            work.replace_module(str(block.sum.target), WeightedSum([1.0 if t in folded else w for t, w in terms]))

    def _fold(self, work: Workspace, branch: Branch) -> None:
        for parameter in _parameters(branch.affine[-1]):
            with torch.no_grad():
                work.tensor(parameter).mul_(branch.term)
        work.record(branch.affine[-1], "fold residual weight", "inference", f"{branch.term:.6g} in the sum", "1")


def _parameters(node: fx.Node) -> list[fx.Node]:
    bias = bias_of(node)
    return [weight_of(node)] + ([bias] if bias is not None else [])


def _foldable(work: Workspace, branch: Branch, uses: dict[str, int]) -> bool:
    """Linear from V to the sum, and V's parameters are its own."""
    node = branch.end
    while node is not branch.affine[-1]:
        inputs = [n for n in node.args if isinstance(n, fx.Node) and work.is_random(n)]
        if len(inputs) != 1 or operation_name(node) not in LINEAR:
            return False
        node = inputs[0]
    return all(p.op == "get_attr" and uses[str(p.target)] == 1 for p in _parameters(node))
