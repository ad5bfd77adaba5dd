"""Gradients that a forward stops: an emitted module stops them too, or the ledger says what is lost.

The oracle is autograd on the model as given.
"""

from __future__ import annotations

import copy
import pickle
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import kgraph
from kgraph.capture import capture
from kgraph.gradient_stops import STOPS

pytestmark = pytest.mark.filterwarnings("ignore:.*LeafSpec.*:FutureWarning")  # PyTorch, about its own pickles
WIDTH, BATCH = 16, 8


class Net(nn.Module):
    """Three layers in a forward that a test writes."""

    def __init__(self, forward: Callable[[Net, Tensor], Any], **modules: nn.Module) -> None:
        super().__init__()
        self.a, self.b, self.c = nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, 4)
        self.run = forward
        for name, module in modules.items():
            self.add_module(name, module)

    def forward(self, x: Tensor) -> Any:
        return self.run(self, x)


def gradients(module: nn.Module) -> dict[str, Tensor]:
    """Of one random sum of the outputs' entries, by every parameter and by the input."""
    x = torch.randn(BATCH, WIDTH, generator=torch.Generator().manual_seed(1)).requires_grad_()
    out = module.eval()(x)
    outputs = list(out.values()) if isinstance(out, dict) else [out]
    drawn = torch.Generator().manual_seed(2)
    total = sum(((y * torch.randn(y.shape, generator=drawn)).sum() for y in outputs), torch.zeros(()))
    wanted = {**dict(module.named_parameters()), "x": x}
    return dict(zip(wanted, torch.autograd.grad(total, list(wanted.values()), materialize_grads=True), strict=True))


def alike(one: nn.Module, two: nn.Module) -> bool:
    first, second = gradients(one), gradients(two)
    return all(torch.allclose(g, second[name], atol=1e-5) for name, g in first.items() if name in second)


def in_front(m: Net, x: Tensor) -> Tensor:
    return m.c(F.relu(m.b(F.relu(m.a(x)).detach())))


def region(m: Net, x: Tensor) -> Tensor:
    with torch.no_grad():
        h = F.relu(m.a(x))
        g = torch.tanh(h)
    return m.c(F.relu(m.b(h + g)))


def straight_through(m: Net, x: Tensor) -> Tensor:
    h = F.relu(m.a(x))
    q = torch.tanh(m.b(h))
    return m.c(F.relu(h + (q - h).detach()))


def straight_through_backwards(m: Net, x: Tensor) -> Tensor:
    h = F.relu(m.a(x))
    return m.c(h - (h - torch.tanh(m.b(h))).detach())


def target_branch(m: Net, x: Tensor) -> Tensor:
    with torch.no_grad():
        target = m.c(F.relu(m.b(x)))
    return torch.tanh(m.c(F.relu(m.a(x)))) * target


def weight(m: Net, x: Tensor) -> Tensor:
    return m.c(F.relu(F.linear(F.relu(m.a(x)), m.b.weight.detach(), m.b.bias)))


def output(m: Net, x: Tensor) -> dict[str, Tensor]:
    h = m.a(x)
    return {"main": m.c(F.relu(h)), "code": h.detach()}


def statistics(m: Net, x: Tensor) -> Tensor:
    h = m.a(x)
    with torch.no_grad():
        mean, variance = h.mean(-1, keepdim=True), h.var(-1, keepdim=True, unbiased=False)
    return m.c(F.relu(m.b((h - mean) / (variance + 1e-5).sqrt())))


def in_front_of_norm(m: Net, x: Tensor) -> Tensor:
    return m.c(F.relu(F.layer_norm(m.a(x).detach(), (WIDTH,)) + m.b(x)))


def branch(m: Net, x: Tensor) -> Tensor:
    for _ in range(2):
        x = x + m.b(F.relu(m.a(x.detach())))
    return m.c(x)


def in_place(m: Net, x: Tensor) -> Tensor:
    h = F.relu(m.a(x))
    y = m.b(h)
    k = h * 1.5
    k.detach_()
    return m.c(y + k)


def inference(m: Net, x: Tensor) -> Tensor:
    with torch.inference_mode():
        h = F.relu(m.a(x))
    return m.c(F.relu(m.b(h.clone())))


def inference_but_for_a_part(m: Net, x: Tensor) -> Tensor:
    with torch.inference_mode():
        h = F.relu(m.a(x))
        with torch.inference_mode(False):
            g = torch.tanh(m.b(x))
    return m.c(F.relu(h.clone() + g))


STOPPED = [
    *(in_front, region, straight_through, straight_through_backwards, target_branch, weight, output),
    *(statistics, in_front_of_norm, branch, in_place, inference, inference_but_for_a_part),
]


@pytest.mark.parametrize("forward", STOPPED, ids=lambda f: f.__name__)
def test_an_emitted_module_has_the_gradients_of_the_model(forward: Callable[[Net, Tensor], Any]) -> None:
    model = Net(forward)
    graph = capture(model, torch.randn(BATCH, WIDTH))
    emitted = graph.emit()
    assert alike(emitted, model)
    assert alike(pickle.loads(pickle.dumps(emitted)), model) and alike(copy.deepcopy(emitted), model)
    assert alike(capture(emitted, torch.randn(BATCH, WIDTH)).emit(), model)  # once more
    for node in graph.module.graph.nodes:  # the comparison tells: without its marks the graph has other gradients
        node.meta.pop(STOPS, None)
    assert not alike(graph.emit(), model) or forward is statistics  # of which the user's own body has its own


@pytest.mark.parametrize("forward", STOPPED, ids=lambda f: f.__name__)
@pytest.mark.parametrize("method", ["tat", kgraph.ResidualScaling()], ids=["tat", "residual"])
def test_a_transform_keeps_stops(forward: Callable[[Net, Tensor], Any], method: Any) -> None:
    """What no gradient reaches is reached by none after a transform either, and what one reached still is."""
    model = Net(forward)
    shaped = kgraph.transform(model, method, torch.randn(BATCH, WIDTH))
    before, after = gradients(model), gradients(shaped)
    for name in before.keys() & after.keys():
        assert (float(before[name].norm()) == 0) == (float(after[name].norm()) == 0), name
    record = shaped.kgraph
    assert record is not None and not [line for line in record.ledger.unmet if "gradient" in line]


def test_a_straight_through_sum_is_no_residual() -> None:
    """Its value is q's, which weights on both terms would change."""
    for forward in (straight_through, straight_through_backwards):
        record = kgraph.transform(Net(forward), "tat", torch.randn(BATCH, WIDTH)).kgraph
        assert record is not None
        assert len([kept for kept in record.ledger.kept if "straight-through" in kept.why]) == 2
        assert not [change for change in record.ledger.changes if change.what == "weight residual sum"]
        kept_too = kgraph.transform(Net(forward), kgraph.ResidualScaling(), torch.randn(BATCH, WIDTH)).kgraph
        assert kept_too is not None and not kept_too.ledger.changes


def test_a_deep_traced_model() -> None:
    """The other front end: its stops are kept, and regions without gradients are left to torch.export."""

    class Block(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer, self.act = nn.Linear(4, 4), nn.Tanh()

        def forward(self, x: Tensor) -> Tensor:
            return x + self.act(self.layer(x.detach()))

    class Frozen(Block):
        def forward(self, x: Tensor) -> Tensor:
            with torch.no_grad():
                h = self.layer(x)
            return x + self.act(h)

    x = torch.randn(3, 4)
    for kind in (Block, Frozen):
        model = nn.Sequential(*[kind() for _ in range(5)])
        emitted = capture(model, x, deep=1).emit()
        y, z = model(x).sum(), emitted(x).sum()
        own = torch.autograd.grad(y, list(model.parameters()), materialize_grads=True) if y.requires_grad else ()
        told = torch.autograd.grad(z, list(emitted.parameters()), materialize_grads=True) if z.requires_grad else ()
        assert len(own) == len(told) == (10 if kind is Block else 0)
        assert all(torch.allclose(g, h) for g, h in zip(own, told, strict=True))


class Threefold(torch.autograd.Function):
    @staticmethod
    def forward(ctx: object, u: Tensor) -> Tensor:
        return u.clamp(min=0)

    @staticmethod
    def backward(ctx: object, *gradients: Tensor) -> Tensor:
        return 3 * gradients[0]


class Own(nn.Module):
    def forward(self, u: Tensor) -> Tensor:
        return Threefold.apply(u)


def lost(model: nn.Module, method: Any = "tat") -> list[str]:
    record = kgraph.transform(model, method, torch.randn(BATCH, WIDTH)).kgraph
    assert record is not None
    return [line for line in record.ledger.unmet if "not kept" in line]


def test_a_backward_written_by_hand() -> None:
    """In the forward of the model it is lost at once; in a module of its own it goes when that module goes."""
    (line,) = lost(Net(lambda m, x: m.c(Threefold.apply(m.b(F.relu(m.a(x)))))))
    assert "backward of Threefold (test_gradient_stops.py:" in line and "gradient of a.weight and of" in line
    inside = Net(lambda m, x: m.c(m.act(m.b(F.relu(m.a(x))))), act=Own())
    (line,) = lost(inside)
    assert "backward of Threefold" in line
    assert not lost(inside, kgraph.EdgeOfChaos())  # which leaves the module as it is
    kept = kgraph.transform(inside, kgraph.EdgeOfChaos(), torch.randn(BATCH, WIDTH))
    changed = copy.deepcopy(inside)
    changed.load_state_dict(kept.state_dict())
    assert alike(kept, changed)


def test_other_losses_are_named() -> None:
    def hooked(m: Net, x: Tensor) -> Tensor:
        h = F.relu(m.a(x))
        if h.requires_grad:
            h.register_hook(lambda gradient: -gradient)
        return m.c(F.relu(m.b(h)))

    def in_train_mode(m: Net, x: Tensor) -> Tensor:
        h = F.relu(m.a(x))
        return m.c(F.relu(m.b(h.detach() if m.training else h)))

    for forward in (hooked, in_train_mode):
        (line,) = lost(Net(forward))
        assert "gradient of a.weight" in line
    (line,) = lost(Net(lambda m, x: m.c((h := m.a(x)) * torch.sigmoid(h).detach())))  # swish with half a derivative
    assert "stop of gradients inside it" in line and "test_gradient_stops.py:" in line


@pytest.mark.filterwarnings("ignore:None of the inputs have requires_grad")  # of the checkpoint, about a run without
def test_what_stops_nothing_is_not_named() -> None:
    def gated(m: Net, x: Tensor) -> Tensor:
        h = m.a(x)
        return m.c(F.relu(m.b(h * (h > 0).to(h.dtype).detach() * torch.tensor(2.0).detach())))

    def checkpointed(m: Net, x: Tensor) -> Tensor:
        return m.c(torch.utils.checkpoint.checkpoint(lambda h: F.relu(m.b(h)), m.a(x), use_reentrant=True))

    assert not lost(Net(gated))
    x = torch.randn(BATCH, WIDTH).requires_grad_()
    emitted = kgraph.transform(Net(checkpointed), kgraph.ResidualScaling(), x.detach())
    assert emitted.kgraph is not None and not [line for line in emitted.kgraph.ledger.unmet if "gradient" in line]
    (gradient,) = torch.autograd.grad(emitted(x).sum(), x)
    assert float(gradient.norm()) > 0


def test_a_caller_without_gradients() -> None:
    model = Net(region)
    with torch.no_grad():
        emitted = capture(model, torch.randn(BATCH, WIDTH)).emit()
    assert alike(emitted, model)


def test_no_ntk_where_gradients_are_stopped() -> None:
    report = kgraph.analyze(Net(in_front), torch.randn(BATCH, WIDTH))
    assert report.final.ntk != report.final.ntk
    said = "stop of gradients (detach, no_grad or inference_mode) stands before a.weight"
    assert any(said in note for note in report.analysis.notes)
    plain = kgraph.analyze(Net(lambda m, x: m.c(F.relu(m.b(F.relu(m.a(x)))))), torch.randn(BATCH, WIDTH))
    assert plain.final.ntk > 0


class Frozen(nn.Module):
    """A backbone whose whole forward runs in inference mode, under a head."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.backbone, self.head = nn.Linear(width, width), nn.Linear(width, width)

    @torch.inference_mode()
    def features(self, x: Tensor) -> Tensor:
        return torch.tanh(self.backbone(x))

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.features(x).clone())


def test_inference_mode_stops_gradients_for_kernels_too() -> None:
    """Counted without the stop, the NTK is more than the head's: that of the same layers without inference mode is.

    One input's mean square of 256 tanhs has a standard error of about 8 percent, that of 16 inputs 2.
    """
    torch.manual_seed(0)
    model, x = Frozen(256), torch.randn(16, 256)
    with pytest.raises(kgraph.KGraphError, match=r"stops gradients on the way to 'backbone\.weight'"):
        kgraph.ntk(model, x)
    head = kgraph.ntk(model, x, multipliers={"backbone.weight": 0.0, "backbone.bias": 0.0}).trace()
    assert abs(head / kgraph.empirical_ntk(model, x).matrix.trace() - 1) < 0.08
    assert kgraph.ntk(nn.Sequential(model.backbone, nn.Tanh(), model.head), x).trace() > 1.2 * head
    report = kgraph.analyze(model, x)
    assert report.final.ntk != report.final.ntk
    assert torch.inference_mode.__enter__.__qualname__ == "inference_mode.__enter__"  # as PyTorch has it


REVERSED = {
    "reversed": (-1.0, lambda h: -h + (2 * h).detach()),
    "reversed, detached first": (-1.0, lambda h: 2 * h.detach() - h),
    "a part of it": (0.1, lambda h: 0.1 * h + 0.9 * h.detach()),
    "a rest detached": (0.25, lambda h: h / 4 + (h - h / 4).detach()),
    "a difference": (0.3, lambda h: torch.add(h.detach(), h - h.detach(), alpha=0.3)),
    "of another size": (-1.0, lambda h: (3 * h).detach() - h),
    "interpolated": (0.2, lambda h: torch.lerp(h.detach(), h, 0.2)),
}


@pytest.mark.parametrize("where", ["a layer", "an activation"])
@pytest.mark.parametrize("name", REVERSED)
def test_a_factor_of_the_gradient_is_kept(name: str, where: str) -> None:
    """The shaped model is the plain one but for that factor: the value of ``-h + 2 h`` is h, or a multiple of it."""
    factor, combined = REVERSED[name]
    given = torch.tanh if where == "an activation" else (lambda h: h)
    size = 2.0 if name == "of another size" else 1.0  # q is restored: the gradient with it

    def run(combine: Callable[[Tensor], Tensor]) -> nn.Module:
        torch.manual_seed(0)
        model = Net(lambda m, x: m.c(F.silu(m.b(combine(given(m.a(x)))))))
        return kgraph.transform(model, "tat", torch.randn(BATCH, WIDTH))

    shaped, plain = run(combined), run(lambda h: h)
    x = torch.randn(BATCH, WIDTH)
    assert torch.allclose(shaped(x), plain(x), atol=1e-4)
    one, other = gradients(shaped)["a.weight"], gradients(plain)["a.weight"]
    assert torch.allclose(one, factor / size * other, atol=1e-4 * float(other.abs().max()))
    assert not shaped.kgraph.ledger.unmet  # type: ignore[union-attr]


def test_a_sum_of_multiples_without_a_stop_is_a_multiple() -> None:
    torch.manual_seed(0)

    def twice(m: Net, x: Tensor) -> Tensor:
        h = m.a(x)
        return m.c(F.silu(m.b(3 * h - 2.5 * h)))

    shaped = kgraph.transform(Net(twice), "dks", torch.randn(4, WIDTH))
    assert shaped.kgraph is not None and abs(shaped.kgraph.after.final.q - 1) < 1e-6
    assert not shaped.kgraph.ledger.unmet and shaped.kgraph.ledger.counts()["restore q"] == 1
