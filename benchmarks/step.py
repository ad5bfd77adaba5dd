"""A training step of a shaped network next to its BatchNorm original's, in time and in memory.

    python benchmarks/step.py [--pairs 15] [--nets resnet18 resnet50] [--activations leaky_relu tanh gelu silu]

Steps of the two networks alternate in one run; their processor times (one thread) are divided pair by pair, and the
median of the ratios is given with its quartiles. Memory is that of the distinct tensors that autograd keeps for
the backward pass, weights aside. Exit status 1 where a ratio is over the one that is promised.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path

import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor, nn

import kgraph

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "examples"))
from resnet50_without_skips import define_torchvision_operators

ACTIVATIONS: dict[str, tuple[Callable[[], nn.Module], str]] = {
    "leaky_relu": (lambda: nn.ReLU(inplace=True), "tat"),  # as in torchvision; TAT makes leaky relus of them
    "tanh": (nn.Tanh, "dks"),
    "gelu": (nn.GELU, "dks"),
    "silu": (nn.SiLU, "dks"),
}
SIZES = {"resnet18": 96, "resnet50": 64}
SLOWEST = {"leaky_relu": 0.95}
MOST_MEMORY = 0.9


def original(name: str, activation: Callable[[], nn.Module]) -> nn.Module:
    """A torchvision network with another activation everywhere."""
    import torchvision

    torch.manual_seed(0)
    model = getattr(torchvision.models, name)(num_classes=10)
    for module in list(model.modules()):
        for child, inner in module.named_children():
            if isinstance(inner, nn.ReLU):
                setattr(module, child, activation())
    return model


def step(model: nn.Module, x: Tensor) -> None:
    """Forward and backward."""
    model(x).square().mean().backward()
    model.zero_grad()


def kept_bytes(model: nn.Module, x: Tensor) -> int:
    """Of the distinct tensors that autograd keeps, parameters aside."""
    own = {p.untyped_storage().data_ptr() for p in model.parameters()}
    found: dict[int, int] = {}

    def pack(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in own:
            found[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        loss = model(x).square().mean()
    total = sum(found.values())
    loss.backward()
    model.zero_grad()
    return total


def seconds(model: nn.Module, x: Tensor) -> float:
    start = time.process_time()
    step(model, x)
    return time.process_time() - start


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--pairs", type=int, default=15)
    parser.add_argument("--batch", type=int, default=32)
    parser.add_argument("--nets", nargs="+", choices=SIZES, default=list(SIZES))
    parser.add_argument("--activations", nargs="+", choices=ACTIVATIONS, default=list(ACTIVATIONS))
    parser.add_argument("--channels-last", action="store_true")
    parser.add_argument("--compile", action="store_true", help="both by torch.compile; takes minutes before it starts")
    options = parser.parse_args()
    torch.set_num_threads(1)
    operators = define_torchvision_operators()
    table = Table("network", "activation", "step: median", "quartiles", "allowed", "memory", "allowed")
    failed = False
    for name in options.nets:
        for label in options.activations:
            activation, method = ACTIVATIONS[label]
            plain = original(name, activation).train()
            x = torch.randn(options.batch, 3, SIZES[name], SIZES[name])
            shaped = kgraph.transform(plain, method, x[:2]).train()
            if options.channels_last:
                plain, shaped, x = (t.to(memory_format=torch.channels_last) for t in (plain, shaped, x))
            two = (plain, shaped)
            if options.compile:
                two = torch.compile(plain), torch.compile(shaped)
            for model in two:
                step(model, x)
            ratios = [seconds(two[1], x) / seconds(two[0], x) for _ in range(options.pairs)]
            low, median, high = statistics.quantiles(ratios, n=4)
            memory, allowed = kept_bytes(shaped, x) / kept_bytes(plain, x), SLOWEST.get(label, 1.0)
            failed |= median > allowed or memory > MOST_MEMORY
            table.add_row(
                name, label, f"{median:.3f}", f"{low:.3f} .. {high:.3f}", f"{allowed}", f"{memory:.3f}", "0.9"
            )
    Console().print(table)
    del operators
    return int(failed)


if __name__ == "__main__":
    sys.exit(main())
