"""Local targets of DKS and TAT: the local slope, curvature or negative slope that a whole network can afford."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from scipy.optimize import brentq

from kgraph.errors import InputError, TargetError
from kgraph.methods import DKS, TAT
from kgraph.subnetworks import Extreme, Subnetworks

_ROOT = {"xtol": 1e-15, "rtol": 8.9e-16, "maxiter": 200}


@dataclass(frozen=True)
class ShapingTargets:
    """What every nonlinear layer must have so that no subnetwork exceeds the target.

    Attributes:
        psi: local slope C'(1) (DKS), or None.
        kappa: local curvature C''(1) (TAT, smooth activations), or None.
        negative_slope: of the leaky relus (TAT); 0 when a plain scaled relu meets the target already.
        binding: the subnetwork whose map attains the maximum.
        attained: that maximum.
    """

    psi: float | None
    kappa: float | None
    negative_slope: float | None
    binding: str
    attained: float


_MOST = 1e12
"""Local slope or curvature that no activation needs: past it the maximum does not grow with it at all."""


def solve_targets(subnetworks: Subnetworks, method: DKS | TAT) -> ShapingTargets:
    """Solve ``max over subnetworks = target`` for the local value; every maximum grows with it.

    Raises:
        TargetError: unmet for any local value; names the binding subnetwork and its minimum.
        InputError: the graph has no nonlinear layer to shape.
    """
    if not subnetworks.free:
        raise InputError("the model has no activation to shape", hint="Check kgraph.analyze(model) for its operations")
    if isinstance(method, DKS):
        psi, extreme = _solve_slope(subnetworks, method.zeta)
        return ShapingTargets(psi, None, None, str(extreme), extreme.value)
    return _solve_both(subnetworks, method)


def solve_kind(subnetworks: Subnetworks, method: TAT, *, leaky: bool) -> tuple[float, Extreme]:
    """TAT's target for one kind of activation: a negative slope, or a curvature.

    Raises:
        TargetError: unmet for any local value.
    """
    return _solve_leaky(subnetworks, method.eta) if leaky else _solve_curvature(subnetworks, method.tau)


def _solve_both(subnetworks: Subnetworks, method: TAT) -> ShapingTargets:
    kappa, curved = _optional(lambda: _solve_curvature(subnetworks, method.tau))
    slope, leaky = _optional(lambda: _solve_leaky(subnetworks, method.eta))
    found = leaky or curved
    if found is None:
        _solve_leaky(subnetworks, method.eta)  # raises, saying what binds
        _solve_curvature(subnetworks, method.tau)
    assert found is not None
    return ShapingTargets(None, kappa, slope, str(found), found.value)


def _optional(solve: Callable[[], tuple[float, Extreme]]) -> tuple[float | None, Extreme | None]:
    """TAT's two targets concern different activations; one may be out of reach where the other is not."""
    try:
        return solve()
    except TargetError:
        return None, None


def _out_of_reach(name: str, target: float, found: Extreme) -> TargetError:
    return TargetError(
        f"no local value reaches {name} = {target:g}: the largest is {found.value:.6g}, whatever the activations are",
        node=found.target,
        hint="Nothing that can be shaped lies between the inputs and the outputs",
    )


def _unmet(what: str, target: float, extreme: Extreme) -> TargetError:
    return TargetError(
        f"no local value meets {what} = {target:g}: the subnetwork {extreme} has at least {extreme.value:.6g}",
        node=extreme.target,
        hint="Raise the target, or weight the shortcuts more (a larger shortcut_weight); "
        "a product of two branches has slope 2 by itself",
    )


def _solve_slope(subnetworks: Subnetworks, zeta: float) -> tuple[float, Extreme]:
    least = subnetworks.max_slope(1.0)
    if least.value > zeta:
        raise _unmet("max slope zeta", zeta, least)
    high = 2.0
    while (found := subnetworks.max_slope(high)).value < zeta:
        high *= 2
        if high > _MOST:
            raise _out_of_reach("max slope zeta", zeta, found)
    psi = float(brentq(lambda p: subnetworks.max_slope(p).value - zeta, 1.0, high, **_ROOT))  # type: ignore[arg-type]
    return psi, subnetworks.max_slope(psi)


def _solve_curvature(subnetworks: Subnetworks, tau: float) -> tuple[float, Extreme]:
    least = subnetworks.max_curvature(0.0)
    if least.value >= tau:
        raise _unmet("max curvature tau", tau, least)
    high = tau
    while (found := subnetworks.max_curvature(high)).value < tau:
        high *= 2
        if high > _MOST:
            raise _out_of_reach("max curvature tau", tau, found)
    kappa = float(brentq(lambda k: subnetworks.max_curvature(k).value - tau, 0.0, high, **_ROOT))  # type: ignore[arg-type]
    return kappa, subnetworks.max_curvature(kappa)


def _solve_leaky(subnetworks: Subnetworks, eta: float) -> tuple[float, Extreme]:
    relu = subnetworks.max_c(0.0)
    if relu.value <= eta:
        return 0.0, relu
    least = subnetworks.max_c(1.0)
    if least.value >= eta:
        raise _unmet("max C(0) eta", eta, least)
    slope = float(brentq(lambda a: subnetworks.max_c(a).value - eta, 0.0, 1.0, **_ROOT))  # type: ignore[arg-type]
    return slope, subnetworks.max_c(slope)
