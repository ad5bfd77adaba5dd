"""What every test gets: one thread per worker, a fixed seed, no network, a torchvision that imports."""

from __future__ import annotations

import importlib.util
import os
from pathlib import Path

# Before the libraries read them: models are built, never fetched; plots need no display.
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("MPLBACKEND", "agg")

import pytest
import torch

SEED = 0

if "PYTEST_XDIST_WORKER" in os.environ:
    torch.set_num_threads(1)


def define_torchvision_operators() -> torch.library.Library | None:
    """Defines the schemas of the C++ operators that ``import torchvision``, hence timm, looks up.

    A torchvision built for CUDA cannot load its extension beside a CPU-only torch; the models need none of
    its operators, but its import fails on the missing schemas. None where the extension loads.
    """
    spec = importlib.util.find_spec("torchvision")
    if spec is None or spec.origin is None:
        return None
    for extension in Path(spec.origin).parent.glob("_C*"):
        try:
            torch.ops.load_library(extension)
        except OSError:
            continue
        return None
    library = torch.library.Library("torchvision", "FRAGMENT")
    for name in ("nms", "qnms"):
        library.define(f"{name}(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
    return library


TORCHVISION_OPERATORS = define_torchvision_operators()  # referenced: the schemas go with the object


@pytest.fixture(autouse=True)
def fixed_seed() -> None:
    """Models draw their weights from the global generator."""
    torch.manual_seed(SEED)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Skips tests marked ``gpu`` where there is no CUDA device."""
    if torch.cuda.is_available():
        return
    skip = pytest.mark.skip(reason="no CUDA device")
    for item in items:
        if item.get_closest_marker("gpu"):
            item.add_marker(skip)
