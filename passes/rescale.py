"""Restore q = 1, and a mean or slope, after operations that change them by themselves.

Pooling, embeddings, position tables, constant factors (SkipInit, NF-ResNet's alpha and beta) and gates get a
constant factor behind them. A shaped activation whose input is not Gaussian (the sums of a post-activation ResNet)
has other maps than those at N(0, 1) it was shaped for: its output scale and shift are corrected, so that what
was solved for (a mean of 0, a slope of 1) holds for the input that it gets. Behind max pooling a shift does the
same. Attention is left alone: how much it averages depends on how alike the positions of real data are, so a
constant chosen for unrelated positions would do harm. The ledger says so.
"""

from __future__ import annotations

import math
from collections.abc import Collection
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, fx, nn

from kgraph.canonical import operation_name
from kgraph.checks import choice, flag, positive
from kgraph.how import LEVELS
from kgraph.kernel import SAME, Kernel, Pairs, Part
from kgraph.modules import NORM_FACTOR, Scale, ShapedActivation, WeightedSum
from kgraph.multiples import Multiples
from kgraph.nonlinear import Region
from kgraph.passes.affine import affine_source
from kgraph.passes.affine_image import AffineImage, Keep, incoherent, restoring
from kgraph.passes.base import Pass, Workspace
from kgraph.passes.exponentials import is_rate
from kgraph.passes.input_causes import cause
from kgraph.propagate import Propagation, propagate, reread

_ROUNDING = 1e-9
"""What two ways to the same kernel may differ by, q being 1."""
_MAX_POOLS = ("max_pool1d", "max_pool2d", "max_pool3d")
_AVERAGING = ("average pooling", "averaging positions")
_CHANGERS = {
    **dict.fromkeys(_MAX_POOLS, "max pooling"),
    **{f"avg_pool{d}d": _AVERAGING[0] for d in (1, 2, 3)},
    **{f"adaptive_avg_pool{d}d": _AVERAGING[0] for d in (1, 2, 3)},
    "mean": _AVERAGING[1],
    "embedding": "embedding",
    "upsample_bilinear2d": "interpolation",
    "prelu": "an activation that is not shaped",
    "rrelu": "an activation that is not shaped",
}


_SAMPLED = LEVELS.index("sampled")


@dataclass(frozen=True)
class Walk:
    """A walk that corrected on its way.

    Attributes:
        propagation: kernels with the corrections.
        reasons: nodes that might be corrected, and why.
        images: the corrections.
        plain: the corrected nodes' kernels without.
        unknown: nodes without a finite q.
    """

    propagation: Propagation
    reasons: dict[fx.Node, str]
    images: dict[fx.Node, AffineImage]
    plain: dict[fx.Node, Kernel]
    unknown: tuple[fx.Node, ...]


@dataclass(frozen=True)
class Rescale(Pass):
    """Insert the constants that keep q = 1 at every activation and at the last layers, in one walk through the graph.

    Args:
        tolerance: deviation of q from 1, of a mean from 0, that is left alone.
        only_gates: leave everything but gated products alone.
        keep: what shaped activations and max pooling keep besides q = 1: nothing ("q"), a mean of 0 ("mean", DKS), or
            the slope that they are given ("slope", TAT).
    """

    tolerance: float = 1e-7
    only_gates: bool = False
    keep: Keep = "q"

    def __post_init__(self) -> None:
        positive("tolerance", self.tolerance)
        flag("only_gates", self.only_gates)
        choice("keep", self.keep, ("q", "mean", "slope"))

    def rewrite(self, work: Workspace) -> None:
        walk = self.walk(work)
        work.unmet += [f"{node.name}: its q value is not known, and not restored to 1" for node in walk.unknown]
        given = {name for node in walk.images for name in _given(work, node, walk.images.keys())}
        if given:
            work.notes.append(_follows(work, walk.images, given))
        kernels = walk.propagation.kernels() if walk.images else {}
        for node, image in walk.images.items():
            plain = walk.plain[node].merged
            reason = _input_reason(work, kernels, node, float(plain.q)) or walk.reasons[node]
            self._correct(work, node, image, plain, reason)
        corrected = _corrected(work, walk.propagation, walk.plain)
        if corrected is not None:
            work.touch()
            work.adopt(corrected)

    def walk(self, work: Workspace) -> Walk:
        """The constants, and the kernels of the graph with them, which is left as it is."""
        reasons = self._candidates(work)
        images: dict[fx.Node, AffineImage] = {}
        plain: dict[fx.Node, Kernel] = {}
        unknown: list[fx.Node] = []

        def adjust(node: fx.Node, kernel: Kernel, values: dict[fx.Node, Any]) -> Kernel:
            if node not in reasons:
                return kernel
            if not math.isfinite(float(kernel.merged.q)):
                unknown.append(node)
            image = self._image(work, node, kernel, values)
            if image is None or image.idle(self.tolerance):
                return kernel
            images[node], plain[node] = image, kernel
            return image.of(kernel)

        propagation = propagate(work.graph, mode=work.mode, adjust=adjust)
        return Walk(propagation, reasons, images, plain, tuple(unknown))

    def _image(self, work: Workspace, node: fx.Node, kernel: Kernel, values: dict[fx.Node, Any]) -> AffineImage | None:
        if isinstance(work.module(node), WeightedSum):  # where the means of terms, and no draws, tell
            return incoherent(kernel) if kernel.how.level < _SAMPLED else None
        keep = self.keep if isinstance(work.module(node), ShapedActivation) or is_max_pool(node) else "q"
        read = values.get(node.all_input_nodes[0]) if node.all_input_nodes else None
        return restoring(kernel, read if isinstance(read, Kernel) else None, keep)

    def broken(self, work: Workspace) -> str:
        """Sampled values are left out: their noise is no fault of the pass."""
        kernels, bad = work.kernels(), []
        for node in self._candidates(work):
            ends = [user for user in node.users if _restores(work, user)] or [node]
            off = [n for n in ends if kernels[n].how.level < 2 and abs(float(kernels[n].merged.q) - 1) > 1e-6]
            bad += [node.name for n in off if float(kernels[n].merged.q) > 0]
        return f"q is not 1 behind {', '.join(sorted(bad))}" if bad else ""

    def _correct(self, work: Workspace, node: fx.Node, image: AffineImage, plain: Part, reason: str) -> None:
        module = work.module(node)
        moved, q = abs(image.shift) > self.tolerance, float(plain.q)
        why = f"q = {q:.4g}" + (f" and mean {plain.mean:.3g}" if moved else "") + f" after {reason}"
        if isinstance(module, ShapedActivation):
            constants = {
                **module.constants,
                "output_shift": module.output_shift + image.shift / module.output_scale,
                "output_scale": module.output_scale * image.factor,
            }
            work.replace_module(str(node.target), ShapedActivation(module.activation, **constants))
        else:
            work.scale_after(node, Scale(image.factor, image.shift, why, average=reason in _AVERAGING))
        what = "normalize gate" if reason == "a gate" else f"restore {self.keep}" if moved else "restore q"
        before = f"q {q:.4g}" + (f", mean {plain.mean:.3g}" if moved else "")
        after = "q 1" + (f", mean {(plain.mean + image.shift) * image.factor:.3g}" if moved else "")
        work.record(node, what, why, before, after)

    def _candidates(self, work: Workspace) -> dict[fx.Node, str]:
        """Nodes that may be corrected and lead to an activation or a last layer; an exponent has its own size."""
        regions = work.regions()
        gates = {region.end for region in regions if region.gate}
        inside = {n for r in regions for n in r.nodes if not _ends_here(work, r, n)}
        rates = {region.end for region in regions if is_rate(region)}
        wanted = _upstream([region.source for region in regions if region.end not in rates], rates)
        wanted |= _upstream(_read_by_heads(work, regions), rates)
        multiples, found = Multiples(work.graph.module.graph, work.is_random), {}
        for node in filter(work.is_random, wanted - inside):
            reason = self._reason(work, node, gates, multiples)
            if reason and not multiples.is_part(node):
                found[node] = reason
        return found

    def _reason(self, work: Workspace, node: fx.Node, gates: set[fx.Node], multiples: Multiples) -> str:
        name = operation_name(node)
        if name == "mul" and any(n in gates for n in node.all_input_nodes):
            return "a gate"
        if self.only_gates:
            return ""
        if isinstance(work.module(node), ShapedActivation):
            return "an input that is not Gaussian"
        if name in ("mul", "div") and len(node.all_input_nodes) == 1:
            return "a constant factor"
        if multiples.is_sum(node):
            return "a sum of multiples of one tensor"
        if name == "add" and _adds_table(work, node):
            return "an added table"
        if self.keep == "slope" and isinstance(work.module(node), WeightedSum) and not _shapes(work, node):
            return "a sum of terms that are not orthogonal"
        return _CHANGERS.get(name, "")


def is_max_pool(node: fx.Node) -> bool:
    return operation_name(node) in _MAX_POOLS


def _restores(work: Workspace, node: fx.Node) -> bool:
    """Whether a node is a scale of this pass, and not one that keeps the size which a norm had set."""
    return isinstance(module := work.module(node), Scale) and module.reason != NORM_FACTOR


def _input_reason(work: Workspace, kernels: dict[fx.Node, Kernel], node: fx.Node, q: float) -> str:
    """What a shaped activation reads instead of a Gaussian of mean 0 and q = 1; "" for another node."""
    region = next((region for region in work.regions() if region.end is node), None)
    if region is None or not isinstance(work.module(node), ShapedActivation):
        return ""

    def read(value: Tensor, _: Tensor) -> float:
        return float(value[Pairs.SELF, SAME])

    return f"an input that {cause(work, kernels, region, read, 1.0, q)}"


def _corrected(work: Workspace, walked: Propagation, plain: dict[fx.Node, Kernel]) -> Propagation | None:
    """The kernels of the corrected graph: those of the walk that corrected on its way, for nothing else has changed.

    ``plain`` are the kernels before correction. What was put in is read anew by its rule; None where that differs.
    """
    values: dict[fx.Node, Any] = {}
    put_in: list[fx.Node] = []
    for node in work.nodes:
        source = node.args[0] if isinstance(work.module(node), Scale) else None
        if node not in walked.values and isinstance(source, fx.Node) and source in plain:
            values[node], values[source] = walked.values[source], plain[source]
            put_in.append(node)
        elif node in walked.values:
            values[node] = walked.values[node]
    put_in += [node for node in plain if isinstance(work.module(node), ShapedActivation)]
    found = replace(walked, values=values)
    again = reread(work.graph, found, put_in)
    return found if all(_alike(again[node], values[node]) for node in put_in) else None


def _alike(one: Kernel, other: Kernel) -> bool:
    """Up to rounding. Moments of draws are moved by a mean that is drawn too: those of the shifted draws differ."""
    pairs = [
        (getattr(a, name), getattr(b, name))
        for a, b in zip(one.parts, other.parts, strict=True)
        for name in ("cov", "slope", "ntk")
    ]
    return all(torch.allclose(a, b, rtol=_ROUNDING, atol=_ROUNDING, equal_nan=True) for a, b in pairs)


def _ends_here(work: Workspace, region: Region, node: fx.Node) -> bool:
    """A shaped activation, or one that was not shaped for its slope: what comes out of it may be scaled."""
    return node is region.end and (isinstance(work.module(node), ShapedActivation) or bool(region.learnable))


def _shapes(work: Workspace, node: fx.Node) -> bool:
    """Whether a shaped activation reads the node, and has constants of its own for what it reads."""
    return any(isinstance(work.module(user), ShapedActivation) for user in node.users)


def _adds_table(work: Workspace, node: fx.Node) -> bool:
    """Sums of branches are weighted already; this is x + position embedding."""
    others = [n for n in node.args[:2] if isinstance(n, fx.Node) and not work.is_random(n)]
    return len(others) == 1


def _given(work: Workspace, node: fx.Node, found: Collection[fx.Node]) -> set[str]:
    """Parameters, still at the model's own random values, on which q at a node depends: behind the last correction."""
    names, seen, queue = set[str](), {node}, [node]
    while queue:
        for before in queue.pop().all_input_nodes:
            if before in seen or before in found:
                continue
            seen.add(before)
            queue.append(before)
            if before.op == "get_attr" and str(before.target) not in work.settled and _is_drawn(work.tensor(before)):
                names.add(str(before.target))
    return names


def _is_drawn(tensor: Tensor) -> bool:
    """Whether a parameter holds numbers of a draw: not one number throughout, as gains and biases do."""
    random = isinstance(tensor, nn.Parameter) and not tensor.is_meta and tensor.is_floating_point()
    return random and bool((tensor != tensor.flatten()[:1]).any())


def _follows(work: Workspace, found: Collection[fx.Node], given: set[str]) -> str:
    nodes = [node.name for node in found if _given(work, node, found)]
    return (
        f"the constants at {_some(nodes)} follow the values that {_some(sorted(given))} had at the transform: load a "
        "state dict into a model transformed from the same values (the same seed), or save the whole module"
    )


def _some(names: list[str]) -> str:
    return ", ".join(names[:3]) + (f" and {len(names) - 3} more" if len(names) > 3 else "")


def _read_by_heads(work: Workspace, regions: list[Region]) -> list[fx.Node]:
    """What the last affine layers read: those that lead to no activation."""
    inner = _upstream([region.source for region in regions], ())
    read = [affine_source(work, node) for node in work.nodes if node not in inner]
    return [node for node in read if node is not None]


def _upstream(ends: list[fx.Node], stops: Collection[fx.Node]) -> set[fx.Node]:
    found: set[fx.Node] = set()
    queue = list(ends)
    while queue:
        node = queue.pop()
        if node not in found and node not in stops:
            found.add(node)
            queue += node.all_input_nodes
    return found
