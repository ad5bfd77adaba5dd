"""The leaf modules: values, exactness in every dtype, and everything PyTorch does to a module."""

from __future__ import annotations

import copy
import functools
import io
from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from kgraph.errors import InputError
from kgraph.modules import (
    FunctionModule,
    PerLocationNorm,
    Scale,
    ShapedActivation,
    ShapedAttention,
    WeightedSum,
)

# softplus under DKS, published (arXiv 2110.01765): the cancelling kind of constants.
CONSTANTS = (0.18761008168267976, 0.40688063442262007, -0.9213466151411376, 8.878672543665223)


def randn(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


def softplus_reference(u: Tensor) -> Tensor:
    a, b, c, d = CONSTANTS
    return d * (F.softplus(a * u.double() + b) + c)


class Block(nn.Module):
    """All the leaf modules in one model."""

    def __init__(self) -> None:
        super().__init__()
        self.norm = PerLocationNorm(append_constant=True)
        self.conv = nn.Conv2d(4, 8, 3, padding=1)
        self.act = ShapedActivation(nn.Softplus(), *CONSTANTS)
        self.branch = nn.Conv2d(8, 8, 1)
        self.sum = WeightedSum([0.8, 0.6])
        self.gain = Scale(1.5, reason="mean of 9 positions")

    def forward(self, x: Tensor) -> Tensor:
        y = self.act(self.conv(self.norm(x)))
        return self.gain(self.sum(y, self.branch(y)))


@pytest.fixture
def block() -> Block:
    model = Block()
    for i, parameter in enumerate(model.parameters()):
        parameter.data = randn(*parameter.shape, seed=i) * 0.3
    return model


@pytest.mark.parametrize(
    "constants",
    [
        (),
        (2.0,),
        (1.0, 0.5),
        (1.0, 0.0, -0.3),
        (1.0, 0.0, 0.0, 3.0),
        (2.0, 0.5, -0.3, 3.0),
        (-1.5, 0.1, 0.2, -2.0),
    ],
)
def test_shaped_activation_is_its_formula_with_its_gradient(constants: tuple[float, ...]) -> None:
    shaped = ShapedActivation(torch.tanh, *constants)
    a, b, c, d = shaped.constants.values()
    u = randn(50, dtype=torch.float64).requires_grad_()
    torch.testing.assert_close(shaped(u), d * (torch.tanh(a * u + b) + c), rtol=1e-14, atol=1e-14)
    (gradient,) = torch.autograd.grad(shaped(u).sum(), u)
    torch.testing.assert_close(gradient, d * a * (1 - torch.tanh(a * u + b) ** 2), rtol=1e-13, atol=1e-13)


def test_identity_constants_return_the_activation_itself() -> None:
    u = randn(3)
    assert ShapedActivation(nn.Identity())(u) is u


def test_constants_stay_exact_through_every_dtype_and_device_move() -> None:
    shaped = ShapedActivation(nn.Softplus(), *CONSTANTS).to(torch.float16).to("meta").to_empty(device="cpu").double()
    assert tuple(shaped.constants.values()) == CONSTANTS
    u = randn(100, dtype=torch.float64)
    torch.testing.assert_close(shaped(u), softplus_reference(u), rtol=1e-13, atol=1e-13)


def test_the_default_device_does_not_matter() -> None:
    shaped, u = ShapedActivation(nn.Softplus(), *CONSTANTS), randn(5)
    with torch.device("meta"):
        assert torch.equal(shaped(u), shaped(u.cpu())) and shaped(u).device == u.device
    assert shaped(u.to("meta")).is_meta


def test_no_state_dict_key_and_the_childs_parameters_are_kept() -> None:
    assert not ShapedActivation(nn.Softplus(), *CONSTANTS).state_dict()
    assert list(ShapedActivation(nn.PReLU(), 2.0).state_dict()) == ["activation.weight"]
    assert not nn.Sequential(WeightedSum([0.6, 0.8]), Scale(2.0), PerLocationNorm()).state_dict()


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_low_precision_error_is_one_rounding(dtype: torch.dtype) -> None:
    u = randn(10_000).to(dtype)
    y = ShapedActivation(nn.Softplus(), *CONSTANTS)(u)
    exact = softplus_reference(u)
    assert y.dtype == dtype
    # Half an ulp of the result, and the float32 error of the cancellation near zero.
    bound = 0.51 * torch.finfo(dtype).eps * exact.abs() + 1e-5
    assert bool(((y.double() - exact).abs() <= bound).all())
    # Negative control: the same arithmetic in low precision is far beyond that bound.
    a, b, c, d = CONSTANTS
    naive = d * (F.softplus(a * u + b) + c)
    assert bool(((naive.double() - exact).abs() > 4 * bound).any())


def test_half_precision_model_with_a_learnable_activation() -> None:
    shaped = ShapedActivation(nn.PReLU(), 2.0, 0.1, 0.0, 1.5).half()
    u = randn(64).half()
    y = shaped(u)
    x = 2 * u.float() + 0.1
    assert y.dtype == torch.float16
    torch.testing.assert_close(y.float(), 1.5 * torch.where(x > 0, x, 0.25 * x), rtol=2e-3, atol=2e-3)


def test_inplace_activation_leaves_the_input_and_its_gradient_intact() -> None:
    u = randn(20).requires_grad_()
    before = u.detach().clone()
    y = ShapedActivation(nn.ReLU(inplace=True), 2.0, 0.5, 0.1, 3.0)(u)
    (gradient,) = torch.autograd.grad(y.sum(), u)
    assert torch.equal(u.detach(), before)
    torch.testing.assert_close(gradient, 6.0 * (2 * before + 0.5 > 0).float())


@pytest.mark.parametrize(
    "function",
    [
        torch.ops.aten.relu.default,
        functools.partial(torch.ops.aten.gelu.default, approximate="tanh"),
        functools.partial(F.leaky_relu, negative_slope=0.2),
        torch.tanh,
    ],
)
def test_functions_and_operators_survive_pickle_and_deepcopy(function: Callable[[Tensor], Tensor]) -> None:
    shaped = ShapedActivation(function, 2.0, 0.5, 0.1, 3.0)
    buffer = io.BytesIO()
    torch.save(shaped, buffer)
    buffer.seek(0)
    u = randn(30)
    for twin in (torch.load(buffer, weights_only=False), copy.deepcopy(shaped)):
        assert torch.equal(twin(u), shaped(u)) and repr(twin) == repr(shaped)


def test_function_module_refuses_positional_partials_and_prints_its_arguments() -> None:
    with pytest.raises(InputError, match="keyword"):
        FunctionModule(functools.partial(torch.pow, 2.0))
    assert FunctionModule(F.elu, 0.5).extra_repr() == "elu, 0.5"
    torch.testing.assert_close(FunctionModule(F.elu, 0.5)(torch.tensor(-1.0)), F.elu(torch.tensor(-1.0), 0.5))


@pytest.mark.parametrize("constants", [(0.0,), (1.0, float("nan")), (1.0, 0.0, float("inf")), (1.0, 0.0, 0.0, 0.0)])
def test_shaped_activation_refuses_degenerate_constants(constants: tuple[float, ...]) -> None:
    with pytest.raises(InputError):
        ShapedActivation(nn.ReLU(), *constants)


@pytest.mark.parametrize("weights", [(0.6, 0.8), (0.5, 1.0, -2.0), (1.0, 1.0), (3.0,)])
def test_weighted_sum_is_its_formula(weights: tuple[float, ...]) -> None:
    terms = [randn(4, 5, seed=i, dtype=torch.float64) for i in range(len(weights))]
    expected = sum((w * t for w, t in zip(weights, terms, strict=True)), torch.zeros(()))
    torch.testing.assert_close(WeightedSum(weights)(*terms), expected, rtol=1e-14, atol=1e-14)


def test_weighted_sum_broadcasts_and_promotes_as_plus_does() -> None:
    total = WeightedSum([0.6, 0.8])(torch.ones(1, 3), torch.ones(2, 1, dtype=torch.float64))
    assert total.shape == (2, 3) and total.dtype == torch.float64


def test_weighted_sum_refuses_bad_weights_and_counts() -> None:
    for weights in ((), (0.0, 1.0), (float("nan"),)):
        with pytest.raises(InputError, match="weights"):
            WeightedSum(weights)
    with pytest.raises(InputError, match="2 weights but got 1"):
        WeightedSum([0.6, 0.8])(torch.ones(2))


def test_scale_multiplies_and_says_why() -> None:
    assert torch.equal(Scale(3.0)(torch.ones(2)), torch.full((2,), 3.0))
    assert repr(Scale(2.0, reason="gate")) == "Scale(2, reason='gate')"
    with pytest.raises(InputError, match="finite"):
        Scale(float("inf"))


@pytest.mark.parametrize("append", [False, True])
@pytest.mark.parametrize(("shape", "axis"), [((6, 5), -1), ((3, 5, 7), 1), ((3, 5, 4, 4), 1), ((2, 5, 3, 3, 3), 1)])
def test_per_location_norm_gives_q_one(shape: tuple[int, ...], axis: int, append: bool) -> None:
    x = 300.0 * randn(*shape, dtype=torch.float64)
    y = PerLocationNorm(append_constant=append)(x)
    assert y.shape[axis] == 5 + append
    q = y.square().mean(axis)
    torch.testing.assert_close(q, torch.ones_like(q), rtol=1e-12, atol=0)
    kept = y.narrow(axis, 0, 5)
    torch.testing.assert_close(kept / kept.norm(dim=axis, keepdim=True), x / x.norm(dim=axis, keepdim=True))


def test_per_location_norm_of_zeros_half_and_integers() -> None:
    zero = torch.zeros(2, 3, 4, requires_grad=True)
    y = PerLocationNorm()(zero)
    y.sum().backward()
    assert zero.grad is not None and torch.equal(y, zero) and bool(zero.grad.isfinite().all())
    assert torch.equal(PerLocationNorm(True)(torch.zeros(1, 3)), torch.tensor([[0.0, 0.0, 0.0, 2.0]]))
    half = PerLocationNorm()((300 * randn(2, 8, 5)).half())
    assert half.dtype == torch.float16 and bool(half.isfinite().all())
    with pytest.raises(InputError, match="floating point"):
        PerLocationNorm()(torch.zeros(2, 3, dtype=torch.uint8))
    with pytest.raises(InputError, match="eps"):
        PerLocationNorm(eps=0.0)


def attention_inputs(length: int = 6) -> tuple[Tensor, Tensor, Tensor]:
    query, key, value = (randn(2, 3, length, 4, seed=i, dtype=torch.float64) for i in range(3))
    return query, key, value


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("masked", [False, True])
def test_shaped_attention_is_alpha_identity_at_zero_logits(causal: bool, masked: bool) -> None:
    query, key, value = attention_inputs()
    mask = randn(6, 6, seed=9, dtype=torch.float64) if masked and not causal else None
    layer = ShapedAttention(3, alpha=0.7, beta=1.3).double()
    out = layer(torch.zeros_like(query), key, value, attn_mask=mask, is_causal=causal)
    assert torch.equal(out, layer.alpha * value)


def test_shaped_attention_is_its_formula() -> None:
    query, key, value = attention_inputs()
    layer = ShapedAttention(3, alpha=0.7, beta=1.3).double()
    logits = query @ key.mT / 2.0
    matrix = 0.7 * torch.eye(6) + 1.3 * (logits.softmax(-1) - 1 / 6)
    torch.testing.assert_close(layer(query, key, value), matrix.double() @ value, rtol=1e-6, atol=1e-6)
    layer(query, key, value).sum().backward()
    assert layer.alpha.grad is not None and layer.beta.grad is not None


def test_shaped_attention_refuses_cross_attention_and_other_head_counts() -> None:
    query, key, value = attention_inputs()
    with pytest.raises(InputError, match="self-attention"):
        ShapedAttention(3)(query[:, :, :2], key, value)
    with pytest.raises(InputError, match="self-attention"):
        ShapedAttention(2)(query, key, value)
    with pytest.raises(InputError, match="heads"):
        ShapedAttention(0)


def test_everything_is_compilable_exportable_and_symbolically_traceable(block: Block) -> None:
    x = randn(2, 3, 5, 5)
    expected = block(x)
    compiled = torch.compile(block, backend="aot_eager", fullgraph=True)
    torch.testing.assert_close(compiled(x), expected)
    exported = torch.export.export(block, (x,), strict=False)
    torch.testing.assert_close(exported.module()(x), expected)
    assert not [n for n in exported.graph.nodes if n.target is torch.ops.aten.to.dtype]
    torch.testing.assert_close(torch.fx.symbolic_trace(block)(x), expected)


def test_everything_is_picklable_copyable_and_strict_loadable(block: Block) -> None:
    x = randn(2, 3, 5, 5)
    buffer = io.BytesIO()
    torch.save(block, buffer)
    buffer.seek(0)
    for twin in (torch.load(buffer, weights_only=False), copy.deepcopy(block)):
        assert torch.equal(twin(x), block(x))
    assert set(block.state_dict()) == {f"{m}.{p}" for m in ("conv", "branch") for p in ("weight", "bias")}


def test_channels_last_meta_double_and_autocast(block: Block) -> None:
    x = randn(2, 3, 5, 5)
    expected = block(x)
    block.to(memory_format=torch.channels_last)  # pyright: ignore[reportCallIssue]
    last = block(x.to(memory_format=torch.channels_last))
    torch.testing.assert_close(last, expected)
    assert last.is_contiguous(memory_format=torch.channels_last)
    with torch.autocast("cpu", torch.bfloat16):
        torch.testing.assert_close(block(x).float(), expected, rtol=0.03, atol=0.03)
    torch.testing.assert_close(copy.deepcopy(block).double()(x.double()).float(), expected)
    assert copy.deepcopy(block).to("meta")(x.to("meta")).shape == expected.shape
