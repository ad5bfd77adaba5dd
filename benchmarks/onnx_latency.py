"""A folded network against its BatchNorm original in onnxruntime: python benchmarks/onnx_latency.py [--net resnet18]

The original's norms are folded into its convolutions by the exporter; the shaped network is exported as it is and
folded. One thread on the CPU. All files take turns in one run, in a random order each round; printed are the nodes of
a file and the median over rounds of its CPU time as a multiple of the original's in the same round.
"""

from __future__ import annotations

import argparse
import random
import statistics
import sys
import tempfile
import time
from collections import Counter, defaultdict
from pathlib import Path

import onnx
import onnxruntime as ort
import torch
from rich.console import Console
from rich.table import Table
from torch import nn

import kgraph

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "examples"))
from resnet50_without_skips import define_torchvision_operators

TORCHVISION = define_torchvision_operators()  # referenced: the schemas go with the object


def network(name: str, slope: float) -> nn.Module:
    """A torchvision network whose norms have run over some data, with leaky ReLUs where a slope is given."""
    import torchvision

    torch.manual_seed(0)
    model: nn.Module = torchvision.models.get_model(name)
    if slope:
        for path, module in list(model.named_modules()):
            if isinstance(module, nn.ReLU):
                model.set_submodule(path, nn.LeakyReLU(slope, inplace=True))
    return model


def session(path: Path, written: Path) -> ort.InferenceSession:
    options = ort.SessionOptions()
    options.intra_op_num_threads = options.inter_op_num_threads = 1
    options.log_severity_level = 3
    options.optimized_model_filepath = str(written)
    return ort.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])


def files(folder: Path, name: str, slope: float, method: str | kgraph.TAT, size: int) -> dict[str, Path]:
    """The three files to compare."""
    model, x = network(name, slope), torch.randn(2, 3, size, size)
    shaped = kgraph.transform(model, method, x)
    model.train()(torch.randn(16, 3, size, size))
    paths = {arm: folder / f"{arm}.onnx" for arm in ("original", "shaped", "folded")}
    kgraph.export_onnx(model, paths["original"], x)
    kgraph.export_onnx(shaped, paths["shaped"], x, fold=False)
    print(kgraph.export_onnx(shaped, paths["folded"], x).fold_report)
    return paths


def times(sessions: dict[str, ort.InferenceSession], feed: dict[str, object], rounds: int) -> dict[str, list[float]]:
    """Seconds of CPU time by arm, round by round."""
    found: dict[str, list[float]] = defaultdict(list)
    arms, order = list(sessions), random.Random(0)
    for turn in range(rounds + 3):
        order.shuffle(arms)
        for arm in arms:
            start = time.process_time()
            sessions[arm].run(None, feed)
            if turn >= 3:  # the first rounds allocate
                found[arm].append(time.process_time() - start)
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--net", default="resnet18")
    parser.add_argument("--method", default="tat", choices=["tat", "dks", "auto"])
    parser.add_argument("--eta", type=float, default=0.0, help="TAT's eta; a low one gives leaky ReLUs a slope")
    parser.add_argument("--slope", type=float, default=0.0, help="leaky ReLUs of this slope in the original")
    parser.add_argument("--size", type=int, default=96)
    parser.add_argument("--rounds", type=int, default=60)
    options = parser.parse_args()
    shown = Table("file", "nodes", "nodes run", "ms", "of the original", "what")
    with tempfile.TemporaryDirectory() as folder:
        method = kgraph.TAT(eta=options.eta) if options.eta else options.method
        paths = files(Path(folder), options.net, options.slope, method, options.size)
        run = {arm: Path(folder) / f"{arm}.run.onnx" for arm in paths}
        sessions = {arm: session(path, run[arm]) for arm, path in paths.items()}
        x = torch.randn(1, 3, options.size, options.size).numpy()
        found = times(sessions, {next(iter(sessions.values())).get_inputs()[0].name: x}, options.rounds)
        for arm, path in paths.items():
            kinds = Counter(node.op_type for node in onnx.load(path).graph.node)
            ratio = statistics.median(a / b for a, b in zip(found[arm], found["original"], strict=True))
            nodes = len(onnx.load(run[arm]).graph.node)
            shown.add_row(
                arm,
                str(kinds.total()),
                str(nodes),
                f"{statistics.median(found[arm]) * 1e3:.2f}",
                f"{ratio:.3f}",
                ", ".join(f"{number} {kind}" for kind, number in kinds.most_common()),
            )
    Console(width=150).print(shown)


if __name__ == "__main__":
    main()
