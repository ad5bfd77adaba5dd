"""A transform as a whole: the model untouched, options, every site accounted for."""

from __future__ import annotations

import copy
from collections import Counter
from typing import Any

import pytest
import torch
import zoo
from torch import nn
from transformed import assert_same, record, shaped, state

import kgraph
from kgraph import TAT
from kgraph.canonical import operation_name
from kgraph.capture import capture
from kgraph.modules import ShapedActivation, WeightedSum
from kgraph.passes.remove_norms import NORMS

LAYERS = ("linear", "addmm", "conv1d", "conv2d", "conv3d", "conv_transpose2d")


@pytest.mark.parametrize("name", ["cnn", "resnet18", "siamese", "squeeze_excite"])
def test_the_model_is_left_as_it_was(name: str) -> None:
    model, inputs = zoo.build(name)
    next(iter(model.children())).eval()
    model.register_forward_hook(lambda *_: None)
    before, generator = state(model), torch.get_rng_state()
    kgraph.transform(model, "dks", inputs)
    assert_same(before, state(model))
    assert torch.equal(generator, torch.get_rng_state())


def test_inplace_owns_the_models_parameters() -> None:
    model, inputs = zoo.build("cnn")
    weights = {name: id(p) for name, p in model.named_parameters()}
    result = kgraph.transform(model, "dks", inputs, inplace=True)
    kept = {name: id(p) for name, p in result.named_parameters() if name in weights}
    assert kept and all(weights[name] == identity for name, identity in kept.items())


def counts_before(model: nn.Module, inputs: Any) -> Counter[str]:
    graph = capture(copy.deepcopy(model), inputs, verify=False).module.graph
    found: Counter[str] = Counter()
    for node in graph.nodes:
        found[operation_name(node)] += 1
        found["norm"] += node.target in NORMS
    return found


@pytest.mark.parametrize("name", ["cnn", "unet", "dcgan_generator", "resnet18", "convnext_atto", "two_inputs"])
def test_ledger_has_an_entry_for_every_site(name: str) -> None:
    model, inputs, result = shaped(name)
    was, ledger = counts_before(model, inputs), record(result).ledger
    done = Counter(ledger.counts())
    assert sum(n for what, n in done.items() if what.startswith("remove ")) == was["norm"]
    assert sum(n for what, n in done.items() if what.startswith("re-draw")) == sum(was[k] for k in LAYERS)
    activations = sum(was[k] for k in ("relu", "tanh", "gelu", "silu"))
    kept = [entry for entry in ledger.kept if entry.what in ("relu", "tanh", "gelu", "silu")]
    assert done["shape activation"] + len(kept) == activations
    sums = {"resnet18": 8, "convnext_atto": 12, "two_inputs": 1}
    assert done["weight residual sum"] == sums.get(name, 0)
    assert len([m for m in result.modules() if isinstance(m, WeightedSum)]) == sums.get(name, 0)
    assert len([m for m in result.modules() if isinstance(m, ShapedActivation)]) == done["shape activation"]
    assert all(entry.why for entry in (*ledger.changes, *ledger.kept))


def test_seed() -> None:
    model, inputs = zoo.build("cnn")
    one, same, other = (kgraph.transform(model, "dks", inputs, seed=s).state_dict() for s in (1, 1, 2))
    assert all(torch.equal(one[key], same[key]) for key in one)
    assert not torch.equal(one["0.weight"], other["0.weight"])
    assert not torch.equal(one["10.weight"], other["10.weight"])


def test_gaussian_weights() -> None:
    model, inputs = zoo.build("mlp")
    weight = kgraph.transform(model, "dks", inputs, distribution="gaussian").get_parameter("2.weight").detach()
    assert float(weight.square().mean()) * 512 == pytest.approx(1, rel=0.02)
    gram = weight @ weight.T - torch.eye(512)
    assert float(gram.abs().max()) > 0.05


def test_options_survive_in_the_record() -> None:
    model, inputs = zoo.build("mlp")
    result = kgraph.transform(model, TAT(eta=0.8), inputs)
    assert record(result).method == TAT(eta=0.8)
    assert "TAT(eta=0.8" in record(result).ledger.method
    assert record(result).before.analysis.model == record(result).after.analysis.model


class Stream(nn.Module):
    """Residual blocks without a head: features."""

    def __init__(self, end: str = "sum") -> None:
        super().__init__()
        self.layers, self.end = nn.ModuleList(nn.Linear(64, 64) for _ in range(3)), end

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for layer in self.layers:
            x = x + torch.relu(layer(x))
        return {"sum": lambda y: y, "doubled": lambda y: 2 * y, "loss": lambda y: y.mean(1)}[self.end](x)


@pytest.mark.parametrize(("end", "shaped"), [("sum", 3), ("doubled", 3), ("loss", 2)])
def test_the_last_branch_of_a_stream_is_shaped(end: str, shaped: int) -> None:
    """A sum has no range that anybody wants; one number an input may be a loss."""
    found = kgraph.transform(Stream(end), "dks", torch.randn(2, 64)).kgraph
    assert found.ledger.counts()["shape activation"] == shaped
    if end == "sum":
        assert found.after.final.q == pytest.approx(1.0, abs=1e-6)
        assert not found.ledger.kept
