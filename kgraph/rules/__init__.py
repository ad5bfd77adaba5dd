"""Kernel rules, one file a family of operations. Importing this package fills the table."""

from kgraph.rules import (
    attention,
    constants,
    conv,
    embedding,
    linear,
    merge,
    norm,
    parent_scale,
    pointwise,
    pool,
    prelu,
    reindex,
    spatial,
)
from kgraph.rules.sampled import Sampler
from kgraph.rules.table import Context, find_rule, known_targets, rule

__all__ = [
    "Context",
    "Sampler",
    "attention",
    "constants",
    "conv",
    "embedding",
    "find_rule",
    "known_targets",
    "linear",
    "merge",
    "norm",
    "parent_scale",
    "pointwise",
    "pool",
    "prelu",
    "reindex",
    "rule",
    "spatial",
]
