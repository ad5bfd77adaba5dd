"""How far a residual network is from the identity, and how its gradients grow: predicted and measured, by layer."""

from __future__ import annotations

import io
import math
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from os import PathLike
from typing import Any

from rich.box import SIMPLE_HEAD
from rich.console import Console, ConsoleOptions, Group, RenderableType, RenderResult
from rich.table import Table
from rich.text import Text
from torch import Tensor, nn

from kgraph.capture import capture, check_model
from kgraph.checks import count as count_of
from kgraph.checks import mode_of, seeded
from kgraph.copies import copied
from kgraph.depth_correlated import DepthWeights
from kgraph.errors import InputError, ModelError
from kgraph.files import destination, save_figure
from kgraph.propagate import propagate
from kgraph.report.numbers import count, short
from kgraph.report.table import PLAIN_WIDTH, pick, to_text
from kgraph.residual.chains import ResidualChain, find_chains
from kgraph.studies.residual_depth.measure import Samples, measure_chains
from kgraph.studies.residual_depth.prediction import Prediction, predict_chain
from kgraph.systems import ResidualScaling

_SHOWN = 5
_LEGEND = "displacement |h_l - h_0|/|h_0|; gradient |p_l|/|p_L|, its displacement |p_l - p_L|/|p_L|, p = dL/dh"


@dataclass(frozen=True)
class DepthCurve:
    """One quantity at every layer 0..L: root mean squares over draws and inputs.

    Attributes:
        predicted: nan where it is not.
        measured, error: with standard errors over draws; empty without draws.
    """

    predicted: tuple[float, ...]
    measured: tuple[float, ...]
    error: tuple[float, ...]


@dataclass(frozen=True)
class LogRatio:
    """``ln(|h_L| / |h_0|)``: mean and standard deviation over networks and inputs."""

    predicted_mean: float
    predicted_sd: float
    mean: float
    mean_error: float
    sd: float


@dataclass(frozen=True)
class ChainDepth:
    """One chain of residual blocks.

    Attributes:
        name: modules of its first and last sum.
        length: L, residual sums.
        blocks: block types in it.
        alpha: constant of the branches; nan where they differ.
        beta: -ln(alpha) / ln(L).
        how: how the predictions were obtained, or why there are none.
        displacement: ``|h_l - h_0| / |h_0|``.
        gradient: ``|dL/dh_l| / |dL/dh_L|``.
        gradient_displacement: ``|dL/dh_l - dL/dh_L| / |dL/dh_L|``.
        log_ratio: of ``|h_L| / |h_0|``.
    """

    name: str
    length: int
    blocks: tuple[str, ...]
    alpha: float
    beta: float
    how: str
    displacement: DepthCurve
    gradient: DepthCurve
    gradient_displacement: DepthCurve
    log_ratio: LogRatio


@dataclass(frozen=True)
class ResidualDepth:
    """Result of `residual_depth`.

    Attributes:
        chains: in graph order.
        left_out: sums that are no residual block, and why.
        draws, inputs: networks drawn, and inputs of each.
        mode: "train" or "eval".
    """

    chains: tuple[ChainDepth, ...]
    left_out: tuple[tuple[str, str], ...]
    draws: int
    inputs: int
    mode: str

    def __getitem__(self, index: int) -> ChainDepth:
        return self.chains[index]

    def to_dict(self) -> dict[str, Any]:
        """Plain numbers, strings, lists."""
        return asdict(self)

    def text(self, *, width: int = PLAIN_WIDTH) -> str:
        """What `print` shows."""
        return to_text(self._parts(), count_of("width", width))

    def __str__(self) -> str:
        return self.text()

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        yield from self._parts()

    def _repr_html_(self) -> str:
        console = Console(record=True, width=PLAIN_WIDTH, file=io.StringIO())
        console.print(Group(*self._parts()))
        return console.export_html(inline_styles=True, code_format="<pre>{code}</pre>")

    def _parts(self) -> Iterator[RenderableType]:
        by = f"{count(self.draws, 'draw')} of {count(self.inputs, 'input')}" if self.draws else "prediction only"
        yield Text(f"{count(len(self.chains), 'residual chain')}, {self.mode} mode, {by}", style="bold")
        yield Text(_LEGEND, style="dim")
        for chain in self.chains:
            yield from _chain_parts(chain)
        for name, reason in self.left_out:
            yield Text(f"no block: {name}: {reason}", style="dim")

    def plot(self, path: str | PathLike[str]) -> None:
        """``|h_l - h_0| / |h_0|`` and ``|dL/dh_l| / |dL/dh_L|`` against l / L as an image file.

        Raises:
            InputError: matplotlib is not installed.
        """
        destination(path)
        try:
            from matplotlib.figure import Figure
        except ImportError as error:
            raise InputError("plots need matplotlib", hint="Install it with: pip install 'kgraph[plot]'") from error
        figure = Figure(figsize=(11, 4), layout="constrained")
        labels = ("|h_l - h_0| / |h_0|", "|dL/dh_l| / |dL/dh_L|")
        for axes, kind, label in zip(figure.subplots(1, 2), ("displacement", "gradient"), labels, strict=True):
            for i, chain in enumerate(self.chains):
                curve: DepthCurve = getattr(chain, kind)
                x = [layer / chain.length for layer in range(chain.length + 1)]
                axes.plot(x, curve.predicted, color=f"C{i}", label=f"{chain.name}, L = {chain.length}")
                if curve.measured:
                    at = slice(None, None, max(1, chain.length // 20))
                    error = curve.error[at]
                    axes.errorbar(x[at], curve.measured[at], error, fmt=".", color=f"C{i}", capsize=2)
            axes.set(xlabel="layer l / L", ylabel=label)
            axes.grid(alpha=0.3)
        figure.axes[0].legend(fontsize="small")
        save_figure(figure, path)


def residual_depth(
    model: nn.Module,
    example_inputs: object = None,
    *,
    draws: int = 8,
    inputs: int = 8,
    mode: str | None = None,
    seed: int = 0,
) -> ResidualDepth:
    """Find a model's residual chains; predict and measure how far they are from the identity, layer by layer.

        ``|h_l - h_0| / |h_0|``,   ``|dL/dh_l| / |dL/dh_L|``      rms over networks and inputs

    beta = 1/2 in alpha = L^-beta keeps both at order one for independent weights: (1 + alpha^2 / 2)^L - 1 is the
    square of either for relu blocks, and ``ln(|h_L| / |h_0|)`` is normal of mean 1/4 - 1/(2d), variance 1/(2d).

    Args:
        model: any bare module, left as it was; also what `kgraph.transform` returned.
        example_inputs: give the shapes; inferred when None. Floating point inputs are drawn anew, Gaussian.
        draws: networks: signed permutations of the model's own parameters (that keep correlation along depth). 0:
            predictions only; otherwise at least 2.
        inputs: of each network.
        mode: "train" or "eval"; the model's own when None.
        seed: of the draws; the global generator is not touched.

    Raises:
        ModelError: the model has no residual chain; and what `kgraph.analyze` raises.

    Source: Marion, Fermanian, Biau, Vert 2022, arXiv 2206.06929.
    """
    check_model(model)
    if count_of("draws", draws, 0) == 1:
        raise InputError("draws is 1", hint="Pass at least 2, or draws=0")
    count_of("inputs", inputs, 2)
    seed = seeded(seed)
    mode = mode_of(model, mode)
    graph = capture(copied(model), example_inputs)
    result = propagate(graph, mode=mode)
    found = find_chains(graph.module, result.kernels().__contains__)
    left_out = tuple((node.name, reason) for node, reason in found.left_out)
    if not found.chains:
        reasons = "; ".join(f"{name}: {reason}" for name, reason in left_out[:3])
        raise ModelError(
            f"{type(model).__name__} has no chain of residual blocks h + branch(h)" + (f" ({reasons})" * bool(reasons)),
            hint="A block's shortcut must be the identity and its branch must hold an affine layer",
        )
    generator = _generator(model)
    predictions = [predict_chain(graph.module, chain, result, generator) for chain in found.chains]
    samples = measure_chains(graph, found.chains, draws, inputs, mode, seed) if draws else [None] * len(found.chains)
    chains = tuple(map(_chain, found.chains, predictions, samples))
    return ResidualDepth(chains, left_out, draws, inputs, mode)


def _generator(model: nn.Module) -> tuple[DepthWeights, float | None]:
    """The generator of depth-correlated weights that a transform's record names."""
    record = getattr(model, "kgraph", None)
    used = getattr(record, "method", ())
    for method in used if isinstance(used, tuple) else (used,):
        if isinstance(method, ResidualScaling):
            return method.weights, method.hurst
    return "iid", None


def _chain(chain: ResidualChain, predicted: Prediction, samples: Samples | None) -> ChainDepth:
    alphas = [abs(block.alpha) for block in chain.blocks]
    alpha = alphas[0] if max(alphas) <= min(alphas) * (1 + 1e-6) else math.nan
    return ChainDepth(
        name=chain.name,
        length=chain.length,
        blocks=chain.kinds,
        alpha=alpha,
        beta=-math.log(alpha) / math.log(chain.length) if chain.length > 1 and alpha > 0 else math.nan,
        how=predicted.how,
        displacement=_curve(predicted.forward, samples and samples.forward),
        gradient=_curve(predicted.ratio, samples and samples.ratio),
        gradient_displacement=_curve(predicted.backward, samples and samples.backward),
        log_ratio=_log_ratio(predicted, samples),
    )


def _curve(predicted: Tensor, squares: Tensor | None) -> DepthCurve:
    """Roots of mean squares; d sqrt(m) = dm / (2 sqrt(m))."""
    own = tuple(predicted.sqrt().tolist())
    if squares is None:
        return DepthCurve(own, (), ())
    rms = squares.mean(0).sqrt()
    error = squares.std(0) / math.sqrt(len(squares)) / (2 * rms).clamp_min(1e-300)
    return DepthCurve(own, tuple(rms.tolist()), tuple(error.tolist()))


def _log_ratio(predicted: Prediction, samples: Samples | None) -> LogRatio:
    if samples is None:
        return LogRatio(predicted.log_mean, predicted.log_sd, math.nan, math.nan, math.nan)
    by_draw = samples.log_ratio.mean(1)
    error = float(by_draw.std()) / math.sqrt(len(by_draw))
    mean, sd = float(samples.log_ratio.mean()), float(samples.log_ratio.std())
    return LogRatio(predicted.log_mean, predicted.log_sd, mean, error, sd)


def _chain_parts(chain: ChainDepth) -> Iterator[RenderableType]:
    constant = f"{chain.alpha:.6g}"
    if not math.isnan(chain.beta):
        constant = f"alpha = {constant} = L^{0.0 - chain.beta:.4g}"
    yield Text("")
    yield Text(f"{chain.name}: L = {chain.length}, {', '.join(chain.blocks)}, {constant}", style="bold")
    table = Table(box=SIMPLE_HEAD, padding=(0, 2, 0, 0), pad_edge=False, show_edge=False)
    table.add_column("layer", justify="right")
    for head in ("displacement", "measured", "gradient", "measured", "its displacement", "measured"):
        table.add_column(head, justify="right", no_wrap=True)
    for layer in pick(chain.length + 1, _SHOWN):
        curves = (chain.displacement, chain.gradient, chain.gradient_displacement)
        table.add_row(str(layer), *(cell for curve in curves for cell in _cells(curve, layer)))
    yield table
    yield from _log_parts(chain.log_ratio)
    yield Text(chain.how, style="dim")


def _log_parts(log: LogRatio) -> Iterator[RenderableType]:
    said = []
    if not math.isnan(log.predicted_mean):
        said.append(f"{short(log.predicted_mean)}, sd {short(log.predicted_sd)} predicted (second order in alpha)")
    if not math.isnan(log.mean):
        said.append(f"{short(log.mean)}±{log.mean_error:.1g}, sd {short(log.sd)} measured")
    if said:
        yield Text(f"ln(|h_L|/|h_0|): {'; '.join(said)}")


def _cells(curve: DepthCurve, layer: int) -> tuple[str, str]:
    if not curve.measured:
        return short(curve.predicted[layer]), "-"
    return short(curve.predicted[layer]), f"{short(curve.measured[layer])}±{curve.error[layer]:.1g}"
