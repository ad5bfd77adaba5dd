"""Rewrite passes, one file each; `Pipeline` runs them in order and keeps the ledger."""

from kgraph.passes.base import Pass, Pipeline, Workspace
from kgraph.passes.fold_parametrizations import fold_parametrizations
from kgraph.passes.graph_parametrize import GraphParametrize
from kgraph.passes.normalize_gates import NormalizeGates
from kgraph.passes.per_location_norm import InsertPerLocationNorm
from kgraph.passes.reinitialize import Reinitialize
from kgraph.passes.remove_norms import RemoveNorms
from kgraph.passes.rescale import Rescale
from kgraph.passes.scale_residuals import ScaleResiduals
from kgraph.passes.shape_activations import ShapeActivations

__all__ = [
    "GraphParametrize",
    "InsertPerLocationNorm",
    "NormalizeGates",
    "Pass",
    "Pipeline",
    "Reinitialize",
    "RemoveNorms",
    "Rescale",
    "ScaleResiduals",
    "ShapeActivations",
    "Workspace",
    "fold_parametrizations",
]
