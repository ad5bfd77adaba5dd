"""`kgraph.explain`: each row is the model that one would build by hand, and closed forms of deep relu networks."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor, nn

import kgraph
from kgraph.capture import capture
from kgraph.passes.base import Workspace
from kgraph.studies.explain.report import INPUTS
from kgraph.studies.explain.variants import Initialize
from kgraph.studies.explain.words import difference, fate

WIDTH, DEPTH = 256, 6


class Residual(nn.Module):
    """Norm, activation and layer in every block, beside a skip."""

    def __init__(self, *, norm: bool = True, skip: bool = True, activation: type[nn.Module] = nn.ReLU) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.layers = nn.ModuleList(nn.Linear(WIDTH, WIDTH) for _ in range(DEPTH))
        self.norms = nn.ModuleList(nn.LayerNorm(WIDTH) if norm else nn.Identity() for _ in range(DEPTH))
        self.activation, self.skip, self.head = activation(), skip, nn.Linear(WIDTH, WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        for norm, layer in zip(self.norms, self.layers, strict=True):
            y = layer(self.activation(norm(x)))
            x = x + y if self.skip else y
        return self.head(x)


X = torch.randn(2, WIDTH)
BY_HAND = {
    "without LayerNorm": {"norm": False},
    "without skips": {"skip": False},
    "without both": {"norm": False, "skip": False},
    "tanh instead": {"activation": nn.Tanh},
    "gelu instead": {"activation": nn.GELU},
}


@pytest.fixture(scope="module")
def found() -> kgraph.Explanation:
    return kgraph.explain(Residual(), X)


@pytest.mark.parametrize("change", BY_HAND)
def test_a_row_is_the_model_without_the_component(found: kgraph.Explanation, change: str) -> None:
    (effect,) = [effect for effect in found.effects if effect.change == change]
    own = kgraph.analyze(Residual(**BY_HAND[change]), X).final  # type: ignore[arg-type]
    # RemoveNorms gives no bias and takes none here: the same weights, and the same numbers
    assert (effect.q, effect.c, effect.slope) == pytest.approx((own.q, own.c[0], own.slope), rel=1e-9)
    other = kgraph.analyze(Residual(), X).final
    assert (effect.q, effect.c, effect.slope) != pytest.approx((other.q, other.c[0], other.slope), rel=1e-3)


def test_the_model_is_left_as_it_was() -> None:
    model = Residual()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    state = torch.random.get_rng_state()
    kgraph.explain(model, X)
    assert torch.equal(torch.random.get_rng_state(), state)
    after = model.state_dict()
    assert before.keys() == after.keys() and all(torch.equal(before[name], after[name]) for name in before)


def test_he_and_orthogonal_weights_of_a_deep_relu_network() -> None:
    """He: q stays, C is the arc-cosine map iterated and the NTK its recursion; orthogonal: q halves at every relu."""
    depth, width = 12, 512
    layers = [layer for _ in range(depth) for layer in (nn.Linear(width, width), nn.ReLU())]
    found = kgraph.explain(nn.Sequential(*layers, nn.Linear(width, width)), torch.randn(2, width))
    rows = {effect.change: effect for effect in found.effects}
    he, orthogonal = rows["He (kaiming_normal_)"], rows["orthogonal (orthogonal_)"]
    c, ntk_two = 0.0, 0.0
    for _ in range(depth):  # of a layer of q 2, its relu has q 1: the next layer adds its own kernel to the NTK's share
        slope = (math.pi - math.acos(c)) / math.pi
        ntk_two = slope * (ntk_two + c)
        c = (math.sqrt(1 - c * c) + c * (math.pi - math.acos(c))) / math.pi
    ntk_two, ntk_own = ntk_two + c, depth + 1
    allowed = 4 * math.sqrt(2 * (depth + 1)) / width  # of the sum over layers of their weights' mean square
    assert (he.c, he.slope) == pytest.approx((c, 1.0), rel=1e-9)
    assert he.q == pytest.approx(2.0, rel=allowed) and orthogonal.q == pytest.approx(2.0**-depth, rel=1e-5)
    condition = (ntk_own + (INPUTS - 1) * ntk_two) / (ntk_own - ntk_two)
    assert he.condition == pytest.approx(condition, rel=0.02)  # weights' own squares, a layer's part each


def test_pools_and_features_in_front_of_an_average() -> None:
    layers = (nn.Conv2d(3, 64, 3), nn.ReLU(), nn.MaxPool2d(2), nn.Conv2d(64, 64, 3), nn.ReLU())
    model = nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(64, 10))
    found = kgraph.explain(model, torch.randn(2, 3, 16, 16))
    rows = {effect.change: effect for effect in found.effects}
    assert rows["average instead of max"].q_low < rows["as it is"].q_low  # a maximum has a mean, an average a quarter
    assert "in front of the average" in found.at
    average = kgraph.analyze(model, torch.randn(2, 3, 16, 16))
    (last,) = [node for node in average.nodes if node.name == found.at.partition(",")[0]]
    assert rows["as it is"].c == pytest.approx(last.c[0], rel=1e-9) and average.final.c[0] > last.c[0] + 0.05


def test_a_plain_network_has_no_rows_for_what_it_lacks() -> None:
    found = kgraph.explain(nn.Sequential(nn.Linear(8, 8), nn.Tanh(), nn.Linear(8, 8)), torch.randn(2, 8))
    changes = [effect.change for effect in found.effects]
    assert changes[0] == "as it is" and not any("without" in change or "max" in change for change in changes)
    assert not any(change.startswith("tanh") for change in changes)
    assert found.at == "the output" and "transform with TAT" in changes


def test_a_network_without_activations() -> None:
    found = kgraph.explain(nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 8)), torch.randn(2, 8))
    assert all(effect.component not in ("activation", "pooling") for effect in found.effects)
    assert "q " not in found.effects[0].words and math.isnan(found.effects[0].q_high)


def test_a_learnable_slope_goes_with_its_activation() -> None:
    model = nn.Sequential(nn.Linear(8, 16), nn.PReLU(16), nn.Linear(16, 8))
    found = kgraph.explain(model, torch.randn(2, 8))
    (effect,) = [effect for effect in found.effects if effect.change == "tanh instead"]
    own = kgraph.analyze(nn.Sequential(model[0], nn.Tanh(), model[2]), torch.randn(2, 8)).final
    assert (effect.q, effect.c, effect.slope) == pytest.approx((own.q, own.c[0], own.slope), rel=1e-9)


def test_what_cannot_be_made_is_a_row_that_says_why(monkeypatch: pytest.MonkeyPatch) -> None:
    def fails(*args: object) -> None:
        raise kgraph.RuleError("no such thing")

    monkeypatch.setattr("kgraph.studies.explain.variants.rewrite", fails)
    found = kgraph.explain(nn.Sequential(nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 8)), torch.randn(2, 8))
    refused = [effect for effect in found.effects if effect.refused]
    assert [effect.change for effect in refused] == ["transform with DKS", "transform with TAT"]
    assert "transform with DKS: no such thing" in str(found) and found.effects[0].words


def test_words(found: kgraph.Explanation) -> None:
    assert fate(1, 1, 0.0, 1.0) == "q stays; unrelated inputs stay apart"
    assert fate(
        1, 1e6, 0.97, 0.01
    ) == "q explodes (by 1e+06); unrelated inputs look alike; small differences fade".replace("1e+06", "1e6")
    assert "q vanishes" in fate(1e-5, 1, 0.5, 1.0) and "keep 50%" in fate(1e-5, 1, 0.5, 1.0)
    assert fate(0, 1, math.nan, math.nan) == "q is 0; no cosine is left"
    assert difference(found.effects[0], found.effects[0]) == ""


def test_views(found: kgraph.Explanation) -> None:
    text = found.text(width=160)
    assert "what becomes of a signal" in text and "without skips" in text and "NTK cond" in text
    assert max(map(len, str(found).splitlines())) <= 100 and "what becomes" not in str(found)
    assert "without LayerNorm" in found._repr_html_()
    data = found.to_dict()
    assert data["effects"][0]["change"] == "as it is"  # type: ignore[index]


def test_bad_calls() -> None:
    with pytest.raises(kgraph.InputError, match="inputs"):
        kgraph.explain(Residual(), X, inputs="grey")
    with pytest.raises(kgraph.InputError, match="mode"):
        kgraph.explain(Residual(), X, mode="test")
    with pytest.raises(kgraph.ModelError):
        kgraph.explain("a model", X)  # type: ignore[arg-type]


def test_layers_of_one_shape_are_drawn_apart_in_any_precision() -> None:
    """QR has no kernel for bfloat16; one seed for every layer would make all of them the same matrix."""
    model = nn.Sequential(*(nn.Linear(16, 16, dtype=torch.bfloat16) for _ in range(3)))
    graph = capture(model, torch.zeros(2, 16, dtype=torch.bfloat16))
    work = Workspace(graph, seed=0)

    Initialize(nn.init.orthogonal_).rewrite(work)

    first, second, third = (graph.root.get_parameter(f"{i}.weight").double() for i in range(3))
    torch.testing.assert_close(first @ first.T, torch.eye(16, dtype=torch.float64), rtol=0, atol=2**-8 * 1.01)
    assert not torch.equal(first, second) and not torch.equal(second, third)


def test_an_output_that_is_a_relu_is_named() -> None:
    """C(0) and q are those of what it reads, as the promise of a transform is."""
    found = kgraph.explain(nn.Sequential(nn.Linear(64, 64), nn.ReLU()), torch.randn(2, 64))
    assert found.end == found.at == "linear, in front of the output's own nonlinearity"
    assert f"the others: at {found.end}" in str(found).replace("\n", " ")


def test_weights_without_numbers_are_not_drawn() -> None:
    layers = [nn.Linear(16, 16, device="meta"), nn.ReLU(), nn.Linear(16, 16, device="meta")]
    found = kgraph.explain(nn.Sequential(*layers), torch.randn(2, 16, device="meta"))
    drawn = [effect for effect in found.effects if effect.component == "initializer"]
    assert len(drawn) == 3 and all("is on the meta device" in effect.refused for effect in drawn)
