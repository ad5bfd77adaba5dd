"""Local maps: closed forms and quadrature against reference numbers, each other, and sampling."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats
from torch import Tensor, nn
from torch.nn import functional

from kgraph.errors import InputError
from kgraph.maps import NAMES, Pointwise, closed_form, pointwise

REFERENCE = json.loads((Path(__file__).parent / "reference" / "activation_maps.json").read_text())
DTYPE = torch.float64


def _reference_functions() -> dict[str, Pointwise]:
    erf = pointwise("erf")
    return {
        "relu": pointwise("relu"),
        "leaky_relu_0.2": pointwise("leaky_relu", 0.2),
        "abs": pointwise("abs"),
        "erf": erf,
        "erf_a2_b0.7_c0.3": erf.affine(input_scale=0.7, output_shift=0.15, output_scale=2.0),
        "sigmoid_like": erf.affine(input_scale=1 / 2.4020563531719796, output_shift=1.0, output_scale=0.5),
        "gelu": pointwise("gelu_exact"),
        "sin": pointwise("sin"),
        "rbf_0.7": Pointwise(lambda u: math.sqrt(2) * torch.sin(math.sqrt(1.4) * u + math.pi / 4)),
        "exp_0.5": Pointwise(lambda u: torch.exp(0.5 * u)),
        "gaussian": Pointwise(lambda u: torch.exp(-u * u)),
        "sign": pointwise("sign"),
        "monomial_2": pointwise("square"),
        "polynomial_1_2_3": Pointwise(lambda u: 0.5 + u - 0.25 * u**2 + 0.1 * u**3),
        "tanh": pointwise("tanh"),
        "silu": pointwise("silu"),
        "softplus": pointwise("softplus"),
    }


FUNCTIONS = _reference_functions()
CLOSED = [name for name, phi in FUNCTIONS.items() if phi.how == "exact"]


def user_kinked(u: Tensor) -> Tensor:
    """A kink at .3 and a jump at 1.7: no library has it."""
    return torch.where(u > 0.3, u * u, -0.5 * u) + (u > 1.7).to(u.dtype)


def tensor(*numbers: float) -> Tensor:
    return torch.tensor(numbers, dtype=DTYPE)


def _check_rows(name: str, phi: Pointwise, tolerance: float) -> None:
    """Every row; errors relative to the largest value a kernel of that q can have."""
    for row in REFERENCE[name]["rows"]:
        q1, q2 = torch.tensor(row["q1"], dtype=DTYPE), torch.tensor(row["q2"], dtype=DTYPE)
        cov = tensor(*row["c"]) * torch.sqrt(q1 * q2)
        value, slope = phi.dual(q1, q2, cov)
        size = math.sqrt(row["qout1"] * row["qout2"])
        assert (value - tensor(*row["E_ff"])).abs().max() <= tolerance * size
        wanted = tensor(*row["E_dfdf"])
        assert (slope - wanted).abs().max() <= tolerance * wanted.abs().max()
        for q, out in ((q1, row["qout1"]), (q2, row["qout2"])):
            assert float(phi.second(q)) == pytest.approx(out, rel=tolerance)


def test_every_reference_is_tested() -> None:
    assert set(FUNCTIONS) == set(REFERENCE)


@pytest.mark.parametrize("name", CLOSED)
def test_closed_forms_match_reference(name: str) -> None:
    _check_rows(name, FUNCTIONS[name], 1e-12)


@pytest.mark.parametrize("name", list(FUNCTIONS))
def test_quadrature_matches_reference(name: str) -> None:
    _check_rows(name, Pointwise(FUNCTIONS[name].fn), 1e-9)


@pytest.mark.parametrize(
    "name", ["identity", "cos", "sin", "erf", "gelu_exact", "relu", "leaky_relu", "abs", "sign", "step"]
)
def test_closed_form_equals_quadrature(name: str) -> None:
    exact = pointwise(name)
    numeric = Pointwise(exact.fn)
    c = tensor(-1, -0.99999, -0.9, -0.3, 0, 1e-3, 0.6, 0.99, 0.999999, 1)
    q1, q2 = torch.tensor(0.6, dtype=DTYPE), torch.tensor(2.5, dtype=DTYPE)
    for ours, theirs in zip(exact.dual(q1, q2, c * 1.5**0.5), numeric.dual(q1, q2, c * 1.5**0.5), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-9, atol=1e-11)
    torch.testing.assert_close(exact.mean(q2), numeric.mean(q2), rtol=1e-10, atol=1e-12)
    torch.testing.assert_close(exact.second(q2), numeric.second(q2), rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("degree", [1, 2, 3, 5])
def test_monomials(degree: int) -> None:
    exact = pointwise("monomial", degree)
    numeric = Pointwise(exact.fn)
    q, cov = torch.tensor(1.3, dtype=DTYPE), tensor(-1.3, -0.4, 0, 0.7, 1.3)
    for ours, theirs in zip(exact.dual(q, q, cov), numeric.dual(q, q, cov), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-9, atol=1e-9)
    torch.testing.assert_close(exact.mean(q), numeric.mean(q), rtol=1e-9, atol=1e-11)


def test_affine_keeps_the_closed_form_only_without_input_shift() -> None:
    kept = pointwise("gelu_exact").affine(0.7, 0.0, -0.2, 1.7)
    lost = pointwise("gelu_exact").affine(0.7, 0.1, -0.2, 1.7)
    assert (kept.how, lost.how) == ("exact", "quadrature")
    q, cov = tensor(0.5, 2.0), tensor(-0.3, 1.9)
    for ours, theirs in zip(kept.dual(q, q, cov), Pointwise(kept.fn).dual(q, q, cov), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-10, atol=1e-12)
    torch.testing.assert_close(kept.mean(q), Pointwise(kept.fn).mean(q), rtol=1e-11, atol=0)


KINKS: list[tuple[Callable[[Tensor], Tensor], list[float]]] = [
    (functional.relu6, [0, 6]),
    (functional.hardtanh, [-1, 1]),
    (functional.hardswish, [-3, 3]),
    (functional.hardsigmoid, [-3, 3]),
    (functional.hardshrink, [-0.5, 0.5]),
    (functional.softshrink, [-0.5, 0.5]),
    (functional.elu, [0]),
    (functional.softsign, [0]),
    (nn.ReLU(inplace=True), [0]),
    (user_kinked, [0.3, 1.7]),
    (torch.tanh, []),
    (functional.gelu, []),
    (functional.silu, []),
    (lambda u: torch.tanh(1e5 * u), []),
]


@pytest.mark.parametrize(("fn", "wanted"), KINKS)
def test_kinks_are_found(fn: Callable[[Tensor], Tensor], wanted: list[float]) -> None:
    found = Pointwise(fn).kinks()
    assert found.tolist() == pytest.approx(wanted, abs=1e-12)
    shifted = Pointwise(fn).affine(input_scale=-0.5, input_shift=0.2).kinks()
    assert shifted.tolist() == pytest.approx(sorted((t - 0.2) / -0.5 for t in wanted), abs=1e-11)


def _dense(fn: Callable[[Tensor], Tensor], c: float, step: float = 0.004) -> float:
    """Independent oracle for sharp smooth functions: the trapezoid rule in (z1, z2 - c z1)."""
    x = torch.arange(-9, 9, step, dtype=DTYPE)
    weight = torch.exp(-x * x / 2) * step / math.sqrt(2 * math.pi)
    inner = torch.cat([fn(c * part[:, None] + math.sqrt(1 - c * c) * x) @ weight for part in x.split(500)])
    return float((weight * fn(x) * inner).sum())


@pytest.mark.parametrize("c", [-0.6, 0.3, 0.9, 0.99])
def test_sharp_smooth_function_is_not_silently_wrong(c: float) -> None:
    def sharp(u: Tensor) -> Tensor:
        return torch.tanh(20 * u)

    one = torch.ones((), dtype=DTYPE)
    value, _ = Pointwise(sharp).dual(one, one, torch.tensor(c, dtype=DTYPE))
    assert float(value) == pytest.approx(_dense(sharp, c), rel=1e-9)


def test_large_q_of_a_smooth_function() -> None:
    """tanh under N(0, 10^6) is nearly a sign; the missing part is about E[1 - tanh^2] = O(q^-1/2)."""
    q = torch.tensor(1e6, dtype=DTYPE)
    second = float(Pointwise(torch.tanh).second(q))
    # E[1 - tanh(z)^2] = density(0) * (2 - O(1/q)) with density(0) = 1 / sqrt(2 pi q)
    assert 1 - second == pytest.approx(2 / math.sqrt(2 * math.pi * 1e6), rel=1e-5)


def test_third_derivative_kink() -> None:
    """|u|^3: phi, phi' and phi'' are continuous; E|z|^3 |z|^3 = 15."""
    cube = Pointwise(lambda u: u.abs() ** 3)
    one = torch.ones((), dtype=DTYPE)
    value, slope = cube.dual(one, one, tensor(0.0, 1.0))
    torch.testing.assert_close(value, tensor(8 / math.pi, 15), rtol=1e-9, atol=0)
    torch.testing.assert_close(slope, tensor(0, 27), rtol=1e-9, atol=1e-9)


def test_plain_gauss_hermite_misses_relu() -> None:
    """Negative control: without the split at the kink, 1e-9 is out of reach (160 nodes)."""
    x, weight = np.polynomial.hermite_e.hermegauss(160)
    weight = weight / weight.sum()
    c, relu = 0.5, lambda z: np.maximum(z, 0)
    plain = weight @ (relu(x)[:, None] * relu(c * x[:, None] + math.sqrt(1 - c * c) * x)) @ weight
    one, cov = torch.ones((), dtype=DTYPE), torch.tensor(c, dtype=DTYPE)
    exact = float(pointwise("relu").dual(one, one, cov)[0])
    ours = float(Pointwise(torch.relu).dual(one, one, cov)[0])
    assert abs(plain / exact - 1) > 1e-6
    assert abs(ours / exact - 1) < 1e-12


def test_user_kinked_function_against_sampling() -> None:
    draws, c = 2_000_000, 0.7
    z = torch.randn(2, draws, dtype=DTYPE, generator=torch.Generator().manual_seed(7))
    first, second = z[0], c * z[0] + math.sqrt(1 - c * c) * z[1]
    product = user_kinked(first) * user_kinked(second)
    one = torch.ones((), dtype=DTYPE)
    value, _ = Pointwise(user_kinked).dual(one, one, torch.tensor(c, dtype=DTYPE))
    assert abs(float(product.mean() - value)) < 4 * float(product.std()) / math.sqrt(draws)
    wrong, _ = Pointwise(lambda u: torch.where(u > 0.3, u * u, -0.5 * u)).dual(one, one, torch.tensor(c, dtype=DTYPE))
    assert abs(float(product.mean() - wrong)) > 40 * float(product.std()) / math.sqrt(draws)


def test_zero_q_and_identical_inputs() -> None:
    zero, two = torch.zeros((), dtype=DTYPE), torch.tensor(2.0, dtype=DTYPE)
    for phi in (pointwise("cos"), Pointwise(torch.cos), pointwise("softplus"), pointwise("relu")):
        at_zero = phi(torch.zeros(1, dtype=DTYPE))[0]
        torch.testing.assert_close(phi.dual(zero, two, zero)[0], at_zero * phi.mean(two), rtol=1e-10, atol=1e-14)
        torch.testing.assert_close(phi.second(zero), at_zero**2, rtol=1e-12, atol=0)
        torch.testing.assert_close(phi.dual(two, two, two)[0], phi.second(two), rtol=1e-12, atol=0)
    value, slope = pointwise("relu").dual(zero, two, zero)
    assert (float(value), float(slope)) == (0.0, 0.0)


def test_broadcasting_and_mixed_sizes() -> None:
    phi = Pointwise(functional.hardtanh)
    q1, q2 = tensor(0.01, 1.0, 30.0)[:, None], tensor(0.5, 2.0)[None, :]
    cov = 0.4 * torch.sqrt(q1 * q2)
    value, slope = phi.dual(q1, q2, cov)
    assert value.shape == slope.shape == (3, 2)
    single, _ = phi.dual(q1[2, 0], q2[0, 1], cov[2, 1])
    torch.testing.assert_close(value[2, 1], single, rtol=1e-10, atol=0)


PROPERTY = {name: pointwise(name) for name in ("relu", "tanh", "hardtanh", "gelu_exact", "elu")}
PROPERTY["user"] = Pointwise(user_kinked)
SIZES = st.floats(0.05, 4.0)
COSINES = st.floats(-0.98, 0.98)


@settings(max_examples=40, deadline=None)
@given(name=st.sampled_from(sorted(PROPERTY)), q1=SIZES, q2=SIZES, c=st.floats(-1, 1))
def test_symmetry_and_cauchy_schwarz(name: str, q1: float, q2: float, c: float) -> None:
    phi = PROPERTY[name]
    first, second = tensor(q1), tensor(q2)
    cov = c * torch.sqrt(first * second)
    value, slope = phi.dual(first, second, cov)
    swapped, swapped_slope = phi.dual(second, first, cov)
    bound = torch.sqrt(phi.second(first) * phi.second(second))
    torch.testing.assert_close(value, swapped, rtol=1e-9, atol=1e-9 * float(bound))
    torch.testing.assert_close(slope, swapped_slope, rtol=1e-9, atol=1e-9)
    assert float(value.abs()) <= float(bound) * (1 + 1e-9)


@settings(max_examples=40, deadline=None)
@given(name=st.sampled_from(sorted(set(PROPERTY) - {"user"})), q1=SIZES, q2=SIZES, c=COSINES)
def test_slope_is_the_derivative_by_covariance(name: str, q1: float, q2: float, c: float) -> None:
    """Price's theorem; it needs phi without jumps."""
    phi, r = PROPERTY[name], math.sqrt(q1 * q2)
    h = 1e-4 * (1 - abs(c)) * r
    cov = c * r + tensor(-2 * h, -h, h, 2 * h)
    value, _ = phi.dual(tensor(q1), tensor(q2), cov)
    numeric = float(value[0] - 8 * value[1] + 8 * value[2] - value[3]) / (12 * h)
    _, slope = phi.dual(tensor(q1), tensor(q2), tensor(c * r))
    assert numeric == pytest.approx(float(slope), rel=1e-6, abs=1e-6)


def test_errors() -> None:
    with pytest.raises(InputError, match="No activation is called 'reluu'"):
        pointwise("reluu")
    with pytest.raises(InputError, match="takes no parameters"):
        pointwise("tanh", 2.0)
    with pytest.raises(InputError, match="whole degree"):
        closed_form("monomial", 1.5)
    with pytest.raises(InputError, match="negative or not finite"):
        pointwise("tanh").second(tensor(-1.0))
    with pytest.raises(InputError, match="not finite"):
        Pointwise(torch.log).second(tensor(1.0))
    with pytest.raises(InputError, match="returned shape"):
        Pointwise(lambda u: u.sum(-1)).second(tensor(1.0))
    with pytest.raises(InputError, match="square integrable"):
        Pointwise(lambda u: torch.exp(u * u)).second(tensor(1.0))
    with pytest.raises(InputError, match="does not converge"):
        Pointwise(lambda u: u.abs().sqrt()).second(tensor(1.0))


@pytest.mark.parametrize("name", NAMES)
def test_every_name_works(name: str) -> None:
    phi = pointwise(name, 3) if name == "monomial" else pointwise(name)
    value, slope = phi.dual(tensor(1.0), tensor(1.0), tensor(0.3))
    assert bool(torch.isfinite(value).all() and torch.isfinite(slope).all())
    assert closed_form("tanh") is None


STEPS: dict[str, tuple[Callable[[Tensor], Tensor], list[float], list[float]]] = {
    "sign of a shifted value": (lambda z: torch.sign(z - 0.3), [0.3], [-1.0, 1.0]),
    "rounding": (torch.round, [k + 0.5 for k in range(-7, 7)], list(range(-7, 8))),
    "two levels of a smooth function": (
        lambda z: functional.gelu((z > 0.1).to(z.dtype) + 1),
        [0.1],
        [0.8413447, 1.9544997],
    ),
}


@pytest.mark.parametrize("name", STEPS)
def test_steps_against_the_normal_distribution(name: str) -> None:
    """E f f = sum over pairs of jumps of their heights times P(z1 > t, z2 > t'), by scipy; the slope is 0."""
    fn, jumps, heights = STEPS[name]
    q1, q2, cov = 1.3, 0.7, np.array([0.0, 0.5, -0.6, 0.95])
    jump = np.diff(heights)
    found, slope = Pointwise(fn).dual(*(torch.as_tensor(t, dtype=DTYPE) for t in (q1, q2, cov)))

    def above(t: float, q: float) -> float:
        return float(stats.norm.sf(t / math.sqrt(q)))

    for i, c in enumerate(cov):
        law = stats.multivariate_normal([0, 0], [[q1, c], [c, q2]], allow_singular=True, abseps=1e-9, releps=1e-9)
        singles = sum(a * (above(t, q1) + above(t, q2)) for a, t in zip(jump, jumps, strict=True))
        pairs = sum(
            a * b * law.cdf([-t, -u])
            for a, t in zip(jump, jumps, strict=True)
            for b, u in zip(jump, jumps, strict=True)
        )
        assert float(found[i]) == pytest.approx(heights[0] ** 2 + heights[0] * singles + pairs, abs=2e-6)
    assert not slope.any()


def test_steps_at_equal_arguments() -> None:
    """c = 1: the second moment, which nothing has to be integrated twice for."""
    fn, q = Pointwise(torch.round), torch.tensor([0.2, 1.0, 5.0], dtype=DTYPE)
    torch.testing.assert_close(fn.dual(q, q, q)[0], fn.second(q), rtol=1e-9, atol=0)
    assert fn.plan(1.0).heights is not None
    assert Pointwise(torch.floor).affine(output_shift=0.5).plan(1.0).heights is not None
    assert Pointwise(lambda z: torch.round(z) + 1e-3 * z).plan(1.0).heights is None


@pytest.mark.parametrize(("steepness", "q"), [(500.0, 1.0), (1000.0, 1.0), (1.0, 2e5), (1.0, 1e6), (1.0, 1e12)])
def test_two_kinks_nearer_than_a_cell(steepness: float, q: float) -> None:
    """hardtanh(k z): E[f'^2] = k^2 P(|k z| < 1); one of its two kinks makes it a step, whose derivative is 0."""
    fn = Pointwise(lambda z: torch.nn.functional.hardtanh(steepness * z))
    value, slope = fn.dual(*(torch.tensor([q], dtype=torch.float64),) * 3)
    inside = math.erf(1 / (steepness * math.sqrt(2 * q)))
    assert float(slope) == pytest.approx(steepness**2 * inside, rel=1e-8)
    assert float(value) < 1 - inside / 2
