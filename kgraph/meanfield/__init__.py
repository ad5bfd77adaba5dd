"""Mean field of a chain with one activation: fixed points, the critical line, depth scales, the Jacobian's spectrum."""

from kgraph.meanfield.critical import critical_line, critical_point, smallest_critical_q
from kgraph.meanfield.jacobian import JacobianMoments, chain_jacobian, gaussian_s1
from kgraph.meanfield.moments import Activation, Moments, as_pointwise
from kgraph.meanfield.phase_diagram import PhaseDiagram, phase_diagram
from kgraph.meanfield.phases import MeanField, Regime, depth_scale, mean_field, q_fixed_point
from kgraph.meanfield.places import fourier_multipliers, tap_shares, top_multiplier

__all__ = [
    "Activation",
    "JacobianMoments",
    "MeanField",
    "Moments",
    "PhaseDiagram",
    "Regime",
    "as_pointwise",
    "chain_jacobian",
    "critical_line",
    "critical_point",
    "depth_scale",
    "fourier_multipliers",
    "gaussian_s1",
    "mean_field",
    "phase_diagram",
    "q_fixed_point",
    "smallest_critical_q",
    "tap_shares",
    "top_multiplier",
]
