"""Constants do not depend on what was drawn: the state of one shaped model fits another of another seed.

What still follows values that the transform did not draw (an embedding's, a recurrent cell's) is named by a note.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional

import kgraph
from kgraph.initializers import reinitialize_weight_

GENERATOR = torch.Generator().manual_seed(0)
FLAT, IMAGES = torch.randn(3, 16, generator=GENERATOR), torch.randn(2, 3, 8, 8, generator=GENERATOR)
TOKENS = torch.randint(0, 20, (3, 6), generator=GENERATOR)


class Residual(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.enter, self.leave = nn.Linear(16, 32), nn.Linear(32, 4)
        self.blocks = nn.ModuleList(nn.Sequential(nn.Linear(32, 32), nn.GELU(), nn.Linear(32, 32)) for _ in range(2))

    def forward(self, x: Tensor) -> Tensor:
        x = self.enter(x)
        for block in self.blocks:
            x = x + block(x)
        return self.leave(torch.tanh(x))


class PostActivation(nn.Module):
    """Sums of relus: the constants that restore q are those of inputs that are not Gaussian."""

    def __init__(self) -> None:
        super().__init__()
        self.convs = nn.ModuleList(nn.Conv2d(3 if i == 0 else 8, 8, 3, padding=1) for i in range(3))
        self.leave = nn.Linear(8, 4)

    def forward(self, x: Tensor) -> Tensor:
        x = torch.relu(self.convs[0](x))
        for conv in list(self.convs)[1:]:
            x = torch.relu(x + torch.relu(conv(x)))
        return self.leave(torch.tanh(functional.max_pool2d(x, 2).mean((2, 3))))


class Gated(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.value, self.gate, self.mix = nn.Linear(16, 32), nn.Linear(16, 32), nn.Linear(32, 32)
        self.leave = nn.Linear(32, 4)

    def forward(self, x: Tensor) -> Tensor:
        return self.leave(torch.tanh(self.mix(self.value(x) * torch.sigmoid(self.gate(x)))))


class Tokens(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embed, self.positions = nn.Embedding(20, 16), nn.Parameter(torch.randn(6, 16))
        self.mix, self.leave = nn.Linear(16, 16), nn.Linear(16, 4)

    def forward(self, x: Tensor) -> Tensor:
        return self.leave(torch.tanh(self.mix(torch.tanh(self.embed(x) + self.positions))))


def _generator() -> nn.Module:
    layers: list[nn.Module] = [nn.ConvTranspose2d(3, 16, 4, 2, 1), nn.ReLU(), nn.Conv2d(16, 16, 3, groups=16)]
    return nn.Sequential(*layers, nn.ReLU(), nn.ConvTranspose2d(16, 3, 4, 2, 1))


def _mlp() -> nn.Module:
    return nn.Sequential(nn.Linear(16, 32), nn.Tanh(), nn.Linear(32, 32), nn.PReLU(), nn.Linear(32, 4))


MODELS: dict[str, tuple[Callable[[], nn.Module], Tensor]] = {
    "mlp": (_mlp, FLAT),
    "residual": (Residual, FLAT),
    "gated": (Gated, FLAT),
    "post-activation": (PostActivation, IMAGES),
    "generator": (_generator, IMAGES),
}
METHODS: dict[str, dict[str, Any]] = {
    "dks": {"method": "dks"},
    "dks gaussian": {"method": "dks", "distribution": "gaussian"},
    "tat gaussian": {"method": "tat", "distribution": "gaussian"},
    "edge of chaos": {"method": "edge-of-chaos"},
    "edge of chaos gaussian": {"method": kgraph.EdgeOfChaos(distribution="gaussian")},
    "ntk chaos": {"method": "ntk-chaos"},
    "residual scaling": {"method": "residual-scaling"},
}


def _pair(build: Callable[[], nn.Module], x: Tensor, options: dict[str, Any]) -> list[Any]:
    shaped = []
    for seed in (1, 2):
        torch.manual_seed(seed)
        shaped.append(kgraph.transform(build(), example_inputs=x, seed=seed, **options).eval())
    return shaped


PAIRS = [(name, method) for name in ("mlp", "residual") for method in METHODS]
PAIRS += [(name, "dks gaussian") for name in ("gated", "post-activation", "generator")]


@pytest.mark.parametrize(("name", "method"), PAIRS)
@torch.no_grad()
def test_a_state_fits_the_model_of_another_seed(name: str, method: str) -> None:
    build, x = MODELS[name]
    one, two = _pair(build, x, METHODS[method])
    assert not torch.allclose(one(x), two(x), rtol=1e-2)  # other weights
    two.load_state_dict(one.state_dict())
    scale = float(one(x).abs().max())
    assert torch.allclose(one(x), two(x), rtol=0, atol=1e-5 * scale)
    assert not [note for note in one.kgraph.ledger.notes if "follow the values" in note]


def test_constants_that_follow_the_model_s_own_values_are_named() -> None:
    one, two = _pair(Tokens, TOKENS, {"method": "dks"})
    two.load_state_dict(one.state_dict())
    assert not torch.allclose(one(TOKENS), two(TOKENS), rtol=1e-5)  # or the note would be idle
    (note,) = [note for note in one.kgraph.ledger.notes if "follow the values" in note]
    assert "embed.weight" in note and "positions" in note and "mix" not in note


@pytest.mark.parametrize("groups", [1, 4])
@pytest.mark.parametrize("transposed", [False, True])
def test_a_corrected_gaussian_weight_has_the_mean_square_of_its_law(groups: int, transposed: bool) -> None:
    """Delta taps: variance 1 / fan_in at one tap of nine; transposed, at one tap of each class of the stride, 4 of 9.

    The entries stay Gaussian ones in their directions: kurtosis 3 up to sampling, and no two seeds alike.
    """
    weight = torch.empty((32, 64 // groups, 3, 3) if not transposed else (64, 32 // groups, 3, 3))
    taps = 4 if transposed else 1
    fan_in = 64 // groups
    for seed in range(3):
        generator = torch.Generator().manual_seed(seed)
        options: dict[str, Any] = {"groups": groups, "transposed": transposed, "padding": 1, "generator": generator}
        options["stride"] = 2 if transposed else 1
        reinitialize_weight_(weight, distribution="gaussian", gain=1.5, corrected=True, **options)
        assert float(weight.double().square().mean()) * 9 / taps == pytest.approx(2.25 / fan_in, rel=1e-6)
        drawn = weight[weight != 0].double()
        error = (96 / len(drawn)) ** 0.5  # variance of z^4 is 96
        assert abs(float(drawn.pow(4).mean() / drawn.square().mean() ** 2) - 3) < 4 * error
    generator.manual_seed(0)
    reinitialize_weight_(weight, distribution="gaussian", gain=1.5, **options)
    assert float(weight.double().square().mean()) * 9 / taps != pytest.approx(2.25 / fan_in, rel=1e-4)
