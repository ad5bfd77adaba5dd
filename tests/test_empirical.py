"""The measured NTK: against dense Jacobians, against the closed form, sketched, and with the model left alone."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor, nn

import kgraph
from kgraph import empirical
from kgraph.empirical import empirical_ntk
from kgraph.errors import InputError, ModelError


def tiny() -> nn.Sequential:
    return nn.Sequential(nn.Linear(4, 6), nn.Tanh(), nn.Linear(6, 3))


def dense(model: nn.Module, x: Tensor, factors: dict[str, float] | None = None) -> Tensor:
    """(1/O) J m J^T from `torch.autograd.functional.jacobian`, all inputs at once."""
    model.double()
    total = torch.zeros((), dtype=torch.float64)
    for name, p in model.named_parameters():

        def f(value: Tensor, name: str = name) -> Tensor:
            return torch.func.functional_call(model, {name: value}, (x.double(),)).flatten(1)

        jacobian = torch.autograd.functional.jacobian(f, p.detach())
        assert isinstance(jacobian, Tensor)
        rows = jacobian.flatten(2)
        total = total + (factors or {}).get(name, 1.0) * torch.einsum("iop,jop->ij", rows, rows) / rows.shape[1]
    return total


class Tied(nn.Module):
    """Tokens in, the same table out, attention between."""

    def __init__(self) -> None:
        super().__init__()
        self.table = nn.Embedding(7, 8)
        self.layer = nn.TransformerEncoderLayer(8, 2, 16, dropout=0.0, batch_first=True)
        self.out = nn.Linear(8, 7, bias=False)
        self.out.weight = self.table.weight

    def forward(self, ids: Tensor, scale: Tensor) -> dict[str, Tensor]:
        return {"ids": ids, "logits": self.out(self.layer(self.table(ids))) * scale[:, None, None]}


def convnet() -> nn.Sequential:
    norm = nn.BatchNorm2d(4)
    nn.init.zeros_(norm.weight)  # hides the batch from the output, not from the derivative
    return nn.Sequential(nn.Conv2d(2, 4, 3), norm, nn.ReLU(), nn.Flatten(), nn.Linear(16, 3))


@pytest.mark.parametrize("build", [tiny, convnet, lambda: convnet().eval()])
def test_exact_is_the_dense_jacobian(build: type[nn.Module]) -> None:
    model = build()
    x = torch.randn(3, 4) if isinstance(model[0], nn.Linear) else torch.randn(3, 2, 4, 4)  # type: ignore[index]
    found = empirical_ntk(model, x)
    assert found.how == "exact" and found.standard_error is None
    torch.testing.assert_close(found.matrix, dense(model, x), rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("budget", [1, 200, 2**25])
def test_tiles_and_chunks_change_nothing(budget: int, monkeypatch: pytest.MonkeyPatch) -> None:
    model, x, y = tiny(), torch.randn(3, 4), torch.randn(2, 4)
    whole = empirical_ntk(model, torch.cat([x, y])).matrix
    monkeypatch.setattr(empirical, "BUDGET", budget)
    torch.testing.assert_close(empirical_ntk(model, x, y).matrix, whole[:3, 3:], rtol=1e-10, atol=1e-12)
    torch.testing.assert_close(empirical_ntk(model, x).matrix, whole[:3, :3], rtol=1e-10, atol=1e-12)


def test_multipliers_and_a_dropped_parameter() -> None:
    """Factors multiply each parameter's part; leaving one bias out is noticed (negative control)."""
    model, x = tiny(), torch.randn(3, 4)
    factors = {"0.weight": 2.5, "2.bias": 0.0}
    found = empirical_ntk(model, x, multipliers=factors).matrix
    expected = dense(model, x, factors)
    torch.testing.assert_close(found, expected, rtol=1e-10, atol=1e-12)
    with pytest.raises(AssertionError):
        torch.testing.assert_close(found, dense(model, x, {"0.weight": 2.5}), rtol=1e-10, atol=1e-12)
    entries = torch.full((6, 4), 2.5)
    found = empirical_ntk(model, x, multipliers={**factors, "0.weight": entries}).matrix
    torch.testing.assert_close(found, expected, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("training", [False, True])
def test_dict_inputs_and_tied_weights(training: bool) -> None:
    """A tied table counts once, with both of its gradients; a multiplier answers to either name."""
    model = Tied().train(training)
    x = {"ids": torch.randint(0, 7, (3, 5)), "scale": torch.tensor([1.0, 2.0, 0.5])}
    found = empirical_ntk(model, x).matrix
    model.double()
    logits = model(x["ids"], x["scale"].double())["logits"].flatten(1)
    rows = [
        torch.cat([g.flatten() for g in torch.autograd.grad(v, list(model.parameters()), retain_graph=True)])
        for v in logits.flatten()
    ]
    jacobian = torch.stack(rows).reshape(3, 35, -1)
    expected = torch.einsum("iop,jop->ij", jacobian, jacobian) / 35
    torch.testing.assert_close(found, expected, rtol=1e-10, atol=1e-12)
    for name in ("table.weight", "out.weight"):
        less = empirical_ntk(model, x, multipliers={name: 0.0}).matrix
        assert (less.diagonal() < found.diagonal()).all()


def test_sketch_is_unbiased() -> None:
    """Within 4 standard errors; the mean of 200 sketches within 4 of theirs, and the error says their spread."""
    model, x = nn.Sequential(nn.Linear(4, 16), nn.Tanh(), nn.Linear(16, 40)), torch.randn(3, 4)
    exact = empirical_ntk(model, x).matrix
    one = empirical_ntk(model, x, sketch=64, seed=5)
    assert one.standard_error is not None and one.how == "sampled: 64 of 40 output directions"
    assert ((one.matrix - exact).abs() <= 4 * one.standard_error).all()
    many = [empirical_ntk(model, x, sketch=8, seed=seed) for seed in range(200)]
    values = torch.stack([m.matrix for m in many])
    assert ((values.mean(0) - exact).abs() <= 4 * values.std(0) / math.sqrt(200)).all()
    claimed = torch.stack([m.standard_error for m in many if m.standard_error is not None]).square().mean(0).sqrt()
    torch.testing.assert_close(claimed, values.std(0), rtol=0.25, atol=0.0)
    assert torch.equal(one.matrix, empirical_ntk(model, x, sketch=64, seed=5).matrix)


def test_wide_network_has_the_closed_form() -> None:
    """Fresh draws of a wide MLP against `kgraph.ntk`: 4 standard errors and 4 x 3 layers / width."""
    width, draws, x = 512, 12, torch.randn(3, 8)

    def draw() -> nn.Sequential:
        layers = [nn.Linear(8, width), nn.Linear(width, width), nn.Linear(width, 4)]
        for layer in layers:
            nn.init.normal_(layer.weight, std=math.sqrt(2 / layer.in_features))
            nn.init.normal_(layer.bias, std=0.1)
        return nn.Sequential(layers[0], nn.ReLU(), layers[1], nn.ReLU(), layers[2])

    moments = {f"{i}.weight": 2 / n for i, n in ((0, 8), (2, width), (4, width))} | {
        f"{i}.bias": 0.01 for i in (0, 2, 4)
    }
    predicted = kgraph.ntk(draw(), x, variances=moments)
    measured = torch.stack([empirical_ntk(draw(), x).matrix for _ in range(draws)])
    scale = (predicted.diagonal()[:, None] * predicted.diagonal()).sqrt()
    allowed = 4 * measured.std(0) / math.sqrt(draws) + 12 / width * scale
    assert ((measured.mean(0) - predicted).abs() <= allowed).all()
    without = torch.stack([empirical_ntk(draw(), x, multipliers={"2.weight": 0.0}).matrix for _ in range(draws)])
    assert ((without.mean(0) - predicted).abs() > allowed).any()


def test_the_model_and_the_generators_stay() -> None:
    model, x = nn.Sequential(convnet(), nn.Dropout(0.5)), torch.randn(3, 2, 4, 4)
    model[0][1].eval()  # type: ignore[index]
    before = {name: t.clone() for name, t in model.state_dict().items()}
    modes = [m.training for m in model.modules()]
    state = torch.get_rng_state()
    first = empirical_ntk(model, x, seed=3).matrix
    assert torch.equal(state, torch.get_rng_state())
    assert modes == [m.training for m in model.modules()]
    assert all(torch.equal(t, before[name]) for name, t in model.state_dict().items())
    assert all(p.grad is None and p.dtype == torch.float32 for p in model.parameters())
    assert torch.equal(first, empirical_ntk(model, x, seed=3).matrix)


def test_refusals() -> None:
    x = torch.randn(2, 4)
    with pytest.raises(InputError, match="sketch is 1"):
        empirical_ntk(tiny(), x, sketch=1)
    with pytest.raises(InputError, match="no parameter 'nope'"):
        empirical_ntk(tiny(), x, multipliers={"nope": 1.0})
    with pytest.raises(InputError, match="no parameters"):
        empirical_ntk(nn.ReLU(), x)
    with pytest.raises(ModelError):
        empirical_ntk("model", x)  # type: ignore[arg-type]
