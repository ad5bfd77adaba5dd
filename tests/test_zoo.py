"""Real architectures end to end: analysis and its Monte Carlo check, before and after the transform."""

from __future__ import annotations

import math

import pytest
import zoo
from torch import nn

import kgraph
from kgraph.errors import InputError

ANALYZED = [
    "mlp",
    "cnn",
    "dcgan_generator",
    "unet",
    "unet_bilinear",
    "resnet18",
    "resnet50",
    "vgg16",
    "densenet121",
    "mobilenetv3_small",
    "efficientnet_b0",
    "convnext_tiny",
    "vit_tiny",
    "mixer_s32",
    "resnetv2_50",
    "bert",
    "gpt2",
    "llama",
]
MEASURED = ["mlp", "cnn", "dcgan_generator", "unet", "resnet18", "convnext_atto", "mixer_s32", "bert", "gpt2", "llama"]
SHAPED = ["cnn", "unet", "resnet18", "mobilenetv3_small", "convnext_atto", "bert", "gpt2", "llama"]


def disagreements(model, inputs, mode: str) -> list[tuple[str, str, float, float, float]]:
    """Nodes whose prediction (not marked as assumed) lies outside 4 standard errors + O(1/width)."""
    report = kgraph.analyze(model, inputs, mode=mode)
    measured = kgraph.montecarlo(model, inputs, mode=mode, draws=8)
    certain = {row.name for row in report.nodes if row.how != "assumed"}
    return [d for d in measured.disagreements(report.analysis) if d[0] in certain]


@pytest.mark.parametrize("name", ANALYZED)
def test_every_random_node_gets_a_number(name: str) -> None:
    model, inputs = zoo.build(name)
    report = kgraph.analyze(model, inputs)
    assert all(math.isfinite(row.q) and row.q >= 0 for row in report.nodes)
    assert all(row.note for row in report.nodes if row.how in ("sampled", "assumed"))
    assert str(report)


@pytest.mark.parametrize("name", MEASURED)
def test_the_model_as_it_is_agrees_with_monte_carlo(name: str) -> None:
    model, inputs = zoo.build(name)
    assert not disagreements(model, inputs, "eval" if name in ("bert", "gpt2") else "train")


@pytest.mark.parametrize("name", SHAPED)
def test_the_transformed_model_agrees_with_monte_carlo(name: str) -> None:
    model, inputs = zoo.build(name)
    assert not disagreements(kgraph.transform(model, "dks", inputs), inputs, "eval")


def test_inputs_are_inferred() -> None:
    model, _ = zoo.build("bert")
    assert kgraph.analyze(model).final.q > 0
    with pytest.raises(InputError):
        kgraph.analyze(nn.ReLU())
