"""Rules on fields, one file a family."""

from kgraph.gram.rules import (  # noqa: F401  (each registers its rules)
    affine,
    attention,
    constants,
    einsum,
    embedding,
    gates,
    joined,
    merge,
    norm,
    orders,
    parent_scale,
    pointwise,
    pool,
    prelu,
    recurrent,
    reindex,
)
from kgraph.gram.rules.pointwise import several, unary
from kgraph.gram.rules.sampled import sample
from kgraph.gram.rules.table import Context, find_rule

__all__ = ["Context", "find_rule", "sample", "several", "unary"]
