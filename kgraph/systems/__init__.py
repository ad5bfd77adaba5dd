"""Methods that are a plain list of passes, and how several of them compose."""

from kgraph.systems.compose import AnyMethod, compose, resolve_methods
from kgraph.systems.system import System

__all__ = ["AnyMethod", "System", "compose", "resolve_methods"]
