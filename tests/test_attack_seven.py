"""Cosine classifiers, casts of constructors, and odd arguments: models and calls that strangers wrote."""

from __future__ import annotations

import copy
import io
import math
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import kgraph
from kgraph.emitted import EmittedModule
from kgraph.errors import InputError

WIDTH, INPUTS = 128, 32


class CosineHead(nn.Module):
    """Logits are features of unit length times the weight's rows, of unit length or not."""

    def __init__(self, unit_rows: bool, scaled: bool) -> None:
        super().__init__()
        self.enter = nn.Linear(INPUTS, WIDTH, bias=False)
        self.rows = nn.Parameter(torch.randn(64, WIDTH))
        self.scale = nn.Parameter(torch.tensor(10.0)) if scaled else 1.0
        self.unit_rows = unit_rows

    def forward(self, x: Tensor) -> Tensor:
        features = F.normalize(torch.relu(self.enter(x)), dim=-1)
        return self.scale * F.linear(features, F.normalize(self.rows, dim=-1) if self.unit_rows else self.rows)


def _white(rows: int) -> Tensor:
    x = torch.randn(rows, INPUTS, generator=torch.Generator().manual_seed(0))
    return x * (INPUTS**0.5 / x.norm(dim=-1, keepdim=True))


@pytest.mark.parametrize("method", ["tat", "dks"])
@pytest.mark.parametrize("scaled", [True, False])
@pytest.mark.parametrize("unit_rows", [True, False])
def test_cosine_classifiers(unit_rows: bool, scaled: bool, method: str) -> None:
    """Cosines stay cosines, E[y^2] = 1 / n, and that is no q = 1, which is said; of other rows q = 1 holds."""
    q, draws = 1 / WIDTH if unit_rows else 1.0, []
    for seed in range(4):
        shaped = kgraph.transform(CosineHead(unit_rows, scaled), method, torch.randn(2, INPUTS), seed=seed)
        draws.append(float(shaped(_white(500)).detach().square().mean()))
        assert math.isclose(shaped.kgraph.after.final.q, q, rel_tol=1e-6)
        assert (
            any(
                "q is not 1 at the output" in line and "size that a norm gave" in line
                for line in shaped.kgraph.ledger.unmet
            )
            == unit_rows
        )
    measured = torch.tensor(draws)
    assert abs(float(measured.mean()) - q) < q * 4 / WIDTH + 4 * float(measured.std()) / len(draws) ** 0.5


class Recurrent(nn.Module):
    """A first state in one of the ways that people write it."""

    def __init__(self, first: Callable[[nn.Module, Tensor], Tensor]) -> None:
        super().__init__()
        self.enter, self.again, self.leave = nn.Linear(INPUTS, 16), nn.Linear(16, 16), nn.Linear(16, 4)
        self.first = first

    def forward(self, x: Tensor) -> Tensor:
        state = self.first(self, x)
        for _ in range(2):
            state = torch.tanh(self.again(state) + self.enter(x))
        return self.leave(state)


class Cells(nn.Module):
    def __init__(self, kind: Callable[..., nn.RNNBase]) -> None:
        super().__init__()
        self.cells, self.leave = kind(INPUTS, 16, batch_first=True), nn.Linear(16, 4)

    def forward(self, x: Tensor) -> Tensor:
        return self.leave(torch.relu(self.cells(x.unsqueeze(1))[0][:, -1]))


class Added(nn.Module):
    """Zeros of the input's type, which in float64 could as well be float32, and not in a narrower type."""

    def __init__(self) -> None:
        super().__init__()
        self.enter, self.leave = nn.Linear(INPUTS, 16), nn.Linear(16, 4)

    def forward(self, x: Tensor) -> Tensor:
        return self.leave(torch.relu(self.enter(x)) + torch.zeros(x.shape[0], 16, dtype=x.dtype))


def _of_input(model: nn.Module, x: Tensor) -> Tensor:
    return torch.zeros(x.shape[0], 16, dtype=x.dtype, device=x.device)


def _of_weight(model: nn.Module, x: Tensor) -> Tensor:
    weight = model.get_parameter("again.weight")
    return torch.full((x.shape[0], 16), 0.3, dtype=weight.dtype, device=weight.device)


def _moved(model: nn.Module, x: Tensor) -> Tensor:
    return torch.ones(x.shape[0], 16).to(x)


WITH_TYPES: dict[str, Callable[[], nn.Module]] = {
    "of the input": lambda: Recurrent(_of_input),
    "of a weight": lambda: Recurrent(_of_weight),
    "moved": lambda: Recurrent(_moved),
    "added": Added,
    "nn.RNN": lambda: Cells(nn.RNN),
    "nn.LSTM": lambda: Cells(nn.LSTM),
    "nn.GRU": lambda: Cells(nn.GRU),
}


def _saved(model: EmittedModule) -> nn.Module:
    file = io.BytesIO()
    torch.save(model, file)
    file.seek(0)
    loaded = torch.load(file, weights_only=False)
    assert isinstance(loaded, nn.Module)
    return loaded


@pytest.mark.filterwarnings("ignore:.*LeafSpec.*:FutureWarning")
@pytest.mark.parametrize("name", WITH_TYPES)
def test_what_a_forward_makes_follows_the_type_of_the_model(name: str) -> None:
    """Wherever the user's model can be cast: in copies and files too, to the same numbers up to rounding."""
    model, x = WITH_TYPES[name](), torch.randn(3, INPUTS)
    shaped = kgraph.transform(model, "dks", x[:2])
    assert set(shaped.state_dict()) == set(model.state_dict())
    given = shaped(x)
    for made in (shaped, copy.deepcopy(shaped), _saved(shaped)):
        assert torch.equal(made(x), given)
        for dtype in (torch.bfloat16, torch.float64):
            cast, wide = copy.deepcopy(made).to(dtype), x.to(dtype)
            assert model.to(dtype)(wide).dtype == cast(wide).dtype == dtype
            torch.testing.assert_close(
                cast(wide).float(), given, rtol=0, atol=0.05 if dtype == torch.bfloat16 else 1e-5
            )
        model.float()
    with torch.autocast("cpu", torch.bfloat16):
        assert shaped(x).dtype == torch.bfloat16


class Angles(nn.Module):
    """Positions that are float32 on purpose, beside a state that is of the input's type."""

    def __init__(self, state: bool) -> None:
        super().__init__()
        self.enter, self.again, self.leave = nn.Linear(INPUTS, 16), nn.Linear(16, 16), nn.Linear(16, 4)
        self.state = state

    def forward(self, x: Tensor) -> Tensor:
        places = torch.sin(torch.arange(16, dtype=torch.float32) / 7)
        hidden = self.enter(x)
        if self.state:
            hidden = hidden + self.again(torch.zeros(x.shape[0], 16, dtype=x.dtype))
        return self.leave(torch.relu(hidden) * places)


@pytest.mark.parametrize("state", [False, True])
def test_a_type_that_is_meant_stays(state: bool) -> None:
    """In float64 the model computes with the sines of float32, and so does what is emitted."""
    shaped = kgraph.transform(Angles(state), "dks", torch.randn(2, INPUTS))
    made = [node for node in shaped.graph.nodes if str(node.target) in ("aten.arange.default", "aten.zeros.default")]
    followed = [str(node.target) for node in made if node.kwargs["dtype"] is not torch.float32]
    assert len(made) == 1 + state and followed == ["aten.zeros.default"] * state
    double, x = shaped.double(), torch.randn(3, INPUTS, dtype=torch.float64)
    assert double(x).dtype == torch.float64


def _perceptron() -> nn.Module:
    return nn.Sequential(nn.Linear(6, 8), nn.ReLU(), nn.Linear(8, 3))


ODD: dict[str, tuple[Callable[[Tensor], Tensor], str]] = {
    "sparse": (Tensor.to_sparse, r"layout torch.sparse_coo.*to_dense"),
    "rows": (Tensor.to_sparse_csr, r"layout torch.sparse_csr.*to_dense"),
    "quantized": (lambda x: torch.quantize_per_tensor(x, 0.1, 0, torch.qint8), "quantized.*dequantize"),
    "nested": (lambda x: torch.nested.nested_tensor(list(x)), "nested tensor.*padded"),
    "meta": (lambda x: x.to("meta"), "meta"),
}
CALLS: dict[str, Callable[[nn.Module, Tensor], object]] = {
    "kernels": kgraph.kernels,
    "second": lambda model, x: kgraph.kernels(model, torch.randn(3, 6), x),
    "ntk": kgraph.ntk,
    "nngp": kgraph.nngp,
    "function": kgraph.kernel_function,
    "called": lambda model, x: kgraph.kernel_function(model, torch.randn(3, 6))(x),
    "compare": kgraph.compare,
    "empirical": kgraph.empirical_ntk,
    "montecarlo": kgraph.montecarlo,
    "analyze": kgraph.analyze,
    "data": lambda model, x: kgraph.analyze(model, x, inputs="data"),
    "transform": lambda model, x: kgraph.transform(model, "dks", x),
    "targets": lambda model, x: kgraph.shaping_targets(model, "dks", x),
    "moments": lambda model, x: kgraph.InputMoments.of(x),
}


@pytest.mark.filterwarnings("ignore:.*(nested|Sparse|quantize).*:UserWarning", "ignore:.*quantiz.*:DeprecationWarning")
@pytest.mark.parametrize("call", CALLS)
@pytest.mark.parametrize("odd", ODD)
def test_inputs_that_are_no_arrays(odd: str, call: str) -> None:
    make, said = ODD[odd]
    with pytest.raises(InputError, match=said):
        CALLS[call](_perceptron(), make(torch.randn(3, 6)))


@pytest.mark.parametrize("get", [3, None, b"ntk", {"ntk": 1}, ("nngp", 3), (), "both", [["ntk"]]])
def test_kernels_that_there_are_not(get: object) -> None:
    x = torch.randn(3, 6)
    kernel = kgraph.kernel_function(_perceptron(), x)
    with pytest.raises(InputError, match="get"):
        kernel(x, get=get)  # type: ignore[arg-type]
