"""Train a DCGAN without batch normalization on digits: in order as usual, and in chaos with graph parametrization.

    python examples/dcgan_on_digits.py [--quick] [--figure FILE]

Scikit-learn's 8x8 digits, enlarged to 16x16. One generator, three transposed convolutions (4x4, 8x8, 16x16 pixels), two
ways to prepare it with kgraph; discriminator, optimizer (Adam) and noise are the same:

    order   relu of mean square 1, biases of std .5, every pixel's weights alike: r = .75
    chaos   relu of mean 0 and mean square 1, biases of std .1, every pixel scaled by its parents: r = 1.45

Border: output variance of the corners over that of the middle at initialization, predicted by `kgraph.order_chaos`.
Checkerboard: part of the NTK's trace on images of period 2, predicted likewise; and of the samples' own variation,
beside that of the digits. Off the digits: distance of the samples' mean image from the digits', at the rim and inside.

One seed, 800 steps (torch 2.13, CPU, one thread, about a minute each):

                                      order     chaos    digits
    r                                  .702     1.452
    border at initialization           .519     1.000
    checkerboard at initialization   28.9 %     2.0 %
    checkerboard after 80 steps      6.52 %    0.21 %
    checkerboard after 800 steps     0.02 %    0.02 %    0.02 %
    off the digits, rim                .052      .027
    off the digits, inside             .132      .045

Both learn the digits in the end; the one in order has to unlearn its pattern first.
"""

from __future__ import annotations

import argparse
import itertools
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from matplotlib.figure import Figure
from rich.console import Console
from rich.table import Table
from sklearn.datasets import load_digits
from torch import Tensor, nn
from torch.nn import functional

import kgraph
from kgraph import NTKChaos
from kgraph.studies.order_chaos.pixels import period_share

NOISE, BATCH, SIDE = 32, 64, 16
EARLY = 10
"""Samples are looked at after a tenth of the steps, and at the end."""
FIGURE = Path(__file__).parent / "figures" / "dcgan_on_digits.png"
METHODS = {
    "order, usual parametrization": NTKChaos(beta=0.5, form="standardized", graph=False),
    "chaos, graph parametrization": NTKChaos(),
}


@dataclass(frozen=True)
class Result:
    """A generator: figures at initialization, samples (and their checkerboards) early and at the end of training."""

    name: str
    r: float
    border: float
    checkerboard: float
    variances: Tensor
    early: Tensor
    samples: Tensor
    early_checkerboard: float
    sample_checkerboard: float
    off_rim: float
    off_inside: float
    diversity: float
    seconds: float


def digits() -> Tensor:
    """1797 images [N, 1, 16, 16] in [-1, 1]."""
    small = torch.tensor(load_digits().images, dtype=torch.float32)[:, None] / 8 - 1
    return functional.interpolate(small, size=(SIDE, SIDE), mode="bilinear")


def generator(width: int) -> nn.Sequential:
    """Noise [N, 32, 1, 1] to images [N, 1, 16, 16], no normalization."""
    return nn.Sequential(
        nn.ConvTranspose2d(NOISE, 2 * width, 4),
        nn.ReLU(),
        nn.ConvTranspose2d(2 * width, width, 4, 2, 1),
        nn.ReLU(),
        nn.ConvTranspose2d(width, 1, 4, 2, 1),
        nn.Tanh(),
    )


def discriminator(width: int) -> nn.Sequential:
    """Images to one number."""
    return nn.Sequential(
        nn.Conv2d(1, width, 4, 2, 1),
        nn.LeakyReLU(0.2),
        nn.Conv2d(width, 2 * width, 4, 2, 1),
        nn.LeakyReLU(0.2),
        nn.Flatten(),
        nn.Linear(2 * width * 16, 1),
    )


def train(network: nn.Module, width: int, images: Tensor, noise: Tensor, steps: int, seed: int) -> list[Tensor]:
    """Alternate steps of the non-saturating loss, Adam with momentum 1/2; samples of ``noise`` early and at the end."""
    random = torch.Generator().manual_seed(seed)
    torch.manual_seed(seed)  # of the discriminator's weights
    judge = discriminator(width)
    ours, theirs = (torch.optim.Adam(m.parameters(), 5e-4, betas=(0.5, 0.99)) for m in (network, judge))
    samples = []
    for step in range(1, steps + 1):
        real = images[torch.randint(len(images), (BATCH,), generator=random)]
        fake = network(torch.randn(BATCH, NOISE, 1, 1, generator=random))
        loss = functional.softplus(-judge(real)).mean() + functional.softplus(judge(fake.detach())).mean()
        theirs.zero_grad()
        loss.backward()
        theirs.step()
        loss = functional.softplus(-judge(fake)).mean()
        ours.zero_grad()
        loss.backward()
        ours.step()
        if step in (steps // EARLY, steps):
            samples.append(network(noise).detach())
    return samples


def checkerboard(images: Tensor) -> float:
    """Part of the images' variation on fields of period 2, the constant left out."""
    flat = (images - images.mean((-1, -2), keepdim=True)).flatten(1).double()
    return period_share(flat.T @ flat, (SIDE, SIDE), 2)


def rim() -> Tensor:
    """The two outer rows and columns, [16, 16]."""
    mask = torch.ones(SIDE, SIDE, dtype=torch.bool)
    mask[2:-2, 2:-2] = False
    return mask


def run(name: str, method: NTKChaos, width: int, images: Tensor, steps: int, seed: int) -> Result:
    """Prepare, predict, train, sample."""
    start = time.perf_counter()
    random = torch.Generator().manual_seed(100 + seed)
    noise = torch.randn(256, NOISE, 1, 1, generator=random)
    torch.manual_seed(seed)
    network: Any = kgraph.transform(generator(width), method, noise[:2], seed=seed)
    report = kgraph.order_chaos(network, noise[:4])
    pixels = report.pixels
    assert pixels is not None
    early, samples = train(network, width, images, noise, steps, seed)
    off = (samples.mean(0) - images.mean(0))[0].abs()
    return Result(
        name,
        report.r,
        pixels.variance_ratio,
        pixels.checkerboard_share,
        pixels.variances,
        early,
        samples,
        checkerboard(early),
        checkerboard(samples),
        float(off[rim()].mean()),
        float(off[~rim()].mean()),
        float(samples.std(0).mean() / images.std(0).mean()),
        time.perf_counter() - start,
    )


def table(results: list[Result], images: Tensor) -> Table:
    """Figures of both generators beside those of the digits."""
    out = Table("", *(result.name for result in results), "digits")
    rows: dict[str, tuple[list[str], str]] = {
        "r": ([f"{x.r:.3f}" for x in results], ""),
        "border at initialization": ([f"{x.border:.3f}" for x in results], ""),
        "checkerboard at initialization": ([f"{x.checkerboard:.1%}" for x in results], ""),
        "checkerboard of early samples": ([f"{x.early_checkerboard:.2%}" for x in results], ""),
        "checkerboard of samples": ([f"{x.sample_checkerboard:.2%}" for x in results], f"{checkerboard(images):.2%}"),
        "off the digits, rim": ([f"{x.off_rim:.3f}" for x in results], ""),
        "off the digits, inside": ([f"{x.off_inside:.3f}" for x in results], ""),
        "diversity": ([f"{x.diversity:.2f}" for x in results], "1"),
        "seconds": ([f"{x.seconds:.0f}" for x in results], ""),
    }
    for name, (values, last) in rows.items():
        out.add_row(name, *values, last)
    return out


def grid(images: Tensor, rows: int = 6, columns: int = 8) -> Tensor:
    """Images side by side with a line of one pixel between."""
    tiles = functional.pad(images[: rows * columns, 0], (0, 1, 0, 1), value=1.0)
    return torch.cat([torch.cat(list(line), 1) for line in tiles.split(columns)], 0)[:-1, :-1]


def draw(results: list[Result], images: Tensor, path: Path) -> None:
    """Samples of both, early and trained, and digits; under them the predicted variance of every pixel."""
    figure = Figure(figsize=(10, 8), layout="constrained")
    panels = figure.subplots(3, 3, height_ratios=(3, 3, 2))
    for axes in itertools.chain(*panels):
        axes.axis("off")
    early = [(f"{result.name},\nafter a tenth of the steps", result.early) for result in results]
    late = [*(("trained", result.samples) for result in results), ("digits", images)]
    for axes, (title, tiles) in [*zip(panels[0], early, strict=False), *zip(panels[1], late, strict=True)]:
        axes.imshow(grid(tiles).tolist(), cmap="gray", vmin=-1, vmax=1, interpolation="nearest")
        axes.set_title(title, fontsize="medium")
    for axes, result in zip(panels[2], results, strict=False):
        shown = axes.imshow(result.variances.tolist(), vmin=0, interpolation="nearest")
        corner = f"variance before training: corner {result.border:.2f} of the middle"
        axes.set_title(f"{corner}\ncheckerboard {result.checkerboard:.1%} of the NTK", fontsize="small")
        figure.colorbar(shown, ax=axes)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=100)


def main(arguments: list[str] | None = None) -> list[Result]:
    """Train both, print the figures, save the picture."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="narrow, 20 steps")
    parser.add_argument("--figure", type=Path, default=FIGURE)
    parser.add_argument("--steps", type=int, default=800)
    options = parser.parse_args(arguments)
    width, steps = (16, 20) if options.quick else (48, options.steps)
    images = digits()
    results = [run(name, method, width, images, steps, seed=0) for name, method in METHODS.items()]
    Console().print(table(results, images))
    draw(results, images, options.figure)
    return results


if __name__ == "__main__":
    main()
