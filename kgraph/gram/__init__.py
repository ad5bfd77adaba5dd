"""Kernels on real inputs: NNGP and NTK Gram matrices of the torch model the user has."""

from kgraph.gram.kernels import Kernels, NodeGram, kernels, nngp, ntk

__all__ = ["Kernels", "NodeGram", "kernels", "nngp", "ntk"]
