"""Time of one shape_activation call, warm, for the usual activations: python benchmarks/shaping.py"""

from __future__ import annotations

import statistics
import time

from kgraph.shaping import shape_activation

SMOOTH = (
    "softplus",
    "tanh",
    "gelu",
    "gelu_exact",
    "elu",
    "sigmoid",
    "erf",
    "atan",
    "bentid",
    "softsign",
    "silu",
    "mish",
)
RUNS = 7


def _milliseconds(activation: str, target: dict[str, float]) -> float:
    shape_activation(activation, **target)
    times = []
    for _ in range(RUNS):
        start = time.perf_counter()
        shape_activation(activation, **target)
        times.append((time.perf_counter() - start) * 1e3)
    return statistics.median(times)


def main() -> None:
    cases = [(name, {"psi": 1.01}) for name in (*SMOOTH, "hardswish", "selu", "relu", "leaky_relu")]
    cases += [(name, {"kappa": 0.0075}) for name in SMOOTH]
    cases += [("leaky_relu", {"negative_slope": 0.4})]
    print(f"{'activation':12} {'target':22} {'ms':>7}")
    for name, target in cases:
        (text,) = (f"{key} = {number}" for key, number in target.items())
        print(f"{name:12} {text:22} {_milliseconds(name, target):7.1f}")


if __name__ == "__main__":
    main()
