"""What an unknown operation does to channels and inputs is seen by running it: wrong guesses would be silent."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from gram_montecarlo import WIDTH, Case, Net, check_nngp, dense
from torch import Tensor
from torch.nn.functional import relu

import kgraph
from kgraph.errors import InputError, RuleError

SAME = 8
"""Inputs, positions and channels of the same number: sizes tell nothing."""


def cube() -> Tensor:
    return torch.randn(SAME, SAME, SAME, generator=torch.Generator().manual_seed(0), dtype=torch.float64)


def on_input(change: Callable[[Tensor], Tensor]) -> Net:
    return Net(lambda m, x: m.a(change(x)), a=dense(SAME, 16, bias=False))


INDEX = torch.tensor([2, 0, 0, 1, 5, 5, 7, 3])
FOLLOWED: dict[str, Callable[[Tensor], Tensor]] = {
    "gather positions": lambda x: x[:, INDEX],
    "running log sum of positions": lambda x: x.logcumsumexp(1),
    "running sum of positions": lambda x: x.cumsum(1),
    "running sum of inputs": lambda x: x.cumsum(0),
    "positions reversed": lambda x: x.flip(1),
}
REFUSED: dict[str, Callable[[Tensor], Tensor]] = {
    "running log sum of channels": lambda x: x.logcumsumexp(2),
    "running sum of channels": lambda x: x.cumsum(2),
    "mean of inputs": lambda x: x - x.mean(0),
    "norm of everything": lambda x: x / x.norm(),
}


@pytest.mark.parametrize("name", FOLLOWED)
def test_operations_that_keep_channels(name: str) -> None:
    """On known inputs the answer is known: sw2 <f(x), f(x')> / C, at every pair of positions."""
    model, x = on_input(FOLLOWED[name]).double(), cube()
    y = FOLLOWED[name](x)
    sw2 = float(SAME * model.a.weight.detach().square().mean())
    expected = torch.einsum("aic,bjc->abij", y, y) * sw2 / SAME
    found = kgraph.nngp(model, x, positions="full")
    torch.testing.assert_close(found, expected, rtol=1e-8, atol=1e-10)


@pytest.mark.parametrize("name", REFUSED)
def test_operations_that_do_not(name: str) -> None:
    with pytest.raises(RuleError, match="mixes channels or inputs"):
        kgraph.nngp(on_input(REFUSED[name]).double(), cube(), positions="full")


def test_mixed_inputs_are_not_computed_in_tiles() -> None:
    """Each tile has some inputs only: an operation that mixes them would see the wrong ones."""
    model, x = on_input(FOLLOWED["running sum of inputs"]).double(), cube()
    with pytest.raises(InputError, match="need all inputs at once"):
        kgraph.nngp(model, x, memory_gib=3e-5)


def gathered(index: Tensor) -> Net:
    return Net(lambda m, x: m.b(relu(m.a(x))[:, index].mean(1)), a=dense(8), b=dense())


def test_gathered_positions_against_monte_carlo() -> None:
    """Two of three positions are one: their average has another variance than that of three."""

    def sequences() -> Tensor:
        return torch.randn(2, 4, 8, generator=torch.Generator().manual_seed(1), dtype=torch.float64)

    case = Case(
        lambda: gathered(torch.tensor([2, 0, 0])), lambda: gathered(torch.tensor([2, 0, 1])), sequences, width=WIDTH
    )
    check_nngp(case)


def test_a_product_of_inputs_with_inputs_is_refused() -> None:
    model = Net(lambda m, x: m.a((x @ x.T) @ x), a=dense(SAME, 16))
    with pytest.raises(RuleError, match="mixes channels or inputs"):
        kgraph.nngp(model.double(), torch.randn(5, SAME, dtype=torch.float64))


def test_random_numbers_of_an_operation_come_from_the_seed() -> None:
    """Alpha dropout has no rule: measured on draws, the same for the same seed, and the user's generator stays."""
    model = torch.nn.Sequential(dense(SAME, 64), torch.nn.SELU(), torch.nn.AlphaDropout(0.3), dense(64, 64))
    x = torch.randn(3, SAME)
    before = torch.random.get_rng_state()
    first, again = (kgraph.nngp(model, x, seed=1) for _ in range(2))
    assert torch.equal(torch.random.get_rng_state(), before)
    assert torch.equal(first, again)
    assert not torch.equal(first, kgraph.nngp(model, x, seed=2))


def test_alpha_dropout_against_its_formula() -> None:
    """y = a (m u + (1 - m) alpha') + b keeps mean 0 and variance 1 of a standard u; different inputs: E[y y'] = keep^2
    a^2 E[u u'] for zero means, with a = (keep (1 + (1 - keep) alpha'^2))^(-1/2)."""
    keep, alpha = 0.7, -1.7580993408473766
    model = torch.nn.Sequential(dense(SAME, 64, bias=False), torch.nn.AlphaDropout(1 - keep))
    x = torch.randn(3, SAME, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    scale = SAME**0.5 / x.norm(dim=1, keepdim=True)
    found = kgraph.kernels(model, x * scale, variances={"0.weight": 1.0 / SAME}, nodes="all")
    plain = next(gram.nngp for name, gram in found.nodes.items() if name.startswith("linear"))
    a = (keep * (1 + (1 - keep) * alpha**2)) ** -0.5
    expected = torch.where(torch.eye(3, dtype=torch.bool), 1.0, keep**2 * a**2 * plain)
    # 8192 draws: a product of two values of unit variance has a standard error of about sqrt(2 / 8192)
    torch.testing.assert_close(found.nngp, expected, rtol=0, atol=4 * (2 / 8192) ** 0.5)


def mixer() -> Net:
    """A layer over the positions, the same for all channels: what it adds is no mean over many random numbers."""

    def forward(m: Net, x: Tensor) -> Tensor:
        h = m.read(x)
        return m.out(relu(h + m.down(relu(m.up(h.mT))).mT))[:, :2].mean(1)

    layers = {"read": dense(6, 512, bias=False), "out": dense(512, 512, bias=False)}
    return Net(forward, up=dense(4, 64, bias=False), down=dense(64, 4, bias=False), **layers).double()


def test_layers_over_positions_are_those_of_the_model_at_hand() -> None:
    """Exact given their weights, which the report says; another draw of them has another kernel."""
    torch.manual_seed(0)
    x, model, other = torch.randn(2, 4, 6, dtype=torch.float64), mixer(), mixer()
    found = kgraph.kernels(model, x, with_ntk=False)
    assert found.how == "assumed"
    samples = []
    with torch.no_grad():
        for _ in range(100):
            fresh = mixer()
            fresh.up, fresh.down = model.up, model.down
            y = fresh(x)
            samples.append(y @ y.T / y.shape[1])
    measured, error = torch.stack(samples).mean(0), torch.stack(samples).std(0) / 10
    # 8192 draws, and 512 channels whose second moments scatter: 5 / 512 a layer, two layers
    allowed = 4 * error + measured.diagonal().max() * (4 * (5 / 8192) ** 0.5 + 2.5 * 2 / 512)
    assert bool(((found.nngp - measured).abs() <= allowed).all())
    assert bool(((kgraph.nngp(other, x) - measured).abs() > allowed).any())


def test_no_ntk_without_the_part_of_a_parameter() -> None:
    with pytest.raises(RuleError, match=r"part of up\.weight in the NTK is not known.*kgraph\.nngp"):
        kgraph.ntk(mixer(), torch.randn(2, 4, 6))
