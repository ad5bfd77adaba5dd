"""kgraph: a compiler for the initialization-time kernel of neural networks.

shaped = kgraph.transform(model)        # a standard module whose kernel has the shape that trains well
print(kgraph.analyze(model))            # q, c and slope at every node
kgraph.export_onnx(shaped, "model.onnx")
"""

from kgraph.api import TransformRecord, analyze, export_onnx, shaping_targets, transform
from kgraph.certificate import Certificate, CertificateRow, Figure
from kgraph.empirical import EmpiricalNTK, empirical_ntk
from kgraph.errors import (
    CaptureError,
    ExportError,
    FileError,
    InputError,
    KGraphError,
    ModelError,
    PassError,
    RuleError,
    TargetError,
)
from kgraph.gram import KernelFunction, Kernels, NodeGram, kernel_function, kernels, nngp, ntk
from kgraph.input_moments import InputMoments
from kgraph.kernel_comparison import KernelComparison, NodeComparison, compare
from kgraph.meanfield import MeanField, PhaseDiagram, critical_point, mean_field, phase_diagram
from kgraph.methods import DKS, TAT
from kgraph.montecarlo import montecarlo
from kgraph.ntk_report import NTKReport, ntk_report
from kgraph.param_groups import param_groups
from kgraph.passes.fold import FoldReport, fold
from kgraph.passes.graph_parametrize import graph_parametrize
from kgraph.saved import load
from kgraph.shaping import ShapedConstants, shape_activation
from kgraph.studies.explain import Effect, Explanation, explain
from kgraph.studies.finite_width.measured import MeasuredFluctuations, MeasuredNode, measure_fluctuations
from kgraph.studies.finite_width.report import Fluctuations, NodeFluctuations, fluctuations
from kgraph.studies.isometry.report import Isometry, LayerIsometry, isometry
from kgraph.studies.order_chaos.measure import order_chaos
from kgraph.studies.order_chaos.report import OrderChaosReport
from kgraph.studies.residual_depth.report import ResidualDepth, residual_depth
from kgraph.systems import EdgeOfChaos, NTKChaos, ResidualScaling

__version__ = "0.1.0"

__all__ = [
    "DKS",
    "TAT",
    "CaptureError",
    "Certificate",
    "CertificateRow",
    "EdgeOfChaos",
    "Effect",
    "EmpiricalNTK",
    "Explanation",
    "ExportError",
    "Figure",
    "FileError",
    "Fluctuations",
    "FoldReport",
    "InputError",
    "InputMoments",
    "Isometry",
    "KGraphError",
    "KernelComparison",
    "KernelFunction",
    "Kernels",
    "LayerIsometry",
    "MeanField",
    "MeasuredFluctuations",
    "MeasuredNode",
    "ModelError",
    "NTKChaos",
    "NTKReport",
    "NodeComparison",
    "NodeFluctuations",
    "NodeGram",
    "OrderChaosReport",
    "PassError",
    "PhaseDiagram",
    "ResidualDepth",
    "ResidualScaling",
    "RuleError",
    "ShapedConstants",
    "TargetError",
    "TransformRecord",
    "analyze",
    "compare",
    "critical_point",
    "empirical_ntk",
    "explain",
    "export_onnx",
    "fluctuations",
    "fold",
    "graph_parametrize",
    "isometry",
    "kernel_function",
    "kernels",
    "load",
    "mean_field",
    "measure_fluctuations",
    "montecarlo",
    "nngp",
    "ntk",
    "ntk_report",
    "order_chaos",
    "param_groups",
    "phase_diagram",
    "residual_depth",
    "shape_activation",
    "shaping_targets",
    "transform",
]
