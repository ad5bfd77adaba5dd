"""The plain data that an analysis and a transform return: no tensors, no graph, nothing to compute.

Everything that reads a kernel (tables, HTML, plots, JSON, the passes' checks) reads these classes, so that
none of it depends on how the numbers were obtained.
"""

from __future__ import annotations

import math
from collections import Counter
from dataclasses import dataclass
from difflib import get_close_matches

from kgraph.errors import InputError


@dataclass(frozen=True)
class NodeKernel:
    """Kernel of one graph node for the analysis' input cosines."""

    name: str
    """fx node name."""
    module: str
    """Dotted path of the owning module ("" = the model itself)."""
    op: str
    """What the node computes: "conv2d", "relu", "add", ..."""
    shape: tuple[int, ...]
    """Shape of its value, batch included."""
    source: str
    """"file.py:123" (base name only), or "" when unknown."""
    depth: int
    """Nonlinear layers on the longest path from an input."""
    q: float
    """q value (uncentred second moment), averaged over channels and positions."""
    c: tuple[float, ...]
    """c value for each of `Analysis.cosines`; nan if q == 0."""
    c_positions: float
    """Cosine between two different positions of the same input; nan if there is one position."""
    slope: float
    """d c / d c_input at c_input = 1."""
    mean: float
    """Mean over channels, positions and random parameters."""
    how: str
    """"exact", "quadrature", "sampled" or "assumed"."""
    note: str
    """e.g. "+-1.2e-03" for sampled, the reason for assumed, else ""."""
    inputs: tuple[str, ...]
    """Names of the nodes it reads (only those that are rows)."""
    ntk: float = math.nan
    """NTK block of an input with itself at one position, E[sum over parameters of (dv/dp)^2] averaged over
    channels, in `Analysis.parametrization`; nan where it is not known."""


@dataclass(frozen=True)
class Analysis:
    """Kernels of all nodes of one model."""

    model: str
    """Class name of the model."""
    mode: str
    """"train" or "eval"."""
    cosines: tuple[float, ...]
    """The input c values, e.g. (0.0, 0.5, 0.9)."""
    positions: str
    """Position model, e.g. "exchangeable"."""
    nodes: tuple[NodeKernel, ...]
    """All nodes in topological order."""
    output: str
    """Name of the node whose value the model returns (first tensor output)."""
    seconds: float
    """Time of the propagation itself."""
    max_slope: float | None
    """Maximal slope over all subnetworks (None when not computed)."""
    max_slope_at: str
    """The subnetwork "u -> v" that attains it, or ""."""
    notes: tuple[str, ...]
    """Remarks about capture or assumptions, in plain words."""
    parametrization: str = "standard"
    """What the NTK is with respect to: "standard" (the parameters that PyTorch trains) or "ntk" (unit normal
    parameters with the variance as a factor)."""
    inputs: str = ""
    """Second moments of the inputs, "" for white noise of q = 1."""
    path: str = ""
    """What was analysed in place of the mode's own forward, e.g. "forward of eval mode"; "" for that one."""

    def __getitem__(self, name: str) -> NodeKernel:
        """The node called `name`, or an InputError that names the nearest ones."""
        for node in self.nodes:
            if node.name == name:
                return node
        near = get_close_matches(str(name), [node.name for node in self.nodes], n=3, cutoff=0.4)
        hint = f"Did you mean {', '.join(near)}" if near else "See `.nodes` for the names"
        raise InputError(f"The analysis of {self.model} has no node {name!r}", hint=hint)

    @property
    def final(self) -> NodeKernel:
        """The node whose value the model returns."""
        return self[self.output]


@dataclass(frozen=True)
class Change:
    """One line of the ledger of a transform."""

    node: str
    """fx node name or module path."""
    what: str
    """Kind of change, e.g. "shape activation"."""
    why: str
    """Reason in plain words."""
    before: str
    """What stood there before."""
    after: str
    """What stands there now."""


@dataclass(frozen=True)
class Ledger:
    """What a pipeline changed, kept and did not understand."""

    method: str
    """Name of the method, e.g. "TAT(eta=0.9)"."""
    changes: tuple[Change, ...]
    """What was rewritten."""
    kept: tuple[Change, ...]
    """What was left as it was, and why."""
    unmet: tuple[str, ...]
    """Promises that could not be kept, or operations not understood, in plain words."""
    notes: tuple[str, ...]
    """Remarks."""

    def counts(self) -> dict[str, int]:
        """Number of changes by `what`, in order of first appearance."""
        return dict(Counter(change.what for change in self.changes))
