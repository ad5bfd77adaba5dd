"""kgraph: a compiler for the initialization-time kernel of neural networks.

shaped = kgraph.transform(model)        # a standard module whose kernel has the shape that trains well
print(kgraph.analyze(model))            # q, c and slope at every node
kgraph.export_onnx(shaped, "model.onnx")

Names are imported when they are first used: what they need takes longer to import than torch itself.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
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
    from kgraph.layer_ntk import NTKReport, ntk_report
    from kgraph.meanfield import MeanField, PhaseDiagram, critical_point, mean_field, phase_diagram
    from kgraph.methods import DKS, TAT
    from kgraph.monte_carlo import montecarlo
    from kgraph.parameter_groups import param_groups
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

_NAMES = {
    "kgraph.api": "TransformRecord analyze export_onnx shaping_targets transform",
    "kgraph.certificate": "Certificate CertificateRow Figure",
    "kgraph.empirical": "EmpiricalNTK empirical_ntk",
    "kgraph.errors": "CaptureError ExportError FileError InputError KGraphError ModelError PassError RuleError "
    "TargetError",
    "kgraph.gram": "KernelFunction Kernels NodeGram kernel_function kernels nngp ntk",
    "kgraph.input_moments": "InputMoments",
    "kgraph.kernel_comparison": "KernelComparison NodeComparison compare",
    "kgraph.meanfield": "MeanField PhaseDiagram critical_point mean_field phase_diagram",
    "kgraph.methods": "DKS TAT",
    "kgraph.monte_carlo": "montecarlo",
    "kgraph.layer_ntk": "NTKReport ntk_report",
    "kgraph.parameter_groups": "param_groups",
    "kgraph.passes.fold": "FoldReport fold",
    "kgraph.passes.graph_parametrize": "graph_parametrize",
    "kgraph.saved": "load",
    "kgraph.shaping": "ShapedConstants shape_activation",
    "kgraph.studies.explain": "Effect Explanation explain",
    "kgraph.studies.finite_width.measured": "MeasuredFluctuations MeasuredNode measure_fluctuations",
    "kgraph.studies.finite_width.report": "Fluctuations NodeFluctuations fluctuations",
    "kgraph.studies.isometry.report": "Isometry LayerIsometry isometry",
    "kgraph.studies.order_chaos.measure": "order_chaos",
    "kgraph.studies.order_chaos.report": "OrderChaosReport",
    "kgraph.studies.residual_depth.report": "ResidualDepth residual_depth",
    "kgraph.systems": "EdgeOfChaos NTKChaos ResidualScaling",
}
_WHERE = {name: module for module, names in _NAMES.items() for name in names.split()}


def __getattr__(name: str) -> Any:
    """A public name, or a module of the package."""
    if name in _WHERE:
        value = getattr(importlib.import_module(_WHERE[name]), name)
        globals()[name] = value
        return value
    try:
        return importlib.import_module(f"{__name__}.{name}")
    except ModuleNotFoundError as error:
        if error.name != f"{__name__}.{name}":
            raise
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}") from None


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})


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
