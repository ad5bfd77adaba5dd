"""Shaped activations in one pass: the chain of operations that they stand for is the oracle."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Callable, Mapping

import pytest
import torch
from torch import Tensor, nn
from torch.func import functional_call, grad, hessian, jacfwd, jacrev, jvp, vmap

import kgraph
from kgraph.fused import fusible_module
from kgraph.modules import FunctionModule, ShapedActivation, WeightedSum

aten = torch.ops.aten
ACTIVATIONS: dict[str, Callable[[], nn.Module]] = {
    "relu": nn.ReLU,
    "leaky relu": lambda: nn.LeakyReLU(0.3),
    "tanh": nn.Tanh,
    "sigmoid": nn.Sigmoid,
    "silu": nn.SiLU,
    "gelu": nn.GELU,
    "gelu by tanh": lambda: nn.GELU("tanh"),
    "softplus": lambda: nn.Softplus(2.0),
    "operator": lambda: FunctionModule(aten.leaky_relu.default, 0.1),
    "operator with options": lambda: FunctionModule(aten.gelu.default, approximate="tanh"),
}
CONSTANTS = {
    "scaled": (1.0, 0.0, 0.0, 1.3),
    "nothing": (1.0, 0.0, 0.0, 1.0),
    "all four": (0.4, 0.5, -0.2, 3.0),
    "negative": (-0.7, 0.1, 0.3, -2.0),
    "turned around": (-1.0, 0.0, 0.0, 1.0),
    "upside down": (1.0, 0.0, 0.0, -0.5),
    "shifted": (1.0, 0.2, 0.4, 1.0),
}
OTHERS: dict[str, Callable[[], nn.Module]] = {
    "negative slope": lambda: nn.LeakyReLU(-0.5),
    "a function of the user's": lambda: FunctionModule(torch.erf),
    "a learnable slope": nn.PReLU,
    "another of torch's": nn.Mish,
}


def chain(module: ShapedActivation, u: Tensor) -> Tensor:
    x = module.input_scale * u + module.input_shift
    return module.output_scale * (module.activation(x) + module.output_shift)


def points() -> Tensor:
    """No kink of any constants lies at one."""
    return torch.linspace(-3.17, 3.11, 24, dtype=torch.float64).reshape(4, 6)


@pytest.mark.parametrize("constants", CONSTANTS)
@pytest.mark.parametrize("name", ACTIVATIONS)
def test_values_and_derivatives(name: str, constants: str) -> None:
    module = ShapedActivation(ACTIVATIONS[name](), *CONSTANTS[constants])
    u, v = points().requires_grad_(), points().requires_grad_()
    found, asked = module(u), chain(module, v)
    direction = torch.linspace(0.5, 1.5, 24, dtype=torch.float64).reshape(4, 6)
    slope, wanted = (
        torch.autograd.grad((y * direction).sum(), x, create_graph=True)[0] for y, x in ((found, u), (asked, v))
    )

    torch.testing.assert_close(found, asked, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(slope, wanted, rtol=1e-12, atol=1e-12)
    assert not torch.allclose(slope, 1.001 * wanted, rtol=1e-6, atol=0)
    assert torch.autograd.gradcheck(module, (u,), check_forward_ad=True)
    if slope.requires_grad and wanted.requires_grad:
        second, twice = (torch.autograd.grad((g * direction).sum(), x)[0] for g, x in ((slope, u), (wanted, v)))
        torch.testing.assert_close(second, twice, rtol=1e-11, atol=1e-11)
        assert torch.autograd.gradgradcheck(module, (u,))


@pytest.mark.parametrize("name", ACTIVATIONS)
def test_one_tensor_is_kept(name: str) -> None:
    """The output, which the next layer keeps anyway, or the input; the chain keeps others besides."""
    module = ShapedActivation(ACTIVATIONS[name](), 0.4, 0.5, 0.0, 3.0)
    u = points().requires_grad_() * 1.0
    kept: list[Tensor] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
        y = module(u)
    assert [t.data_ptr() for t in kept] in ([u.data_ptr()], [y.data_ptr()])


@pytest.mark.parametrize("name", OTHERS)
def test_other_activations_run_as_they_are(name: str) -> None:
    module = ShapedActivation(OTHERS[name](), 0.4, 0.5, -0.2, 3.0).double()
    u, v = points().requires_grad_(), points().requires_grad_()
    found, asked = module(u), chain(module, v)
    torch.testing.assert_close(found, asked, rtol=1e-12, atol=1e-12)
    assert fusible_module(module.activation) is None
    gradients = [torch.autograd.grad(y.sum(), x)[0] for y, x in ((found, u), (asked, v))]
    torch.testing.assert_close(*gradients, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("name", ["leaky relu", "tanh", "gelu"])
def test_transforms_of_functions(name: str) -> None:
    module, u = ShapedActivation(ACTIVATIONS[name](), *CONSTANTS["all four"]), points()

    def loss(x: Tensor) -> Tensor:
        return module(x).square().sum()

    def wanted(x: Tensor) -> Tensor:
        return chain(module, x).square().sum()

    for transform in (grad, jacrev, jacfwd, hessian, lambda f: vmap(grad(f)), lambda f: vmap(f, in_dims=1)):
        torch.testing.assert_close(transform(loss)(u), transform(wanted)(u), rtol=1e-10, atol=1e-10)
    torch.testing.assert_close(jvp(loss, (u,), (u,)), jvp(wanted, (u,), (u,)), rtol=1e-10, atol=1e-10)
    batch = torch.eye(24, dtype=torch.float64).reshape(24, 4, 6)
    x = points().requires_grad_()
    rows = torch.autograd.grad(module(x), x, batch, is_grads_batched=True)[0].reshape(24, 24)
    torch.testing.assert_close(rows, torch.func.jacrev(lambda t: chain(module, t))(u).reshape(24, 24))


def network() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(2, 4, 3, padding=1),
        ShapedActivation(nn.LeakyReLU(0.2), output_scale=1.2),
        nn.Conv2d(4, 4, 3, padding=1),
        ShapedActivation(nn.Tanh(), 0.4, 0.5, -0.2, 3.0),
        ShapedActivation(nn.GELU(), 0.4, 0.5, -0.2, 3.0),
    )


def test_tracers_see_the_chain() -> None:
    model, x = network(), torch.randn(2, 2, 5, 5)
    exported = torch.export.export(model, (x,)).module()
    names = {str(n.target) for n in exported.graph.nodes if n.op == "call_function"}
    assert {"aten.leaky_relu.default", "aten.tanh.default", "aten.gelu.default"} <= names
    traced = torch.fx.symbolic_trace(model)
    scripted = torch.jit.trace(model, x)
    modules: tuple[Callable[[Tensor], Tensor], ...] = (exported, traced, scripted)  # type: ignore[assignment]
    for other in modules:
        torch.testing.assert_close(other(x), model(x), rtol=1e-5, atol=1e-6)


def test_copies_and_formats() -> None:
    model, x = network(), torch.randn(2, 2, 5, 5)
    for other in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert torch.equal(other(x), model(x))
    last = model.to(memory_format=torch.channels_last)(x.to(memory_format=torch.channels_last))
    assert last.is_contiguous(memory_format=torch.channels_last)
    low = network().bfloat16()(x.bfloat16())
    assert low.dtype == torch.bfloat16
    with torch.autocast("cpu", torch.bfloat16):
        assert network()(x).dtype == torch.bfloat16
    with torch.no_grad():
        torch.testing.assert_close(network()(x), network()(x.requires_grad_()))


def test_hooks_on_the_activation_are_called() -> None:
    module, seen = ShapedActivation(nn.Tanh(), 0.5), []
    module.activation.register_forward_hook(lambda *_: seen.append(1))
    module(points())
    assert seen == [1]


def test_per_sample_gradients_of_a_network() -> None:
    model = network().double()
    x = torch.randn(3, 2, 5, 5, dtype=torch.float64)
    parameters = dict(model.named_parameters())

    def loss(values: Mapping[str, Tensor], one: Tensor) -> Tensor:
        return functional_call(model, dict(values), (one[None],)).square().sum()

    found = vmap(grad(loss), (None, 0))(parameters, x)
    for i in range(3):
        wanted = torch.autograd.grad(model(x[i : i + 1]).square().sum(), list(parameters.values()))
        for name, value in zip(parameters, wanted, strict=True):
            torch.testing.assert_close(found[name][i], value, rtol=1e-9, atol=1e-9)


def test_sums_write_over_no_term() -> None:
    """In place on the product of the first term alone, whatever the weights and shapes."""
    a, b = points(), points().flip(0)
    before = a.clone(), b.clone()
    for weights in ((0.6, 0.8), (1.0, 0.5), (0.5, 1.0)):
        torch.testing.assert_close(WeightedSum(weights)(a, b), weights[0] * a + weights[1] * b)
        wide = WeightedSum(weights)(a[:1], b)
        torch.testing.assert_close(wide, weights[0] * a[:1] + weights[1] * b)
    assert torch.equal(a, before[0]) and torch.equal(b, before[1])
    x, y = points().requires_grad_(), points().requires_grad_()
    assert torch.autograd.gradgradcheck(WeightedSum((0.6, 0.8)), (x, y))


@pytest.mark.parametrize("shape", [(), (1,)])
def test_dropout_in_place_does_not_write_over_what_is_kept(shape: tuple[int, ...]) -> None:
    """Also through a view of the activation's output."""
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Linear(8, 32),
        nn.BatchNorm1d(32),
        nn.LeakyReLU(0.1),
        *(nn.Flatten(*shape) for _ in shape),
        nn.Dropout(0.1, inplace=True),
        nn.Linear(32, 4),
    )
    x = torch.randn(16, 8)
    shaped = kgraph.transform(model, "tat", x).train()
    shaped(x).square().sum().backward()
    assert all(p.grad is not None for p in shaped.parameters())
    assert model[-2].inplace  # the user's own is left alone


def test_derivative_keeps_its_digits_behind_a_large_shift() -> None:
    u = torch.linspace(-4, 4, 101)
    for phi in (nn.Tanh(), nn.Sigmoid()):
        found = vmap(grad(ShapedActivation(phi, output_shift=100.0)))(u)
        torch.testing.assert_close(found.double(), vmap(grad(phi))(u.double()), rtol=5e-4, atol=0)


def test_inputs_that_are_no_real_numbers_run_as_they_are() -> None:
    assert torch.equal(ShapedActivation(nn.ReLU(), output_scale=2.0)(torch.arange(3)), torch.tensor([0, 2, 4]))
    z = torch.randn(3, dtype=torch.complex128, requires_grad=True)
    assert torch.autograd.gradcheck(ShapedActivation(nn.Tanh(), 0.5, 0.1, 0.2, 2.0), (z,))
