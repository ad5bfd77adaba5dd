"""Models that end in shares: a softmax at the end is the answer, not attention, and what comes before it is shaped."""

from __future__ import annotations

import pytest
import torch
from torch import nn

import kgraph


@pytest.mark.parametrize("method", ["tat", "dks"])
@pytest.mark.parametrize("end", [nn.Softmax(-1), nn.LogSoftmax(-1), nn.Sequential(nn.Softmax(-1), nn.Flatten())])
def test_what_a_last_softmax_reads_is_shaped(end: nn.Module, method: str) -> None:
    body = [nn.Linear(16, 16), nn.GELU(), nn.Linear(16, 16), nn.GELU(), nn.Linear(16, 4)]
    shaped = kgraph.transform(nn.Sequential(*body, end), method, torch.randn(4, 16))
    plain = kgraph.transform(nn.Sequential(*body), method, torch.randn(4, 16))
    ledger = shaped.kgraph.ledger
    found, wanted = (
        [change.after for change in one if change.what == "shape activation"]
        for one in (ledger.changes, plain.kgraph.ledger.changes)
    )
    assert len(found) == 2 and found == wanted
