"""What each component of a model does to its kernel: the same graph without it, or with another in its place."""

from kgraph.studies.explain.report import Effect, Explanation, explain

__all__ = ["Effect", "Explanation", "explain"]
