"""Displacement and gradients along chains of residual blocks (arXiv 2206.06929)."""
