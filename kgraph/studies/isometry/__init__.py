"""Dynamical isometry: depth scales and the spectrum of the input-output Jacobian (arXiv 1806.05393)."""
