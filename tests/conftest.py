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


FULL_SIZE = [line for line in Path(__file__).with_name("slow.txt").read_text().splitlines() if line[0] != "#"]


@pytest.hookimpl(tryfirst=True)  # before pytest deselects by marker
def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Marks the tests of ``slow.txt``, and skips tests marked ``gpu`` where there is no CUDA device."""
    found = set()
    for item in items:
        names = {item.nodeid, item.nodeid.partition("[")[0], item.nodeid.partition("::")[0]}.intersection(FULL_SIZE)
        if names:
            item.add_marker("slow")
        found |= names
        if item.get_closest_marker("gpu") and not torch.cuda.is_available():
            item.add_marker(pytest.mark.skip(reason="no CUDA device"))
    files = {item.nodeid.partition("::")[0] for item in items}
    lost = [name for name in FULL_SIZE if name.partition("::")[0] in files and name not in found]
    if lost and not any("::" in argument for argument in config.args):
        raise pytest.UsageError(f"tests/slow.txt names tests that are not there: {', '.join(lost)}")
