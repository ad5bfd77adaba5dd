"""Gap maps: what is left of 1 - c near c = 1, against 50-digit arithmetic."""

from __future__ import annotations

import math

import mpmath
import pytest
import torch
from torch import Tensor

from kgraph.maps import Pointwise, closed_form
from kgraph.maps.gap import erf_gap, sin_minus_cos, smooth_gap, two_slopes_gap

CASES = [(1.0, 1.0, 1e-14), (1.0, 1.0, 1e-6), (1.0, 1.0, 0.7), (1.0, 1.0001, 1e-6), (1.0, 1.1, 0.01), (2.0, 0.5, 0.3)]


def number(x: float) -> Tensor:
    return torch.tensor([x], dtype=torch.float64)


def exact_relu(qa: float, qb: float, gap: float) -> mpmath.mpf:
    a, b, g = (mpmath.mpf(x) for x in (qa, qb, gap))
    c = ((a + b) / 2 - g) / mpmath.sqrt(a * b)
    theta = mpmath.acos(c)
    return (a + b) / 4 - mpmath.sqrt(a * b) * (mpmath.sin(theta) + (mpmath.pi - theta) * c) / (2 * mpmath.pi)


def exact_erf(qa: float, qb: float, gap: float) -> mpmath.mpf:
    a, b, g = (mpmath.mpf(x) for x in (qa, qb, gap))
    cross = mpmath.asin(2 * ((a + b) / 2 - g) / mpmath.sqrt((1 + 2 * a) * (1 + 2 * b)))
    own = mpmath.asin(2 * a / (1 + 2 * a)) + mpmath.asin(2 * b / (1 + 2 * b))
    return (own - 2 * cross) / mpmath.pi


@pytest.mark.parametrize("case", CASES)
def test_closed_forms_keep_all_digits(case: tuple[float, float, float]) -> None:
    """Unequal q leave (q_a - q_b) itself to rounding: its square enters the gap, hence the second term."""
    qa, qb, g = case
    tolerance = 1e-14 + 1e-15 * abs(qa - qb) / g
    with mpmath.workdps(50):
        relu, erf = exact_relu(*case), exact_erf(*case)
        found_relu = float(two_slopes_gap(1.0, 0.0)(number(qa), number(qb), number(g))[0])
        found_erf = float(erf_gap(number(qa), number(qb), number(g))[0])
        assert abs(found_relu / relu - 1) < tolerance
        assert abs(found_erf / erf - 1) < tolerance


@pytest.mark.parametrize("case", [case for case in CASES if case[2] < 0.1])
def test_quadrature_of_any_smooth_function(case: tuple[float, float, float]) -> None:
    qa, qb, g = case
    fn = Pointwise(torch.erf)
    found = float(smooth_gap(torch.erf, fn.plan(max(qa, qb)), number(qa), number(qb), number(g)))
    with mpmath.workdps(50):
        assert abs(found / exact_erf(*case) - 1) < 2e-14


def test_difference_of_kernels_has_no_digits_left() -> None:
    """Negative control: q - E[phi phi] at a gap of 1e-14 is noise."""
    form = closed_form("relu")
    assert form is not None
    one = number(1.0)
    naive = 0.5 - float(form.dual(one, one, one - 1e-14)[0])
    with mpmath.workdps(50):
        assert abs(naive / exact_relu(1.0, 1.0, 1e-14) - 1) > 1e-6


def test_ten_thousand_relu_layers() -> None:
    """At the edge of chaos (sw2 = 2) 1 - c falls as 9 pi^2 / (2 l^2): ten digits kept, against 50-digit arithmetic."""
    one, g, phi = number(1.0), number(0.5), two_slopes_gap(1.0, 0.0)
    with mpmath.workdps(50):
        c = mpmath.mpf("0.5")
        for _ in range(10_000):
            g = 2 * phi(one, one, g)[0]
            theta = mpmath.acos(c)
            c = (mpmath.sin(theta) + (mpmath.pi - theta) * c) / mpmath.pi
        assert abs(float(g) / (1 - c) - 1) < 1e-10
        assert abs((1 - c) * 10_000**2 / (9 * mpmath.pi**2 / 2) - 1) < 0.01


def test_sin_minus_cos_is_smooth_where_the_series_ends() -> None:
    theta = torch.tensor([1e-8, 1e-3, 0.4999, 0.5001, 1.0, math.pi], dtype=torch.float64)
    with mpmath.workdps(50):
        exact = [mpmath.sin(t) - mpmath.mpf(t) * mpmath.cos(t) for t in theta.tolist()]
        for found, want in zip(sin_minus_cos(theta).tolist(), exact, strict=True):
            assert abs(found / want - 1) < 1e-14
