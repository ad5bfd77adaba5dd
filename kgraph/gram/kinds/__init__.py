"""Kinds of fields, one file a kind: every law of it, registered in the tables of `kgraph.gram.laws`."""

from kgraph.gram.kinds import (  # noqa: F401  (each registers its laws)
    affine,
    attention,
    drawn,
    joined,
    known,
    mapped,
    masked,
    moved,
    product,
    sums,
)
