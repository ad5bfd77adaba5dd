"""One run: a network, an arm, an optimizer, a rate and a seed; what came of it is a line of a file."""

from __future__ import annotations

import json
import math
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from functools import cache
from pathlib import Path

import torch
from torch import Tensor, nn

from tournament.arms import ARMS
from tournament.data import fashion_mnist
from tournament.nets import NETS

STEPS, BATCH, EXAMPLES = 200, 64, 64
TRAIN, TEST = 20_000, 2_000
RATES = {"adam": (1e-4, 3e-4, 1e-3, 3e-3, 1e-2, 3e-2), "sgd": (1e-3, 3e-3, 1e-2, 3e-2, 1e-1, 3e-1)}


@dataclass(frozen=True, order=True)
class Run:
    """What is trained, and how."""

    net: str
    arm: str
    optimizer: str
    rate: float
    seed: int


@dataclass(frozen=True)
class Outcome:
    """What came of a run.

    Attributes:
        accuracy: on the test images, in eval mode; 0 where the loss became infinite.
        first, last: training loss of the first step, and its mean over the last twenty.
        seconds: of training.
        note: why there is no such run; "" where there is.
    """

    accuracy: float = 0.0
    first: float = math.nan
    last: float = math.nan
    seconds: float = 0.0
    note: str = ""


@cache
def _data() -> tuple[Tensor, Tensor, Tensor, Tensor]:
    return fashion_mnist(TRAIN, TEST)


def _optimizer(model: nn.Module, run: Run) -> torch.optim.Optimizer:
    if run.optimizer == "sgd":
        return torch.optim.SGD(model.parameters(), run.rate, momentum=0.9)
    return torch.optim.Adam(model.parameters(), run.rate)


def train(run: Run, steps: int = STEPS) -> Outcome:
    """The run; batches are the same for all arms of a seed, and the rate falls to 0 along a cosine."""
    x, y, test_x, test_y = _data()
    torch.manual_seed(run.seed)
    model = ARMS[run.arm](NETS[run.net]().train(), x[:EXAMPLES], run.seed)
    if model is None:
        return Outcome(note="nothing to replace")
    optimizer = _optimizer(model.train(), run)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
    rows = torch.randint(len(x), (steps, BATCH), generator=torch.Generator().manual_seed(run.seed))
    losses, start = [], time.perf_counter()
    for picked in rows:
        loss = nn.functional.cross_entropy(model(x[picked]), y[picked])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
        losses.append(loss.item())
        if not math.isfinite(losses[-1]):
            return Outcome(0.0, losses[0], math.inf, time.perf_counter() - start)
    seconds = time.perf_counter() - start
    model.eval()
    with torch.no_grad():
        right = sum(int((model(a).argmax(1) == b).sum()) for a, b in zip(test_x.split(500), test_y.split(500)))  # noqa: B905
    return Outcome(right / len(test_y), losses[0], sum(losses[-20:]) / 20, seconds)


def recorded(path: Path) -> dict[Run, Outcome]:
    """What a file holds."""
    found = {}
    for line in path.read_text().splitlines() if path.exists() else []:
        values = json.loads(line)
        found[Run(**values["run"])] = Outcome(**values["outcome"])
    return found


def missing(runs: list[Run], path: Path) -> Iterator[Run]:
    """Those of the runs that the file does not hold."""
    done = recorded(path)
    return (run for run in runs if run not in done)


def record(run: Run, outcome: Outcome, path: Path) -> None:
    """Add a line to the file."""
    with path.open("a") as file:
        file.write(json.dumps({"run": asdict(run), "outcome": asdict(outcome)}) + "\n")
