"""Draw the phase diagram of tanh: order, chaos, the critical line and the depth scales around it.

    python examples/phase_diagram.py [--quick] [--activation NAME] [--figure FILE]

The contours are depth scales of c in layers: how deep two inputs can still be told apart, or told alike.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import torch

import kgraph

FIGURE = Path(__file__).parent / "figures" / "phase_diagram.png"


def main(arguments: list[str] | None = None) -> kgraph.PhaseDiagram:
    """Compute and save the picture."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="a coarse grid")
    parser.add_argument("--activation", default="tanh")
    parser.add_argument("--figure", type=Path, default=FIGURE)
    options = parser.parse_args(arguments)
    counts = (9, 7) if options.quick else (51, 36)
    sigma_w, sigma_b = torch.linspace(0.6, 2.6, counts[0]), torch.linspace(0.005, 0.5, counts[1])
    diagram = kgraph.phase_diagram(options.activation, sigma_w=sigma_w, sigma_b=sigma_b)
    options.figure.parent.mkdir(parents=True, exist_ok=True)
    diagram.plot(options.figure)
    print(f"{len(diagram.line)} points of the critical line, sigma_w up to {float(diagram.line[-1, 0]):.3f}")
    return diagram


if __name__ == "__main__":
    main()
