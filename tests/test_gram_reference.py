"""reference/nngp_ntk.json: every case at its output and at every intermediate, through the public calls."""

from __future__ import annotations

import gram_reference as reference
import pytest
import torch
from torch import Tensor, nn

import kgraph
from kgraph.capture import capture
from kgraph.gram import NodeGram
from kgraph.site import site_of

CASES = {case["name"]: case for case in reference.reference()["cases"]}


def tolerance(case: dict) -> float:
    """The file's own: 1e-7 for relu convolutions (its relu regularizes a square root), else 1e-10."""
    return 1e-7 if len(reference.array(reference.reference()["inputs"][case["x1"]]).shape) == 4 else 1e-10


def kernels_of(case: dict, positions: str = "auto", nodes: str = "") -> tuple[nn.Module, kgraph.Kernels]:
    model, x1, x2 = reference.build(case)
    parametrization = "standard" if "standard" in case["name"] else "ntk"
    options = {"nodes": "all"} if nodes else {}
    result = kgraph.kernels(model, x1, x2, parametrization=parametrization, positions=positions, **options)
    return model, result


def assert_close(found: Tensor, stored: dict, rtol: float) -> None:
    expected = reference.array(stored)
    assert found.shape == expected.shape
    error = (found - expected).abs().max() / expected.abs().max().clamp_min(1e-300)
    assert error <= rtol, f"relative error {error:.1e}"


@pytest.mark.parametrize("name", CASES)
def test_output(name: str) -> None:
    case = CASES[name]
    _, result = kernels_of(case)
    assert result.ntk is not None
    assert_close(result.nngp, case["out"]["nngp"], tolerance(case))
    assert_close(result.ntk, case["out"]["ntk"], tolerance(case))


def module_path(path: str) -> str:
    """ "3.b1.0" -> "l3.b1.l0"."""
    return ".".join(piece if piece.startswith("b") else f"l{piece}" for piece in path.split("."))


def node_of(model: nn.Module, x: Tensor, path: str) -> str:
    """The last node that the module at ``path`` made."""
    graph = capture(model, x, verify=False).module.graph
    wanted = module_path(path)
    made = [n.name for n in graph.nodes if wanted in (*site_of(n).ancestors, site_of(n).path)]
    return made[-1]


@pytest.mark.parametrize("name", CASES)
def test_intermediates(name: str) -> None:
    """Nodes that the reference stores whole; stored diagonals and position means where it stores those."""
    case = CASES[name]
    model, result = kernels_of(case, "full", "all")
    x = reference.build(case)[1]
    compared = 0
    for stored in case["intermediate"]:
        if stored["op"] in ("Input", "Parallel") or ("." in stored["path"] and stored["op"] == "Identity"):
            continue
        node = result.nodes[node_of(model, x, stored["path"])]
        compared += compare(node, stored, tolerance(case))
    assert compared >= len(case["layers"]) - 1


def compare(node: NodeGram, stored: dict, rtol: float) -> int:
    places = len(node.places)
    for kind, found in (("nngp", node.nngp), ("ntk", node.ntk)):
        assert found is not None
        if kind in stored:
            assert_close(reference.as_stored(found, places), stored[kind], rtol)
        else:
            count = int(torch.tensor(node.places).prod())
            square = found.reshape(*found.shape[:2], count, count)
            diagonal = square.diagonal(dim1=2, dim2=3).reshape(*found.shape[:2], *node.places)
            assert_close(diagonal, stored[f"{kind}_spatial_diag"], rtol)
            assert_close(square.mean((2, 3)), stored[f"{kind}_spatial_mean"], rtol)
    return 1


def test_a_wrong_weight_variance_is_noticed() -> None:
    """Negative control: one weight 1e-6 off is seen at the reference's tolerance."""
    case = CASES["mlp5_relu"]
    model, x1, _ = reference.build(case)
    with torch.no_grad():
        model.get_submodule("l4").weight.mul_(1 + 1e-6)  # type: ignore[operator]
    found = kgraph.nngp(model, x1)
    with pytest.raises(AssertionError):
        assert_close(found, case["out"]["nngp"], tolerance(case))
