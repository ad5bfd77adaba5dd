"""Chains of residual blocks in any captured graph: sums, branches, and the layers that make them."""
