"""Local Q and C maps of pointwise functions: closed forms where known, kink-aware quadrature otherwise."""

from kgraph.maps.closed import ClosedForm, closed_form, correlation
from kgraph.maps.named import NAMES, leaky_relu, pointwise, relu
from kgraph.maps.pointwise import Pointwise

__all__ = [
    "NAMES",
    "ClosedForm",
    "Pointwise",
    "closed_form",
    "correlation",
    "leaky_relu",
    "pointwise",
    "relu",
]
