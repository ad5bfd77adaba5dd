"""Measured fluctuations: draws against autograd, against the paper's Monte Carlo, against the recursions."""

from __future__ import annotations

import importlib
import itertools
import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.func import hessian, jacfwd, jacrev

import kgraph
from kgraph.capture import capture
from kgraph.errors import InputError
from kgraph.studies.finite_width.derivatives import derivative_statistics
from kgraph.studies.finite_width.draws import draw_parameters, layer_statistics
from kgraph.studies.finite_width.reader import read_chain

HERE = Path(__file__).parent
REFERENCE = json.loads((HERE / "reference" / "isometry.json").read_text())
LAWS = {"orth": "orthogonal", "gauss": "gaussian"}
CRITICAL: dict[str, Any] = {"weight_variance": 1.0, "parametrization": "ntk"}


def chain(widths: list[int], phi: type[nn.Module] = nn.Tanh, bias: bool = False) -> nn.Sequential:
    pairs = itertools.pairwise(widths)
    return nn.Sequential(*[m for a, b in pairs for m in (nn.Linear(a, b, bias=bias), phi())][:-1])


def named(depths: list[int]) -> list[str]:
    return [f"linear_{depth - 1}" for depth in depths]


@pytest.fixture(scope="module")
def wide() -> dict[str, kgraph.MeasuredFluctuations]:
    """S3_mc_n32_N800's own setting."""
    model = chain([32] * 41)
    return {key: kgraph.measure_fluctuations(model, draws=800, distribution=LAWS[key], **CRITICAL) for key in LAWS}  # type: ignore[arg-type]


@pytest.fixture(scope="module")
def derived() -> dict[str, kgraph.MeasuredFluctuations]:
    """S3_mc_dntk_n16_N1000's, with half the draws."""
    options: dict[str, Any] = {"draws": 500, "dntk": named([2, 3, 5, 10, 12]), **CRITICAL}
    return {key: kgraph.measure_fluctuations(chain([16] * 13), distribution=LAWS[key], **options) for key in LAWS}  # type: ignore[arg-type]


def assert_agree(found: kgraph.MeasuredFluctuations, rows: list[dict[str, float]], names: str, draws: int) -> None:
    """Two measurements of one quantity: within four of their errors together.

    The file gives no errors of K, Theta and D: they are those of our draws (jackknife), scaled to its own number of
    draws. Whether that number is right is seen on the errors that it does give.
    """
    share, ratios = math.sqrt(found.draws / draws), []
    for row in rows:
        node = found.nodes[int(row["l"]) - 1]
        pairs = {"K": (node.K, node.K_error), "Theta": (node.Theta, node.Theta_error)}
        pairs |= {name: (node.scaled[name], node.error[name]) for name in (*names, "D")}
        for name, (value, error) in pairs.items():
            theirs = row.get(f"{name}_se", share * error)
            assert value == pytest.approx(row[name], abs=4 * math.hypot(error, theirs) + 1e-8), (row["l"], name)
            if f"{name}_se" in row and theirs > 1e-8:
                ratios.append(math.log(share * error / theirs))
    assert abs(float(torch.tensor(ratios).median())) < math.log(1.5)


@pytest.mark.parametrize("key", LAWS)
def test_monte_carlo_of_the_paper(wide: dict[str, kgraph.MeasuredFluctuations], key: str) -> None:
    """The same measurement: also A and D, which no leading order describes (D: 1.9 standard errors at most)."""
    assert_agree(wide[key], REFERENCE["S3_mc_n32_N800"]["data"][key], "VFBA", 800)


@pytest.mark.parametrize("key", LAWS)
def test_monte_carlo_of_the_dntk(derived: dict[str, kgraph.MeasuredFluctuations], key: str) -> None:
    assert_agree(derived[key], REFERENCE["S3_mc_dntk_n16_N1000"]["data"][key], "VFBAPQ", 1000)


def test_jackknife_errors_of_D_are_the_spread_of_runs() -> None:
    """What stands for the errors that the file lacks: eight runs of 100 draws differ by as much as they say.

    To four sigma sqrt(chi2_7 / 7) is within [.17, 2.2]. And D of orthogonal weights is not that of Gaussian ones.
    """
    runs = {
        key: [
            kgraph.measure_fluctuations(chain([32] * 11), draws=100, seed=seed, distribution=law, **CRITICAL).nodes[9]  # type: ignore[arg-type]
            for seed in range(8)
        ]
        for key, law in LAWS.items()
    }
    for nodes in runs.values():
        values = torch.tensor([node.scaled["D"] for node in nodes], dtype=torch.float64)
        claimed = torch.tensor([node.error["D"] for node in nodes], dtype=torch.float64).square().mean().sqrt()
        assert 0.17 < float(values.std() / claimed) < 2.2
    rows = {key: REFERENCE["S3_mc_n32_N800"]["data"][key][4] for key in LAWS}
    D, error = (sum(x) / 8 for x in zip(*((n.scaled["D"], n.error["D"]) for n in runs["orth"]), strict=True))
    allowed = 4 * error * math.sqrt(1 / 8 + 100 / 800)
    assert rows["orth"]["l"] == 10 and abs(D - rows["orth"]["D"]) < allowed < abs(D - rows["gauss"]["D"])


@pytest.mark.parametrize("key", LAWS)
def test_recursions_describe_the_papers_draws(key: str) -> None:
    """V, F, B and P within max(4 standard errors, 15 %), but for what the file itself excepts."""
    for entry, width, names in (("S3_mc_n32_N800", 32, "VFB"), ("S3_mc_dntk_n16_N1000", 16, "VFBP")):
        nodes = kgraph.fluctuations(chain([width] * 41), distribution=LAWS[key], **CRITICAL).nodes  # type: ignore[arg-type]
        for row in REFERENCE[entry]["data"][key]:
            for name in names:
                late = row["l"] >= 30 if width == 32 else key == "gauss" and row["l"] >= 10
                if late and name in "BP":
                    continue
                wanted = nodes[row["l"] - 1].scaled[name]
                allowed = max(4 * row[f"{name}_se"], 0.15 * abs(wanted)) + 1e-8
                assert row[name] == pytest.approx(wanted, abs=allowed), (entry, row["l"], name)


@pytest.mark.parametrize("key", LAWS)
def test_recursions_describe_our_draws(
    wide: dict[str, kgraph.MeasuredFluctuations], derived: dict[str, kgraph.MeasuredFluctuations], key: str
) -> None:
    assert wide[key].disagreements() == []
    assert derived[key].disagreements() == []
    early = [d for d in wide[key].disagreements(width_factor=0) if wide[key].nodes.index(wide[key][d[0]]) < 5]
    assert early == []  # 15 % as the file says


def test_the_other_laws_recursion_fails(wide: dict[str, kgraph.MeasuredFluctuations]) -> None:
    """Negative control: all of V, F, B from the second layer on, while depth / width means anything."""
    for key, other in (("orth", "gauss"), ("gauss", "orth")):
        wrong = {d[:2] for d in wide[key].disagreements(wide[other].predicted)}
        assert wrong >= {(f"linear_{i}", name) for i in range(1, 24) for name in "VFB"} | {("linear", "V")}


def test_exact_deficits_pile_up_with_depth(wide: dict[str, kgraph.MeasuredFluctuations]) -> None:
    """Why the leading form is the default: 2/(m + 2) is right for one layer, its 1/n^2 part is not alone."""
    exact = kgraph.fluctuations(chain([32] * 41), distribution="orthogonal", deficit="exact", **CRITICAL)
    measured = wide["orth"].nodes
    assert abs(exact.nodes[0].scaled["V"] - measured[0].scaled["V"]) < 4 * measured[0].error["V"]
    assert exact.nodes[39].scaled["V"] > -0.5 > -1.5 > measured[39].scaled["V"]
    assert wide["orth"].disagreements(exact) != []


@pytest.mark.parametrize("law", LAWS.values())
def test_unequal_widths_biases_and_other_functions(law: str) -> None:
    model = chain([10, 120, 80, 144, 80, 96], nn.GELU, bias=True)
    options: dict[str, Any] = {"weight_variance": 1.8, "bias_variance": 0.1, "parametrization": "ntk", "input_q": 1.5}
    found = kgraph.measure_fluctuations(model, draws=400, distribution=law, **options)  # type: ignore[arg-type]
    assert found.disagreements() == []
    narrow = chain([10, 36, 24], bias=True)
    derived = kgraph.measure_fluctuations(narrow, draws=400, dntk=True, distribution=law, **options)  # type: ignore[arg-type]
    assert math.isfinite(derived.nodes[1].scaled["P"]) and derived.disagreements() == []
    other = "gaussian" if law == "orthogonal" else "orthogonal"
    assert found.disagreements(kgraph.fluctuations(model, distribution=other, **options)) != []  # type: ignore[arg-type]


@pytest.mark.parametrize("form", ["standard", "ntk"])
def test_H_and_dH_and_ddH_are_those_of_autograd(form: str) -> None:
    """The layerwise NTK against Jacobians, the nested forward derivatives against dense second and third ones."""
    model = chain([3, 4, 5, 3], nn.SiLU, bias=True)
    layers = read_chain(capture(model), "gaussian", 1.3, 0.3).layers
    drawn = draw_parameters(layers, 2, torch.Generator().manual_seed(0))
    x = torch.tensor([0.3, -1.0, 0.8], dtype=torch.float64)
    rows = layer_statistics(layers, drawn, x, form)[:, -1]
    derived = derivative_statistics(layers, drawn, x, form, third=True)
    shapes = [t.shape[1:] for pair in drawn for t in pair]
    rates = [
        (lambda_W / layer.width_in, lambda_b) for layer in layers for lambda_W, lambda_b in [layer.learning_rates(form)]
    ]
    factors = [factor for pair in rates for factor in pair]
    gains = torch.cat(
        [torch.full((shape.numel(),), f, dtype=torch.float64) for shape, f in zip(shapes, factors, strict=True)]
    )

    def network(flat: Tensor) -> Tensor:
        parts = [p.reshape(shape) for p, shape in zip(flat.split([math.prod(s) for s in shapes]), shapes, strict=True)]
        z = x
        for i in range(3):
            z = parts[2 * i] @ (nn.functional.silu(z) if i else z) + parts[2 * i + 1]
        return z

    for draw in range(2):
        flat = torch.cat([t[draw].flatten() for pair in drawn for t in pair])
        z, J, second = network(flat), jacrev(network)(flat), hessian(network)(flat)
        H = torch.einsum("ip,jp,p->ij", J, J, gains)
        dH = torch.einsum("ipq,jp,kq,p,q->ijk", second, J, J, gains, gains)
        off = 1 - torch.eye(3, dtype=torch.float64)
        z2, h, pairs = z.square(), H.diagonal(), off.sum()
        wanted = [
            z2.mean(),
            (off * torch.outer(z2, z2)).sum() / pairs,
            h.mean(),
            (off * torch.outer(h, h)).sum() / pairs,
            (off * torch.outer(h, z2)).sum() / pairs,
            (off * H * H).sum() / pairs,
            (off * H * torch.outer(z, z)).sum() / pairs,
        ]
        torch.testing.assert_close(rows[draw], torch.stack(wanted), rtol=1e-10, atol=1e-12)
        p = (off * torch.einsum("ijj,i->ij", dH, z)).sum() / pairs
        q = (off * torch.einsum("iij,j->ij", dH, z)).sum() / pairs
        v, third = J * gains, jacfwd(hessian(network))(flat)
        bent = torch.einsum("ipq,kq->ikp", second, v)
        ddI = torch.einsum("ipqr,jp,kq,lr->ijkl", third, v, v, v)
        ddII = torch.einsum("ikp,jlp,p->ijkl", bent, bent, gains)
        orders = [(ddI, "iijj"), (ddII, "iijj"), (ddII, "ijij"), (ddII, "ijji")]
        ddH = [(off * torch.einsum(f"{order}->ij", tensor)).sum() / pairs for tensor, order in orders]
        torch.testing.assert_close(derived[draw], torch.stack([p, q, *ddH]), rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("shape", [(6, 6), (4, 9), (9, 4)])
def test_draws_have_their_law(shape: tuple[int, int]) -> None:
    model = nn.Sequential(nn.Linear(*shape))
    generator = torch.Generator().manual_seed(0)
    (layer,) = read_chain(capture(model), "orthogonal", 1.7, 0.4).layers
    ((W, b),) = draw_parameters([layer], 4000, generator)
    long, short = max(shape), min(shape)
    gram = W.mT @ W if shape[1] >= shape[0] else W @ W.mT
    eye = torch.eye(short, dtype=torch.float64) * 1.7 * long / shape[0]
    torch.testing.assert_close(gram, eye.expand_as(gram), rtol=1e-10, atol=1e-10)
    assert float(W.square().mean()) * shape[0] == pytest.approx(1.7)
    assert float(b.square().mean()) == pytest.approx(0.4, rel=0.05)
    assert float(W.mean(0).abs().max()) < 5 * math.sqrt(1.7 / shape[0] / 4000)


def test_kinks_that_derivatives_miss_are_said() -> None:
    model = nn.Sequential(nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 8), nn.Hardtanh(), nn.Linear(8, 8))
    found = kgraph.measure_fluctuations(model, draws=50, dntk=True)
    assert [math.isfinite(node.scaled["P"]) for node in found.nodes] == [False, True, False]
    assert found.nodes[1].scaled["P"] == pytest.approx(0, abs=1e-12)
    assert any("linear_2" in note for note in found.notes)


def test_report_and_options() -> None:
    model, steps = chain([16] * 4), []
    found = kgraph.measure_fluctuations(
        model, draws=60, dntk=True, progress=lambda done, draws: steps.append((done, draws)), **CRITICAL
    )
    again = kgraph.measure_fluctuations(model, draws=60, dntk=True, **CRITICAL)
    assert found.to_dict() == again.to_dict() or str(found) == str(again)
    assert steps[-1] == (60, 60)
    text = str(found)
    assert max(map(len, text.splitlines())) <= 100 and "P/nΘ²" in text and "60 draws" in text
    assert "<pre" in found._repr_html_()
    assert json.loads(json.dumps(found.to_dict()))["draws"] == 60
    assert found["linear_1"] is found["2"] is found.nodes[1]
    for wrong in ({"draws": 2}, {"dntk": ["nowhere"]}):
        with pytest.raises(InputError):
            kgraph.measure_fluctuations(model, **wrong)  # type: ignore[arg-type]
    with pytest.raises(InputError, match="nowhere"):
        found["nowhere"]


def test_example(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(HERE.parent / "examples")
    figure = tmp_path / "figures" / "fluctuations.png"
    results, trained = importlib.import_module("fluctuations").main(["--quick", "--figure", str(figure)])
    assert (
        results["gaussian"].predicted.nodes[-1].scaled["V"]
        > 10
        > 0
        > results["orthogonal"].measured.nodes[-1].scaled["V"]
    )
    final = {curve.name: curve.accuracy[-1] for curve in trained[40]}
    assert final["orthogonal"] > final["gaussian"] + 0.1
    assert figure.stat().st_size < 200_000
