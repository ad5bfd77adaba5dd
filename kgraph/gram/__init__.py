"""Kernels on real inputs: NNGP and NTK Gram matrices of the torch model the user has."""

from kgraph.gram.function import KernelFunction, kernel_function
from kgraph.gram.kernels import Kernels, NodeGram, kernels, nngp, ntk

__all__ = ["KernelFunction", "Kernels", "NodeGram", "kernel_function", "kernels", "nngp", "ntk"]
