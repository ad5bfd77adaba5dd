"""Processor time of kgraph on slow models, capture included: python benchmarks/slow_models.py [--call tat]

Recurrences written as loops, one vector field read many times, routed experts, windows of attention: what no rule
covers is drawn and run. With one thread of a busy machine with two cores:

                                   analyze   transform by TAT   by DKS
    Mamba, 2 layers, 8 tokens       7.2 s      20 s               23 s
    Mixtral, 2 layers, 4 experts    2.1 s       4.4 s              6.0 s
    ODE, 6 steps of Runge-Kutta 4   2.1 s       5.6 s              7.6 s
    BiLSTM, 16 tokens               1.6 s       2.6 s              3.9 s
    Swin-tiny, 224 x 224           25   s      71 s               81   s

A transform walks a model three times: as it is, without its norms, and shaped.
"""

from __future__ import annotations

import argparse
import os
import sys
import time
from collections.abc import Callable
from pathlib import Path

import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor, nn

import kgraph
from kgraph.record import TransformRecord
from kgraph.report import Report

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "examples"))
from resnet50_without_skips import define_torchvision_operators

ALLOWED = 30.0  # seconds of processor time
Build = Callable[[], tuple[nn.Module, Tensor]]


class Ode(nn.Module):
    """A vector field integrated by the classical Runge-Kutta method: read 24 times."""

    def __init__(self, width: int = 64, steps: int = 6) -> None:
        super().__init__()
        self.steps = steps
        self.stem, self.head = nn.Linear(16, width), nn.Linear(width, 10)
        self.field = nn.Sequential(nn.Linear(width, width), nn.Tanh(), nn.Linear(width, width))

    def forward(self, x: Tensor) -> Tensor:
        x, step = self.stem(x), 1 / self.steps
        for _ in range(self.steps):
            k1 = self.field(x)
            k2 = self.field(x + step / 2 * k1)
            k3 = self.field(x + step / 2 * k2)
            k4 = self.field(x + step * k3)
            x = x + step / 6 * (k1 + 2 * k2 + 2 * k3 + k4)
        return self.head(x)


class BiLstm(nn.Module):
    """A tagger's encoder, averaged over positions."""

    def __init__(self, hidden: int = 64) -> None:
        super().__init__()
        self.table = nn.Embedding(100, 32)
        self.lstm = nn.LSTM(32, hidden, batch_first=True, bidirectional=True)
        self.head = nn.Linear(2 * hidden, 5)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.lstm(self.table(x))[0].mean(1))


def mamba() -> tuple[nn.Module, Tensor]:
    from transformers import MambaConfig, MambaForCausalLM

    config = MambaConfig(vocab_size=128, hidden_size=64, num_hidden_layers=2, state_size=8, use_cache=False)
    return MambaForCausalLM(config), torch.randint(0, 128, (2, 8))


def mixtral() -> tuple[nn.Module, Tensor]:
    from transformers import MixtralConfig, MixtralForCausalLM

    config = MixtralConfig(
        vocab_size=128,
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        num_local_experts=4,
        num_experts_per_tok=2,
        max_position_embeddings=64,
        use_cache=False,
    )
    return MixtralForCausalLM(config), torch.randint(0, 128, (2, 8))


def swin() -> tuple[nn.Module, Tensor]:
    import timm

    return timm.create_model("swin_tiny_patch4_window7_224").eval(), torch.randn(2, 3, 224, 224)


MODELS: dict[str, Build] = {
    "Mamba": mamba,
    "Mixtral": mixtral,
    "ODE": lambda: (Ode(), torch.randn(2, 16)),
    "BiLSTM": lambda: (BiLstm(), torch.randint(0, 100, (2, 16))),
    "Swin": swin,
}


def _report(call: str, model: nn.Module, x: Tensor) -> Report:
    """The report of the model, or of what a method made of it."""
    if call == "analyze":
        return kgraph.analyze(model, x)
    record = kgraph.transform(model, call, x).kgraph
    assert isinstance(record, TransformRecord)
    return record.after


def main() -> None:
    """Prints one row a model; fails where one takes longer than allowed."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("models", nargs="*", help="which ones (default: all)")
    parser.add_argument("--call", choices=("analyze", "tat", "dks"), default="analyze", help="what is timed")
    options = parser.parse_args()
    chosen = options.models or list(MODELS)
    if unknown := sorted(set(chosen) - set(MODELS)):
        parser.error(f"unknown: {', '.join(unknown)}; known: {', '.join(MODELS)}")
    torch.set_num_threads(1)
    table = Table("model", "CPU seconds", "rows", "sampled", "assumed")
    slow = []
    for name in chosen:
        torch.manual_seed(0)
        model, x = MODELS[name]()
        start = time.process_time()
        report = _report(options.call, model, x)
        spent = time.process_time() - start
        how = [node.how for node in report.nodes]
        table.add_row(name, f"{spent:.1f}", str(len(how)), str(how.count("sampled")), str(how.count("assumed")))
        slow += [name] if spent > ALLOWED else []
    Console().print(table)
    if slow:
        raise SystemExit(f"over {ALLOWED:g} s: {', '.join(slow)}")


if __name__ == "__main__":
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    TORCHVISION = define_torchvision_operators()  # referenced: timm's import needs the schemas
    main()
