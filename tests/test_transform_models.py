"""What the transform promises of models that nobody here wrote: kept, or the ledger says which node prevents it."""

from __future__ import annotations

import pytest
import zoo

import kgraph
from kgraph import DKS

MODELS = [
    *("resnet50", "vgg16", "densenet121", "mobilenetv3_small", "efficientnet_b0", "convnext_tiny", "vit_tiny"),
    *("mixer_s32", "resnetv2_50", "dcgan_generator", "unet", "bert", "gpt2", "llama"),
]
MET = {"convnext_tiny", "mixer_s32", "dcgan_generator"}
"""Those in which nothing stands in the way: no product of branches, no attention, no max pooling."""
POOLED = {"resnet50", "vgg16", "densenet121", "resnetv2_50", "unet"}


@pytest.mark.parametrize("name", MODELS)
def test_slope_and_q_or_the_reason(name: str) -> None:
    model, inputs = zoo.build(name)
    shaped = kgraph.transform(model, DKS(zeta=1.5), inputs)
    record = shaped.kgraph
    assert isinstance(record, kgraph.TransformRecord)
    rows = {row.name: row for row in record.after.nodes}
    activations = [row for row in record.after.nodes if row.op == "ShapedActivation"]
    off = [row.name for row in activations if abs(rows[row.inputs[0]].q - 1) > 1e-6]
    slope = record.after.analysis.max_slope
    assert activations and slope is not None
    unmet = " ".join(record.ledger.unmet)
    assert slope <= 1.5 * (1 + 1e-6) or "no local value meets max slope zeta = 1.5" in unmet
    assert not off or ("q is not 1 at the input of" in unmet and off[0] in unmet)
    assert (name in MET) == (not record.ledger.unmet)
    if name in POOLED:
        assert all("max pooling has maps of its own" in line for line in record.ledger.unmet)
