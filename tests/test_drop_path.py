"""Stochastic depth and other random functions, written out: the mode is theirs too."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional

import kgraph
from kgraph.capture import capture

WIDTH = 16


def draw(*shape: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(0))


X = draw(4, WIDTH)


class DropPath(nn.Module):
    """Stochastic depth as timm, torchvision and transformers write it."""

    def __init__(self, style: str, p: float = 0.5) -> None:
        super().__init__()
        self.style, self.keep = style, 1 - p

    def forward(self, x: Tensor) -> Tensor:
        if not self.training:
            return x
        shape = (x.shape[0],) + (1,) * (x.ndim - 1)
        if self.style == "timm":
            return x * x.new_empty(shape).bernoulli_(self.keep).div_(self.keep)
        if self.style == "torchvision":
            return x * torch.empty(shape, dtype=x.dtype, device=x.device).bernoulli_(self.keep).div_(self.keep)
        if self.style == "whole batch":
            return x * torch.empty([1] * x.ndim, dtype=x.dtype, device=x.device).bernoulli_(self.keep).div_(self.keep)
        return x.div(self.keep) * (self.keep + torch.rand(shape, dtype=x.dtype, device=x.device)).floor_()


STYLES = ("timm", "torchvision", "transformers", "whole batch")


@pytest.mark.parametrize("style", STYLES)
def test_drop_path_is_known(style: str) -> None:
    """Eval: nothing. Train: q / keep, the cosine of two inputs times keep, for masks of mean 1 are independent."""
    layers = [nn.Linear(WIDTH, WIDTH), nn.ReLU(), nn.Linear(WIDTH, WIDTH)]
    bare, dropped = nn.Sequential(*layers), nn.Sequential(*layers, DropPath(style))
    x = draw(6, 5, WIDTH)
    own = kgraph.analyze(bare, x).final
    still, noisy = (kgraph.analyze(dropped, x, mode=mode).final for mode in ("eval", "train"))
    assert (still.q, *still.c) == (own.q, *own.c)
    assert noisy.q == pytest.approx(2 * own.q, rel=1e-12)
    assert noisy.c == pytest.approx([c / 2 for c in own.c], rel=1e-12)


@pytest.mark.parametrize("style", STYLES)
def test_drop_path_follows_the_mode_where_a_pass_reached_into_it(style: str) -> None:
    graph = capture(nn.Sequential(nn.Linear(WIDTH, WIDTH), DropPath(style)), X)
    for node in graph.module.graph.nodes:
        node.meta["group_size"] = 0  # as after a change inside: no module call is put back
    made = graph.emit()
    x = draw(4000, WIDTH)
    with torch.no_grad():
        out, reference = made.train()(x), graph.root[0](x)  # type: ignore[index]
    ratio = (out / reference)[:, 0]
    assert ratio.unique().numel() <= 3  # 0 and 2, one more for rounding
    assert torch.allclose(out, ratio[:, None] * reference, rtol=1e-4, atol=1e-6)  # one number for every input
    if style != "whole batch":
        assert abs(float(ratio.mean()) - 1) < 5 / 4000**0.5  # 5 standard errors: the ratio has variance 1
    assert torch.equal(made.eval()(x), reference)


@pytest.mark.parametrize(
    "noise",
    [
        lambda x, on: functional.alpha_dropout(x, 0.5, on),
        lambda x, on: functional.feature_alpha_dropout(x, 0.5, on),
        lambda x, on: functional.rrelu(x, 0.1, 0.9, on),
    ],
)
def test_random_functions_follow_the_mode(noise: Any) -> None:
    class Noisy(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = nn.Linear(WIDTH, WIDTH)

        def forward(self, x: Tensor) -> Tensor:
            return noise(self.layer(x), self.training)

    model = Noisy()
    graph = capture(model, X)
    assert not graph.notes
    made = graph.emit()
    assert torch.equal(made.eval()(X), model.eval()(X))
    assert not torch.equal(made.train()(X), made(X))


def test_alpha_dropout_does_nothing_in_eval_mode() -> None:
    layers = [nn.Linear(WIDTH, WIDTH), nn.SELU()]
    one, two = (kgraph.analyze(nn.Sequential(*layers, *more).eval(), X).final for more in ([], [nn.AlphaDropout(0.3)]))
    assert (one.q, *one.c, one.slope) == (two.q, *two.c, two.slope)


BY_HAND = {
    "below": lambda x: (torch.rand(x.shape[0], 1) < 0.8).float() / 0.8,
    "floor": lambda x: torch.floor(0.8 + torch.rand(x.shape[0], 1)) / 0.8,
    "bernoulli": lambda x: x.new_empty(x.shape[0], 1).bernoulli_(0.8) / 0.8,
}


@pytest.mark.parametrize("name", BY_HAND)
def test_depth_dropped_in_both_modes(name: str) -> None:
    """x + m f(x) without a look at the mode: drawn in eval mode too, q = 1 + q_f / keep, c of f times keep."""

    class Model(nn.Module):
        def __init__(self, drops: bool) -> None:
            super().__init__()
            self.layer, self.drops = nn.Linear(WIDTH, WIDTH, bias=False), drops
            nn.init.constant_(self.layer.weight, WIDTH**-0.5)

        def forward(self, x: Tensor) -> Tensor:
            h = self.layer(x)
            return x + (BY_HAND[name](x) * h if self.drops else h)

    model, x = Model(True), draw(64, WIDTH)
    graph = capture(model, X)
    assert not graph.notes
    made = graph.emit()
    for training in (True, False):
        torch.manual_seed(4)
        expected = model.train(training)(x)
        torch.manual_seed(4)
        assert torch.allclose(made.train(training)(x), expected, atol=1e-6)
        own, bare = (kgraph.analyze(m.train(training), X).final for m in (model, Model(False)))
        kept = bare.q - 1
        assert own.q == pytest.approx(1 + kept / 0.8, rel=1e-6)
        both = [(c + kept * c) / (1 + kept / 0.8) for c in (0.0, 0.5, 0.9)]
        assert own.c == pytest.approx(both, abs=1e-6)
        assert own.note == "one random number for all channels of an input"
