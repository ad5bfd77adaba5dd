"""Kernels on real inputs: NNGP and NTK Gram matrices of the torch model the user has."""

from kgraph.gram import kinds  # noqa: F401  (the laws of fields)
from kgraph.gram.function import KernelFunction, kernel_function
from kgraph.gram.kernels import Kernels, NodeGram, kernels, nngp, ntk

__all__ = ["KernelFunction", "Kernels", "NodeGram", "kernel_function", "kernels", "nngp", "ntk"]
