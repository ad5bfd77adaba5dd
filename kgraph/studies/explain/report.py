"""`kgraph.explain`: one table of what each component of a model does to its kernel."""

from __future__ import annotations

import copy
import math
import warnings
from collections.abc import Iterator
from dataclasses import dataclass, replace
from os import PathLike

from rich.console import RenderableType
from rich.text import Text
from torch import fx, nn

from kgraph.capture import capture, check_model
from kgraph.checks import choice, mode_of, seeded
from kgraph.closed_loop import averaged, correlation, ends, returned
from kgraph.copies import copied
from kgraph.errors import KGraphError
from kgraph.files import write_text
from kgraph.gram.tiles import Bar
from kgraph.input_moments import InputMoments
from kgraph.kernel import SAME, Kernel, Pairs
from kgraph.passes.affine_image import tangent
from kgraph.passes.base import Workspace
from kgraph.propagate import Propagation, probes_of, propagate
from kgraph.report import data
from kgraph.report.numbers import cosine, short
from kgraph.studies.explain.variants import Variant, variants
from kgraph.studies.explain.words import difference, fate
from kgraph.studies.tables import LayerReport, table_of

_WIDE = 130
"""Width of a text from which on the sentences fit beside the numbers."""
INPUTS = 32
"""Unrelated inputs of the NTK matrix whose condition number is given."""


@dataclass(frozen=True)
class Effect:
    """The kernel of a model with one component changed.

    Attributes:
        component: what kind of component; "" of the model as it is.
        change: what is changed.
        q_low, q_high: smallest and largest q value that an activation reads.
        c: C(0) of the features: at the output, or in front of an average over positions (of white inputs that keeps
            only what all inputs share).
        slope: C'(1) there.
        q: q value of the output.
        condition: condition number of the NTK of `INPUTS` unrelated inputs, (T + (n - 1) T_0) / (T - T_0) with T of an
            input with itself and T_0 of two; nan where the NTK is not known.
        how: how surely the features are known.
        refused: why there is no such variant; "" where there is.
    """

    component: str
    change: str
    q_low: float = math.nan
    q_high: float = math.nan
    c: float = math.nan
    slope: float = math.nan
    q: float = math.nan
    condition: float = math.nan
    how: str = ""
    refused: str = ""

    @property
    def words(self) -> str:
        """What becomes of a signal: one half sentence."""
        return self.refused or fate(self.q_low, self.q_high, self.c, self.slope)


@dataclass(frozen=True)
class Explanation(LayerReport):
    """What `explain` finds; print it, or show it in a notebook.

    Attributes:
        model: class name.
        mode: of the analysis.
        effects: the model as it is, then one for every change.
        at: where C(0) and slope are read: the end, or what an average reads.
        end: where q and the NTK are read: the output, or what its own nonlinearity (softmax, a last relu) reads.
        inputs: what the inputs were taken for.
    """

    model: str
    mode: str
    effects: tuple[Effect, ...]
    at: str
    end: str
    inputs: str

    @property
    def summary(self) -> tuple[str, ...]:
        """A sentence for the model as it is, and one for every component that matters."""
        own, *others = self.effects
        lines = [f"{self.model} ({self.mode} mode, {self.inputs}): {own.words}"]
        for effect in others:
            if not effect.refused and (line := difference(own, effect)):
                lines.append(line)
        return tuple(lines)

    def to_dict(self) -> dict[str, object]:
        """Everything as plain data, ready for JSON."""
        return {
            "model": self.model,
            "mode": self.mode,
            "at": self.at,
            "end": self.end,
            "inputs": self.inputs,
            "summary": list(self.summary),
            "effects": [{**data.encode(effect), "words": effect.words} for effect in self.effects],
        }

    def to_json(self, path: str | PathLike[str] | None = None) -> str:
        """JSON text, also written to ``path``."""
        return write_text(data.to_json(self.to_dict()), path)

    def _parts(self, width: int, all_nodes: bool) -> list[RenderableType]:
        heads = ("change", "q read", "C(0)", "slope", "q out", "NTK cond", "how", "what becomes of a signal")
        shown = len(heads) if width >= _WIDE else len(heads) - 1
        table = table_of(heads[:shown], 1, (_cells(effect)[:shown] for effect in self.effects))
        if shown == len(heads):
            table.columns[-1].no_wrap, table.columns[-1].justify = False, "left"
        apart = f"C(0), slope: at {self.at}; q out, NTK cond: at {self.end}"
        where = f"the others: at {self.end}" if self.at == self.end else apart
        legend = (
            f"q read: q values that activations read; {where}; NTK cond: of {INPUTS} unrelated inputs; "
            "initializers: of all layers' weights, biases 0"
        )
        refused = [f"{effect.change}: {effect.refused}" for effect in self.effects if effect.refused]
        notes = [Text(line, style="dim") for line in (legend, *refused)]
        return [*(Text(line, style="bold") for line in self.summary), Text(""), table, *notes]


def explain(
    model: nn.Module,
    example_inputs: object = None,
    *,
    mode: str | None = None,
    inputs: str | InputMoments = "white",
    seed: int = 0,
) -> Explanation:
    """What each component of a model does to its kernel: the model as it is beside its variants.

    Norms and skips are left out, activations and pooling exchanged, weights drawn by other initializers, one thing at
    a time; and what `kgraph.transform` would make of it.

    Args:
        model: any bare module; left as it was.
        example_inputs: tensor, tuple or dict; inferred when None.
        mode: "train" or "eval"; the model's own when None.
        inputs: "white", "data" or `InputMoments`, as for `kgraph.analyze`.
        seed: of the initializers.

    Returns:
        A table whose numbers are those of the infinitely wide network: q, C(0) and C'(1) (pure numbers).

    Raises:
        ModelError, InputError, CaptureError: see `kgraph.errors`. A variant that cannot be made is a row that says why.

    Example:
        >>> import torch
        >>> from torch import nn
        >>> layers = [layer for _ in range(20) for layer in (nn.Linear(64, 64), nn.ReLU())]
        >>> print(kgraph.explain(nn.Sequential(*layers), torch.randn(2, 64)).effects[0].words)
        q vanishes (by 6e+15); unrelated inputs look alike; small differences fade
    """
    check_model(model)
    if not isinstance(inputs, InputMoments):
        choice("inputs", inputs, ("white", "data"))
    mode, seed = mode_of(model, mode), seeded(seed)
    graph = capture(copied(model), example_inputs)
    pairs = probes_of(graph, inputs)
    first = propagate(graph, mode=mode, pairs=pairs)
    work = Workspace(graph, mode, seed, first)
    effects = [_effect("", "as it is", work, first)]
    with Bar(list(variants(work)), "variants") as bar:
        effects += [effect for variant in bar for effect in _effects(variant, work, pairs)]
    said = {"white": "white inputs", "data": "inputs as they are"}.get(str(inputs), f"inputs with {inputs}")
    return Explanation(graph.name, mode, tuple(effects), _where(work), _end(work), said)


def _effects(variant: Variant, work: Workspace, pairs: Pairs) -> Iterator[Effect]:
    """The variant's kernel; nothing where the model has no such component."""
    own = _copy_of(work)
    try:
        if variant.apply(own):
            found = propagate(own.graph, mode=work.mode, pairs=pairs)
            yield _effect(variant.component, variant.name, own, found)
    except KGraphError as error:
        yield Effect(variant.component, variant.name, refused=str(error).partition("\n")[0])


def _copy_of(work: Workspace) -> Workspace:
    """The model as it is, on a graph and parameters of its own, with the analysis that there is already."""
    with warnings.catch_warnings():  # PyTorch warns about its own pytree leaves
        warnings.filterwarnings("ignore", ".*LeafSpec.*", FutureWarning)
        module, root = copy.deepcopy((work.graph.module, work.graph.root))  # together: they share parameters
    graph = replace(work.graph, module=module, root=root, notes=list(work.graph.notes))
    twins = dict(zip(work.nodes, module.graph.nodes, strict=True))
    first = work.before()
    values = {twins[node]: value for node, value in first.values.items()}
    return Workspace(graph, work.mode, work.seed, replace(first, values=values))


def _effect(component: str, change: str, work: Workspace, found: Propagation) -> Effect:
    kernels = found.kernels()
    read = [float(kernels[r.source].merged.q) for r in work.regions() if r.source in kernels]
    features, out = _features(work, kernels)
    part = out.merged
    own, two = (float(part.ntk[row, SAME]) for row in (Pairs.SELF, 0))
    condition = (own + (INPUTS - 1) * two) / (own - two) if own > two else math.inf if own == two else math.nan
    return Effect(
        component,
        change,
        min(read, default=math.nan),
        max(read, default=math.nan),
        correlation(features),
        tangent(features),
        float(part.q),
        condition,
        features.how.name,
    )


def _features(work: Workspace, kernels: dict[fx.Node, Kernel]) -> tuple[Kernel, Kernel]:
    """Of what the last average over positions reads, or of the output; and of the output."""
    out = [kernels[node] for node in ends(work) if node in kernels]
    final = out[0] if out else list(kernels.values())[-1]
    before = [kernels[node] for node in averaged(work) if node in kernels]
    return (before[-1] if before and final.positions == 1 else final), final


def _where(work: Workspace) -> str:
    kernels = work.kernels()
    features, final = _features(work, kernels)
    names = {id(kernel): node.name for node, kernel in kernels.items()}
    if features is final:
        return _end(work)
    return f"{names[id(features)]}, in front of the average over positions"


def _end(work: Workspace) -> str:
    kernels = work.kernels()
    node = next((node for node in ends(work) if node in kernels), None)
    if node is None or any(node is output for _, output in returned(work)):
        return "the output"
    return f"{node.name}, in front of the output's own nonlinearity"


def _cells(effect: Effect) -> tuple[str, ...]:
    if effect.refused:
        return (effect.change, "none", *[""] * 5, effect.refused)
    low, high = short(effect.q_low), short(effect.q_high)
    return (
        effect.change,
        low if low == high else f"{low} .. {high}",
        cosine(effect.c),
        short(effect.slope),
        short(effect.q),
        "" if math.isnan(effect.condition) else short(effect.condition),
        effect.how,
        effect.words,
    )
