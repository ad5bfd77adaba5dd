"""Constants behind averages, measured on a batch that is plainly no white noise."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import kgraph
from kgraph.calibration import FEWEST, averages
from kgraph.modules import Scale


def net(width: int = 32) -> nn.Module:
    torch.manual_seed(0)
    layers: list[nn.Module] = []
    for inputs in (3, width):
        layers += [nn.Conv2d(inputs, width, 3, padding=1), nn.ReLU()]
    return nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(width, 10))


def skies(n: int = 64) -> Tensor:
    """Images most of whose positions are alike: one colour an image, and a little noise."""
    generator = torch.Generator().manual_seed(1)
    return torch.randn(n, 3, 1, 1, generator=generator) + 0.3 * torch.randn(n, 3, 12, 12, generator=generator)


def behind_the_average(shaped: Any, x: Tensor) -> float:
    (one,) = averages(shaped)
    seen: list[Tensor] = []
    handle = one.register_forward_hook(lambda module, args, out: seen.append(out))
    with torch.no_grad():
        shaped.eval()(x)
    handle.remove()
    return float(seen[0].square().mean())


@pytest.mark.parametrize("method", ["dks", "tat"])
def test_q_is_1_on_the_inputs_given(method: str) -> None:
    x = skies()
    shaped: Any = kgraph.transform(net(), method, x)
    white: Any = kgraph.transform(net(), method, torch.randn(64, 3, 12, 12))
    assert behind_the_average(shaped, x) == pytest.approx(1, rel=1e-5)
    assert not 0.7 < behind_the_average(white, x) < 1.4  # what the plan on white noise makes of such images
    # nothing else has changed: the same weights, and an output that differs by the one factor
    assert all(torch.equal(a, b) for a, b in zip(shaped.parameters(), white.parameters(), strict=True))
    (one,), (other,) = averages(shaped), averages(white)
    bias = shaped.get_parameter("6.bias")
    with torch.no_grad():
        y, z = (module.eval()(x) - bias for module in (shaped, white))
    torch.testing.assert_close(y, z * (one.factor / other.factor), rtol=1e-4, atol=1e-5)
    fresh = skies(512)[64:]
    assert behind_the_average(shaped, fresh) == pytest.approx(1, rel=0.5)  # 64 images have 192 colours


def test_the_ledger_and_the_reports_say_so() -> None:
    shaped: Any = kgraph.transform(net(), "dks", skies())
    (change,) = [change for change in shaped.kgraph.ledger.changes if change.what == "measure q"]
    assert "64 inputs" in change.why and "white noise" in change.before
    assert any("measured on the inputs given" in line for line in shaped.kgraph.ledger.notes)
    assert any("measured on the inputs given" in line for line in shaped.kgraph.after.analysis.notes)
    assert shaped.kgraph.after.final.q == pytest.approx(1, rel=1e-6)
    # a report of the bare module is one of white noise, which has far less
    assert kgraph.analyze(shaped.eval(), skies()).final.q < 0.5


@pytest.mark.parametrize(
    "x",
    [torch.randn(64, 3, 12, 12), skies(FEWEST - 1), torch.zeros(64, 3, 12, 12), torch.ones(64, 3, 12, 12)],
    ids=["white noise", "too few", "zeros", "all the same"],
)
def test_inputs_that_say_nothing_measure_nothing(x: Tensor) -> None:
    shaped: Any = kgraph.transform(net(), "dks", x)
    (one,) = averages(shaped)
    assert not one.measured and not [c for c in shaped.kgraph.ledger.changes if c.what == "measure q"]


def test_a_certificate_measures_them_anew() -> None:
    """In every draw, on its own inputs: q is 1 in the mean of each, where the fixed constant would miss by far."""
    shaped: Any = kgraph.transform(net(128), "dks", skies())
    found = shaped.kgraph.certificate(2, pairs=16)
    output = next(row for row in found.rows if row.node == found.output)
    assert output.q.value == pytest.approx(1, rel=0.25)
    assert any("measured anew" in line for line in found.notes)
    (one,) = averages(shaped)
    factor = one.factor
    for module in shaped.modules():
        if isinstance(module, Scale):
            module.measured = False  # the negative control: the constant as it is
    fixed = shaped.kgraph.certificate(2, pairs=16)
    assert next(row for row in fixed.rows if row.node == fixed.output).q.value < 0.5
    assert one.factor == factor


@pytest.mark.filterwarnings("ignore:.*LeafSpec:FutureWarning")
def test_copies_and_pickles_keep_them(tmp_path: Any) -> None:
    x = skies()
    shaped: Any = kgraph.transform(net(), "dks", x).eval()
    torch.save(shaped, tmp_path / "whole.pt")
    loaded = torch.load(tmp_path / "whole.pt", weights_only=False)
    with torch.no_grad():
        for twin in (copy.deepcopy(shaped), loaded):
            assert torch.equal(twin(x), shaped(x)) and averages(twin)[0].measured


def test_the_model_keeps_its_buffers_and_mode() -> None:
    model = net().train()
    state = torch.random.get_rng_state()
    shaped: Any = kgraph.transform(model, "dks", skies())
    assert shaped.training and model.training and torch.equal(torch.random.get_rng_state(), state)
    assert shaped.state_dict().keys() == model.state_dict().keys()


@pytest.mark.parametrize("grid", [8, 4])
def test_smooth_images_are_measured(grid: int) -> None:
    """Neighbours alike, and yet a tenth of q or less in the mean colour: an average keeps many times 1 / n of q."""
    generator = torch.Generator().manual_seed(0)
    x = nn.functional.interpolate(torch.randn(64, 3, grid, grid, generator=generator), size=(16, 16), mode="bilinear")
    x = x / x.square().mean().sqrt()
    torch.manual_seed(0)
    layers = [nn.Conv2d(3, 32, 3), nn.ReLU(), nn.Conv2d(32, 32, 3), nn.ReLU()]
    model = nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(32, 64))

    shaped = [kgraph.transform(model, example_inputs=given) for given in (x, torch.randn(64, 3, 16, 16))]

    assert ["measure q" in one.kgraph.ledger.counts() for one in shaped] == [True, False]
    q = [float(one.eval()(x).detach().square().mean()) for one in shaped]
    assert 0.5 < q[0] < 2.0 and q[1] > 3.0  # 64 outputs of one draw of the head's weights
    assert any("neighbouring positions correlate" in note for note in kgraph.analyze(model, x).analysis.notes)
