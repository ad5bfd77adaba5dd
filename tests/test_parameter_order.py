"""Parameters, buffers and keys of an emitted module stand in the model's own order, and so do those of its copies.

Averages of weights and optimizer states are matched to parameters by their order: where shapes agree, another order is
an error that nothing reports.
"""

from __future__ import annotations

import copy
import io
import pickle
from collections.abc import Callable, Iterable
from typing import Any

import pytest
import torch
import zoo
from torch import Tensor, fx, nn
from torch.nn.utils import parametrizations
from torch.optim.swa_utils import AveragedModel

import kgraph
from kgraph.capture import capture
from kgraph.emitted import EmittedModule

pytestmark = pytest.mark.filterwarnings("ignore:.*LeafSpec.*:FutureWarning")
X = torch.randn(3, 8, generator=torch.Generator().manual_seed(0))


class Backwards(nn.Module):
    """Registered in another order than called, at several depths, all of one shape; a norm that a transform removes."""

    def __init__(self) -> None:
        super().__init__()
        self.last, self.first = nn.Linear(8, 8), nn.Linear(8, 8)
        self.body = nn.ModuleDict({"b": nn.Linear(8, 8), "a": nn.Sequential(nn.Linear(8, 8), nn.Tanh())})
        self.norm = nn.BatchNorm1d(8)
        self.gain = nn.Parameter(torch.ones(8))
        self.register_buffer("table", torch.linspace(0, 1, 8))
        self.middle = nn.Linear(8, 8)
        self.register_buffer("offset", torch.zeros(8))
        self.unread = nn.Linear(8, 8)

    def forward(self, x: Tensor) -> Tensor:
        h = torch.tanh(self.norm(self.first(x + self.offset)))
        h = self.body["a"](torch.relu(self.middle(h))) + self.table
        return self.last(self.body["b"](nn.functional.dropout(h, 0.1, self.training)) * self.gain)


class Tied(nn.Module):
    """The tied weight is known by its first name; it is read by its second one first."""

    def __init__(self) -> None:
        super().__init__()
        self.late, self.early = nn.Linear(8, 8), nn.Linear(8, 8)
        self.other = nn.Linear(8, 8)
        self.early.weight = self.late.weight

    def forward(self, x: Tensor) -> Tensor:
        return self.late(torch.tanh(self.other(torch.tanh(self.early(x)))))


class Functional(nn.Module):
    """Parameters without modules, and a layer whose weight is normalized: folded into a plain one."""

    def __init__(self) -> None:
        super().__init__()
        self.weights = nn.ParameterList([torch.randn(8, 8) for _ in range(3)])
        self.normed = parametrizations.weight_norm(nn.Linear(8, 8))
        self.direct = nn.Parameter(torch.randn(8, 8))

    def forward(self, x: Tensor) -> Tensor:
        h = torch.tanh(torch.tanh(x @ self.direct) @ self.weights[2])
        return torch.tanh(self.normed(torch.tanh(h @ self.weights[0]))) @ self.weights[1]


def _chain(depth: int = 4) -> nn.Module:
    return nn.Sequential(*(layer for _ in range(depth) for layer in (nn.Linear(8, 8), nn.Tanh())), nn.Linear(8, 8))


def _traced(model: nn.Module) -> EmittedModule:
    return capture(copy.deepcopy(model), X, front_end="trace").emit()


def _exported(model: nn.Module) -> EmittedModule:
    return capture(copy.deepcopy(model), X, front_end="export").emit()


def _inplace(model: nn.Module) -> EmittedModule:
    return kgraph.transform(copy.deepcopy(model), "tat", X, inplace=True)


def _through_file(module: EmittedModule) -> EmittedModule:
    file = io.BytesIO()
    torch.save(module, file)
    file.seek(0)
    return torch.load(file, weights_only=False)


COPIES: dict[str, Callable[[Any], Any]] = {
    "itself": lambda module: module,
    "deepcopy": copy.deepcopy,
    "copy": copy.copy,
    "file": _through_file,
    "pickle": lambda module: pickle.loads(pickle.dumps(module)),
    "file of a copy": lambda module: _through_file(copy.deepcopy(module)),
    "copy of a file": lambda module: copy.deepcopy(_through_file(_through_file(module))),
    "inside another": lambda module: copy.deepcopy(nn.Sequential(module))[0],
}
EMISSIONS: dict[str, Callable[[nn.Module], EmittedModule]] = {
    "traced": _traced,
    "exported": _exported,
    "tat": lambda model: kgraph.transform(model, "tat", X),
    "inplace": _inplace,
    "residual scaling": lambda model: kgraph.transform(model, "residual-scaling", X),
}


def _listed(model: nn.Module) -> dict[str, list[str]]:
    return {
        "parameters": [name for name, _ in model.named_parameters()],
        "tied too": [name for name, _ in model.named_parameters(remove_duplicate=False)],
        "buffers": [name for name, _ in model.named_buffers()],
        "state": list(model.state_dict()),
    }


def _in_order_of(own: Iterable[str], reference: list[str]) -> bool:
    """Whether names that both have stand in the order of the reference."""
    common = [name for name in own if name in reference]
    return bool(common) and common == [name for name in reference if name in common]


@pytest.mark.parametrize("emission", EMISSIONS)
@pytest.mark.parametrize("build", [Backwards, Tied, Functional, _chain])
def test_order_is_that_of_the_model(build: Callable[[], nn.Module], emission: str) -> None:
    module = EMISSIONS[emission](build())
    reference = build()
    if isinstance(reference, Functional) and emission in ("tat", "inplace", "residual scaling"):
        torch.nn.utils.parametrize.remove_parametrizations(reference.normed, "weight")  # as the transform does
    expected = _listed(reference)
    for name, copied in COPIES.items():
        for kind, names in _listed(copied(module)).items():
            common = [one for one in names if one in expected[kind]]
            kept = [one for one in expected[kind] if one in common]
            assert common == kept, (name, kind)
            assert len(common) > 3 or kind == "buffers", (name, kind)


def test_a_bare_graph_module_has_another_order() -> None:
    """Negative control: what torch.fx makes of the same graph holds the parameters as the graph reads them."""
    module = _exported(Backwards())
    bare = fx.GraphModule(module, module.graph)
    names = _listed(Backwards())["tied too"]
    assert _in_order_of(_listed(module)["tied too"], names) and not _in_order_of(_listed(bare)["tied too"], names)


@pytest.mark.parametrize("name", ["resnet18", "unet", "vit_tiny", "gpt2"])
def test_order_in_models_of_others(name: str) -> None:
    model, inputs = zoo.build(name)
    expected = _listed(model)
    module = capture(copy.deepcopy(model), inputs).emit()
    for other in (module, copy.deepcopy(module), _through_file(module)):
        own = _listed(other)
        assert all(_in_order_of(own[kind], expected[kind]) for kind in ("parameters", "tied too", "state"))


def _trained(module: nn.Module, optimizer: torch.optim.Optimizer) -> None:
    for _ in range(2):
        optimizer.zero_grad()
        module(X).square().sum().backward()
        optimizer.step()


def test_an_average_of_weights_averages_each_with_itself() -> None:
    shaped = kgraph.transform(Backwards(), "tat", X)
    average = AveragedModel(shaped, multi_avg_fn=torch.optim.swa_utils.get_ema_multi_avg_fn(0.5))
    before = {name: parameter.detach().clone() for name, parameter in shaped.named_parameters()}
    average.update_parameters(shaped)  # the first takes them over
    _trained(shaped, torch.optim.SGD(shaped.parameters(), 1e-2))
    average.update_parameters(shaped)
    inner = dict(average.module.named_parameters())
    assert inner.keys() == before.keys()
    for name, parameter in shaped.named_parameters():
        assert torch.allclose(inner[name], (before[name] + parameter) / 2, atol=1e-7), name


@pytest.mark.parametrize("copied", ["deepcopy", "file"])
def test_the_state_of_an_optimizer_lands_on_its_own_parameters(copied: str) -> None:
    """Two runs of Adam, one of them moved to a copy halfway, arrive at the same weights."""
    shaped = kgraph.transform(Backwards(), "tat", X).eval()
    optimizer = torch.optim.Adam(shaped.parameters(), 1e-2)
    _trained(shaped, optimizer)
    other = COPIES[copied](shaped)
    resumed = torch.optim.Adam(other.parameters(), 1e-2)
    resumed.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    _trained(shaped, optimizer)
    _trained(other, resumed)
    theirs = dict(other.named_parameters())
    for name, parameter in shaped.named_parameters():
        assert torch.allclose(theirs[name], parameter, atol=1e-7), name


def test_the_state_of_an_optimizer_of_the_model_lands_on_its_emission() -> None:
    """A plain emission goes on with what an optimizer of the model itself had gathered."""
    model = Tied()
    optimizer = torch.optim.Adam(model.parameters(), 1e-2)
    _trained(model, optimizer)
    module = _exported(model)
    resumed = torch.optim.Adam(module.parameters(), 1e-2)
    resumed.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    _trained(model, optimizer)
    _trained(module, resumed)
    theirs = dict(module.named_parameters())
    for name, parameter in model.named_parameters():
        assert torch.allclose(theirs[name], parameter, atol=1e-6), name
