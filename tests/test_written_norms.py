"""Norms in other spellings: recognized by what they compute, removed as norms, kept as what the user wrote."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import kgraph
from kgraph.canonical import operation_name
from kgraph.capture import capture
from kgraph.passes.base import Workspace
from kgraph.passes.remove_norms import NORMS, RemoveNorms

WIDTH = 8
Norm = Callable[[Tensor, Tensor, Tensor], Tensor]


def _centred(x: Tensor, *dims: int) -> Tensor:
    return x - x.mean(dims, keepdim=True)


def _at(parameter: Tensor) -> Tensor:
    return parameter[:, None, None]


def _folded(x: Tensor, g: Tensor, b: Tensor) -> Tensor:
    """As inference engines write it: one scale and one shift."""
    inverse = torch.rsqrt(x.var(-1, keepdim=True, unbiased=False) + 1e-5)
    return x * (g * inverse) + (b - x.mean(-1, keepdim=True) * g * inverse)


def _groups(x: Tensor, g: Tensor, b: Tensor) -> Tensor:
    parts = x.reshape(x.shape[0], 2, -1)
    parts = _centred(parts, -1) / torch.sqrt(parts.var(-1, keepdim=True, unbiased=False) + 1e-5)
    return parts.reshape(x.shape) * _at(g) + _at(b)


def _gemma(x: Tensor, g: Tensor, b: Tensor) -> Tensor:
    y = x.float()
    return (y * torch.rsqrt(y.pow(2).mean(-1, keepdim=True) + 1e-6) * (1 + g.float())).type_as(x)


def _squares(x: Tensor, g: Tensor, b: Tensor) -> Tensor:
    mean = x.mean(-1, keepdim=True)
    return (x - mean) / ((x * x).mean(-1, keepdim=True) - mean**2 + 1e-5).sqrt()


DENSE: dict[str, tuple[str, Norm]] = {
    "unit length": ("RMSNorm", lambda x, g, b: F.normalize(x, dim=-1) * WIDTH**0.5),
    "scale norm": ("RMSNorm", lambda x, g, b: g[0] * x / x.norm(dim=-1, keepdim=True).clamp(min=1e-5)),
    "linalg": ("RMSNorm", lambda x, g, b: x / torch.linalg.norm(x, dim=-1, keepdim=True) * g),
    "sum of squares": ("RMSNorm", lambda x, g, b: x / torch.sqrt(x.square().sum(-1, keepdim=True) / WIDTH + 1e-8) * g),
    "one plus gain": ("RMSNorm", _gemma),
    "std": ("LayerNorm", lambda x, g, b: g * _centred(x, -1) / (x.std(-1, keepdim=True) + 1e-6) + b),
    "power": ("LayerNorm", lambda x, g, b: _centred(x, -1) * (x.var(-1, keepdim=True) + 1e-5) ** -0.5 * g + b),
    "mean of squares": ("LayerNorm", _squares),
    "folded": ("LayerNorm", _folded),
    "batch std": ("BatchNorm", lambda x, g, b: (x - x.mean(0)) / (x.std(0, unbiased=False) + 1e-5) * g + b),
    "batch": ("BatchNorm", lambda x, g, b: (x - x.mean(0)) / torch.sqrt(x.var(0, unbiased=False) + 1e-5) * g + b),
}
IMAGES: dict[str, tuple[str, Norm]] = {
    "channels first": (
        "LayerNorm",
        lambda x, g, b: _at(g) * (_centred(x, 1) / torch.sqrt(_centred(x, 1).pow(2).mean(1, True) + 1e-6)) + _at(b),
    ),
    "over channels": ("RMSNorm", lambda x, g, b: F.normalize(x, dim=1) * WIDTH**0.5 * _at(g)),
    "whole image": ("LayerNorm", lambda x, g, b: _centred(x, 1, 2, 3) / x.std((1, 2, 3), keepdim=True) * _at(g)),
    "positions": (
        "InstanceNorm",
        lambda x, g, b: _centred(x, 2, 3) / torch.sqrt(x.var((2, 3), keepdim=True) + 1e-5) * _at(g) + _at(b),
    ),
    "groups": ("GroupNorm", _groups),
    "batch and positions": (
        "BatchNorm",
        lambda x, g, b: _centred(x, 0, 2, 3) / torch.sqrt(x.var((0, 2, 3), keepdim=True) + 1e-5) * _at(g) + _at(b),
    ),
}
OTHERS: dict[str, Norm] = {
    "over everything": lambda x, g, b: x / x.norm(),
    "sum of magnitudes": lambda x, g, b: x / x.abs().mean(-1, keepdim=True),
    "softmax": lambda x, g, b: x.exp() / x.exp().sum(-1, keepdim=True),
    "squash": lambda x, g, b: x * x.norm(dim=-1, keepdim=True) / (1 + x.square().sum(-1, keepdim=True)),
    "clipped": lambda x, g, b: x / x.norm(dim=-1, keepdim=True).clamp(min=4.0),
    "not centred": lambda x, g, b: x / x.std(-1, keepdim=True),
    "mean alone": lambda x, g, b: _centred(x, -1),
    "no root": lambda x, g, b: x / (x.pow(2).mean(-1, keepdim=True) + 1e-5),
    "largest": lambda x, g, b: x / x.amax(-1, keepdim=True),
    "excited": lambda x, g, b: x * torch.sigmoid(x.mean(-1, keepdim=True)),
}


class Normed(nn.Module):
    def __init__(self, norm: Norm, images: bool = False) -> None:
        super().__init__()
        self.enter = nn.Conv2d(3, WIDTH, 1) if images else nn.Linear(5, WIDTH)
        self.gain, self.shift = nn.Parameter(torch.rand(WIDTH) + 0.5), nn.Parameter(torch.randn(WIDTH))
        self.leave = nn.Conv2d(WIDTH, 4, 1) if images else nn.Linear(WIDTH, 4)
        self.norm = norm

    def forward(self, x: Tensor) -> Tensor:
        return self.leave(torch.tanh(self.norm(self.enter(x), self.gain, self.shift)))


CASES = [(name, kind, norm, False) for name, (kind, norm) in DENSE.items()]
CASES += [(name, kind, norm, True) for name, (kind, norm) in IMAGES.items()]


def _input(images: bool) -> Tensor:
    return torch.randn(4, 3, 3, 3) if images else torch.randn(4, 5)


@pytest.mark.parametrize(("name", "kind", "norm", "images"), CASES, ids=[case[0] for case in CASES])
def test_a_written_norm_is_one_operation_and_stays_what_it_was(name: str, kind: str, norm: Norm, images: bool) -> None:
    """The captured graph has the norm, an emitted module the user's own arithmetic, bit for bit and at other sizes."""
    model = Normed(norm, images).eval()
    graph = capture(model, _input(images))
    assert [NORMS[node.target] for node in graph.module.graph.nodes if node.target in NORMS] == [kind]
    emitted = graph.emit().eval()
    for scale in (1.0, 1e-4, 0.0):
        x = scale * _input(images)[:3]
        assert torch.equal(emitted(x).nan_to_num(7.0), model(x).nan_to_num(7.0))
    assert list(emitted.state_dict()) == [key for key in model.state_dict() if key in emitted.state_dict()]
    x = 3.0 * _input(images) + 1.0
    actual = graph.module(x)
    actual = actual[0] if isinstance(actual, tuple) else actual
    # a sample variance over a batch is a population variance in the limit of large batches: sqrt(1 - 1/36) of it here
    assert torch.allclose(actual, model(x), atol=2e-2 if name == "batch and positions" else 2e-5)
    work = Workspace(capture(model, _input(images)))
    RemoveNorms().run(work)
    bare = work.graph.emit().eval()
    assert work.ledger("").counts() == {f"remove {kind}": 1}
    assert torch.allclose(bare(x), model.leave(torch.tanh(model.enter(x))), atol=1e-6)
    assert not {"gain", "shift"} & set(bare.state_dict())


@pytest.mark.parametrize("name", list(OTHERS))
def test_what_is_no_norm_is_none(name: str) -> None:
    graph = capture(Normed(OTHERS[name]).eval(), _input(False))
    assert not [node for node in graph.module.graph.nodes if node.target in NORMS]


def test_gradients_may_be_off() -> None:
    """What a norm depends on is read off a gradient, whatever the caller's mode."""
    for mode in (torch.no_grad(), torch.inference_mode()):
        with mode:
            graph = capture(Normed(DENSE["std"][1]).eval(), _input(False))
        assert "layer_norm" in {operation_name(node) for node in graph.module.graph.nodes}


def test_two_norms_in_a_row_are_two() -> None:
    def both(x: Tensor, g: Tensor, b: Tensor) -> Tensor:
        return _folded(F.normalize(x, dim=-1) * WIDTH**0.5, g, b)

    model = Normed(both).eval()
    graph = capture(model, _input(False))
    assert [NORMS[n.target] for n in graph.module.graph.nodes if n.target in NORMS] == ["RMSNorm", "LayerNorm"]
    x = _input(False)
    assert torch.equal(graph.emit().eval()(x), model(x))


def test_computed_weights_are_no_norm_of_activations() -> None:
    """A cosine head: the features' norm is one, that of the weight is how the weight is computed."""

    class Cosine(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.enter, self.weight = nn.Linear(5, WIDTH), nn.Parameter(torch.randn(4, WIDTH))

        def forward(self, x: Tensor) -> Tensor:
            x = torch.tanh(self.enter(x))
            return 16 * F.linear(F.normalize(x, dim=-1), F.normalize(self.weight, dim=-1))

    graph = capture(Cosine(), torch.randn(3, 5))
    assert [NORMS[node.target] for node in graph.module.graph.nodes if node.target in NORMS] == ["RMSNorm"]
    work = Workspace(graph)
    RemoveNorms().run(work)
    bare, x = work.graph.emit(), torch.randn(6, 5)
    model = work.graph.root
    features = torch.tanh(model.get_submodule("enter")(x)) / WIDTH**0.5  # unit length at q = 1: the logits' size
    expected = 16 * F.linear(features, F.normalize(model.get_parameter("weight"), dim=-1))
    assert torch.allclose(bare(x), expected, atol=1e-5)


def test_unit_vectors_that_meet_keep_their_length() -> None:
    """Cosine attention: without its norms queries and keys are 1 / sqrt(n) of theirs, or the softmax would be hard."""

    class Attention(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.q, self.k, self.v = nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, WIDTH)
            self.leave = nn.Linear(WIDTH, 3)

        def forward(self, x: Tensor) -> Tensor:
            q, k = F.normalize(self.q(x), dim=-1), F.normalize(self.k(x), dim=-1)
            return self.leave(F.gelu(torch.softmax(10 * q @ k.transpose(1, 2), -1) @ self.v(x)))

    model, x = Attention(), torch.randn(2, 5, WIDTH)
    work = Workspace(capture(model, x))
    RemoveNorms().run(work)
    attention = torch.softmax(10 * model.q(x) @ model.k(x).transpose(1, 2) / WIDTH, -1)
    assert torch.allclose(work.graph.emit()(x), model.leave(F.gelu(attention @ model.v(x))), atol=1e-5)
    said = " ".join(change.why for change in work.changes)
    assert "factor 3.536 stays" in said and "factor 0.3536 stays" in said  # 10 / sqrt(8) and 1 / sqrt(8)


def test_a_method_that_keeps_norms_keeps_the_function() -> None:
    """Zeros stay zeros behind F.normalize, which the norm's own operation would divide by nothing."""

    class Residual(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layers = nn.ModuleList(nn.Linear(WIDTH, WIDTH, bias=False) for _ in range(3))

        def forward(self, x: Tensor) -> Tensor:
            for layer in self.layers:
                x = x + layer(torch.relu(F.normalize(x, dim=-1) * WIDTH**0.5))
            return x

    model = Residual()
    result = kgraph.transform(model, "residual-scaling", torch.randn(4, WIDTH))
    x = torch.randn(4, WIDTH)
    x[1] = 0
    expected = x
    for layer in model.layers:
        expected = expected + layer(torch.relu(F.normalize(expected, dim=-1) * WIDTH**0.5)) / 3**0.5
    assert torch.allclose(result(x), expected, atol=1e-5)


def test_what_divides_is_no_activation() -> None:
    """A norm that has no name here stays, and its clamp is kept, not shaped."""
    result = kgraph.transform(Normed(OTHERS["clipped"]), "dks", torch.randn(4, 5))
    ledger = result.kgraph.ledger
    assert ledger.counts()["shape activation"] == 1
    assert ["clamp" in change.node and "divided" in change.why for change in ledger.kept] == [True]


def test_batch_statistics_by_hand_agree_with_plain_torch() -> None:
    """c of a pair of cosine .5 within a batch of unrelated inputs, three layers of tanh, by plain torch."""

    class Hand(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return (x - x.mean(0)) / torch.sqrt(x.var(0, unbiased=False) + 1e-5)

    width, inputs = 200, 16

    def net() -> nn.Sequential:
        torch.manual_seed(1)
        layers: list[nn.Module] = [nn.Linear(inputs, width, bias=False)]
        for _ in range(3):
            layers += [Hand(), nn.ReLU(), nn.Linear(width, width, bias=False)]
        return nn.Sequential(*layers)

    final = kgraph.analyze(net(), torch.randn(8, inputs)).final
    generator = torch.Generator().manual_seed(0)
    found = []
    for _ in range(24):
        x = torch.randn(256, inputs, generator=generator)
        x = x / x.norm(dim=1, keepdim=True) * inputs**0.5
        other = x[1] - x[1] @ x[0] / inputs * x[0]
        x[1] = 0.5 * x[0] + 0.75**0.5 * other / other.norm() * inputs**0.5
        model = net()
        with torch.no_grad():
            for layer in model:
                if isinstance(layer, nn.Linear):
                    layer.weight.normal_(generator=generator, std=layer.in_features**-0.5)
            y = model(x)
        found.append(float(y[0] @ y[1] / (y[0].norm() * y[1].norm())))
    sample = torch.tensor(found)
    error = float(sample.std()) / len(found) ** 0.5
    assert abs(final.c[1] - float(sample.mean())) < 4 * error + 2 / width
    assert final.how != "sampled"


class Running(nn.Module):
    """Batch normalization with running statistics, in place, in a region without gradients."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("average", torch.zeros(WIDTH))
        self.register_buffer("variance", torch.ones(WIDTH))
        self.average: Tensor
        self.variance: Tensor

    def forward(self, x: Tensor) -> Tensor:
        if not self.training:
            return (x - self.average) / torch.sqrt(self.variance + 1e-5)
        mean, variance = x.mean(0), x.var(0, unbiased=False)
        with torch.no_grad():
            self.average.mul_(0.9).add_(0.1 * mean)
            self.variance.mul_(0.9).add_(0.1 * variance)
        return (x - mean) / torch.sqrt(variance + 1e-5)


class _WeightStandardized(nn.Linear):
    """A norm of a weight is none of activations, whatever operation computes it."""

    def forward(self, x: Tensor) -> Tensor:
        weight = F.batch_norm(self.weight[None], None, None, training=True).reshape_as(self.weight)
        return F.linear(x, weight, self.bias)


def test_batch_statistics_in_eval_mode_are_said() -> None:
    class Told(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return F.batch_norm(x, None, None, training=True)

    class Hand(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return (x - x.mean(0)) / torch.sqrt(x.var(0) + 1e-5)

    def model(norm: nn.Module) -> nn.Module:
        return nn.Sequential(nn.Linear(5, WIDTH), norm, nn.ReLU(), nn.Linear(WIDTH, 4)).eval()

    x = torch.randn(8, 5)
    for norm in (Told(), Hand(), nn.BatchNorm1d(WIDTH, track_running_stats=False)):
        report = kgraph.analyze(model(norm), x)
        assert report.analysis.notes == ("batch_norm: by the statistics of the batch in eval mode too",)
        assert report["batch_norm"].q == pytest.approx(1, abs=1e-3)  # not what the layer before gives
        record = kgraph.transform(model(norm), "tat", x).kgraph
        assert record.ledger.counts()["remove BatchNorm"] == 1 and not record.after.analysis.notes
    for norm in (nn.BatchNorm1d(WIDTH), nn.LayerNorm(WIDTH), _WeightStandardized(WIDTH, WIDTH)):
        assert not kgraph.analyze(model(norm), x).analysis.notes


def test_running_statistics_by_hand() -> None:
    """Both modes and the statistics survive an emission; the transform removes the norm and its bookkeeping."""
    model, x = nn.Sequential(nn.Linear(5, WIDTH), Running(), nn.Tanh(), nn.Linear(WIDTH, 4)), 2 * torch.randn(16, 5)
    graph = capture(model, x)
    (note,) = kgraph.analyze(model.eval(), x).analysis.notes
    assert note == "batch_norm: by the statistics of the batch in eval mode too"
    emitted = graph.emit().train()
    own = nn.Sequential(nn.Linear(5, WIDTH), Running(), nn.Tanh(), nn.Linear(WIDTH, 4)).train()
    own.load_state_dict(model.state_dict())
    for training in (True, True, False):
        assert torch.allclose(emitted.train(training)(x), own.train(training)(x), atol=1e-6)
    statistics = dict(own.named_buffers())
    assert all(torch.allclose(buffer, statistics[name]) for name, buffer in emitted.named_buffers())
    shaped = kgraph.transform(own, "dks", x)
    assert shaped.kgraph.ledger.counts()["remove BatchNorm"] == 1 and not list(shaped.buffers())
    shaped.train()(x)
