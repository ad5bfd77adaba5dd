"""Functions of one field, whoever wrote them out, against dense quadrature; differences keep their digits."""

from __future__ import annotations

import math
from collections.abc import Callable

import numpy as np
import pytest
import torch
from gaussian_weights import with_gaussian_weights
from torch import Tensor, nn
from torch.nn import functional as F

import kgraph
from kgraph.errors import RuleError
from kgraph.gram.block import Block
from kgraph.gram.engine import Engine
from kgraph.gram.field import Leaf, Sum
from kgraph.gram.layout import Diagonal
from kgraph.gram.rows import Rows
from kgraph.maps import Pointwise, pointwise
from kgraph.maps.combine import composed, multiplied, summed
from kgraph.maps.cross import cross
from kgraph.roots import Root

Function = Callable[[Tensor], Tensor]
GENERATOR = torch.Generator().manual_seed(0)
X = torch.randn(2, 8, generator=GENERATOR, dtype=torch.float64)
K = X @ X.T / 8  # of a layer with sw2 = 1 and no bias

WRITTEN: dict[str, tuple[Function, tuple[float, ...]]] = {
    "swish": (lambda z: z * torch.sigmoid(1.7 * z), ()),
    "gelu": (lambda z: 0.5 * z * (1 + torch.tanh(math.sqrt(2 / math.pi) * (z + 0.044715 * z**3))), ()),
    "hermite": (lambda z: (z**4 - 6 * z * z + 3) / 24**0.5 - z, ()),
    "relu and tanh": (lambda z: F.relu(z) + 0.5 * torch.tanh(z), (0.0,)),
    "ramp": (lambda z: F.relu(10 * z + 0.5) - F.relu(10 * z - 0.5), (-0.05, 0.05)),
    "steep ramp": (lambda z: F.relu(100 * z + 0.5) - F.relu(100 * z - 0.5), (-0.005, 0.005)),
    "two slopes": (lambda z: torch.where(z < 0, -0.5 * z, 1.5 * z), (0.0,)),
    "where with a jump": (lambda z: torch.where(z < 0.3, -0.5 * z, torch.exp(z)), (0.3,)),
    "bump": (lambda z: torch.exp(-z * z) * torch.sin(z + 0.4), ()),
    "masked": (lambda z: z.masked_fill(z < -0.2, 0.0), (-0.2,)),
    "window": (lambda z: ((z > -0.5) & (z < 0.7)).float() * z, (-0.5, 0.7)),
    "not": (lambda z: torch.where(~(z > 0.1), z, 2 * z), (0.1,)),
    "of a mask": (lambda z: F.silu((z > 0.2).double()) + z, (0.2,)),
    "kinks inside": (lambda z: torch.clamp(z * z - 1, min=0.0) + (z**3 - z).abs(), (-1.0, 0.0, 1.0)),
    "maximum": (lambda z: torch.maximum(z, 0.3 * z * z), (0.0, 10 / 3)),
    "shrunk": (lambda z: z - torch.tanh(z), ()),
    "ratio": (lambda z: z / (1 + z.abs()), (0.0,)),
}


class Written(nn.Module):
    def __init__(self, function: Function) -> None:
        super().__init__()
        self.function = function

    def forward(self, x: Tensor) -> Tensor:
        return self.function(x)


def net(function: Function) -> nn.Sequential:
    """Layers of sw2 = 1 without biases round a function."""
    model = nn.Sequential(nn.Linear(8, 64, bias=False), Written(function), nn.Linear(64, 4, bias=False)).double()
    for layer in (model[0], model[2]):
        with torch.no_grad():
            layer.weight.normal_(generator=GENERATOR)  # type: ignore[union-attr, operator]
            layer.weight.div_((layer.weight.square().mean() * layer.in_features).sqrt())  # type: ignore[union-attr, operator]
    return model


def panels(cuts: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Gauss-Legendre points and N(0, 1) weights on [-8.5, 8.5] cut at ``cuts`` and into eighths between."""
    points, weights = np.polynomial.legendre.leggauss(20)
    edges = np.unique(np.concatenate([np.linspace(-8.5, 8.5, 9), cuts[np.abs(cuts) < 8.5]]))
    width = np.diff(edges)[:, None]
    x = (edges[:-1, None] + width * (points + 1) / 2).ravel()
    return x, (width * weights / 2).ravel() * np.exp(-x * x / 2) / math.sqrt(2 * math.pi)


def dense(f: Function, kinks: tuple[float, ...], k: Tensor) -> tuple[float, float]:
    """E[f(z1) f(z2)] and E[f'(z1) f'(z2)], cut where f has kinks: z1, then z2 given z1."""
    cuts, (q1, q2, cov) = np.array(kinks), (float(k[0, 0]), float(k[1, 1]), float(k[0, 1]))

    def values(z: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        at = torch.tensor(z).requires_grad_()
        out = f(at).double()
        slope = torch.autograd.grad(out.sum(), at)[0] if out.requires_grad else torch.zeros_like(at)
        return out.detach().numpy(), slope.numpy()

    x, weight = panels(cuts / math.sqrt(q1))
    first = values(math.sqrt(q1) * x)
    rest = math.sqrt(max(q2 - cov**2 / q1, 0.0))
    if rest < 1e-9:
        return float((weight * first[0] ** 2).sum()), float((weight * first[1] ** 2).sum())
    total = np.zeros(2)
    for at, w, *own in zip(x, weight, *first, strict=True):
        middle = cov / math.sqrt(q1) * at
        y, inner = panels((cuts - middle) / rest)
        total += [w * a * (inner * b).sum() for a, b in zip(own, values(middle + rest * y), strict=True)]
    return float(total[0]), float(total[1])


@pytest.mark.parametrize("name", WRITTEN)
def test_functions_written_out_are_integrated_as_one(name: str) -> None:
    function, kinks = WRITTEN[name]
    found = kgraph.kernels(net(function), X, with_ntk=False)
    assert found.how in ("exact", "quadrature")
    for i in (0, 1):
        value, _ = dense(function, kinks, K[i, i].expand(2, 2))
        assert float(found.nngp[i, i]) == pytest.approx(value, rel=1e-9)


@pytest.mark.parametrize("name", ["ramp", "steep ramp", "two slopes", "window", "gelu", "where with a jump"])
def test_between_inputs_and_in_the_ntk(name: str) -> None:
    function, kinks = WRITTEN[name]
    value, slope = dense(function, kinks, K)
    found = kgraph.kernels(net(function), X)
    assert found.ntk is not None
    assert float(found.nngp[0, 1]) == pytest.approx(value, rel=1e-8)
    assert float(found.ntk[0, 1]) == pytest.approx(64 * value + slope * 8 * float(K[0, 1]), rel=1e-8)


def test_a_difference_of_two_slopes_is_exact() -> None:
    found = kgraph.kernels(net(lambda z: F.relu(z) - 0.3 * F.relu(-z) - z), X)
    assert found.how == "exact"
    assert float(found.nngp[0, 0]) == pytest.approx(0.49 / 2 * float(K[0, 0]), rel=1e-13)  # 0.7 min(z, 0)


def test_functions_of_one_field_that_meet_apart() -> None:
    """relu(z) W and tanh(z) W of one weight: E[f(z) g(z')] of two functions."""
    f, g = pointwise("relu"), pointwise("tanh")
    q, c = torch.tensor([1.3, 0.8]).double(), torch.tensor([0.4, -0.7]).double()
    forth, slope = cross(f, g, q, q.flip(0), c)
    back, _ = cross(g, f, q.flip(0), q, c)
    torch.testing.assert_close(forth, back, rtol=1e-10, atol=0)
    both = summed(f, g)
    total = both.dual(q, q.flip(0), c)
    parts = [h.dual(q, q.flip(0), c) for h in (f, g)]
    other, other_slope = cross(g, f, q, q.flip(0), c)
    torch.testing.assert_close(total[0], parts[0][0] + parts[1][0] + forth + other, rtol=1e-9, atol=1e-12)
    torch.testing.assert_close(total[1], parts[0][1] + parts[1][1] + slope + other_slope, rtol=1e-9, atol=1e-12)


class TwoUses(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a, self.w = nn.Linear(8, 64, bias=False), nn.Linear(64, 4, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        z = self.a(x)
        return self.w(F.relu(z)) - self.w(torch.tanh(z))


def test_one_weight_on_two_functions_is_that_weight_on_their_difference() -> None:
    model = with_gaussian_weights(TwoUses().double())
    plain = net(lambda z: F.relu(z) - torch.tanh(z))
    plain[0].load_state_dict(model.a.state_dict())
    plain[2].load_state_dict(model.w.state_dict())
    found, expected = (kgraph.kernels(m, X) for m in (model, plain))
    assert found.how == "quadrature"
    torch.testing.assert_close(found.nngp, expected.nngp, rtol=1e-8, atol=0)
    assert found.ntk is not None and expected.ntk is not None
    torch.testing.assert_close(found.ntk, expected.ntk, rtol=1e-8, atol=0)


def test_kinks_of_compositions() -> None:
    relu = pointwise("relu")
    cubic = Pointwise(lambda z: z**3 - z)
    assert composed(relu, cubic).kinks().tolist() == pytest.approx([-1.0, 0.0, 1.0], abs=1e-12)
    assert multiplied(relu, relu.affine(3.0, -1.5)).kinks().tolist() == pytest.approx([0.0, 0.5], abs=1e-12)


def test_a_level_that_is_held_is_no_kink() -> None:
    """erf is 1 from 6 on, u - |u| is 0 from 0 on: where the outer kink lies, over thousands of points."""
    clamp, relu = Pointwise(F.hardtanh), pointwise("relu")
    assert len(composed(clamp, Pointwise(torch.erf)).kinks()) < 6
    flat = Pointwise(lambda z: z - z.abs())
    assert composed(relu, flat.affine(output_scale=-1.0)).kinks().tolist() == pytest.approx([0.0], abs=1e-12)
    held = composed(relu, Pointwise(lambda z: z.clamp(-1.0, 0.0)))  # both ends of a level, and what is left of it
    assert held.kinks().tolist() == pytest.approx([-1.0, 0.0], abs=1e-12)


def test_a_negative_variance_is_an_error() -> None:
    """Terms whose covariance is over what their variances allow, as lost digits make it."""
    one, two = (frozenset({Root(name)}) for name in "ab")
    leaf = Leaf((), one, block=Block(torch.tensor([1.0, 0.5, 1.0]).double()))
    lost = Leaf((), two, block=Block(-torch.ones(3).double()))
    engine = Engine(Rows.square(2), Diagonal(), "standard", False)
    good = Sum((), one, terms=((1.0, leaf), (-1.0 - 1e-3, leaf)))
    assert float(engine.second(good)[0]) == pytest.approx(1e-6, rel=1e-6)
    with pytest.raises(RuleError, match="variance came out negative"):
        engine.second(Sum((), one | two, terms=((1.0, leaf), (-1.0, leaf), (1e-3, lost))))
