"""Attacks from the user's side: what any call must leave alone, and what a transformed model must not lose."""

from __future__ import annotations

import copy
import io
import random
import warnings
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional

import kgraph
from kgraph.capture import capture
from kgraph.errors import ModelError

pytestmark = pytest.mark.filterwarnings("ignore:.*LeafSpec.*:FutureWarning")  # PyTorch, about its own pickles
WIDTH = 16
METHODS = ("tat", "dks", "edge-of-chaos", "ntk-chaos", "residual-scaling")


def draw(*shape: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(0))


X = draw(4, WIDTH)


class Restless(nn.Module):
    """Writes to its input, its buffers and its attributes, and draws from three generators."""

    def __init__(self) -> None:
        super().__init__()
        self.enter, self.leave = nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, 4)
        self.register_buffer("count", torch.zeros((), dtype=torch.long))
        self.register_buffer("average", torch.zeros(WIDTH))
        self.calls, self.shapes = 0, list[Any]()

    def forward(self, x: Tensor) -> Tensor:
        self.calls += 1
        self.shapes.append(x.shape)
        self.count += 1
        random.random()
        np.random.rand()
        if self.training:
            x = x + 0.1 * torch.randn_like(x)
        h = torch.relu(self.enter(x.mul_(2)))
        self.average.mul_(0.9).add_(0.1 * h.detach().mean(0))
        return self.leave(h)


@pytest.mark.parametrize("call", [kgraph.analyze, kgraph.transform])
def test_whatever_a_forward_does_is_undone(call: Any) -> None:
    model, x = Restless(), X.clone()
    states = torch.get_rng_state(), random.getstate(), np.random.get_state()[1].copy()  # type: ignore[index]
    made = call(model, example_inputs=x)
    assert torch.equal(x, X) and not hasattr(x, "_dynamo_dynamic_indices")
    assert model.calls == 0 and model.shapes == [] and int(model.count) == 0 and not model.average.any()
    assert torch.equal(torch.get_rng_state(), states[0]) and random.getstate() == states[1]
    assert (np.random.get_state()[1] == states[2]).all()  # type: ignore[index]
    if isinstance(made, nn.Module):  # the example inputs are no data: averages begin where the model's do
        assert int(made.get_buffer("count")) == 0 and not made.get_buffer("average").any()


def test_lazy_parameters_stay_lazy() -> None:
    model = nn.Sequential(nn.LazyLinear(8), nn.ReLU(), nn.LazyLinear(3))
    assert kgraph.analyze(model, X).final.q > 0
    assert isinstance(model[0], nn.LazyLinear) and model[0].has_uninitialized_params()


class Counted(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.enter, self.leave = nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, 4)
        self.register_buffer("count", torch.zeros((), dtype=torch.long))

    def forward(self, x: Tensor) -> Tensor:
        self.count += 1
        return self.leave(torch.relu(self.enter(x)))


def saved_and_loaded(model: nn.Module) -> nn.Module:
    file = io.BytesIO()
    torch.save(model, file)
    file.seek(0)
    return torch.load(file, weights_only=False)


def test_a_loaded_module_counts_on() -> None:
    """fx reads the code again when it loads; buffers that nothing random meets were executed instead of read."""
    made = kgraph.transform(Counted(), "tat", X)
    made(X)
    loaded = saved_and_loaded(made)
    assert loaded.state_dict().keys() == made.state_dict().keys()
    loaded(X)
    assert int(loaded.get_buffer("count")) == 2


class Constants(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.enter, self.leave = nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, 4)
        self.ramp = torch.linspace(-0.1, 0.1, WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        return self.leave(torch.relu(self.enter(x + self.ramp + torch.tensor([0.1, -0.1] * (WIDTH // 2)))))


def test_constants_are_no_state() -> None:
    model = Constants()
    made = kgraph.transform(model, "tat", X)
    made.load_state_dict(model.state_dict())
    for other in (copy.deepcopy(made), saved_and_loaded(made)):
        assert other.state_dict().keys() == model.state_dict().keys()
        assert torch.equal(other(X), made(X))


@pytest.mark.parametrize("method", ["edge-of-chaos", "residual-scaling"])
def test_a_frozen_norm_stays_frozen(method: str) -> None:
    model = nn.Sequential(nn.Linear(WIDTH, WIDTH), nn.BatchNorm1d(WIDTH), nn.ReLU(), nn.Linear(WIDTH, 4))
    model[1].eval()
    made = kgraph.transform(model, method, X)
    assert made.training and not made.get_submodule("1").training
    assert not saved_and_loaded(made).get_submodule("1").training
    assert any(note.startswith("1: in eval mode") for note in kgraph.analyze(model, X).analysis.notes)


class Lists(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.enter, self.leave = nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, 4)

    def forward(self, xs: list[Tensor], more: dict[str, Tensor]) -> Tensor:
        return self.leave(torch.relu(sum(self.enter(x) for x in xs) + more["x"]))


def test_tensors_in_structures() -> None:
    made = kgraph.transform(Lists(), "tat", ([X, X + 1], {"x": X}))
    for n in (1, 7):
        x = draw(n, WIDTH)
        assert made([x, x], {"x": x}).shape == (n, 4)


@pytest.mark.filterwarnings("ignore:The tensor attributes:UserWarning")  # of torch, about a GRU's list of weights
def test_time_first_sequences_are_captured() -> None:
    """torch.export marks its inputs as dynamic; the attempt without a dynamic batch met the marks of the first."""
    model = nn.Sequential(nn.GRU(WIDTH, 8))  # dimension 0 is the time, which export unrolls
    assert any("batch size is fixed" in note for note in capture(model, draw(5, 3, WIDTH)).notes)


class Bag(nn.Module):
    def __init__(self, mode: str) -> None:
        super().__init__()
        self.bag, self.head = nn.EmbeddingBag(500, 64, mode=mode), nn.Linear(64, 4)

    def forward(self, ids: Tensor) -> Tensor:
        return self.head(self.bag(ids))


@pytest.mark.parametrize(("mode", "factor"), [("sum", 6.0), ("mean", 1 / 6)])
def test_embedding_bags(mode: str, factor: float) -> None:
    """Rows are N(0, 1): the sum of six has q = 6, up to 5 standard errors of E[w^2] over 32,000 entries (.04)."""
    report = kgraph.analyze(Bag(mode), torch.arange(24).reshape(4, 6))
    bag = report.nodes[0]
    assert bag.q == pytest.approx(factor, rel=0.05) and bag.ntk == pytest.approx(factor, rel=1e-12)
    assert bag.c == pytest.approx(report.analysis.cosines, abs=0.05)
    with pytest.raises(kgraph.RuleError, match="maximum of an embedding bag"):
        kgraph.analyze(Bag("max"), torch.arange(24).reshape(4, 6))


def test_a_model_of_numbers_only() -> None:
    class OneHot(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = nn.Linear(4, 4)

        def forward(self, ids: Tensor) -> Tensor:
            return self.layer(functional.one_hot(ids, 4).float())

    with pytest.raises(kgraph.RuleError, match="nothing in OneHot depends on an input"):
        kgraph.analyze(OneHot(), torch.zeros(3, dtype=torch.long))


class TwoReads(nn.Module):
    """relu(h) is an output, and a part of tanh(relu(h))."""

    def __init__(self) -> None:
        super().__init__()
        self.enter, self.one, self.two = (nn.Linear(WIDTH, WIDTH) for _ in range(3))

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        h = torch.relu(self.enter(x))
        return self.one(h), self.two(torch.tanh(h))


def test_a_function_of_another_ones_nodes() -> None:
    counts = kgraph.transform(TwoReads(), "ntk-chaos", X).kgraph.ledger.counts()
    assert counts["balance activation"] == 2


def test_one_weight_for_two_variances_is_said() -> None:
    """It reads the input (q = 1, to q* = 1/2) and relus (2): drawn once, which no report may call critical."""
    layer = nn.Linear(WIDTH, WIDTH)
    made = kgraph.transform(nn.Sequential(layer, nn.ReLU(), layer, nn.ReLU(), layer), "edge-of-chaos", X)
    assert any("shares its weight" in line for line in made.kgraph.ledger.unmet)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_is_no_failure(dtype: torch.dtype) -> None:
    layers = [m for _ in range(3) for m in (nn.Linear(WIDTH, WIDTH), nn.ReLU())]
    made = kgraph.transform(nn.Sequential(*layers, nn.Linear(WIDTH, 4)).to(dtype), "tat", X.to(dtype))
    assert made.kgraph.ledger.unmet == ()
    assert {p.dtype for p in made.parameters()} == {dtype} and made(X.to(dtype)).dtype == dtype


def test_complex_gains() -> None:
    class Spectral(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = nn.Linear(WIDTH, WIDTH)
            self.filter = nn.Parameter(torch.randn(WIDTH // 2 + 1, dtype=torch.cfloat))

        def forward(self, x: Tensor) -> Tensor:
            return torch.fft.irfft(torch.fft.rfft(torch.relu(self.layer(x))) * self.filter, n=WIDTH)

    for method in METHODS:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of torch, where the sampled rule takes real parts
            made = kgraph.transform(Spectral(), method, X)
        assert made(X).shape == X.shape


def test_what_is_left_out_is_said() -> None:
    model = nn.Sequential(nn.Linear(WIDTH, WIDTH), nn.ReLU(), nn.Linear(WIDTH, 4))
    model.register_parameter("spare", nn.Parameter(torch.ones(2)))
    assert any("left out: spare" in note for note in kgraph.transform(model, "tat", X).kgraph.ledger.notes)


def test_scripted_parts_and_reserved_names() -> None:
    class Named(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.meta = nn.Linear(WIDTH, 4)

        def forward(self, x: Tensor) -> Tensor:
            return self.meta(x)

    with pytest.raises(kgraph.CaptureError, match="Rename submodules"):
        kgraph.analyze(Named(), X)
    scripted = torch.jit.trace(nn.Linear(WIDTH, 4), X)
    with pytest.raises(ModelError, match=r"TorchScript \(at node '1'\)"):
        kgraph.analyze(nn.Sequential(nn.Linear(WIDTH, WIDTH), scripted), X)


def test_a_refusal_prints_nothing(capfd: pytest.CaptureFixture[str]) -> None:
    class Branches(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return x if x.sum() > 0 else torch.relu(x)

    with pytest.raises(kgraph.CaptureError):
        kgraph.analyze(Branches(), X)
    assert capfd.readouterr().err == ""
