"""What the training examples share: scikit-learn's bundled digits, a training loop, a picture."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass

import torch
from matplotlib.axes import Axes
from sklearn.datasets import load_digits
from sklearn.model_selection import train_test_split
from torch import Tensor, nn


@dataclass(frozen=True)
class Data:
    """Images and labels to train on and to test on."""

    x: Tensor
    y: Tensor
    test_x: Tensor
    test_y: Tensor


@dataclass(frozen=True)
class Curve:
    """Test accuracy and training loss of one network after some numbers of steps."""

    name: str
    seed: int
    steps: tuple[int, ...]
    accuracy: tuple[float, ...]
    loss: tuple[float, ...]
    seconds: float


def digits(layout: Callable[[Tensor], Tensor]) -> Data:
    """1797 images [N, 1, 8, 8] in [-1, 1], passed through ``layout``; a quarter is kept for testing."""
    bunch = load_digits()
    images = layout(torch.tensor(bunch.images, dtype=torch.float32)[:, None] / 8 - 1)
    labels = torch.tensor(bunch.target)
    train, test = train_test_split(torch.arange(len(labels)), test_size=0.25, random_state=0)
    return Data(images[train], labels[train], images[test], labels[test])


def train(
    name: str, model: nn.Module, data: Data, *, steps: int, batch: int, rate: float, seed: int, every: int
) -> Curve:
    """Adam on random batches; looks at the test images before the first step and ``every`` so many steps."""
    generator = torch.Generator().manual_seed(seed)
    optimizer = torch.optim.Adam(model.parameters(), rate)
    rows = torch.randint(len(data.x), (steps, batch), generator=generator)
    accuracy, losses, start = [test_accuracy(model, data)], [], time.perf_counter()
    for step in range(1, steps + 1):
        picked = rows[step - 1]
        loss = nn.functional.cross_entropy(model(data.x[picked]), data.y[picked])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
        if step % every == 0:
            accuracy.append(test_accuracy(model, data))
    at = tuple(range(0, steps + 1, every))
    return Curve(name, seed, at, tuple(accuracy), tuple(losses), time.perf_counter() - start)


def test_accuracy(model: nn.Module, data: Data) -> float:
    """Share of test images with the right answer, in eval mode."""
    model.eval()
    with torch.no_grad():
        guesses = torch.cat([model(x).argmax(1) for x in data.test_x.split(150)])
    model.train()
    return (guesses == data.test_y).double().mean().item()


def he_initialized(model: nn.Module) -> nn.Module:
    """Weights of variance 2 / fan_in, biases 0, in place: He et al. 2015, arXiv 1502.01852."""
    for module in model.modules():
        if isinstance(module, (nn.Conv2d, nn.Linear)):
            nn.init.kaiming_normal_(module.weight, nonlinearity="relu")
            if module.bias is not None:
                nn.init.zeros_(module.bias)
    return model


def draw_accuracy(axes: Axes, curves: Iterable[Curve], colors: dict[str, str]) -> None:
    """Mean over seeds as a line, their range as a band; one color a name."""
    curves = list(curves)
    for name in dict.fromkeys(curve.name for curve in curves):
        same = [curve for curve in curves if curve.name == name]
        values = 100 * torch.tensor([curve.accuracy for curve in same])
        axes.plot(same[0].steps, values.mean(0), color=colors[name], label=name)
        axes.fill_between(same[0].steps, values.amin(0), values.amax(0), color=colors[name], alpha=0.2, lw=0)
    axes.set(xlabel="step", ylabel="test accuracy, %", ylim=(0, 100))
    axes.grid(alpha=0.3)
