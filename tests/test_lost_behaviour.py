"""What a forward does beside its output, or where no graph sees it: named in the ledger, never lost in silence."""

from __future__ import annotations

import threading
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import kgraph
from kgraph.errors import CaptureError, InputError, ModelError

WIDTH = 16
X = torch.randn(4, WIDTH, generator=torch.Generator().manual_seed(0))
Step = Callable[[Any, Tensor], object]


class Net(nn.Module):
    """Two layers and a relu; ``step`` is what a forward does with its hidden tensor besides."""

    def __init__(self, step: Step, **attributes: object) -> None:
        super().__init__()
        self.a, self.b, self.step = nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, WIDTH), step
        for name, value in attributes.items():
            setattr(self, name, value)

    def forward(self, x: Tensor) -> Tensor:
        h = F.relu(self.a(x))
        self.step(self, h)
        return self.b(h)


def unmet(model: nn.Module) -> tuple[str, ...]:
    return kgraph.transform(model, "tat", X).kgraph.ledger.unmet  # pyright: ignore


RESULTS: dict[str, tuple[str, Step, dict[str, object]]] = {
    "a loss": ("aux", lambda m, h: setattr(m, "aux", h.pow(2).mean()), {}),
    "in train mode only": ("aux", lambda m, h: m.training and setattr(m, "aux", h.mean()), {}),
    "without gradients": ("seen", lambda m, h: setattr(m, "seen", h.detach()), {"seen": None}),
    "in a list": ("losses", lambda m, h: m.losses.append(h), {"losses": []}),
    "in a dict": ("out", lambda m, h: m.out.update(h=h), {"out": {}}),
    "in an object": ("held", lambda m, h: setattr(m.held, "h", h), {"held": SimpleNamespace(h=None)}),
    "on a child": ("a.h", lambda m, h: setattr(m.a, "h", h), {}),
    "a count": ("calls", lambda m, h: setattr(m, "calls", m.calls + 1), {"calls": 0}),
}


@pytest.mark.parametrize("case", RESULTS)
@pytest.mark.filterwarnings("ignore:The tensor attribute")
def test_what_every_run_stores_is_named(case: str) -> None:
    name, step, attributes = RESULTS[case]
    model = Net(step, **attributes)
    (line,) = unmet(model)
    owner = "Linear" if name.startswith("a.") else "Net"
    assert line.startswith(f"{name}: ") and f"(on {owner})" in line
    assert "number" in line if case == "a count" else "result" in line
    assert "aux" not in vars(model) and vars(model).get("calls", 0) == 0  # the model is left as it was


KEPT: dict[str, tuple[Step, dict[str, object]]] = {
    "a cache": (lambda m, h: m.mask is None and setattr(m, "mask", torch.ones(3)), {"mask": None}),
    "a constant made anew": (lambda m, h: setattr(m, "mask", torch.ones(h.shape[-1])), {}),
    "sizes": (lambda m, h: setattr(m, "sizes", tuple(h.shape)), {}),
    "a count in a tensor": (lambda m, h: m.calls.add_(1), {"calls": torch.zeros(())}),  # becomes a buffer
}


@pytest.mark.parametrize("case", KEPT)
@pytest.mark.filterwarnings("ignore:The tensor attribute")
def test_what_holds_no_result_is_not_named(case: str) -> None:
    step, attributes = KEPT[case]
    assert unmet(Net(step, **attributes)) == ()


def test_a_count_in_a_tensor_goes_on_in_the_emitted_module_and_is_left_alone_in_the_model() -> None:
    model = Net(lambda m, h: m.calls.add_(1), calls=torch.zeros(()))
    shaped = kgraph.transform(model, "tat", X)
    shaped(X)
    assert model.calls == 0 and dict(shaped.named_buffers())["calls"] == 1


def test_statistics_of_norms_are_no_side_results() -> None:
    assert unmet(nn.Sequential(nn.Linear(WIDTH, WIDTH), nn.BatchNorm1d(WIDTH), nn.ReLU(), nn.Linear(WIDTH, 4))) == ()


class Mixed(nn.Module):
    """A layer and a relu in a region of autocast."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        with torch.autocast("cpu", torch.bfloat16):
            h = F.relu(self.a(x))
        return self.b(h.float())


@pytest.mark.parametrize("method", ["tat", kgraph.EdgeOfChaos()])
def test_a_region_of_autocast_is_named(method: Any) -> None:
    lines = kgraph.transform(Mixed(), method, X).kgraph.ledger.unmet  # pyright: ignore
    (line,) = [line for line in lines if "autocast" in line]
    assert "test_lost_behaviour.py:" in line and "a.weight" in line and "relu" in line
    assert "the model has no activation to shape" not in lines
    with pytest.raises(InputError, match=r"torch\.autocast is not seen into"):
        kgraph.shaping_targets(Mixed(), "tat", X)


def test_a_model_without_activations_is_told_so() -> None:
    assert "the model has no activation to shape" in unmet(nn.Sequential(nn.Linear(WIDTH, 4)))


class Graph(nn.Module):
    """A graph layer with a sparse adjacency."""

    def __init__(self, adjacency: Tensor) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, WIDTH)
        self.register_buffer("adjacency", adjacency)

    def forward(self, x: Tensor) -> Tensor:
        return self.b(F.relu(torch.sparse.mm(self.adjacency, self.a(x))))


@pytest.mark.parametrize("sparse", [Tensor.to_sparse, Tensor.to_sparse_csr])
@pytest.mark.filterwarnings("ignore:Sparse CSR")
def test_sparse_buffers(sparse: Callable[[Tensor], Tensor]) -> None:
    """A permutation of the nodes changes no kernel: q is that of the layers, and the buffer stays as it was."""
    model = Graph(sparse(torch.eye(4)[[1, 0, 3, 2]]))
    q = kgraph.analyze(model, X).final.q
    plain = kgraph.analyze(nn.Sequential(model.a, nn.ReLU(), model.b), X).final.q
    assert q == pytest.approx(plain, rel=0.2)  # sampled
    assert kgraph.transform(model, "tat", X).kgraph.ledger.counts()["re-draw linear"] == 2  # pyright: ignore
    assert torch.equal(model.adjacency.to_dense(), torch.eye(4)[[1, 0, 3, 2]])  # pyright: ignore
    with pytest.raises(InputError, match="does not run on the example inputs"):
        kgraph.analyze(model, torch.randn(3, WIDTH))


@pytest.mark.parametrize("value", [threading.Lock(), [threading.Lock()], (i for i in range(3))])
def test_what_has_no_copy_is_named(value: object) -> None:
    model = nn.Sequential(nn.Linear(WIDTH, WIDTH), nn.ReLU(), Net(lambda m, h: None, held=value))
    with pytest.raises(ModelError, match=r"attribute 'held' of Net cannot be copied .*\(at node '2'\)"):
        kgraph.transform(model, "tat", X)
    assert kgraph.transform(model, "tat", X, inplace=True).kgraph.ledger.unmet == ()  # pyright: ignore


class Pooled(nn.Module):
    """A head behind an average of all positions."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.c, self.o = nn.Conv2d(channels, WIDTH, 3, padding=1), nn.Linear(WIDTH, WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        return self.o(F.relu(self.c(x)).mean((2, 3)))


def test_q_is_restored_in_front_of_the_head() -> None:
    """DKS makes means 0, so an average of 64 unrelated positions has q = 1 / 64, and its constant is 8.

    Cosines of variance 1 / (9 * 2048) add C''(0) / 2 * 64 of it.
    """
    record: Any = kgraph.transform(Pooled(2048), "dks", torch.randn(2, 2048, 8, 8)).kgraph
    assert record.after.final.q == pytest.approx(1, abs=1e-6) and record.ledger.unmet == ()
    (change,) = [change for change in record.ledger.changes if change.what == "restore q"]
    assert "averaging positions" in change.why and float(change.before.split()[1]) == pytest.approx(1 / 64, rel=0.01)


def test_positions_of_few_channels_are_related_behind_an_average() -> None:
    """Their cosines scatter, and DKS's C map is convex: more than 1 / 64 is kept, and C(0) cannot be 0."""
    record: Any = kgraph.transform(Pooled(4), "dks", torch.randn(2, 4, 8, 8)).kgraph
    assert record.after.final.q == pytest.approx(1, abs=1e-6)
    (change,) = [change for change in record.ledger.changes if change.what == "restore q"]
    assert 1.2 / 64 < float(change.before.split()[1]) < 1.5 / 64  # of a plain 4,096-channel network: 1.45 / 64
    assert any("C(0)" in line and "what their positions share" in line for line in record.ledger.unmet)


class Ends(Net):
    """What a forward makes of its last layer."""

    def __init__(self, end: Callable[[Any, Tensor, Tensor], Tensor]) -> None:
        super().__init__(lambda m, h: None)
        self.end = end

    def forward(self, x: Tensor) -> Tensor:
        return self.end(self, super().forward(x), x)


def test_q_that_is_not_1_at_the_output_is_unmet() -> None:
    """f(x) + f(x).detach() is 2 f(x): weights sqrt(1/2) leave q = 2."""
    twin = Ends(lambda m, y, x: y + m.b(F.relu(m.a(x))).detach())
    (line,) = [line for line in unmet(twin) if "at the output" in line]
    q = float(line.partition("(q = ")[2].partition(")")[0])
    assert q == pytest.approx(2, rel=0.25)  # sampled; independent terms have 1
    assert "one value or weight is in several" in line


def test_a_factor_of_the_users_own_is_a_note() -> None:
    ledger: Any = kgraph.transform(Ends(lambda m, y, x: y * 2), "dks", X).kgraph.ledger
    assert ledger.unmet == () and any("at the output mul (q = 4)" in line for line in ledger.notes)


@pytest.mark.parametrize("end", [lambda m, y, x: torch.sigmoid(y), lambda m, y, x: y.pow(2).mean(), lambda m, y, x: y])
def test_what_has_a_size_of_its_own_is_no_unmet_promise(end: Callable[[Any, Tensor, Tensor], Tensor]) -> None:
    ledger: Any = kgraph.transform(Ends(end), "dks", X).kgraph.ledger
    assert not any("at the output" in line for line in (*ledger.unmet, *ledger.notes))


class Noisy(nn.Module):
    """Dropout that follows the mode beside dropout that does not, in a forward that a test writes."""

    def __init__(self, forward: Callable[[Noisy, Tensor], Tensor]) -> None:
        super().__init__()
        self.a, self.b, self.run, self.drop = nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, WIDTH), forward, nn.Dropout(0.3)

    def forward(self, x: Tensor) -> Tensor:
        return self.run(self, x)


ALWAYS = {
    "alone": lambda m, x: m.b(F.dropout(m.a(x).tanh(), 0.5)),
    "behind a module": lambda m, x: m.b(F.alpha_dropout(m.drop(m.a(x).tanh()), 0.4, training=True)),
    "two of a line": lambda m, x: m.b(F.dropout(m.a(x), 0.2, m.training) + F.dropout(x, 0.5)),
    "of attention": lambda m, x: F.scaled_dot_product_attention(m.a(x), m.b(x), m.a(x), dropout_p=0.3),
}


@pytest.mark.parametrize("name", ALWAYS)
def test_noise_in_either_mode_is_kept_and_no_loss(name: str) -> None:
    x, model = torch.randn(6, 4, WIDTH), Noisy(ALWAYS[name])
    shaped = kgraph.transform(model, "dks", x)
    assert shaped.kgraph is not None and "train mode" not in " ".join(shaped.kgraph.ledger.unmet)
    for mode in (True, False):
        assert not torch.equal(shaped.train(mode)(x), shaped(x))


def test_other_numbers_in_train_mode_are_a_loss() -> None:
    model = Noisy(lambda m, x: m.b(F.dropout(m.a(x).tanh(), 0.5)) * (2.0 if m.training else 3.0))
    shaped = kgraph.transform(model, "dks", torch.randn(6, WIDTH))
    assert shaped.kgraph is not None and "train mode" in shaped.kgraph.ledger.unmet[0]


class Decaying(nn.Module):
    """A forward that writes to a parameter of its own, past autograd."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        self.b.bias.data.add_(1.0)
        return self.b(self.a(x).tanh())


@pytest.mark.parametrize("call", [kgraph.analyze, kgraph.nngp])
def test_a_forward_that_writes_to_parameters_leaves_them_as_they_were(call: Callable[[nn.Module, Any], object]) -> None:
    model = Decaying()
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    with pytest.raises(CaptureError, match="hidden state"):
        call(model, X)
    assert all(torch.equal(p, before[name]) for name, p in model.named_parameters())
