"""kgraph: a compiler for the initialization-time kernel of neural networks.

shaped = kgraph.transform(model)        # a standard module whose kernel has the shape that trains well
print(kgraph.analyze(model))            # q, c and slope at every node
kgraph.export_onnx(shaped, "model.onnx")
"""

from kgraph.api import TransformRecord, analyze, export_onnx, shaping_targets, transform
from kgraph.empirical import EmpiricalNTK, empirical_ntk
from kgraph.errors import (
    CaptureError,
    ExportError,
    InputError,
    KGraphError,
    ModelError,
    PassError,
    RuleError,
    TargetError,
)
from kgraph.gram import Kernels, NodeGram, kernels, nngp, ntk
from kgraph.kernel_comparison import KernelComparison, NodeComparison, compare
from kgraph.methods import DKS, TAT
from kgraph.montecarlo import montecarlo
from kgraph.ntk_report import NTKReport, ntk_report
from kgraph.shaping import ShapedConstants, shape_activation

__version__ = "0.1.0"

__all__ = [
    "DKS",
    "TAT",
    "CaptureError",
    "EmpiricalNTK",
    "ExportError",
    "InputError",
    "KGraphError",
    "KernelComparison",
    "Kernels",
    "ModelError",
    "NTKReport",
    "NodeComparison",
    "NodeGram",
    "PassError",
    "RuleError",
    "ShapedConstants",
    "TargetError",
    "TransformRecord",
    "analyze",
    "compare",
    "empirical_ntk",
    "export_onnx",
    "kernels",
    "montecarlo",
    "nngp",
    "ntk",
    "ntk_report",
    "shape_activation",
    "shaping_targets",
    "transform",
]
