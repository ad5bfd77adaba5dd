"""Kernel rules, one file a family of operations. Importing this package fills the table."""

from kgraph.rules import (
    attention,
    average,
    constants,
    contraction,
    conv,
    embedding,
    group_norm,
    linear,
    merge,
    noise,
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
    "average",
    "constants",
    "contraction",
    "conv",
    "embedding",
    "find_rule",
    "group_norm",
    "known_targets",
    "linear",
    "merge",
    "noise",
    "norm",
    "parent_scale",
    "pointwise",
    "pool",
    "prelu",
    "reindex",
    "rule",
    "spatial",
]
