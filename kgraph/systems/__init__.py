"""Methods that are a plain list of passes, and how several of them compose."""

from kgraph.systems.compose import AnyMethod, compose, resolve_methods
from kgraph.systems.edge_of_chaos import EdgeOfChaos
from kgraph.systems.ntk_chaos import NTKChaos
from kgraph.systems.residual_scaling import ResidualScaling
from kgraph.systems.system import System

__all__ = ["AnyMethod", "EdgeOfChaos", "NTKChaos", "ResidualScaling", "System", "compose", "resolve_methods"]
