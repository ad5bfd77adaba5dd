"""docstring"""

from __future__ import annotations

import argparse
import copy
import time
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn
from sklearn.datasets import load_digits
from sklearn.model_selection import train_test_split

import kgraph
from kgraph.capture import capture
from kgraph.passes import Pipeline, RemoveNorms, ScaleResiduals, Workspace

LEARNING_RATE = 1e-4
BATCH = 32


def create_resnet50() -> nn.Module:
    """timm's ResNet-50 for ten classes."""
    define_torchvision_operators()
    import timm

    return timm.create_model("resnet50", num_classes=10)


_LIBRARIES: list[torch.library.Library] = []  # referenced: the schemas go with the object


def define_torchvision_operators() -> None:
    """Let timm import torchvision beside a torch of another build (say, CPU-only torch from another index).

    Torchvision's compiled extension does not load there, and its import then fails because two operators have no
    schema. The network uses neither. Where the extension loads, nothing is done.
    """
    import importlib.util

    spec = importlib.util.find_spec("torchvision")
    if spec is None or spec.origin is None:
        return
    for extension in Path(spec.origin).parent.glob("_C*"):
        try:
            torch.ops.load_library(extension)
        except OSError:
            continue
        return
    if not _LIBRARIES:
        library = torch.library.Library("torchvision", "FRAGMENT")
        for name in ("nms", "qnms"):
            library.define(f"{name}(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
        _LIBRARIES.append(library)


def without_skips(model: nn.Module, example: Tensor, *, norms: bool) -> nn.Module:
    """A copy whose residual sums are only their residual branches, with or without normalization layers.

    These are two of the passes that `kgraph.transform` consists of, run by themselves.
    """
    work = Workspace(capture(copy.deepcopy(model), example))
    remove_skips = ScaleResiduals(shortcut_weight=0)
    Pipeline((remove_skips,) if norms else (RemoveNorms(), remove_skips)).run(work)
    return work.graph.emit().train()


def he_initialized(model: nn.Module) -> nn.Module:
    """Weights of variance 2 / fan_in, biases 0: He et al. 2015, arXiv 1502.01852."""
    for module in model.modules():
        if isinstance(module, (nn.Conv2d, nn.Linear)):
            nn.init.kaiming_normal_(module.weight, nonlinearity="relu")
            if module.bias is not None:
                nn.init.zeros_(module.bias)
    return model
