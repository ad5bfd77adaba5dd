"""The shaping methods DKS and TAT: frozen options. What they do is `kgraph.recipe`."""

from __future__ import annotations

import math
from dataclasses import dataclass

from kgraph.checks import flag, number
from kgraph.errors import InputError


@dataclass(frozen=True)
class DKS:
    """Deep Kernel Shaping: the largest slope of any subnetwork at c = 1 becomes ``zeta``.

    Args:
        zeta: global slope, > 1.
        keep_relu: shape plain relus instead of replacing them by leaky relus.

    Source: Martens et al. 2021, arXiv 2110.01765.
    """

    zeta: float = 1.5
    keep_relu: bool = False

    def __post_init__(self) -> None:
        flag("keep_relu", self.keep_relu)
        if not 1 < number("zeta", self.zeta) < math.inf:
            raise InputError(f"zeta is {self.zeta}", hint="DKS needs zeta > 1; 1.5 is the published default")


@dataclass(frozen=True)
class TAT:
    """Tailored Activation Transformations.

    Args:
        eta: largest C(0) of any subnetwork, in (0, 1), for leaky relus (TReLU).
        tau: largest curvature C''(1) of any subnetwork, > 0, for smooth activations.

    Source: Zhang, Botev, Martens 2022, arXiv 2203.08120.
    """

    eta: float = 0.9
    tau: float = 0.3

    def __post_init__(self) -> None:
        if not 0 < number("eta", self.eta) < 1:
            raise InputError(f"eta is {self.eta}", hint="TAT needs eta in (0, 1); 0.9 is the published default")
        if not 0 < number("tau", self.tau) < math.inf:
            raise InputError(f"tau is {self.tau}", hint="TAT needs tau > 0; 0.3 is the published default")


@dataclass(frozen=True)
class Auto:
    """DKS or TAT, whichever trained better: see `kgraph.selection`."""


Method = DKS | TAT
