"""`kgraph.residual_depth`: predicted and measured, against each other and arXiv 2206.06929's numbers."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from residual_blocks import REFERENCE, WIDTH, network
from torch import Tensor, nn

import kgraph
from kgraph import ResidualDepth, ResidualScaling
from kgraph.errors import InputError, ModelError

X = torch.randn(2, WIDTH, dtype=torch.float64, generator=torch.Generator().manual_seed(0))


def depth(kind: str, length: int, method: ResidualScaling, **options: Any) -> ResidualDepth:
    shaped = kgraph.transform(network(kind, length), method, X)
    return kgraph.residual_depth(shaped, X, **options)


@pytest.mark.parametrize("beta", [0.25, 0.5, 1.0])
@pytest.mark.parametrize("length", [10, 100])
def test_exact_law(length: int, beta: float) -> None:
    (chain,) = depth("res3", length, ResidualScaling(beta=beta), draws=0).chains
    layers = torch.arange(length + 1, dtype=torch.float64)
    exact = torch.expm1(layers * math.log1p(length ** (-2 * beta) / 2)).sqrt()
    torch.testing.assert_close(torch.tensor(chain.displacement.predicted, dtype=torch.float64), exact)
    ratio = torch.exp((length - layers) * math.log1p(length ** (-2 * beta) / 2)).sqrt()
    torch.testing.assert_close(torch.tensor(chain.gradient.predicted, dtype=torch.float64), ratio)
    assert chain.beta == pytest.approx(beta) and chain.alpha == pytest.approx(length**-beta)
    assert "kernel propagation" in chain.how and "exact" in chain.how
    wanted = REFERENCE["S5_depth"]["data"].get(f"res3_iid_beta{beta}_L{length}")
    assert wanted is None or chain.displacement.predicted[-1] == pytest.approx(wanted["theory_rms_out"], rel=1e-7)


@pytest.mark.parametrize(
    ("kind", "method"),
    [
        ("res3", ResidualScaling()),
        ("res1", ResidualScaling()),
        ("res3", ResidualScaling(weights="rbf")),
        ("res1", ResidualScaling(weights="rbf")),
        ("res3", ResidualScaling(weights="fbm", hurst=0.8)),
        ("res1", ResidualScaling(weights="fbm", hurst=0.3)),
    ],
    ids=["iid", "iid res-1", "rbf", "rbf res-1", "fbm", "fbm res-1"],
)
def test_predicted_and_measured(kind: str, method: ResidualScaling) -> None:
    (chain,) = depth(kind, 40, method, draws=24).chains
    for name in ("displacement", "gradient", "gradient_displacement"):
        curve = getattr(chain, name)
        for layer in (0, 10, 20, 40):
            slack = 4 * curve.error[layer] + 0.06 * curve.predicted[layer] + 1e-12  # O(1/width), one draw of paths
            assert abs(curve.measured[layer] - curve.predicted[layer]) < slack, (name, layer)
    assert chain.gradient.measured[-1] == 1 and chain.displacement.measured[0] == 0


def test_prediction_of_another_beta_is_rejected() -> None:
    (right,) = depth("res3", 40, ResidualScaling(), draws=12).chains
    (wrong,) = depth("res3", 40, ResidualScaling(beta=0.4), draws=0).chains
    apart = abs(right.displacement.measured[-1] - wrong.displacement.predicted[-1])
    assert apart > 8 * right.displacement.error[-1]


def test_logarithm_of_growth() -> None:
    """ln(|h_L| / |h_0|) ~ N(1/4 - 1/(2d), 1/(2d)) at beta = 1/2, d = L = 100."""
    wanted, width = REFERENCE["S5_hist_d100"], 100
    data = wanted["data"]
    x = torch.zeros(2, width, dtype=torch.float64)
    shaped = kgraph.transform(network("res3", data["L"], width), ResidualScaling(), x)
    log = kgraph.residual_depth(shaped, x, draws=data["N"] // 2, inputs=4).chains[0].log_ratio
    assert log.predicted_mean == pytest.approx(data["pred_mean"], rel=0.01)
    assert log.predicted_sd == pytest.approx(data["pred_sd"], rel=0.01)
    assert abs(log.mean - data["mean_log"]) < 4 * math.hypot(log.mean_error, data["sd_log"] / data["N"] ** 0.5)
    assert abs(log.mean - log.predicted_mean) < 4 * log.mean_error
    assert log.sd == pytest.approx(data["sd_log"], rel=0.25)


def test_report_object(tmp_path: Path) -> None:
    report = depth("res3", 12, ResidualScaling(), draws=2)
    text = str(report)
    assert "1 residual chain" in text and "L = 12, res-3" in text and "L^-0.5" in text and "kernel propagation" in text
    assert max(map(len, text.splitlines())) <= 100
    assert "<pre" in report._repr_html_() and "res-3" in report._repr_html_()
    kept = json.loads(json.dumps(report.to_dict()))
    assert len(kept["chains"][0]["displacement"]["measured"]) == 13
    report.plot(tmp_path / "depth.png")
    assert (tmp_path / "depth.png").stat().st_size > 1000
    predicted = depth("res3", 12, ResidualScaling(), draws=0)
    assert "prediction only" in str(predicted) and predicted[0].displacement.measured == ()


def test_model_and_generator_are_left_alone() -> None:
    model = network("res3", 5)
    before, state = {n: p.clone() for n, p in model.state_dict().items()}, torch.get_rng_state()
    one, two = (str(kgraph.residual_depth(model, X, draws=3)) for _ in range(2))
    assert one == two and torch.equal(state, torch.get_rng_state())
    assert all(torch.equal(p, before[n]) for n, p in model.state_dict().items())


def test_correlation_is_measured_where_no_record_names_it() -> None:
    shaped = kgraph.transform(network("res3", 40), ResidualScaling(weights="rbf"), X)
    plain: Any = network("res3", 40)
    plain.load_state_dict(shaped.state_dict())
    scaled = kgraph.transform(plain, ResidualScaling(beta=1.0), X)
    with_record, without = (kgraph.residual_depth(m, X, draws=0).chains[0] for m in (shaped, scaled))
    assert "autocovariance of rbf" in with_record.how and "measured on the weights" in without.how
    assert without.displacement.predicted[-1] == pytest.approx(with_record.displacement.predicted[-1], rel=0.05)


def test_what_is_not_predicted_says_why() -> None:
    class Post(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.last = nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, WIDTH)

        def forward(self, h: Tensor) -> Tensor:
            return torch.relu(h + self.last(torch.relu(self.first(h))))

    (chain,) = kgraph.residual_depth(nn.Sequential(Post(), Post(), Post()), X.float(), draws=2).chains
    assert chain.length == 3 and chain.how.startswith("not predicted: relu on the identity path")
    assert math.isnan(chain.displacement.predicted[-1]) and chain.displacement.measured[-1] > 0


def test_errors() -> None:
    with pytest.raises(ModelError, match="no chain of residual blocks"):
        kgraph.residual_depth(nn.Sequential(nn.Linear(4, 4), nn.ReLU()), torch.randn(2, 4))
    with pytest.raises(InputError, match="draws is 1"):
        kgraph.residual_depth(network("res3", 3), X, draws=1)
