"""Residual networks of 1000 layers and more: which alpha_L = L^-beta keeps them from exploding and from vanishing.

    python examples/residual_depth.py [--quick] [--figures FOLDER]

Blocks are h + alpha_L V relu(W h), L of them (arXiv 2206.06929, res-3). Four studies:

1. |h_l - h_0| / |h_0| against l for three betas, independent and smooth (rbf) weights, L = 1000, width 40:
   `kgraph.transform(model, ResidualScaling(beta, weights))` and `kgraph.residual_depth`.
   residual_depth_layers.png
2. The map of (Hurst index, beta) for weights that are increments of a fractional Brownian motion, L = 1000, width 40,
   two networks a point, with the theoretical lines beta = max(H, 1/2), and max(2H - 1, 1/2) for gradients.
   residual_depth_map.png
3. Training on scikit-learn's digits, L = 1000, width 32, Adam at 1e-3, batch 64, beta = 0, 1/2, 1.
   residual_depth_training.png
4. Seconds of one forward and backward pass of 10,000 blocks.

Results (torch 2.13, CPU, one thread; 20 networks of 8 inputs; measured +- standard error, prediction in brackets):

    L = 1000     |h_L - h_0| / |h_0|                  |p_0 - p_L| / |p_L|, p = dL/dh
    iid  1/4     2731 +- 430        (2553)            2428
    iid  1/2     .8145 +- .013      (.8054)           .8015
    iid  1       .02236 +- .0003    (.02237)          .02256
    rbf  1/2     3.3e6 +- 1.1e6     (1.8e6)           2.5e6
    rbf  1       .1995 +- .0024     (.2010)           .2123
    rbf  2       1.974e-4 +- 2e-6   (1.990e-4)        2.092e-4

Where a mean is that of a few large draws (rbf, 1/2), the prediction, of infinitely wide layers, is too small. In the
map the ratio is 1 a little below the theoretical lines: they are about exponents, and 1000^x has a factor in front.
Accuracy after 100 steps: beta = 0 8.2 % (the output overflows), beta = 1/2 95.3 %, beta = 1 88.0 %.
10,000 blocks: .24 s forward, .44 s backward.
"""

from __future__ import annotations

import argparse
import itertools
import math
import time
from pathlib import Path
from typing import NamedTuple

import torch
from digits import Curve, digits, draw_accuracy, train
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from torch import Tensor, nn

import kgraph
from kgraph import ResidualScaling
from kgraph.depth_correlated import DepthWeights, draw_paths
from kgraph.studies.residual_depth.report import ChainDepth

FIGURES = Path(__file__).parent / "figures"
WIDTH = 40
HURST = (0.05, 0.2, 0.35, 0.5, 0.6, 0.7, 0.8, 0.9, 0.97)
BETAS = tuple(i / 10 for i in range(14))
COLORS = {"beta = 0": "tab:red", "beta = 1/2": "tab:blue", "beta = 1": "tab:gray"}


class Block(nn.Module):
    """h + V relu(W h), Gaussian weights of variance 1 / fan_in."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.first, self.last = nn.Linear(width, width, bias=False), nn.Linear(width, width, bias=False)
        for layer in (self.first, self.last):
            nn.init.normal_(layer.weight, std=width**-0.5)

    def forward(self, h: Tensor) -> Tensor:
        return h + self.last(torch.relu(self.first(h)))


class Map(NamedTuple):
    """log10 of a ratio at every (beta, Hurst index)."""

    displacement: Tensor
    gradient: Tensor


def curves(length: int, draws: int) -> dict[str, dict[float, ChainDepth]]:
    """Report of every generator and beta."""
    wanted: dict[DepthWeights, tuple[float, ...]] = {"iid": (0.25, 0.5, 1.0), "rbf": (0.5, 1.0, 2.0)}
    x, found = torch.randn(2, WIDTH), {}
    for weights, betas in wanted.items():
        found[str(weights)] = {}
        for beta in betas:
            torch.manual_seed(0)
            model = nn.Sequential(*(Block(WIDTH) for _ in range(length)))
            shaped = kgraph.transform(model, ResidualScaling(beta, weights), x)
            (chain,) = kgraph.residual_depth(shaped, x, draws=draws).chains
            found[str(weights)][beta] = chain
            out, back = chain.displacement, chain.gradient_displacement
            print(
                f"{weights} beta {beta:g}, L = {length}: |h_L - h_0|/|h_0| = {out.measured[-1]:.4g} "
                f"+- {out.error[-1]:.2g} ({out.predicted[-1]:.4g} predicted), |p_0 - p_L|/|p_L| = "
                f"{back.measured[0]:.4g} +- {back.error[0]:.2g} ({back.predicted[0]:.4g} predicted)",
                flush=True,
            )
    return found


def draw_curves(found: dict[str, dict[float, ChainDepth]], path: Path) -> None:
    """A panel a generator; lines are predictions, points measurements."""
    figure = Figure(figsize=(9, 3.6), layout="constrained")
    titles = {"iid": "independent weights", "rbf": "smooth weights (rbf)"}
    for axes, (weights, chains) in zip(figure.subplots(1, 2, sharey=True), found.items(), strict=True):
        for i, (beta, chain) in enumerate(chains.items()):
            layers = torch.arange(1, chain.length + 1)
            axes.plot(layers, chain.displacement.predicted[1:], color=f"C{i}", label=f"beta = {beta:g}")
            at = layers[:: max(1, chain.length // 15)]
            axes.plot(at, [chain.displacement.measured[k] for k in at], ".", color=f"C{i}")
        axes.set(yscale="log", ylim=(1e-5, 1e8), xlabel="layer l", title=titles[weights])
        axes.grid(alpha=0.3)
        axes.legend(title="lines: predicted", fontsize="small")
    figure.axes[0].set_ylabel("|h_l - h_0| / |h_0|, rms")
    _save(figure, path)


def finite_chains(hurst: float, length: int, betas: Tensor, networks: int) -> tuple[Tensor, Tensor]:
    """log10 of |h_L - h_0| / |h_0| and of |p_0 - p_L| / |p_L|, [betas]: all betas share the same weights."""
    generator = torch.Generator().manual_seed(round(1000 * hurst))
    w, v = (
        draw_paths("fbm", length, networks * WIDTH**2, generator, hurst).reshape(length, networks, WIDTH, WIDTH)
        / WIDTH**0.5
        for _ in range(2)
    )
    alpha = (length**-betas)[:, None]
    h0, last = (torch.randn(networks, 1, WIDTH, generator=generator, dtype=torch.float64) for _ in range(2))
    h, active = h0.repeat(1, len(betas), 1), []
    for layer in range(length):
        u = h @ w[layer].mT
        active.append(u > 0)
        h = h + alpha * (u.clamp_min(0) @ v[layer].mT)
    p = last.repeat(1, len(betas), 1)
    for layer in reversed(range(length)):
        p = p + alpha * ((p @ v[layer]) * active[layer]) @ w[layer]
    return tuple(((x - y).norm(dim=-1) / y.norm(dim=-1)).log10().mean(0) for x, y in ((h, h0), (p, last)))  # type: ignore[return-value]


def exponent_map(length: int, networks: int) -> Map:
    """The ratios at every (beta, H)."""
    betas = torch.tensor(BETAS, dtype=torch.float64)
    columns = [finite_chains(hurst, length, betas, networks) for hurst in HURST]
    return Map(*(torch.stack(column, 1) for column in zip(*columns, strict=True)))


def draw_map(found: Map, length: int, path: Path) -> None:
    """Blue vanishes, red explodes; white is of order one."""
    figure = Figure(figsize=(9.5, 4.0), layout="constrained")
    panels = (
        (found.displacement, "|h_L - h_0| / |h_0|", lambda h: max(h, 0.5), "beta = max(H, 1/2)"),
        (found.gradient, "|p_0 - p_L| / |p_L|, p = dL/dh", lambda h: max(2 * h - 1, 0.5), "beta = max(2H - 1, 1/2)"),
    )
    edges = [0.0, *((a + b) / 2 for a, b in itertools.pairwise(HURST)), 1.0]
    for axes, (values, title, law, label) in zip(figure.subplots(1, 2, sharey=True), panels, strict=True):
        mesh = axes.pcolormesh(
            edges, [b - 0.05 for b in (*BETAS, 1.4)], values.clamp(-3, 3), cmap="RdBu_r", vmin=-3, vmax=3
        )
        steps = torch.linspace(0, 1, 101).tolist()
        axes.plot(steps, [law(h) for h in steps], "k--", label=f"theory: {label}")
        axes.plot(HURST, [_crossing(values[:, i]) for i in range(len(HURST))], "ko", ms=4, label="measured: ratio = 1")
        axes.set(xlabel="Hurst index H", title=f"log10 {title}", xlim=(0, 1))
        axes.legend(fontsize="small", loc="upper left")
    figure.axes[0].set_ylabel("beta, alpha = L^-beta")
    figure.suptitle(f"L = {length}, width {WIDTH}, weights of Hurst index H")
    figure.colorbar(mesh, ax=figure.axes, extend="both")
    _save(figure, path)


def _crossing(column: Tensor) -> float:
    """beta where log10 of the ratio is 0, between two grid points."""
    for i in range(len(BETAS) - 1):
        high, low = float(column[i]), float(column[i + 1])
        if high > 0 >= low:
            return BETAS[i] + 0.1 * (high / (high - low) if math.isfinite(high) else 1.0)
    return math.nan


def trained(length: int, steps: int) -> list[Curve]:
    """Accuracy of a residual network of ``length`` blocks at three betas."""
    data, found = digits(lambda images: images.flatten(1)), []
    for name, beta in zip(COLORS, (0.0, 0.5, 1.0), strict=True):
        torch.manual_seed(0)
        model = nn.Sequential(nn.Linear(64, 32), *(Block(32) for _ in range(length)), nn.Linear(32, 10))
        shaped = kgraph.transform(model, ResidualScaling(beta), data.x[:2])
        curve = train(name, shaped, data, steps=steps, batch=64, rate=1e-3, seed=0, every=steps // 10)
        found.append(curve)
        print(f"{name}, {length} blocks: {curve.accuracy[-1]:.1%} in {curve.seconds:.0f} s", flush=True)
    return found


def draw_training(found: list[Curve], length: int, path: Path) -> None:
    """Test accuracy against steps."""
    figure = Figure(figsize=(5.4, 3.6), layout="constrained")
    axes: Axes = figure.subplots()
    draw_accuracy(axes, found, COLORS)
    axes.set_title(f"{length} residual blocks, alpha = L^-beta")
    axes.legend()
    _save(figure, path)


def seconds(length: int) -> tuple[float, float]:
    """Of one forward and one backward pass of a scaled chain, 16 inputs of width 40."""
    model, alpha = nn.Sequential(*(Block(WIDTH) for _ in range(length))), length**-0.5
    h = torch.randn(16, WIDTH)
    start = time.perf_counter()
    for block in model:
        h = torch.add(h, block.last(torch.relu(block.first(h))), alpha=alpha)  # type: ignore[operator, union-attr]
    middle = time.perf_counter()
    h.square().sum().backward()
    return middle - start, time.perf_counter() - middle


def _save(figure: Figure, path: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=100)


def main(arguments: list[str] | None = None) -> tuple[dict[str, dict[float, ChainDepth]], Map, list[Curve]]:
    """Run all studies, print their numbers, save the pictures."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="24 layers, few draws, 30 steps")
    parser.add_argument("--figures", type=Path, default=FIGURES)
    options = parser.parse_args(arguments)
    length, draws, networks, steps = (24, 2, 1, 30) if options.quick else (1000, 20, 2, 100)
    layers = curves(length, draws)
    draw_curves(layers, options.figures / "residual_depth_layers.png")
    found = exponent_map(length, networks)
    draw_map(found, length, options.figures / "residual_depth_map.png")
    learnt = trained(length, steps)
    draw_training(learnt, length, options.figures / "residual_depth_training.png")
    deep = 10 * length
    forward, backward = seconds(deep)
    print(f"{deep} blocks: forward {forward:.2f} s, backward {backward:.2f} s")
    return layers, found, learnt


if __name__ == "__main__":
    main()
