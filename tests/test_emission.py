"""The emitted module is a standard one: names, state, modes, copies, files, compilers, devices, dtypes."""

from __future__ import annotations

import copy
import dataclasses
import io
from collections.abc import Callable
from functools import cache
from typing import Any

import pytest
import torch
import zoo
from torch import Tensor, nn
from torch.nn import functional
from torch.utils import _pytree as pytree

import kgraph
from kgraph import TransformRecord
from kgraph.capture import capture
from kgraph.emitted import EmittedModule
from kgraph.modules import ShapedActivation

# PyTorch 2.13 warns about its own pytree leaves whenever a captured GraphModule is copied or loaded.
pytestmark = pytest.mark.filterwarnings("ignore:.*LeafSpec.*:FutureWarning")

QUICK = ["mlp", "cnn", "dcgan_generator", "unet", "siamese", "squeeze_excite", "two_inputs"]
MODELS = [*QUICK, "resnet18", "vit_tiny", "bert", "gpt2", "llama"]


@cache
def emitted(name: str) -> tuple[nn.Module, Any, EmittedModule]:
    """A model, its inputs, and the untransformed emission of a copy."""
    model, inputs = zoo.build(name)
    return model, inputs, capture(copy.deepcopy(model), inputs).emit()


@cache
def shaped(name: str) -> tuple[nn.Module, Any, EmittedModule]:
    model, inputs = zoo.build(name)
    return model, inputs, kgraph.transform(model, "dks", inputs)


def run(model: nn.Module, inputs: Any) -> Any:
    if isinstance(inputs, dict):
        return model(**inputs)
    return model(*inputs) if isinstance(inputs, tuple) else model(inputs)


def tensors(output: Any) -> list[Tensor]:
    return [leaf for leaf in pytree.tree_leaves(output) if isinstance(leaf, Tensor)]


def resized(inputs: Any, batch: int) -> Any:
    def resize(value: Any) -> Any:
        return torch.cat([value] * 3)[:batch] if isinstance(value, Tensor) else value

    return pytree.tree_map(resize, inputs)


def first(output: Any, batch: int) -> Any:
    return pytree.tree_map(lambda t: t[:batch] if isinstance(t, Tensor) else t, output)


def assert_close(one: Any, two: Any, tolerance: float = 1e-4) -> None:
    left, right = tensors(one), tensors(two)
    assert len(left) == len(right) > 0
    for a, b in zip(left, right, strict=True):
        scale = float(b.detach().abs().max().clamp(min=1e-6))
        assert torch.allclose(a.to(b.dtype), b, rtol=0, atol=tolerance * scale)


@pytest.mark.parametrize("name", MODELS)
def test_untransformed_emission_is_the_model(name: str) -> None:
    model, inputs, plain = emitted(name)
    assert list(dict(plain.state_dict()).keys() ^ model.state_dict().keys()) == []
    plain.load_state_dict(model.state_dict(), strict=True)
    model.eval(), plain.eval()
    with torch.no_grad():
        for batch in (1, 2, 5):
            assert_close(run(plain, resized(inputs, batch)), run(model, resized(inputs, batch)))


@pytest.mark.parametrize("name", ["cnn", "unet", "resnet18", "dcgan_generator"])
def test_untransformed_emission_trains_like_the_model(name: str) -> None:
    model, inputs, plain = (copy.deepcopy(part) for part in emitted(name))
    model.train(), plain.train()
    assert_close(run(plain, inputs), run(model, inputs))
    tensors(run(plain, inputs))[0].sum().backward()
    tensors(run(model, inputs))[0].sum().backward()
    for key, value in model.state_dict().items():
        assert_close(plain.state_dict()[key].double(), value.double(), 1e-4)
    gradients = dict(plain.named_parameters())
    for key, parameter in model.named_parameters():
        assert (gradients[key].grad is None) == (parameter.grad is None), key


@pytest.mark.parametrize("name", MODELS)
def test_surviving_names_and_shapes(name: str) -> None:
    model, _, result = shaped(name)
    original, own = model.state_dict(), result.state_dict()
    for key in original.keys() & own.keys():
        assert original[key].shape == own[key].shape
    added = {key for key in own.keys() - original.keys() if not key.endswith("bias")}
    assert not added
    report = result.load_state_dict(original, strict=False)
    assert set(report.unexpected_keys) == original.keys() - own.keys()
    assert all(key.endswith("bias") for key in report.missing_keys)
    shaped.cache_clear()  # its weights were overwritten


@pytest.mark.parametrize("name", MODELS)
def test_transformed_model_runs_at_any_batch_size(name: str) -> None:
    model, inputs, result = shaped(name)
    result.eval()
    with torch.no_grad():
        whole = run(result, resized(inputs, 5))
        for batch in (1, 2):
            part = run(result, resized(inputs, batch))
            assert_close(part, first(whole, batch), 1e-3)
        if not isinstance(inputs, Tensor):
            assert type(whole) is type(run(model.eval(), inputs))
    result.train()
    outputs = [t for t in tensors(run(result, inputs)) if t.is_floating_point()]
    torch.stack([t.square().sum() for t in outputs]).sum().backward()
    missing = [key for key, p in result.named_parameters() if p.grad is None]
    used = dict(model.named_parameters())
    assert not [key for key in missing if key in used and "pooler" not in key], missing


@pytest.mark.parametrize("name", ["cnn", "resnet18", "vit_tiny"])
def test_submodules_are_the_users_own_classes(name: str) -> None:
    model, _, plain = emitted(name)
    own = dict(model.named_modules())
    leaves = {key: m for key, m in plain.named_modules() if key in own and not any(own[key].children())}
    layers = {key: m for key, m in leaves.items() if isinstance(own[key], (nn.Conv2d, nn.Linear, nn.BatchNorm2d))}
    assert layers and all(type(m) is type(own[key]) for key, m in layers.items())


class Dropouts(nn.Module):
    """Functional dropout, batch norm and attention that follow ``self.training``."""

    def __init__(self) -> None:
        super().__init__()
        self.enter, self.leave = nn.Linear(16, 32), nn.Linear(32, 4)
        self.register_buffer("mean", torch.zeros(32))
        self.register_buffer("var", torch.ones(32))

    def forward(self, x: Tensor) -> Tensor:
        x = functional.batch_norm(self.enter(x), self.mean, self.var, training=self.training)
        x = functional.dropout(functional.relu(x), 0.5, self.training)
        heads = x.reshape(-1, 1, 4, 8)
        dropout = 0.5 if self.training else 0.0
        x = functional.scaled_dot_product_attention(heads, heads, heads, dropout_p=dropout).reshape(-1, 32)
        return self.leave(x)


@pytest.mark.parametrize("transformed", [False, True])
def test_functional_modes_follow_train_and_eval(transformed: bool) -> None:
    model, x = Dropouts(), torch.randn(64, 16)
    module = kgraph.transform(model, "dks", x) if transformed else capture(copy.deepcopy(model), x).emit()
    module.eval()
    assert torch.equal(module(x), module(x))
    if not transformed:
        assert_close(module(x), model.eval()(x))
    module.train()
    assert not torch.equal(module(x), module(x))
    if not transformed:
        assert bool(module.get_buffer("mean").any())
    module.eval()
    assert torch.equal(module(x), module(x))


@pytest.mark.parametrize("name", ["cnn", "squeeze_excite", "vit_tiny", "gpt2"])
def test_copies_and_files(name: str) -> None:
    _, inputs, result = shaped(name)
    result.eval()
    expected = run(result, inputs)
    file = io.BytesIO()
    torch.save(result, file)
    file.seek(0)
    for other in (copy.deepcopy(result), torch.load(file, weights_only=False)):
        assert isinstance(other, EmittedModule) and isinstance(other.kgraph, TransformRecord)
        assert other.kgraph.ledger == result.kgraph.ledger
        assert not other.training
        assert_close(run(other, inputs), expected, 1e-6)
        assert other.state_dict().keys() == result.state_dict().keys()
        other.train()
        assert all(m.training for m in other.modules())


@pytest.mark.parametrize("backend", ["eager", "aot_eager"])
def test_torch_compile(backend: str) -> None:
    _, inputs, result = shaped("cnn")
    compiled = torch.compile(copy.deepcopy(result).eval(), backend=backend)
    assert_close(compiled(inputs), result.eval()(inputs))


@pytest.mark.parametrize("name", ["cnn", "squeeze_excite", "vit_tiny"])
def test_dtypes_and_memory_formats(name: str) -> None:
    _, inputs, result = shaped(name)
    module = copy.deepcopy(result).eval()
    expected = run(module, inputs)
    assert_close(run(module, inputs.to(memory_format=torch.channels_last)), expected)
    channels_last = copy.deepcopy(module).to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    assert_close(run(channels_last, inputs), expected)
    double = module.to(torch.float64)
    output = run(double, inputs.double())
    assert tensors(output)[0].dtype == torch.float64
    assert_close(expected, output, 1e-4)


def test_autocast() -> None:
    _, inputs, result = shaped("cnn")
    result.eval()
    with torch.autocast("cpu", torch.bfloat16):
        half = result(inputs)
    assert half.dtype == torch.bfloat16
    assert_close(half.float(), result(inputs), 0.1)


@pytest.mark.parametrize("name", ["cnn", "vit_tiny", "gpt2"])
def test_to_meta_moves_everything(name: str) -> None:
    _, inputs, result = shaped(name)
    module = copy.deepcopy(result).eval().to("meta")
    assert all(t.is_meta for t in (*module.parameters(), *module.buffers()))
    moved = pytree.tree_map(lambda t: t.to("meta"), inputs)
    assert all(t.is_meta for t in tensors(run(module, moved)))


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("name", ["cnn", "vit_tiny", "gpt2"])
def test_to_cuda(name: str) -> None:
    _, inputs, result = shaped(name)
    module = copy.deepcopy(result).eval()
    expected = run(module, inputs)
    moved = pytree.tree_map(lambda t: t.cuda(), inputs)
    output = pytree.tree_map(lambda t: t.cpu(), run(module.cuda(), moved))
    assert_close(output, expected, 1e-2)


def test_meta_models_take_no_memory() -> None:
    with torch.device("meta"):
        wide = 1 << 17  # a real layer would take 64 GiB
        model = nn.Sequential(nn.Linear(wide, wide), nn.ReLU(), nn.Linear(wide, wide), nn.Tanh(), nn.Linear(wide, 4))
        inputs = torch.randn(2, wide)
    assert len(kgraph.analyze(model, inputs).analysis.nodes) == 6
    result = kgraph.transform(model, "dks", inputs)
    assert all(p.is_meta for p in result.parameters())
    assert sum(isinstance(m, ShapedActivation) for m in result.modules()) == 2


class Positions(nn.Module):
    """A baked device and a buffer that is no state."""

    inverse: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.table, self.leave = nn.Embedding(16, 8), nn.Linear(8, 4)
        self.register_buffer("inverse", torch.arange(8.0), persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        places = torch.arange(x.shape[1], device=x.device)
        return self.leave(torch.tanh(x + self.table(places) + self.inverse))


def test_baked_devices_follow_and_buffers_stay_non_persistent() -> None:
    model, x = Positions(), torch.randn(2, 6, 8)
    for module in (capture(copy.deepcopy(model), x).emit(), kgraph.transform(model, "dks", x)):
        assert "inverse" in dict(module.named_buffers())
        assert module.state_dict().keys() == model.state_dict().keys()
        assert "inverse" not in copy.deepcopy(module).state_dict()
        assert module.to("meta")(x.to("meta")).is_meta


def test_tied_weights_keep_both_names() -> None:
    *_, result = shaped("gpt2")
    names = dict(result.named_parameters(remove_duplicate=False))
    assert names["transformer.wte.weight"] is names["lm_head.weight"]
    assert {"transformer.wte.weight", "lm_head.weight"} <= result.state_dict().keys()
    other = dict(copy.deepcopy(result).named_parameters(remove_duplicate=False))
    assert other["transformer.wte.weight"] is other["lm_head.weight"]


class Structured(nn.Module):
    """Keyword inputs and a dictionary out."""

    def __init__(self) -> None:
        super().__init__()
        self.enter, self.leave = nn.Linear(8, 16), nn.Linear(16, 4)

    def forward(self, x: Tensor, scale: Tensor | None = None, *, double: bool = False) -> dict[str, Any]:
        hidden = torch.tanh(self.enter(x if scale is None else x * scale))
        return {"out": self.leave(hidden), "all": [hidden, hidden * 2 if double else hidden]}


def test_structured_inputs_and_outputs() -> None:
    model, inputs = Structured(), {"x": torch.randn(2, 8), "double": True}
    result = kgraph.transform(model, "dks", inputs)
    output = result(x=torch.randn(5, 8), double=True)
    assert output.keys() == {"out", "all"}
    assert output["out"].shape == (5, 4) and output["all"][1].shape == (5, 16)
    _, inputs, hugging = shaped("bert")
    out = hugging.eval()(**inputs)
    assert dataclasses.is_dataclass(out) and out.last_hidden_state.shape == (2, 16, 64)


def test_kgraph_of_a_plain_emission_is_none() -> None:
    assert emitted("mlp")[2].kgraph is None


class Threshold(torch.autograd.Function):
    """A step forwards, the identity backwards."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return (x > 0).to(x.dtype)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Tensor:
        return grads[0]


CASTS: dict[str, Callable[[Tensor], Tensor]] = {
    "a function": Threshold.apply,  # type: ignore[dict-item]
    "plain": lambda h: (h > 0.5).to(h.dtype) + h,
    "of another": lambda h: h.round().long().to(h),
    "counts": lambda h: (h > 0).sum(-1, keepdim=True).type_as(h) - 8,
}


class Stepped(nn.Module):
    def __init__(self, step: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.a, self.b, self.step = nn.Linear(16, 16), nn.Linear(16, 16), step

    def forward(self, x: Tensor) -> Tensor:
        return self.b(self.step(self.a(x)) * torch.ones_like(x))


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
@pytest.mark.parametrize("name", CASTS)
def test_truth_values_and_counts_follow_the_type_of_the_model(name: str, dtype: torch.dtype) -> None:
    x, model = torch.randn(4, 16), Stepped(CASTS[name])
    shaped = kgraph.transform(model, "tat", x)
    once_more = kgraph.transform(shaped, "tat", x)
    for module in (shaped, once_more):
        given = module(x)
        assert module.to(dtype)(x.to(dtype)).dtype == dtype
        assert torch.equal(module.to(torch.float32)(x), given) or dtype == torch.bfloat16  # which rounds weights
    emitted = capture(model, x).emit()
    assert torch.equal(emitted(x), model(x))
    assert torch.equal(emitted.double()(x.double()), model.double()(x.double()))
