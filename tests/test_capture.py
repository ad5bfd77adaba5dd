"""Both front ends give one graph: symbolic tracing is held, node by node, to what torch.export captures."""

from __future__ import annotations

import copy
import inspect
import re
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
import zoo
from capture_models import MODELS, REFUSED, Branch, Constant, Residual, X
from torch import Tensor, fx, nn
from torch.utils import _pytree as pytree

from kgraph.capture import DEEP, Graph, capture
from kgraph.errors import CaptureError
from kgraph.inputs import Inputs
from kgraph.verify import reproduces, reproduces_everywhere

pytestmark = pytest.mark.filterwarnings("ignore:.*LeafSpec.*:FutureWarning")


@cache
def both(name: str) -> tuple[Graph, Graph]:
    """A model's graph by either front end."""
    model, inputs = MODELS[name]()
    return capture(model, inputs, front_end="trace"), capture(copy.deepcopy(model), inputs, front_end="export")


def rows(graph: Graph) -> list[tuple[Any, ...]]:
    """Everything that analysis, passes and emission read; nodes are named by their order.

    Nodes that compute sizes are left out: torch.export makes them anew, after the fact.
    """
    nodes = [node for node in graph.module.graph.nodes if not is_size(node)]
    order = {node: f"%{index}" for index, node in enumerate(nodes)}
    return [row(node, order) for node in nodes]


def row(node: fx.Node, order: dict[fx.Node, str]) -> tuple[Any, ...]:
    arguments = fx.node.map_arg((node.args, node.kwargs), lambda n: order.get(n, "size"))
    if node.op == "output":
        return node.op, arguments
    site, value = node.meta["site"], node.meta["val"]
    kind = (value.dtype, value.device) if isinstance(value, Tensor) else type(value)
    untouched = site.path and node.meta.get("group_size")
    return node.op, BASE.sub("", node.name), node.target, arguments, site, kind, untouched


def is_size(node: fx.Node) -> bool:
    return node.op == "call_function" and isinstance(node.meta["val"], torch.SymInt)


BASE = re.compile(r"_\d+$")


@pytest.mark.parametrize("name", MODELS)
def test_traced_graph_is_the_exported_graph(name: str) -> None:
    traced, exported = map(rows, both(name))
    for one, two in zip(traced, exported, strict=False):
        assert one == two
    assert len(traced) == len(exported)


@pytest.mark.parametrize("name", MODELS)
def test_parameters_are_the_models_own(name: str) -> None:
    graph = both(name)[0]
    own = {id(tensor) for tensor in (*graph.root.parameters(), *graph.root.buffers())}
    read = [node for node in graph.module.graph.nodes if node.op == "get_attr"]
    assert read and all(id(attribute(graph.module, node)) in own for node in read)


def attribute(module: nn.Module, node: fx.Node) -> Any:
    owner, _, field = str(node.target).rpartition(".")
    return getattr(module.get_submodule(owner), field)


@pytest.mark.parametrize("name", MODELS)
def test_both_emissions_are_one_module(name: str) -> None:
    traced, exported = (graph.emit() for graph in both(name))
    inputs = MODELS[name]()[1]
    assert traced.state_dict().keys() == exported.state_dict().keys()
    calls = [[(n.op, n.target) for n in module.graph.nodes if n.op == "call_module"] for module in (traced, exported)]
    assert calls[0] == calls[1]
    for training in (False, True):
        for batch in (1, 2, 5) if not training else (2,):
            outputs = [run(module.train(training), resized(inputs, batch)) for module in (traced, exported)]
            assert len(outputs[0]) == len(outputs[1]) > 0
            assert all(map(torch.equal, *outputs))


def run(module: nn.Module, inputs: Any) -> list[Tensor]:
    state = {key: value.clone() for key, value in module.state_dict().items()}
    torch.manual_seed(0)
    arguments = ((), inputs) if isinstance(inputs, dict) else (inputs if isinstance(inputs, tuple) else (inputs,), {})
    with torch.no_grad():
        output = [
            leaf for leaf in pytree.tree_leaves(module(*arguments[0], **arguments[1])) if isinstance(leaf, Tensor)
        ]
        output = [leaf.clone() for leaf in output]
        module.load_state_dict(state)
    return output


def resized(inputs: Any, batch: int) -> Any:
    return pytree.tree_map(lambda v: torch.cat([v] * 3)[:batch] if isinstance(v, Tensor) else v, inputs)


@pytest.mark.parametrize("name", REFUSED)
def test_refusals_leave_the_model_alone(name: str) -> None:
    model, inputs = REFUSED[name]()
    attributes = {module: {**vars(module), **module._buffers} for module in model.modules()}
    with pytest.raises(CaptureError, match=r"cannot be traced symbolically"):
        capture(model, inputs, front_end="trace")
    for module, before in attributes.items():
        after = {**vars(module), **module._buffers}
        changed = [key for key in before | after if before.get(key) is not after.get(key)]
        assert changed in ([], ["features"]) and not isinstance(getattr(module, "features", None), fx.Proxy)


def test_training_is_never_baked() -> None:
    """The danger of symbolic tracing: ``self.training`` becomes the constant it was."""
    for training in (False, True):
        model, x = MODELS["dropouts"]()
        module = capture(model.train(training), x, front_end="trace").emit()
        assert model.training == module.training == training
        large = torch.randn(64, 8)
        assert torch.equal(module.eval()(large), module(large))
        assert not torch.equal(module.train()(large), module(large))
        assert bool(module.get_buffer("mean").any())


def test_writes_through_views() -> None:
    model, x = REFUSED["writes"]()
    graph = capture(model, x, front_end="export")
    written = [node.target for node in graph.module.graph.nodes if node.op == "call_function"]
    mutable = [target for target in written if getattr(target, "_schema", None) and target._schema.is_mutable]
    assert torch.ops.aten.select_scatter.default in written and mutable == [torch.ops.aten.mul_.Tensor]
    for batch in (1, 2, 5):
        x = torch.randn(batch, 8)
        assert torch.equal(graph.emit().eval()(x), model.eval()(x))


def chain(depth: int) -> nn.Module:
    layers = [layer for _ in range(depth) for layer in (nn.Linear(8, 8), nn.Tanh())]
    return nn.Sequential(*layers)


def front_end_of(graph: Graph) -> str:
    """Only torch.export leaves module stacks on the nodes."""
    return "export" if any("nn_module_stack" in node.meta for node in graph.module.graph.nodes) else "trace"


def test_only_deep_models_are_traced() -> None:
    assert front_end_of(capture(chain(3), X)) == "export"
    assert front_end_of(capture(chain(3), X, front_end="trace")) == "trace"
    assert front_end_of(capture(chain(DEEP // 2), X)) == "trace"
    with torch.device("meta"):
        assert front_end_of(capture(chain(DEEP // 2 + 1), X.to("meta"))) == "export"  # nothing to verify


SMALL = 40
"""Module calls that count as many here: a failed export takes seconds at the real number."""


class DeepBranch(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.body, self.end = Residual(SMALL // 2), Branch()

    def forward(self, x: Tensor) -> Tensor:
        return self.end(self.body(x))


def test_deep_models_fall_back_and_say_so() -> None:
    with pytest.raises(CaptureError) as caught:
        capture(DeepBranch(), X, deep=SMALL)
    file = Path(inspect.getfile(Branch))
    line = next(i for i, text in enumerate(file.read_text().splitlines(), 1) if text.endswith("# the line"))
    assert f"{file.name}:{line}" in str(caught.value)
    graph = capture(nn.Sequential(Residual(SMALL // 2), Constant()), X, deep=SMALL)
    assert front_end_of(graph) == "export"
    assert any("symbolic tracing failed: the forward uses a tensor" in note for note in graph.notes)


def test_verification_sees_the_first_layers_of_a_deep_chain() -> None:
    """The output hardly depends on them: without one of them it stays the same."""
    model, inputs = chain(200), Inputs((X,), {})
    emitted = capture(model, X, front_end="trace").emit()
    assert reproduces_everywhere(emitted, model, inputs)
    calls = [node for node in emitted.graph.nodes if node.op == "call_module"]
    calls[2].args = calls[0].args
    emitted.recompile()
    assert reproduces(emitted, model, inputs)
    assert not reproduces_everywhere(emitted, model, inputs)


def test_one_tensor_given_twice_is_two_inputs() -> None:
    for front_end in ("trace", "export"):
        graph = capture(zoo.build("siamese")[0], (torch.ones(2, 32),) * 2, front_end=front_end)
        inputs = [node for node in graph.module.graph.nodes if node.op == "placeholder"]
        assert len(inputs) == 2 and all(node.users for node in inputs)


def test_ten_thousand_nodes() -> None:
    """Linear in depth, and no recursion: 2,500 layers, far beyond python's recursion limit, in seconds."""
    graph = capture(chain(2500), X)
    module = graph.emit()
    assert front_end_of(graph) == "trace"
    assert len(list(module.graph.nodes)) == 5002
    module(X).sum().backward()
    other = copy.deepcopy(module)
    assert other.state_dict().keys() == graph.root.state_dict().keys()
    assert torch.equal(other(X), module(X))
