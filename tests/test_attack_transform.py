"""Attacks on transforms and their analysis: what a transform must leave alone, and what it must not pass over."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils import parametrizations

import kgraph

METHODS = ("dks", "tat", "edge-of-chaos", "ntk-chaos")
X = torch.randn(3, 16, generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("wrap", [parametrizations.weight_norm, parametrizations.spectral_norm])
def test_parametrized_layers_of_the_original_stay(method: str, wrap: object) -> None:
    """torch makes one class per parametrized layer, which copies share: folding the copy must not empty it."""
    model = nn.Sequential(wrap(nn.Linear(16, 16)), nn.Tanh(), nn.Linear(16, 16)).eval()  # type: ignore[operator]
    before = model(X)
    kgraph.transform(model, method, X)
    assert torch.equal(model(X), before)
    assert torch.equal(copy.deepcopy(model)(X), before)


class FixedFilter(nn.Module):
    """A projection and a blur that are buffers."""

    def __init__(self) -> None:
        super().__init__()
        self.read, self.out = nn.Linear(16, 16), nn.Linear(16, 4)
        self.register_buffer("turn", torch.eye(16).flip(0).contiguous())
        self.register_buffer("blur", torch.full((1, 1, 3), 1 / 3))

    def forward(self, x: Tensor) -> Tensor:
        h = torch.relu(self.read(x)) @ self.turn
        h = nn.functional.conv1d(h[:, None], self.blur, padding=1)[:, 0]
        return self.out(torch.relu(h))


@pytest.mark.parametrize("method", METHODS)
def test_buffers_are_no_weights(method: str) -> None:
    model = FixedFilter()
    made = kgraph.transform(model, method, X)
    kept = [b for b in made.buffers() if b.shape in ((16, 16), (1, 1, 3))]
    assert len(kept) == 2
    for buffer in kept:
        assert torch.equal(buffer, model.turn if buffer.ndim == 2 else model.blur)
    if method != "ntk-chaos":  # which says where q is not 1 instead
        assert any("matmul" in line and "not drawn" in line for line in made.kgraph.ledger.unmet)


def test_zeros_of_a_padding_layer_are_those_of_the_convolution() -> None:
    """The mean over a padded field holds its zeros; a convolution reads them at the borders only."""
    x = torch.randn(2, 4, 5, 5)
    own = nn.Conv2d(4, 8, 5, padding=(2, 3))
    bare = nn.Conv2d(4, 8, 5)
    bare.load_state_dict(own.state_dict())
    expected = kgraph.analyze(nn.Sequential(own), x).final
    for pads in ([nn.ZeroPad2d((3, 3, 2, 2))], [nn.ZeroPad2d(1), nn.ZeroPad2d((2, 2, 1, 1))]):
        found = kgraph.analyze(nn.Sequential(*pads, bare), x).final
        assert (found.q, found.ntk, *found.c) == pytest.approx((expected.q, expected.ntk, *expected.c), rel=1e-12)
    pad = nn.ZeroPad2d((3, 3, 2, 2))
    before, after = (nn.Sequential(*order, bare) for order in ([pad, nn.Softplus()], [nn.Softplus(), pad]))
    # softplus(0)^2 = .48 at the borders instead of 0: what stands between is not passed over
    assert kgraph.analyze(before, x).final.q > 1.1 * kgraph.analyze(after, x).final.q


class HiddenSum(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(64, 64) / 8)

    def forward(self, x: Tensor) -> Tensor:
        return torch.addmm(x, torch.relu(x), self.weight)


def test_a_random_bias() -> None:
    """q = 1 + E[relu^2] sw2 = 1.5 for independent weights; drawn, for addmm hides the sum."""
    model = nn.Sequential(HiddenSum())
    variance = float(model[0].weight.detach().square().mean()) * 64
    found = kgraph.analyze(model, torch.randn(2, 64))["addmm"]
    assert found.how == "sampled"
    assert found.q == pytest.approx(1 + variance / 2, rel=0.2)


def test_what_unmet_says_is_true_of_the_end() -> None:
    """NTKChaos first, then ResidualScaling: q is judged once both have run, in either order alike."""
    blocks = nn.Sequential(*(Residual() for _ in range(4)), nn.Linear(16, 4))
    both = [kgraph.NTKChaos(), kgraph.ResidualScaling()]
    one, two = (kgraph.transform(blocks, order, X).kgraph.ledger.unmet for order in (both, both[::-1]))
    values = [[float(line.split()[2].rstrip(",")) for line in lines] for lines in (one, two)]
    assert max(values[0]) < 4 and values[0] == pytest.approx(values[1], rel=1e-6)


class Residual(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.inner, self.outer = nn.Linear(16, 16), nn.Linear(16, 16)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.outer(torch.relu(self.inner(x)))
