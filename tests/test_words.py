"""Forwards that kgraph cannot follow are refused in its own words; those that it can follow get the right numbers."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

import kgraph
from kgraph.errors import CaptureError, InputError, RuleError

WIDTH = 24
X = torch.randn(4, WIDTH, generator=torch.Generator().manual_seed(1))
CALLS = (kgraph.analyze, kgraph.nngp)


class Net(nn.Module):
    """``forward`` of a model with two linear layers."""

    def __init__(self, function: Callable[[Net, Tensor], Tensor]) -> None:
        super().__init__()
        self.a, self.b, self.function = nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, WIDTH), function

    def forward(self, x: Tensor) -> Tensor:
        return self.function(self, x)


def energy(net: Net, x: Tensor) -> Tensor:
    x = x.detach().requires_grad_()
    (force,) = torch.autograd.grad(torch.tanh(net.a(x)).sum(), x, create_graph=True)  # a derivative
    return net.b(force)


def energy_by_itself(net: Net, x: Tensor) -> Tensor:
    with torch.enable_grad():
        x = x.detach().requires_grad_()
        torch.tanh(net.a(x)).sum().backward()  # a derivative of its own
        assert x.grad is not None
        return net.b(x.grad)


NOT_HELD = {
    "vmap": (lambda net, x: torch.func.vmap(lambda u: torch.tanh(net.a(u)))(x), "applies vmap of torch.func"),
    "jvp": (lambda net, x: torch.func.jvp(net.a, (x,), (x,))[1], "applies jvp of torch.func"),
    "grad": (lambda net, x: torch.func.grad(lambda u: net.a(u).exp().sum())(x), "applies grad of torch.func"),
    "jacobian": (lambda net, x: torch.func.jacrev(net.a)(x[0]).sum(0) * x, "applies vjp of torch.func"),
    "energy": (energy, "takes derivatives by torch.autograd"),
    "energy by itself": (energy_by_itself, "takes derivatives by torch.autograd"),
}


@pytest.mark.parametrize("name", NOT_HELD)
def test_what_no_graph_holds_is_named(name: str) -> None:
    function, words = NOT_HELD[name]
    for call in CALLS:
        with pytest.raises(CaptureError, match=f"Net.forward {words}") as caught:
            call(Net(function), X)
        assert caught.value.hint and not any(word in str(caught.value) for word in ("github", "lifted", "hidden"))
        assert caught.value.source is not None
        line = Path(__file__).read_text().splitlines()[int(caught.value.source.rpartition(":")[2]) - 1]
        assert f"torch.func.{name[:3]}" in line or "# a derivative" in line


def test_other_failures_keep_their_own_words() -> None:
    """A branch on a value is not blamed on a derivative that the forward does not take."""

    def branches(net: Net, x: Tensor) -> Tensor:
        return net.a(x) if x.sum() > 0 else net.b(x)

    with pytest.raises(CaptureError, match="branches on a tensor's value"):
        kgraph.analyze(Net(branches), X)


def test_a_number_taken_out_of_the_input() -> None:
    model = Net(lambda net, x: net.b(torch.tanh(net.a(x)) * float(net.a(x).mean())))
    with pytest.raises(RuleError, match=r"takes a Python number.*'item', test_words\.py:\d+.*drop \.item") as caught:
        kgraph.analyze(model, X)
    assert "full_like" not in str(caught.value)
    of_parameters = Net(lambda net, x: net.b(torch.tanh(net.a(x)) * net.a.weight.abs().max().item()))
    assert kgraph.analyze(of_parameters, X).final.how != "assumed"


class OtherInTraining(nn.Module):
    """Another path in train mode, with or without something that follows the mode on both."""

    def __init__(self, rate: float) -> None:
        super().__init__()
        self.a, self.b, self.drop = nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, WIDTH), nn.Dropout(rate)

    def forward(self, x: Tensor) -> Tensor:
        h = self.drop(torch.relu(self.a(x)))
        return h + torch.tanh(self.b(h)) if self.training else h


@pytest.mark.parametrize("rate", [0.0, 0.5])
def test_the_first_line_names_the_forward_that_was_analysed(rate: float) -> None:
    model = OtherInTraining(rate)
    first = kgraph.analyze(model, X, mode="train").summary[0]
    assert "(train mode)" not in first and "forward of eval mode" in first
    assert ("dropout and norms of train mode" in first) == (rate > 0)
    assert "(eval mode)" in kgraph.analyze(model, X, mode="eval").summary[0]
    plain = Net(lambda net, x: torch.relu(net.a(x)))
    assert "(train mode)" in kgraph.analyze(plain, X, mode="train").summary[0]


def complex_layer(net: Net, x: Tensor) -> Tensor:
    return torch.einsum("bi,ij->bj", net.a(x).to(torch.complex64), net.get_parameter("w"))


COMPLEX = {
    "real part": lambda net, x: complex_layer(net, x).real,
    "imaginary part": lambda net, x: complex_layer(net, x).imag,
    "size": lambda net, x: complex_layer(net, x).abs(),
    "phase": lambda net, x: torch.exp(1j * net.a(x)).real,
    "constant": lambda net, x: (net.a(x) * (2 - 1j) + 1j).imag,
}


def complex_net(function: Callable[[Net, Tensor], Tensor], seed: int) -> Net:
    torch.manual_seed(seed)
    net = Net(function)
    net.register_parameter("w", nn.Parameter(torch.randn(WIDTH, WIDTH, dtype=torch.complex64) / WIDTH**0.5))
    nn.init.normal_(net.a.weight, std=WIDTH**-0.5)
    return net


@pytest.mark.parametrize("name", COMPLEX)
def test_complex_numbers_on_the_way(name: str) -> None:
    """q of analyze, which reads one draw of the weights, against the mean square over many draws."""
    x = torch.randn(200, WIDTH, generator=torch.Generator().manual_seed(2))
    with torch.no_grad():
        squares = [complex_net(COMPLEX[name], seed)(x).square().mean() for seed in range(80)]
    drawn = torch.stack(squares)
    final = kgraph.analyze(complex_net(COMPLEX[name], 0), X).final
    one_model = 4 * (2 / WIDTH**2) ** 0.5 * 2**0.5  # of the second moments of two matrices of that size
    tolerance = (one_model + 4 * 80**-0.5 * float(drawn.std() / drawn.mean())) * float(drawn.mean())
    sampled = 0.05 * float(drawn.mean())
    assert final.q == pytest.approx(float(drawn.mean()), abs=tolerance + sampled)
    assert final.how in ("sampled", "assumed")


def test_the_real_part_of_a_complex_layer_on_real_inputs() -> None:
    """Over models whose weights have the second moments of this one: K = WIDTH E[Re(w)^2] (E[a^2] x x' + E[b^2])."""
    net = complex_net(COMPLEX["real part"], 0)
    found = kgraph.nngp(net, X)
    spread = [float(t.detach().double().square().mean()) ** 0.5 for t in (net.a.weight, net.a.bias, net.w.real)]  # type: ignore[union-attr, operator]
    generator, total = torch.Generator().manual_seed(3), []
    shapes = ((256, WIDTH), 256, (64, 256))
    for _ in range(300):
        a, b, w = (s * torch.randn(n, generator=generator) for s, n in zip(spread, shapes, strict=True))
        y = (X @ a.T + b) @ (w * (WIDTH / 256) ** 0.5).T
        total.append((y @ y.T / 64).double())
    drawn = torch.stack(total)
    assert ((drawn.mean(0) - found).abs() <= 4 * drawn.std(0) / 300**0.5).all()
    for name in ("imaginary part", "size", "phase"):
        with pytest.raises(RuleError, match=r"is complex, and there is no kernel rule.*test_words.*kgraph\.analyze"):
            kgraph.nngp(complex_net(COMPLEX[name], 0), X)


IDS = torch.tensor([[3, 1, 3, 0, 2], [2, 2, 1, 5, 0], [4, 4, 4, 4, 4]])
ROWS = 6


class Bags(nn.Module):
    """A bag of tokens, weighted by how large their ids are or not, and a linear layer on what is left of it."""

    def __init__(self, mode: str, padding: int | None, weighted: bool, width: int) -> None:
        super().__init__()
        self.bag = nn.EmbeddingBag(ROWS, width, mode=mode, padding_idx=padding)
        self.out, self.weighted = nn.Linear(width, width, bias=False), weighted
        nn.init.normal_(self.out.weight, std=width**-0.5)

    def forward(self, ids: Tensor) -> Tensor:
        weights = 0.5 + 0.1 * ids.to(self.out.weight.dtype) if self.weighted else None
        return self.out(torch.relu(self.bag(ids, per_sample_weights=weights)))


@pytest.mark.parametrize(
    ("mode", "padding", "weighted"), [("mean", 2, False), ("sum", None, True), ("mean", None, False)]
)
def test_bags_of_embeddings(mode: str, padding: int | None, weighted: bool) -> None:
    """Against many draws of the network, and the bag's own kernels against sums over pairs of equal tokens."""
    width, draws = 256, 150
    declared = {"bag.weight": 1.0, "out.weight": 1 / width}
    torch.manual_seed(0)
    found = kgraph.kernels(Bags(mode, padding, weighted, width), IDS, variances=declared, nodes="all")
    with torch.no_grad():
        outputs = [Bags(mode, padding, weighted, width)(IDS).double() for _ in range(draws)]
    drawn = torch.stack([y @ y.T / width for y in outputs])
    error = 4 * drawn.std(0) / draws**0.5
    assert ((drawn.mean(0) - found.output.nngp).abs() <= error).all()

    counted = torch.ones(IDS.shape).double() if padding is None else IDS.ne(padding).double()
    shares = counted * (0.5 + 0.1 * IDS) if weighted else counted
    shares = shares / counted.sum(1, keepdim=True) if mode == "mean" else shares
    tokens = torch.zeros(len(IDS), ROWS).double().scatter_add_(1, IDS, shares)
    bag = next(gram for name, gram in found.nodes.items() if name.startswith("getitem"))
    torch.testing.assert_close(bag.nngp, tokens @ tokens.T)
    torch.testing.assert_close(bag.ntk, tokens @ tokens.T)
    assert found.output.how == "exact"


def test_bags_that_have_no_rule() -> None:
    with pytest.raises(RuleError, match="maximum over an embedding bag"):
        kgraph.nngp(Bags("max", None, False, 8), IDS)
    with pytest.raises(InputError, match="in a way that a kernel could follow"):
        kgraph.nngp(OfIds(), IDS)


class OfIds(nn.Module):
    """Token ids read as numbers."""

    def forward(self, ids: Tensor) -> Tensor:
        return ids.float().sin()


FILLED: dict[str, Callable[[Net, Tensor], Tensor]] = {
    "of another layer": lambda net, x: net.a(x).masked_fill(net.b(x) < 0.3, -0.5),
    "of two": lambda net, x: net.a(x).masked_fill((net.b(x) < 0.3) & (net.a(x) > 0), 0.0),
    "of itself": lambda net, x: (h := net.a(x)).masked_fill(h < 0.3, -0.5),
    "scattered": lambda net, x: net.a(x).masked_scatter(net.b(x) < 0, torch.ones(x.shape[0], net.a.out_features)),
    "truth": lambda net, x: (net.a(x) > 0).logical_xor(net.b(x) > 0.5).to(x.dtype),
    "whole numbers": lambda net, x: (net.a(x) * 2).to(torch.int64).bitwise_and(net.b(x).to(torch.int64)).to(x.dtype),
}


@pytest.mark.parametrize("name", FILLED)
def test_masks_that_layers_compute(name: str) -> None:
    """Truth values are drawn as truth values: the mean over channels and draws of u_a u_b, in a wide network."""
    width, draws = 512, 40
    declared = {"a.weight": 1 / WIDTH, "b.weight": 1 / WIDTH, "a.bias": 0.1, "b.bias": 0.1}

    def made(seed: int) -> Net:
        torch.manual_seed(seed)
        net = Net(FILLED[name])
        for layer in ("a", "b"):
            setattr(net, layer, nn.Linear(WIDTH, width))
            nn.init.normal_(net.get_parameter(f"{layer}.weight"), std=WIDTH**-0.5)
            nn.init.normal_(net.get_parameter(f"{layer}.bias"), std=0.1**0.5)
        return net

    found = kgraph.kernels(made(0), X, variances=declared, with_ntk=False).output
    with torch.no_grad():
        outputs = [made(seed)(X).double() for seed in range(draws)]
    drawn = torch.stack([y @ y.T / width for y in outputs])
    error = 4 * drawn.std(0) / draws**0.5 + 0.02 * drawn.mean(0).diagonal().mean()  # and of kgraph's own draws
    assert ((drawn.mean(0) - found.nngp).abs() <= error).all()
