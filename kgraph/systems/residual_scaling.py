"""Residual branches scaled by depth, with weights that are independent or correlated across depth."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Literal

from kgraph.checks import finite, numbers
from kgraph.depth_correlated import DepthWeights, check_generator
from kgraph.errors import InputError
from kgraph.passes.base import Pass
from kgraph.passes.residual_scaling import DrawDepthCorrelated, ScaleBranches
from kgraph.systems.system import Aspect, System


@dataclass(frozen=True)
class ResidualScaling(System):
    """h + V g(h) becomes h + L^-beta V g(h), L being the number of residual sums of a chain of equal shape.

        displacement ``|h_L - h_0| / |h_0| ~ L^(x - beta)``,  x: 1/2 iid, 1 rbf; fbm: max(H, 1/2) res-3, H res-1

    so that beta = x, the default, keeps a limit that neither explodes nor is the identity: a neural SDE for iid
    weights, a neural ODE for smooth ones.

    Args:
        beta: "auto" (x of the chain's block types and the generator), or a number.
        weights: "iid" leaves the weights as they are; "rbf" and "fbm" draw the branches' affine layers along depth.
        hurst: Hurst index of "fbm", in (0, 1).

    Source: Marion, Fermanian, Biau, Vert 2022, arXiv 2206.06929.
    """

    label: ClassVar[str] = "residual-scaling"
    beta: float | Literal["auto"] = "auto"
    weights: DepthWeights = "iid"
    hurst: float | None = None

    def __post_init__(self) -> None:
        numbers(self, "hurst")
        check_generator(self.weights, self.hurst)
        if not isinstance(self.beta, str):
            finite("beta", self.beta)
        elif self.beta != "auto":
            raise InputError(f"beta is {self.beta!r}", hint="Pass 'auto' or a finite number")

    @property
    def sets(self) -> frozenset[Aspect]:
        return frozenset({"residuals"}) if self.weights == "iid" else frozenset({"residuals", "weights"})

    def passes(self) -> tuple[Pass, ...]:
        beta = None if self.beta == "auto" else float(self.beta)
        scale = ScaleBranches(beta, self.weights, self.hurst)
        return (scale,) if self.weights == "iid" else (DrawDepthCorrelated(self.weights, self.hurst), scale)
