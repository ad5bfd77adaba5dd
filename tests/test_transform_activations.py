"""Activations in all their forms: shaped, or kept with a reason."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional
from transformed import Calls, chain, local_map, record, shaped

import kgraph
from kgraph.modules import Scale, ShapedActivation


def test_module_called_several_times_gets_a_copy_per_call() -> None:
    class Shared(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layers = nn.ModuleList(nn.Linear(16, 16) for _ in range(4))
            self.act = nn.Tanh()

        def forward(self, x: Tensor) -> Tensor:
            for layer in self.layers[:3]:
                x = self.act(layer(x))
            return self.layers[3](x)

    result = kgraph.transform(Shared(), "dks", torch.randn(2, 16))
    sites = [m for m in result.modules() if isinstance(m, ShapedActivation)]
    assert len(sites) == 3 and record(result).ledger.counts()["shape activation"] == 3
    assert isinstance(result.get_submodule("act"), ShapedActivation)


FORMS = {
    "module": nn.ReLU(),
    "inplace module": nn.ReLU(inplace=True),
    "functional": functional.relu,
    "functional inplace": functional.relu_,
    "method": lambda x: x.relu(),
    "inplace method": lambda x: x.relu_(),
    "clamp": lambda x: x.clamp(min=0),
    "torch": torch.relu,
}


@pytest.mark.parametrize("form", FORMS)
def test_every_form_of_an_activation(form: str) -> None:
    result = kgraph.transform(Calls(FORMS[form]), "tat", torch.randn(2, 16))
    assert record(result).ledger.counts()["shape activation"] == 1
    (site,) = (m for m in result.modules() if isinstance(m, ShapedActivation))
    u = torch.randn(50)
    positive = result.leave(site(result.enter(torch.randn(5, 16))))  # runs
    assert positive.shape == (5, 4)
    assert torch.allclose(site(3 * u), 3 * site(u), atol=1e-5)


WRITTEN = {"silu": lambda x: x * torch.sigmoid(x), "hardswish": lambda x: x * functional.relu6(x + 3) / 6}


@pytest.mark.parametrize("name", WRITTEN)
def test_user_written_activation(name: str) -> None:
    result = kgraph.transform(Calls(WRITTEN[name]), "dks", torch.randn(2, 16))
    (site,) = (m for m in result.modules() if isinstance(m, ShapedActivation))
    q, mean, slope, _ = local_map(site)
    assert (q, mean, slope) == pytest.approx((1, 0, 1.5), abs=2e-3)
    assert record(result).ledger.unmet == ()


class ComputedSlope(nn.Module):
    """prelu whose slope is the absolute value of a parameter."""

    def __init__(self) -> None:
        super().__init__()
        self.raw = nn.Parameter(torch.full((1,), -0.3))

    def forward(self, x: Tensor) -> Tensor:
        return functional.prelu(x, self.raw.abs())


@pytest.mark.parametrize(("kind", "name"), [(ComputedSlope, "prelu"), (nn.RReLU, "rrelu")])
@pytest.mark.parametrize("others", [(), (nn.Tanh(),)], ids=["alone", "mixed"])
def test_learnable_activation_is_never_silent(kind: type[nn.Module], name: str, others: tuple[nn.Module, ...]) -> None:
    ledger = record(kgraph.transform(chain(kind(), *others), "dks", torch.randn(2, 16))).ledger
    (kept,) = (entry for entry in ledger.kept if name in entry.what)
    assert "1" in kept.node and kept.why
    assert any(name in line and "not shaped" in line for line in ledger.unmet)


def test_output_nonlinearity_is_kept() -> None:
    _, inputs, result = shaped("dcgan_generator")
    assert any("output nonlinearity" in entry.why for entry in record(result).ledger.kept)
    assert isinstance(result.get_submodule("10"), nn.Tanh)
    assert float(result(100 * inputs).abs().max().detach()) <= 1


@pytest.mark.parametrize("name", ["squeeze_excite", "swiglu"])
def test_gates_are_kept_and_normalized(name: str) -> None:
    *_, result = shaped(name)
    ledger = record(result).ledger
    assert any("gate" in entry.why for entry in ledger.kept)
    if name == "squeeze_excite":
        assert ledger.counts()["restore q"] >= 1 or ledger.counts()["normalize gate"] == 1
        assert any(isinstance(m, Scale) for m in result.modules())
