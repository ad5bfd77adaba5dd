"""Folding: the same function to rounding, constants only where they must stay, and the caller's model as it was."""

from __future__ import annotations

import copy
import io
import math
import runpy
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from fold_graphs import SHAPE, RandomGraph
from torch import Tensor, fx, nn
from torch.nn.utils import parametrize
from torch.utils import _pytree as pytree
from transformed import assert_same, shaped, state

import kgraph
import kgraph.passes.fold
from kgraph.emitted import EmittedModule
from kgraph.errors import InputError
from kgraph.modules import FunctionModule, Scale, ShapedActivation, WeightedSum
from kgraph.passes.equations import Equations
from kgraph.passes.gauge import Gauge

aten = torch.ops.aten
KGRAPH = (ShapedActivation, WeightedSum, Scale)
QUICK = ["mlp", "cnn", "unet", "squeeze_excite", "hand_written", "swiglu", "two_inputs", "siamese", "dcgan_generator"]
LARGE = ["resnet18", "gpt2", "bert", "vit_tiny", "densenet121", "vgg16", "mobilenetv3_small", "resnetv2_50"]
EXACT = {torch.float64: 1e-12, torch.float32: 1e-6}


def generator() -> torch.Generator:
    return torch.Generator().manual_seed(1)


def randn(*shape: int) -> Tensor:
    return torch.randn(*shape, generator=generator(), dtype=torch.float64)


def trained(model: nn.Module, dtype: torch.dtype) -> Any:
    """A copy whose parameters have moved from their special values: biases of 0, slopes alike."""
    moved, g = copy.deepcopy(model).to(dtype).eval(), generator()
    with torch.no_grad():
        for parameter in moved.parameters():
            noise = torch.randn(parameter.shape, generator=g, dtype=torch.float64).to(dtype)
            parameter += 0.02 * noise
    return moved


def outputs(model: nn.Module, inputs: Any, dtype: torch.dtype) -> list[Tensor]:
    args, kwargs = (
        ((), inputs) if isinstance(inputs, dict) else (inputs if isinstance(inputs, tuple) else (inputs,), {})
    )
    args = tuple(x.to(dtype) if x.is_floating_point() else x for x in args)
    with torch.no_grad():
        return [y for y in pytree.tree_leaves(model(*args, **kwargs)) if isinstance(y, Tensor)]


def differs(one: nn.Module, other: nn.Module, inputs: Any, dtype: torch.dtype = torch.float64) -> float:
    """Largest |one - other| / |one| over outputs, of their lengths."""
    return apart(outputs(one, inputs, dtype), outputs(other, inputs, dtype))


def apart(found: list[Tensor], others: list[Tensor]) -> float:
    """Of their lengths, or of .01 where an output is 0."""
    return max(float((a - b).norm() / a.norm().clamp(min=0.01)) for a, b in zip(found, others, strict=True))


class Leaves(fx.Tracer):
    def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:
        return not isinstance(m, (nn.Sequential, Block))


def emitted(model: nn.Module) -> EmittedModule:
    """A model of kgraph's modules and aten calls, as an emitted one, in float64."""
    model = model.double().eval()
    return EmittedModule(model, Leaves().trace(model))


def leaky(slope: float = 0.3, shift: float = -0.4, scale: float = 1.7) -> ShapedActivation:
    return ShapedActivation(nn.LeakyReLU(slope, inplace=True), 1.3, 0.2, shift, scale)


def tanh(scale: float = 1.7) -> ShapedActivation:
    return ShapedActivation(nn.Tanh(), 1.3, 0.2, -0.4, scale)


def left(model: nn.Module) -> list[str]:
    """Names of the constants' modules that are still there."""
    return [name for name, module in model.named_modules() if isinstance(module, KGRAPH)]


def numbers(model: nn.Module) -> int:
    """How many constants there are that do something."""
    found = 0
    for module in model.modules():
        if isinstance(module, ShapedActivation):
            found += sum(value != name.endswith("scale") for name, value in module.constants.items())
        elif isinstance(module, WeightedSum):
            found += sum(weight != 1 for weight in module.weights)
        elif isinstance(module, Scale):
            found += (module.factor != 1) + (module.shift != 0)
    return found


def checked(model: nn.Module, *inputs: Tensor) -> Any:
    """The folded model, which does what the model does."""
    whole = emitted(model)
    folded = kgraph.fold(whole)
    assert differs(whole, folded, inputs) < EXACT[torch.float64]
    return folded


@pytest.mark.parametrize("dtype", EXACT)
@pytest.mark.parametrize(
    ("name", "method"), [*((n, "dks") for n in QUICK), ("cnn", "tat"), ("unet", "tat"), ("mlp", "tat")]
)
def test_the_function_stays(name: str, method: str, dtype: torch.dtype) -> None:
    _, inputs, module = shaped(name, method)
    model = trained(module, dtype)
    folded = kgraph.fold(model)
    assert differs(model, folded, inputs, dtype) < EXACT[dtype]
    assert len(left(folded)) == len(folded.fold_report.kept)
    assert numbers(folded) < numbers(model)


@pytest.mark.parametrize("name", LARGE)
def test_the_function_of_large_models_stays(name: str) -> None:
    """In single precision as well as the model itself, which is compared with itself in double precision."""
    _, inputs, module = shaped(name)
    for dtype, allowed in EXACT.items():
        model = trained(module, dtype)
        folded = kgraph.fold(model)
        exact = outputs(copy.deepcopy(model).double(), inputs, torch.float64)
        own, found = (apart(exact, outputs(one, inputs, dtype)) for one in (model, folded))
        assert found < max(allowed, 2 * own)
        assert numbers(folded) < numbers(model) / 2


def test_a_wrong_scale_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    _, inputs, module = shaped("cnn")
    model, right = trained(module, torch.float64), kgraph.passes.fold.solve

    def wrong(*args: Any) -> Gauge:
        gauge = right(*args)
        node = next(n for n in gauge.scale if isinstance(n, fx.Node) and n.op == "call_module")
        return Gauge({**gauge.scale, node: gauge.scale[node] * (1 + 1e-6)}, gauge.shift, gauge.missed)

    monkeypatch.setattr(kgraph.passes.fold, "solve", wrong)
    assert differs(model, kgraph.fold(model), inputs) > 1e-9


def test_the_model_is_left_as_it_was() -> None:
    _, _, module = shaped("cnn")
    model = trained(module, torch.float32).train()
    before, text = state(model), str(model)
    folded = kgraph.fold(model)
    assert_same(before, state(model))
    assert str(model) == text and model.kgraph is not None
    assert not folded.training and {id(p) for p in folded.parameters()}.isdisjoint({id(p) for p in model.parameters()})


@pytest.mark.filterwarnings("ignore:.*LeafSpec:FutureWarning")
def test_copies_and_files_of_a_folded_model_are_folded() -> None:
    _, inputs, module = shaped("cnn")
    folded = kgraph.fold(trained(module, torch.float64))
    file = io.BytesIO()
    torch.save(folded, file)
    file.seek(0)
    for other in (copy.deepcopy(folded), torch.load(file, weights_only=False)):
        assert differs(folded, other, inputs) == 0
        assert other.fold_report == folded.fold_report
        other.load_state_dict(folded.state_dict(), strict=True)
    again = kgraph.fold(folded)
    assert not again.fold_report.changes and len(again.fold_report.kept) == len(folded.fold_report.kept)


def test_other_models_are_refused_and_one_without_constants_says_so() -> None:
    with pytest.raises(InputError, match=r"fold takes a model that kgraph.transform returned, got Linear"):
        kgraph.fold(nn.Linear(2, 2))
    folded = checked(nn.Sequential(nn.Linear(4, 4), nn.Tanh(), nn.Linear(4, 4)), randn(2, 4))
    assert str(folded.fold_report) == "nothing to fold: the model has no constants"


@pytest.mark.parametrize("padding", [0, 1])
@pytest.mark.parametrize("mode", ["zeros", "reflect"])
@pytest.mark.parametrize("activation", [leaky, tanh])
def test_a_shift_stays_in_front_of_zeros_at_the_border(activation: Any, mode: Any, padding: int) -> None:
    conv = nn.Conv2d(4, 6, 3, padding=padding, padding_mode=mode, groups=2, bias=False)
    folded = checked(nn.Sequential(nn.Conv2d(3, 4, 1, bias=False), activation(), conv), randn(2, 3, 6, 6))
    stays = padding == 1 and mode == "zeros"
    assert len(left(folded)) == stays
    if stays:
        (kept,) = folded.fold_report.kept
        assert kept.node == "1" and "output_shift" in kept.after and "pads it with zeros" in kept.why
        assert folded.get_submodule("1").output_scale == folded.get_submodule("1").input_scale == 1
        assert "_2 pads it with zeros" in str(folded.fold_report)


@pytest.mark.parametrize("slope", [0.0, 0.3])
def test_a_relu_becomes_a_maximum_where_its_shift_cannot_pass(slope: float) -> None:
    layers = [
        nn.Conv2d(3, 4, 3),
        leaky(slope),
        nn.MaxPool2d(2, padding=1),
        Scale(1.4, -0.6),
        nn.Conv2d(4, 3, 3, padding=1),
    ]
    folded = checked(nn.Sequential(*layers), randn(2, 3, 8, 8))
    if slope:
        assert left(folded) == ["3"]  # the smaller tensor of the two
    else:
        assert left(folded) == [] and isinstance(folded.get_submodule("1"), FunctionModule)


def test_a_relu_without_a_shift_is_a_relu() -> None:
    folded = checked(nn.Sequential(nn.Linear(3, 4), leaky(0.0), nn.Linear(4, 3)), randn(5, 3))
    assert type(folded.get_submodule("1")) is nn.ReLU


@pytest.mark.parametrize("kind", [nn.ConvTranspose1d, nn.Conv1d])
@pytest.mark.parametrize("bias", [True, False])
def test_convolutions_of_either_kind_take_scales_and_shifts_up(kind: Any, bias: bool) -> None:
    layers = [kind(4, 4, 3, groups=2, bias=bias), tanh(), kind(4, 6, 3, stride=2, bias=bias)]
    folded = checked(nn.Sequential(*layers), randn(2, 4, 9))
    assert len(left(folded)) == (kind is nn.ConvTranspose1d)
    assert folded.get_submodule("0").bias is not None


class Block(nn.Module):
    """act(.6 f(x) + .8 x), whose stream has further readers."""

    def __init__(self, activation: Any, width: int = 6, weights: tuple[float, float] = (0.6, 0.8)) -> None:
        super().__init__()
        self.one, self.two = nn.Linear(width, width), nn.Linear(width, width)
        self.inner, self.outer = activation(), activation()
        self.sum = WeightedSum(weights)

    def forward(self, x: Tensor) -> Tensor:
        return self.outer(self.sum(self.two(self.inner(self.one(x))), x))


class Net(nn.Module):
    def __init__(self, *blocks: nn.Module, width: int = 6) -> None:
        super().__init__()
        self.enter, self.blocks, self.leave = nn.Linear(3, width), nn.Sequential(*blocks), nn.Linear(width, 2)

    def forward(self, x: Tensor) -> Tensor:
        return self.leave(self.blocks(self.enter(x)))


def test_a_stream_takes_its_weights_along() -> None:
    folded = checked(Net(Block(leaky), Block(lambda: leaky(0.0)), Block(leaky, weights=(-0.6, 0.8))), randn(5, 3))
    assert left(folded) == ["blocks.2.sum"] and folded.get_submodule("blocks.2.sum").weights == (-1, 1)


def test_activations_that_are_not_homogeneous_fix_their_stream() -> None:
    folded = checked(Net(Block(tanh), Block(lambda: tanh(2.0))), randn(5, 3))
    assert len(left(folded)) == 1  # one scale in front, one behind: the stream has two and a weight
    (kept,) = folded.fold_report.kept
    assert "need another one" in kept.why


class Readers(nn.Module):
    """One activation with readers of different kinds."""

    def __init__(self, reader: str) -> None:
        super().__init__()
        self.enter, self.act, self.leave, self.other = nn.Linear(3, 6), tanh(), nn.Linear(6, 2), nn.Linear(6, 2)
        self.reader = reader

    def forward(self, x: Tensor) -> Any:
        y = self.act(self.enter(x))
        if self.reader == "layer":
            return self.leave(y), self.other(y)
        if self.reader == "output":
            return self.leave(y), y
        if self.reader == "function":
            return self.leave(y), aten.sin.default(y)
        if self.reader == "product":
            return self.leave(aten.mul.Tensor(y, self.enter(x)))
        if self.reader == "concat":
            return self.leave(aten.slice.Tensor(aten.cat.default([y, self.enter(x)], 1), 1, 3, 9))
        assert self.reader == "views"
        return self.leave(aten.mul.Tensor(aten.reshape.default(aten.permute.default(y, [1, 0]), [-1, 6]), 2.0))


@pytest.mark.parametrize(
    ("reader", "stays"),
    [
        ("layer", set()),
        ("output", {"output_scale", "output_shift"}),
        ("function", {"output_scale", "output_shift"}),
        ("product", {"output_shift"}),  # 1/1.3 and .2 are those of what the product reads as well
        ("views", set()),
    ],
)
def test_every_reader_has_a_say(reader: str, stays: set[str]) -> None:
    folded = checked(Readers(reader), randn(6, 3))
    constants = {
        name for change in folded.fold_report.kept for name in ("output_scale", "output_shift") if name in change.after
    }
    assert constants == stays


def test_what_is_joined_agrees() -> None:
    """The layer's output is read by the activation and joined with its output: one scale for both."""
    folded = checked(Readers("concat"), randn(6, 3))
    assert left(folded) == ["act"]


class Twice(nn.Module):
    """One layer called twice."""

    def __init__(self, second: ShapedActivation) -> None:
        super().__init__()
        self.enter, self.shared, self.leave = nn.Linear(3, 6), nn.Linear(6, 6), nn.Linear(6, 2)
        self.first, self.second = tanh(), second

    def forward(self, x: Tensor) -> Tensor:
        return self.leave(self.second(self.shared(self.first(self.shared(self.enter(x))))))


@pytest.mark.parametrize(("second", "stays"), [(tanh(2.1), []), (ShapedActivation(nn.Tanh(), 1.3, 0.5), ["second"])])
def test_a_layer_takes_up_what_all_its_calls_agree_on(second: ShapedActivation, stays: list[str]) -> None:
    folded = checked(Twice(second), randn(5, 3))
    assert left(folded) == stays
    for change in folded.fold_report.kept:
        assert change.after == "input_shift 0.3"  # the other .2 went into the bias


class Tied(nn.Module):
    """An embedding whose table is the head's weight too."""

    def __init__(self) -> None:
        super().__init__()
        self.table, self.scale, self.act, self.head = (
            nn.Embedding(7, 6),
            Scale(3.0),
            tanh(),
            nn.Linear(6, 7, bias=False),
        )
        self.inner = nn.Linear(6, 6)
        self.head.weight = self.table.weight

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.act(self.inner(self.scale(self.table(x)))))


def test_tied_weights_stay_tied() -> None:
    model = emitted(Tied())
    folded = kgraph.fold(model)
    x = torch.arange(7)
    with torch.no_grad():
        assert torch.allclose(folded(x), model(x), rtol=1e-13, atol=1e-13)
    assert folded.get_submodule("head").weight is folded.get_submodule("table").weight
    assert left(folded) == []


class Doubled(nn.Module):
    def forward(self, weight: Tensor) -> Tensor:
        return 2 * weight


def test_a_computed_weight_is_left_alone() -> None:
    layer = nn.Linear(6, 6)
    parametrize.register_parametrization(layer, "weight", Doubled())
    model = nn.Sequential(nn.Linear(3, 6), tanh(), layer, tanh(), nn.Linear(6, 2))
    folded = checked(model, randn(4, 3))
    assert [change.node for change in folded.fold_report.kept] == ["1", "3"]
    assert all("ParametrizedLinear" in change.why for change in folded.fold_report.kept)
    (one, three) = (folded.get_submodule(name) for name in ("1", "3"))
    assert one.input_scale == 1 and one.output_scale == 1.7 and three.input_scale == 1.3 and three.output_scale == 1


class Rescaling(nn.Linear):
    """Not the layer it is derived from."""

    def forward(self, input: Tensor) -> Tensor:
        return super().forward(input) / self.weight.norm()


class Renamed(nn.Linear):
    """The layer it is derived from."""

    def forward(self, input: Tensor) -> Tensor:
        return nn.functional.linear(input, self.weight, self.bias)


@pytest.mark.parametrize(("kind", "stays"), [(Rescaling, ["1"]), (Renamed, [])])
def test_a_subclass_is_a_layer_if_it_computes_one(kind: type[nn.Linear], stays: list[str]) -> None:
    folded = checked(nn.Sequential(nn.Linear(3, 6), tanh(), kind(6, 2)), randn(4, 3))
    assert left(folded) == stays


def test_a_deep_stream_keeps_to_the_range_of_half_precision() -> None:
    class Stream(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.enter, self.leave = nn.Linear(3, 2), nn.Linear(2, 3)
            self.layers = nn.ModuleList(nn.Linear(2, 2) for _ in range(300))
            self.sums = nn.ModuleList(WeightedSum((0.6, 0.8)) for _ in range(300))

        def forward(self, x: Tensor) -> Tensor:
            x = self.enter(x)
            for layer, total in zip(self.layers, self.sums, strict=True):
                x = total(layer(x), x)
            return self.leave(x)

    folded = checked(Stream(), randn(4, 3))
    blocks = math.log(256) / -math.log(0.8)  # after which the stream has shrunk by 256
    assert 300 / blocks - 2 < len(left(folded)) < 300 / blocks + 1
    assert all("range of half precision" in change.why for change in folded.fold_report.kept)
    assert max(float(p.detach().abs().max()) for p in folded.parameters()) < 2 * 256


class Attention(nn.Module):
    """Values pass a scale, queries and keys take none, and a pool with zeros at its border no shift."""

    def __init__(self) -> None:
        super().__init__()
        self.qkv, self.act, self.gain = nn.Linear(4, 12), leaky(), Scale(1.6, 0.3)
        self.leave, self.gamma = nn.Linear(4, 2), nn.Parameter(randn(4))

    def forward(self, x: Tensor) -> Tensor:
        query, key, value = aten.split.Tensor(self.qkv(x), 4, -1)
        y = aten.scaled_dot_product_attention.default(query, key, self.gain(value))
        return self.leave(aten.avg_pool1d.default(self.act(aten.mul.Tensor(y, self.gamma)), [3], [1], [1]))


def test_attention_and_parameters_of_products() -> None:
    graph = emitted(Attention())
    folded = kgraph.fold(graph)
    assert differs(graph, folded, randn(2, 5, 4)) < EXACT[torch.float64]
    assert {change.node for change in folded.fold_report.kept} == {"gain", "act"}
    assert folded.get_submodule("gain").factor == 1 and folded.get_submodule("act").output_scale == 1


def test_random_graphs() -> None:
    """Whatever reads whatever; signs, shared modules and shared parameters included."""
    before = after = 0
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        for seed in range(60):
            model = emitted(RandomGraph(seed))
            folded = kgraph.fold(model)
            assert differs(model, folded, randn(*SHAPE)) < EXACT[torch.float64], seed
            before, after = before + numbers(model), after + numbers(folded)
    assert after < 0.9 * before


def test_equations_are_solved_and_contradictions_named() -> None:
    random = np.random.default_rng(0)
    for _ in range(20):
        count = int(random.integers(2, 9))
        truth, equations = random.normal(size=count), Equations(range(count))
        rows = random.integers(-2, 3, size=(count + 3, count))
        for number, row in enumerate(rows):
            terms: dict[Any, float] = {i: float(weight) for i, weight in enumerate(row) if weight}
            assert equations.adopt(terms, float(row @ truth), f"row {number}") is None
        found = np.array([equations.solution()[i] for i in range(count)])
        np.testing.assert_allclose(rows @ found, rows @ truth, atol=1e-9)
        terms = {i: float(weight) for i, weight in enumerate(rows[0])}
        reasons = equations.adopt(terms, float(rows[0] @ truth) + 1)
        assert not rows[0].any() or reasons


def kinds(path: Path) -> Counter[str]:
    onnx = pytest.importorskip("onnx")
    return Counter(node.op_type for node in onnx.load(path).graph.node)


class Residual(nn.Module):
    """A small ResNet: stem with max pooling, one block with and one without a convolution on its shortcut."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Sequential(
            nn.Conv2d(3, 8, 3, padding=1, bias=False), nn.BatchNorm2d(8), nn.ReLU(), nn.MaxPool2d(2)
        )
        self.one, self.two = self.branch(8, 8, 1), self.branch(8, 16, 2)
        self.shortcut = nn.Sequential(nn.Conv2d(8, 16, 1, 2, bias=False), nn.BatchNorm2d(16))
        self.head = nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(16, 5))

    @staticmethod
    def branch(before: int, after: int, stride: int) -> nn.Sequential:
        enter = [nn.Conv2d(before, after, 3, stride, 1, bias=False), nn.BatchNorm2d(after), nn.ReLU()]
        return nn.Sequential(*enter, nn.Conv2d(after, after, 3, 1, 1, bias=False), nn.BatchNorm2d(after))

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        x = torch.relu(self.one(x) + x)
        return self.head(torch.relu(self.two(x) + self.shortcut(x)))


@pytest.fixture(scope="module")
def residual() -> tuple[Residual, Any, Tensor]:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = Residual()
    x = randn(2, 3, 12, 12).float()
    return model, kgraph.transform(model, "tat", x), x


@pytest.mark.parametrize("slope", [0.0, 0.3])
def test_a_file_has_as_many_nodes_as_that_of_the_original(slope: float, residual: Any, tmp_path: Path) -> None:
    """The exporter folds the original's norms. ReLUs may be a Clip; shifts of leaky ones stay before zeros."""
    model, shaped_model, x = residual
    shaped_model = copy.deepcopy(shaped_model)
    for module in shaped_model.modules():
        if isinstance(module, nn.LeakyReLU):
            module.negative_slope = slope
    original = kgraph.export_onnx(model, tmp_path / "original.onnx", x)
    folded = kgraph.export_onnx(shaped_model, tmp_path / "folded.onnx", x)
    whole = kgraph.export_onnx(shaped_model, tmp_path / "whole.onnx", x, fold=False)
    assert original.fold_report is None and whole.fold_report is None
    report: Any = folded.fold_report
    found = kinds(folded.path)
    assert ("LeakyRelu" in found) == bool(report.kept) == bool(slope)
    assert all("pads it with zeros" in change.why for change in report.kept)
    found["Relu"] += found.pop("Clip", 0) + found.pop("LeakyRelu", 0)
    found["Add"] -= len(report.kept)
    assert found == kinds(original.path) and kinds(whole.path).total() > found.total() + 8


def test_resnet18_has_as_many_nodes_as_its_original(tmp_path: Path) -> None:
    model, inputs, module = shaped("resnet18", "tat")
    original = kgraph.export_onnx(model, tmp_path / "original.onnx", inputs)
    folded = kgraph.export_onnx(module, tmp_path / "folded.onnx", inputs)
    found, report = kinds(folded.path), folded.fold_report
    found["Relu"] += found.pop("Clip", 0) + found.pop("LeakyRelu", 0)
    assert found == kinds(original.path) and isinstance(report, kgraph.FoldReport) and not report.kept


def test_the_picture_in_the_docs_is_drawn_from_files() -> None:
    script = Path(__file__).parents[1] / "docs" / "figures" / "fold.py"
    names = runpy.run_path(str(script))
    assert names["draw"]() == script.with_suffix(".svg").read_text(encoding="utf-8")


@pytest.mark.parametrize("opset", [18, 19, 21, 22, 23])
def test_every_opset(opset: int, residual: Any, tmp_path: Path) -> None:
    _, shaped_model, x = residual
    assert kgraph.export_onnx(shaped_model, tmp_path / "m.onnx", x, opset=opset).max_abs_error < 1e-5


def test_half_precision(tmp_path: Path) -> None:
    x = randn(2, 16)
    layers = [layer for _ in range(4) for layer in (nn.Linear(16, 16), nn.Softplus())]
    half = kgraph.transform(nn.Sequential(*layers), "dks", x.float()).half()
    result = kgraph.export_onnx(half, tmp_path / "half.onnx", x.half())
    assert result.max_abs_error < 16 * torch.finfo(torch.float16).eps * 10
    onnx = pytest.importorskip("onnx")
    weights = [w for w in onnx.load(result.path).graph.initializer if len(w.dims) == 2]
    assert {w.data_type for w in weights} == {onnx.TensorProto.FLOAT16}
    with pytest.raises(InputError, match="bfloat16"):
        kgraph.export_onnx(half.bfloat16(), tmp_path / "m.onnx", x.bfloat16())


def test_weights_in_a_second_file_are_folded(residual: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("kgraph.export.SINGLE_FILE_LIMIT", 0)
    _, shaped_model, x = residual
    assert kgraph.export_onnx(shaped_model, tmp_path / "m.onnx", x).max_abs_error < 1e-5
    assert {file.name for file in tmp_path.iterdir()} == {"m.onnx", "m.onnx.data"}


def test_static_quantization(residual: Any, tmp_path: Path) -> None:
    """Folded constants do no harm to int8: as near to the file in float32 as the original's file is to its own."""
    quantization = pytest.importorskip("onnxruntime.quantization")
    import onnxruntime

    class Batches(quantization.CalibrationDataReader):
        def __init__(self, name: str) -> None:
            self.left = iter([{name: randn(16, 3, 12, 12).float().numpy()}])

        def get_next(self) -> Any:
            return next(self.left, None)

    model, shaped_model, x = residual
    errors = []
    for name, module in (("original", model), ("folded", shaped_model)):
        exact, small = tmp_path / f"{name}.onnx", tmp_path / f"{name}.int8.onnx"
        kgraph.export_onnx(module, exact, x)
        session = onnxruntime.InferenceSession(str(exact), providers=["CPUExecutionProvider"])
        entry = session.get_inputs()[0].name
        quantization.quantize_static(str(exact), str(small), Batches(entry), per_channel=True)
        feed = {entry: randn(16, 3, 12, 12).flip(0).float().numpy()}
        quantized = onnxruntime.InferenceSession(str(small), providers=["CPUExecutionProvider"])
        a, b = (np.asarray(one.run(None, feed)[0]) for one in (session, quantized))
        errors.append(float(np.linalg.norm(a - b) / np.linalg.norm(a)))
    assert errors[1] < max(2 * errors[0], 0.05)
    assert errors[1] > 0
