"""Every refusal is one named error whose message says what is wrong, where, and what to do."""

from __future__ import annotations

import random
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import kgraph
from kgraph import DKS, TAT
from kgraph.capture import capture
from kgraph.errors import CaptureError, ExportError, FileError, InputError, KGraphError, ModelError, TargetError

X = torch.randn(2, 8)


def small() -> nn.Module:
    return nn.Sequential(nn.Linear(8, 8), nn.Tanh(), nn.Linear(8, 4))


CALLS = (kgraph.analyze, kgraph.transform, kgraph.shaping_targets, kgraph.montecarlo)


@pytest.mark.parametrize("call", CALLS)
@pytest.mark.parametrize("thing", ["resnet50", None, nn.Linear, torch.relu])
def test_not_a_module(call: Any, thing: object) -> None:
    with pytest.raises(ModelError, match=r"expected a torch.nn.Module, got .* Pass the model itself"):
        call(thing)


@pytest.mark.parametrize("call", CALLS)
def test_wrapped_models_name_the_order(call: Any) -> None:
    compiled, parallel = torch.compile(small(), backend="eager"), nn.DataParallel(small())
    for model, name in ((compiled, "torch.compile"), (parallel, "DataParallel")):
        with pytest.raises(ModelError, match=rf"wrapped by {name}.*Transform the bare model first, then wrap"):
            call(model, X)


def test_distributed_wrapper(tmp_path: Path) -> None:
    torch.distributed.init_process_group("gloo", f"file://{tmp_path / 'store'}", rank=0, world_size=1)
    try:
        model = nn.parallel.DistributedDataParallel(small())
        with pytest.raises(ModelError, match=r"wrapped by DDP"):
            kgraph.transform(model, "dks", X)
    finally:
        torch.distributed.destroy_process_group()


class Branches(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(8, 8)

    def forward(self, x: Tensor) -> Tensor:
        x = self.layer(x)
        if x.sum() > 0:  # the line
            return torch.relu(x)
        return x


class Items(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(8, 8)

    def forward(self, x: Tensor) -> Tensor:
        x = self.layer(x)
        return x[: int(x.abs().sum().item()) % 2 + 1]  # the item


def line_of(text: str) -> int:
    lines = Path(__file__).read_text().splitlines()
    return next(i for i, line in enumerate(lines, 1) if line.endswith(text))


@pytest.mark.parametrize(("model", "mark"), [(Branches(), "# the line"), (Items(), "# the item")])
def test_data_dependent_control_flow_names_the_line(model: nn.Module, mark: str) -> None:
    with pytest.raises(CaptureError) as caught:
        kgraph.transform(model, "dks", X)
    message = str(caught.value)
    assert f"{Path(__file__).name}:{line_of(mark)}" in message
    assert type(model).__name__ in message and "torch.where" in message


class Moody(nn.Module):
    """Depends on python's random numbers: no graph reproduces it."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(8, 8)

    def forward(self, x: Tensor) -> Tensor:
        return self.layer(x) * random.random()


def test_forward_that_is_no_function_of_its_inputs() -> None:
    with pytest.raises(CaptureError, match=r"does not reproduce the model's output"):
        kgraph.analyze(Moody(), X)


class Variadic(nn.Module):
    def forward(self, *inputs: Tensor) -> Tensor:
        return torch.relu(inputs[0])


def test_variadic_forward() -> None:
    with pytest.raises(CaptureError, match=r"takes \*inputs.*Wrap it in a module that names them"):
        kgraph.analyze(Variadic(), X)


@pytest.mark.parametrize("inputs", [torch.randn(2, 5), (X, X), {"wrong": X}, torch.zeros(2, 8, dtype=torch.long)])
def test_wrong_example_inputs(inputs: Any) -> None:
    with pytest.raises(InputError, match=r"does not run on the example inputs.*\[\(2, \d.*Pass example_inputs"):
        kgraph.transform(small(), "dks", inputs)


@pytest.mark.parametrize("inputs", ["image.png", 3, (), [None]])
def test_inputs_that_are_no_tensors(inputs: object) -> None:
    with pytest.raises(InputError, match=r"Pass a tensor, a tuple of positional arguments or a dict"):
        kgraph.analyze(small(), inputs)


def test_inputs_that_cannot_be_inferred() -> None:
    with pytest.raises(InputError, match=r"cannot be inferred.*Pass example_inputs"):
        kgraph.analyze(nn.Sequential(nn.Tanh()))


@pytest.mark.parametrize("zeta", [1.0, 0.5, float("nan")])
def test_zeta(zeta: float) -> None:
    with pytest.raises(InputError, match=r"zeta is .*zeta > 1"):
        DKS(zeta=zeta)


@pytest.mark.parametrize("eta", [0.0, 1.0, -1.0, float("nan")])
def test_eta(eta: float) -> None:
    with pytest.raises(InputError, match=r"eta is .*eta in \(0, 1\)"):
        TAT(eta=eta)


@pytest.mark.parametrize("tau", [0.0, -1.0, float("nan")])
def test_tau(tau: float) -> None:
    with pytest.raises(InputError, match=r"tau is .*tau > 0"):
        TAT(tau=tau)


@pytest.mark.parametrize("method", ["batchnorm", None, DKS, 3])
def test_unknown_method(method: Any) -> None:
    for call in (kgraph.transform, kgraph.shaping_targets):
        with pytest.raises(InputError, match=r"unknown method .*'auto', 'dks', 'tat'"):
            call(small(), method, X)


@pytest.mark.parametrize("weight", [-0.1, 1.5, float("nan")])
def test_shortcut_weight(weight: float) -> None:
    for call in (kgraph.transform, kgraph.shaping_targets):
        with pytest.raises(InputError, match=r"shortcut_weight is .*\[0, 1\]"):
            call(small(), "dks", X, shortcut_weight=weight)


def test_unknown_distribution() -> None:
    with pytest.raises(InputError, match=r"distribution.*'suo', 'gaussian'"):
        kgraph.transform(small(), "dks", X, distribution="xavier")


class Product(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.leave = nn.Linear(8, 8), nn.Linear(8, 8), nn.Linear(8, 4)

    def forward(self, x: Tensor) -> Tensor:
        return self.leave(torch.tanh(self.a(x)) * self.b(x))


def test_unmet_targets() -> None:
    with pytest.raises(TargetError, match=r"has at least 2.*Raise the target"):
        kgraph.shaping_targets(Product(), "dks", X)
    ledger = kgraph.transform(Product(), "dks", X).kgraph.ledger
    assert any("has at least 2" in line for line in ledger.unmet)


def test_unknown_positions_and_mode() -> None:
    with pytest.raises(InputError, match=r"positions is 'grid'.*Choose one of 'exchangeable'"):
        kgraph.analyze(small(), X, positions="grid")
    with pytest.raises(InputError, match=r"mode is 'test'.*Choose one of 'train', 'eval'"):
        kgraph.analyze(small(), X, mode="test")
    with pytest.raises(InputError, match=r"mode is 'test'"):
        kgraph.montecarlo(small(), X, mode="test")


def test_draws() -> None:
    with pytest.raises(InputError, match=r"draws is 1.*at least 2"):
        kgraph.montecarlo(small(), X, draws=1)


def test_opset(tmp_path: Path) -> None:
    path = tmp_path / "model.onnx"
    with pytest.raises((ExportError, InputError), match=r"opset.*18"):
        kgraph.export_onnx(small(), path, X, opset=17)
    assert list(tmp_path.iterdir()) == []


def test_unwritable_path_leaves_nothing(tmp_path: Path) -> None:
    pytest.importorskip("onnxruntime")
    (tmp_path / "file").write_text("")
    with pytest.raises(FileError, match=r"file"):
        kgraph.export_onnx(small(), tmp_path / "file" / "model.onnx", X)
    assert [entry.name for entry in tmp_path.iterdir()] == ["file"]


def test_a_failed_call_leaves_the_model_as_it_was() -> None:
    model = Branches().train()
    before = {key: value.clone() for key, value in model.state_dict().items()}
    with pytest.raises(CaptureError):
        kgraph.transform(model, "dks", X, inplace=True)
    assert model.training and model.layer.training
    assert all(torch.equal(before[key], value) for key, value in model.state_dict().items())


def test_all_errors_are_one_family() -> None:
    for error in (CaptureError, ExportError, InputError, ModelError, TargetError):
        assert issubclass(error, KGraphError)
    with pytest.raises(KGraphError):
        capture(small(), torch.randn(2, 3))
