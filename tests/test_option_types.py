"""Options of a wrong type and files that cannot be written: named errors, as for values out of range."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

import kgraph
from kgraph import DKS, TAT, EdgeOfChaos, NTKChaos, ResidualScaling
from kgraph.errors import FileError, InputError

WIDTH = 16
X = torch.randn(4, WIDTH, generator=torch.Generator().manual_seed(0))
SMALL = nn.Sequential(nn.Linear(WIDTH, WIDTH), nn.Tanh(), nn.Linear(WIDTH, 4))


@pytest.mark.parametrize(
    "call",
    [
        lambda: TAT(eta="a"),  # type: ignore[arg-type]
        lambda: TAT(tau=None),  # type: ignore[arg-type]
        lambda: TAT(tau=float("inf")),
        lambda: DKS(zeta=[2]),  # type: ignore[arg-type]
        lambda: EdgeOfChaos(q="a"),  # type: ignore[arg-type]
        lambda: EdgeOfChaos(sigma_b="a"),  # type: ignore[arg-type]
        lambda: NTKChaos(beta="a"),  # type: ignore[arg-type]
        lambda: NTKChaos(r="a"),  # type: ignore[arg-type]
        lambda: ResidualScaling(weights="fbm", hurst="a"),  # type: ignore[arg-type]
        lambda: kgraph.transform(SMALL, "tat", X, seed="a"),  # type: ignore[arg-type]
        lambda: kgraph.transform(SMALL, "tat", X, seed=1.5),  # type: ignore[arg-type]
        lambda: kgraph.transform(SMALL, "tat", X, seed=2**70),
        lambda: kgraph.transform(SMALL, "tat", X, shortcut_weight="a"),  # type: ignore[arg-type]
        lambda: kgraph.analyze(SMALL, X, mode=""),
        lambda: kgraph.montecarlo(SMALL, X, draws="a"),  # type: ignore[arg-type]
        lambda: kgraph.montecarlo(SMALL, X, cosines="a"),  # type: ignore[arg-type]
        lambda: kgraph.montecarlo(SMALL, X, cosines=(2.0,)),
        lambda: kgraph.montecarlo(SMALL, X, seed="a"),  # type: ignore[arg-type]
        lambda: kgraph.critical_point("tanh", q="a"),  # type: ignore[arg-type]
        lambda: kgraph.residual_depth(SMALL, X, draws="a"),  # type: ignore[arg-type]
    ],
)
def test_wrong_types_are_input_errors(call: Any) -> None:
    with pytest.raises(InputError):
        call()


def test_a_file_that_cannot_be_written(tmp_path: Any) -> None:
    report = kgraph.analyze(SMALL, X)
    for write in (report.to_html, report.to_json, report.to_csv):
        with pytest.raises(FileError, match="cannot write"):
            write(tmp_path / "missing" / "report")
