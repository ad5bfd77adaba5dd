"""`method="auto"`: the result is that of the method that it names."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

import kgraph

PLAIN = nn.Sequential(nn.Linear(8, 16), nn.ReLU(), nn.Linear(16, 4))
VECTORS = torch.randn(2, 8)


def test_the_default_is_what_trained_better() -> None:
    chosen: Any = kgraph.transform(PLAIN, example_inputs=VECTORS)
    named: Any = kgraph.transform(PLAIN, "dks", VECTORS)
    assert chosen.kgraph.method == kgraph.DKS() and chosen.kgraph.ledger.changes == named.kgraph.ledger.changes
    assert any(line.startswith("method 'auto' is DKS") for line in chosen.kgraph.ledger.notes)
    assert not any("auto" in line for line in named.kgraph.ledger.notes)
    assert torch.equal(chosen.eval()(VECTORS), named.eval()(VECTORS))
    assert kgraph.shaping_targets(PLAIN, "auto", VECTORS) == kgraph.shaping_targets(PLAIN, "dks", VECTORS)


def test_auto_stands_alone() -> None:
    with pytest.raises(kgraph.InputError, match="Auto and EdgeOfChaos both set"):
        kgraph.transform(PLAIN, ["auto", "edge-of-chaos"], VECTORS)
