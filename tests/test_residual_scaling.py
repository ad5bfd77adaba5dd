"""ResidualScaling through `kgraph.transform`: chains, block types, alpha, weights along depth, the ledger."""

from __future__ import annotations

import math
from functools import cache
from typing import Any

import pytest
import torch
from residual_blocks import REFERENCE, WIDTH, Res3, exactly_scaled, network, reweighted
from torch import Tensor, nn

import kgraph
from kgraph import ResidualScaling
from kgraph.capture import capture
from kgraph.depth_correlated import autocovariance
from kgraph.errors import InputError, PassError
from kgraph.modules import WeightedSum
from kgraph.passes.base import Workspace
from kgraph.passes.residual_scaling import BETA, FoldResidualWeights, ScaleBranches
from kgraph.residual.chains import FoundChains, find_chains

DEPTH = REFERENCE["S5_depth"]["data"]
X = torch.randn(2, WIDTH, dtype=torch.float64, generator=torch.Generator().manual_seed(0))


def chains(model: nn.Module, x: Any = X) -> FoundChains:
    work = Workspace(capture(model, x), "eval")
    return find_chains(work.graph.module, work.is_random)


@cache
def deep(kind: str, weights: str) -> Any:
    """A transformed chain of 1000 blocks."""
    return kgraph.transform(network(kind, 1000), ResidualScaling(weights=weights), X).eval()  # type: ignore[arg-type]


def alphas(model: nn.Module) -> set[tuple[float, ...]]:
    """Weights of all weighted sums, to nine digits."""
    return {tuple(round(w, 9) for w in m.weights) for m in model.modules() if isinstance(m, WeightedSum)}


@pytest.mark.parametrize(
    ("kind", "method", "beta"),
    [
        ("res3", ResidualScaling(), 0.5),
        ("res1", ResidualScaling(), 0.5),
        ("res3", ResidualScaling(weights="rbf"), 1.0),
        ("res1", ResidualScaling(weights="rbf"), 1.0),
        ("res3", ResidualScaling(weights="fbm", hurst=0.3), 0.5),
        ("res3", ResidualScaling(weights="fbm", hurst=0.8), 0.8),
        ("res1", ResidualScaling(weights="fbm", hurst=0.3), 0.3),
        ("res3", ResidualScaling(beta=0.25), 0.25),
    ],
    ids=lambda value: str(value),
)
def test_beta_by_block_type_and_generator(kind: str, method: ResidualScaling, beta: float) -> None:
    model = network(kind, 10)
    shaped = kgraph.transform(model, method, X)
    assert alphas(shaped) == {(1.0, round(10**-beta, 9))}
    record = shaped.kgraph
    assert record.ledger.counts()["scale residual branch"] == 10 and record.ledger.unmet == ()
    assert f"L = 10, {kind[:3]}-{kind[3]}, alpha" in record.ledger.notes[-1]
    assert set(shaped.state_dict()) == set(model.state_dict())
    kept = all(torch.equal(p, shaped.state_dict()[name]) for name, p in model.state_dict().items())
    assert kept == (method.weights == "iid")
    manual = X
    for block in shaped.children():
        if isinstance(block, nn.Module) and hasattr(block, "last"):
            first: Any = getattr(block, "first", nn.Identity())
            manual = manual + 10**-beta * block.last(torch.relu(first(manual)))  # type: ignore[operator]
    torch.testing.assert_close(shaped(X), manual)


@pytest.mark.parametrize("weights", ["rbf", "fbm"])
def test_weights_are_drawn_along_depth(weights: Any) -> None:
    hurst = 0.8 if weights == "fbm" else None
    method = ResidualScaling(weights=weights, hurst=hurst)
    first, again = (kgraph.transform(network("res3", 30), method, X, seed=3) for _ in range(2))
    other = kgraph.transform(network("res3", 30), method, X, seed=4)
    for role in ("first", "last"):
        stacks = [
            torch.stack([m.get_parameter(f"{i}.{role}.weight") for i in range(30)]) for m in (first, again, other)
        ]
        paths = stacks[0].detach().flatten(1) * WIDTH**0.5
        assert torch.equal(stacks[0], stacks[1]) and not torch.equal(stacks[0], stacks[2])
        r = autocovariance(weights, 30, hurst)
        for lag in (0, 1, 5):
            assert float((paths[lag:] * paths[: 30 - lag]).mean()) == pytest.approx(float(r[lag]), abs=0.12)
    v, w = (first.get_parameter(f"3.{role}.weight").detach().flatten() * WIDTH**0.5 for role in ("last", "first"))
    assert abs(float((v * w).mean())) < 0.12  # V and W are independent
    assert first.kgraph.ledger.counts()["draw along depth"] == 60
    assert ResidualScaling().sets == {"residuals"} and method.sets == {"residuals", "weights"}


@pytest.mark.parametrize("key", [k for k in DEPTH if k.endswith("_L10")])
def test_ten_blocks(key: str) -> None:
    """Reference numbers of L = 10: each network drawn, transformed and run anew."""
    kind, weights, beta, _ = key.split("_")
    squares: list[Tensor] = []
    for seed in range(8):
        method = ResidualScaling(beta=float(beta[4:]), weights=weights)  # type: ignore[arg-type]
        shaped = kgraph.transform(network(kind, 10, seed=seed), method, X, seed=seed)
        x = torch.randn(64, WIDTH, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))
        with torch.no_grad():
            y = shaped(x)
        squares.append((y - x).square().sum(1) / x.square().sum(1))
    rms = float(torch.stack(squares).mean().sqrt())
    wanted = DEPTH[key]["out"]["rms"]
    assert abs(math.log(rms / wanted)) < 0.5 if beta == "beta0.25" else rms == pytest.approx(wanted, rel=0.08)
    for other in DEPTH:  # negative control: no other beta
        if other.startswith(f"{kind}_{weights}_") and other.endswith("_L10") and other != key:
            assert rms != pytest.approx(DEPTH[other]["out"]["rms"], rel=0.3)


@pytest.mark.parametrize(("kind", "weights"), [("res3", "iid"), ("res3", "rbf")], ids=["iid", "rbf"])
def test_thousand_blocks(kind: str, weights: str) -> None:
    """One network of L = 1000 at every beta of the reference (here 64 inputs of one draw; others share its file)."""
    x = torch.randn(64, WIDTH, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    shaped, auto = deep(kind, weights), (0.5 if weights == "iid" else 1.0)
    assert alphas(shaped) == {(1.0, round(1000**-auto, 9))}
    found = {}
    for beta in (2.0, 1.0, 0.5, 0.25):
        with torch.no_grad():
            y = reweighted(shaped, 1000**-beta)(x)
        found[beta] = float(((y - x).square().sum(1) / x.square().sum(1)).mean().sqrt())
    reweighted(shaped, 1000**-auto)
    for beta in (0.5, 1.0) if weights == "iid" else (1.0, 2.0):
        assert found[beta] == pytest.approx(DEPTH[f"{kind}_{weights}_beta{beta}_L1000"]["out"]["rms"], rel=0.08)
    wrong = 0.25 if weights == "iid" else 0.5  # explosion; and the identity above
    assert found[wrong] > 1e3 and found[auto + 0.5 if weights == "iid" else 2.0] < 0.03 < found[auto] < 1


def test_composes_with_weights_of_another_system() -> None:
    model = network("res3", 6)
    shaped = kgraph.transform(model, [kgraph.EdgeOfChaos(), ResidualScaling()], X)
    assert alphas(shaped) == {(1.0, round(6**-0.5, 9))}
    assert not torch.equal(shaped.get_parameter("0.last.weight"), model.get_parameter("0.last.weight"))
    with pytest.raises(InputError, match="both set the model's weights"):
        kgraph.transform(model, [kgraph.EdgeOfChaos(), ResidualScaling(weights="rbf")], X)


def test_no_silent_nothing() -> None:
    shaped = kgraph.transform(nn.Sequential(nn.Linear(4, 4), nn.Tanh()), "residual-scaling", torch.randn(2, 4))
    assert "no chain of residual blocks" in shaped.kgraph.ledger.unmet[0]
    one = kgraph.transform(network("res3", 1), ResidualScaling(), X)
    assert "1^-beta = 1" in one.kgraph.ledger.kept[0].why


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"beta": "high"}, "beta is 'high'"),
        ({"beta": math.inf}, "beta must be a finite number, got inf"),
        ({"weights": "rbm"}, "weights is 'rbm'"),
        ({"weights": "fbm"}, "hurst is None"),
        ({"hurst": 0.3}, "hurst is an option"),
    ],
    ids=["word", "inf", "weights", "missing", "stray"],
)
def test_refused(options: Any, message: str) -> None:
    with pytest.raises(InputError, match=message):
        ResidualScaling(**options)


class Cell(nn.Module):
    """A block whose sum is written by ``combine(h, branch)``."""

    def __init__(self, combine: Any, activation: Any = torch.relu) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(0)
        self.first, self.last = exactly_scaled(WIDTH, generator), exactly_scaled(WIDTH, generator)
        self.combine, self.activation = combine, activation

    def forward(self, h: Tensor) -> Tensor:
        return self.combine(h, self.last(self.activation(self.first(h))))


def _two_branches(h: Tensor, b: Tensor) -> Tensor:
    return h + b + (0.5 * b)


COMBINED: dict[str, tuple[Any, Any]] = {
    "swapped": (lambda h, b: b + h, lambda h, b, a: h + a * b),
    "minus": (lambda h, b: h - b, lambda h, b, a: h - a * b),
    "alpha": (lambda h, b: torch.add(h, b, alpha=0.5), lambda h, b, a: h + 0.5 * a * b),
    "constant": (lambda h, b: h + b * 0.5, lambda h, b, a: h + 0.5 * a * b),
    "shortcut": (lambda h, b: 0.8 * h + 0.6 * b, lambda h, b, a: 0.8 * h + 0.6 * a * b),
    "in place": (lambda h, b: b.add_(h), lambda h, b, a: h + a * b),
    "two branches": (_two_branches, lambda h, b, a: h + a * b + 0.5 * a * b),
}


@pytest.mark.parametrize("name", COMBINED)
def test_ways_to_write_a_sum(name: str) -> None:
    combine, wanted = COMBINED[name]
    model = nn.Sequential(*(Cell(combine) for _ in range(4)))
    shaped = kgraph.transform(model, ResidualScaling(), X)
    h = X
    for cell in model:
        h = wanted(h, cell.last(torch.relu(cell.first(h))), 0.5)  # type: ignore[operator, union-attr]
    torch.testing.assert_close(shaped(X), h)
    again = kgraph.transform(shaped, ResidualScaling(beta=1.0), X)  # constants multiply, and the ledger says so
    assert "stood there already" in again.kgraph.ledger.notes[-1]


@pytest.mark.parametrize(
    ("activation", "after", "kind", "law"),
    [
        (torch.relu, nn.Identity(), "res-3", "positive"),
        (nn.functional.gelu, nn.Identity(), "res-2", "positive"),
        (torch.tanh, nn.Identity(), "res-2", "centred"),
        (nn.Identity(), nn.Identity(), "linear", "centred"),
        (torch.relu, nn.ReLU(), "activated", "drift"),
        (torch.relu, nn.Tanh(), "activated", "positive"),
    ],
    ids=["relu", "gelu", "tanh", "linear", "relu after", "tanh after"],
)
def test_block_types(activation: Any, after: nn.Module, kind: str, law: str) -> None:
    model = nn.Sequential(*(Cell(lambda h, b: h + after(b), activation) for _ in range(3)))
    (chain,) = chains(model).chains
    assert chain.length == 3 and chain.kinds == (kind,) and chain.blocks[0].branches[0].law == law


def test_shared_weights_are_not_drawn_along_depth() -> None:
    block = Res3(WIDTH, torch.Generator().manual_seed(0))
    shaped = kgraph.transform(nn.Sequential(block, block, block), ResidualScaling(weights="rbf"), X)
    assert {k.why for k in shaped.kgraph.ledger.kept} == {"not drawn along depth: several layers share one weight"}
    assert alphas(shaped) == {(1.0, round(1 / 3, 9))}


def test_projection_is_no_identity() -> None:
    class Projected(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.way, self.branch = nn.Linear(WIDTH, WIDTH).double(), nn.Linear(WIDTH, WIDTH).double()

        def forward(self, h: Tensor) -> Tensor:
            return self.way(h) + self.branch(torch.relu(h))

    model = nn.Sequential(Res3(WIDTH, torch.Generator()), Res3(WIDTH, torch.Generator()), Projected())
    found = chains(model)
    assert [chain.length for chain in found.chains] == [2] and "no identity shortcut" in found.left_out[0][1]
    kept = kgraph.transform(model, ResidualScaling(), X).kgraph.ledger.kept
    assert any("not understood as a residual block" in k.why for k in kept)


def test_broken_promise_is_noticed() -> None:
    work = Workspace(capture(network("res3", 3), X), "eval")
    step = ScaleBranches()
    step.run(work)
    scaled = [node for node in work.nodes if BETA in node.meta]
    assert len(scaled) == 3 and step.broken(work) == ""
    scaled[1].args = (scaled[1].args[1], scaled[1].args[1])
    assert "no longer close a block" in step.broken(work)
    with pytest.raises(PassError, match="ScaleBranches broke its promise"):
        type("Again", (ScaleBranches,), {"rewrite": lambda self, work: None, "name": "ScaleBranches"})().run(work)


def test_folding() -> None:
    shaped = kgraph.transform(network("res3", 4), ResidualScaling(), X)
    wanted = shaped(X).detach()
    work = Workspace(capture(shaped, X), "eval")
    ScaleBranches(0.0).run(work)  # sums as modules again
    FoldResidualWeights().run(work)
    folded = work.graph.emit()
    assert all(set(weights) == {1.0} for weights in alphas(folded))
    torch.testing.assert_close(folded(X), wanted)


@pytest.mark.parametrize("name", ["resnet18", "vit", "gpt2"])
def test_models_of_libraries(name: str) -> None:
    model, x, lengths, kinds = _library_model(name)
    found = chains(model, x).chains
    assert [chain.length for chain in found] == lengths and found[0].kinds == kinds
    shaped = kgraph.transform(model, ResidualScaling(), x)
    assert shaped.kgraph.ledger.unmet == ()
    assert (1.0, round(lengths[0] ** -0.5, 9)) in alphas(shaped) or lengths[0] == 1


def _library_model(name: str) -> tuple[nn.Module, Any, list[int], tuple[str, ...]]:
    if name == "gpt2":
        transformers = pytest.importorskip("transformers")
        config = transformers.GPT2Config(
            n_layer=2, n_embd=32, n_head=2, vocab_size=50, use_cache=False, bos_token_id=0, eos_token_id=0
        )
        ids = torch.randint(0, 50, (2, 6))
        return transformers.GPT2Model(config).eval(), {"input_ids": ids}, [4], ("attention", "res-2")
    timm = pytest.importorskip("timm")
    x = torch.randn(2, 3, 32, 32)
    if name == "vit":
        model = timm.create_model("vit_tiny_patch16_224", img_size=32, depth=3, drop_path_rate=0.1)
        return model, x, [6], ("attention", "res-2")
    return timm.create_model("resnet18"), x, [2, 1, 1, 1], ("res-3",)
