"""Each pass alone: what it changes, what it promises, and that a broken promise is found."""

from __future__ import annotations

import copy
from dataclasses import dataclass
from typing import Any

import pytest
import torch
import zoo
from torch import Tensor, fx, nn

from kgraph import DKS, TAT
from kgraph.canonical import aten, operation_name
from kgraph.capture import capture
from kgraph.errors import InputError, PassError
from kgraph.modules import Scale, ShapedActivation, WeightedSum
from kgraph.passes.base import Pass, Pipeline, Workspace
from kgraph.passes.normalize_gates import NormalizeGates
from kgraph.passes.per_location_norm import InsertPerLocationNorm
from kgraph.passes.reinitialize import Reinitialize
from kgraph.passes.remove_norms import NORMS, RemoveNorms
from kgraph.passes.rescale import Rescale
from kgraph.passes.scale_residuals import ScaleResiduals
from kgraph.passes.shape_activations import ShapeActivations
from kgraph.recipe import Plan
from kgraph.targets import ShapingTargets

TARGETS = ShapingTargets(1.1, None, None, "", 1.5)


def workspace(model: nn.Module | str, inputs: Any = None) -> Workspace:
    if isinstance(model, str):
        model, inputs = zoo.build(model)
    return Workspace(capture(copy.deepcopy(model), inputs, verify=False), "eval")


def names(work: Workspace) -> list[str]:
    return [operation_name(node) for node in work.nodes]


class Norms(nn.Module):
    def __init__(self, norm: nn.Module) -> None:
        super().__init__()
        self.conv, self.norm, self.leave = nn.Conv2d(3, 8, 3, bias=False), norm, nn.Conv2d(8, 4, 1)

    def forward(self, x: Tensor) -> Tensor:
        return self.leave(torch.relu(self.norm(self.conv(x))))


NORM_LAYERS: list[nn.Module] = [
    nn.BatchNorm2d(8),
    nn.GroupNorm(2, 8),
    nn.InstanceNorm2d(8, affine=True),
    nn.LayerNorm((8, 10, 10)),
    nn.LocalResponseNorm(2),
]


@pytest.mark.parametrize("norm", NORM_LAYERS, ids=lambda m: type(m).__name__)
def test_remove_norms(norm: nn.Module) -> None:
    model, x = Norms(norm), torch.randn(2, 3, 12, 12)
    work = workspace(model, x)
    RemoveNorms().run(work)
    module = work.graph.emit().eval()
    assert torch.allclose(module(x), model.leave(torch.relu(model.conv(x))), atol=1e-5)
    assert [c.what for c in work.changes] == [f"remove {type(norm).__name__.removesuffix('2d')}"]
    assert not any(key.startswith("norm.") for key in module.state_dict())
    if not isinstance(norm, nn.LocalResponseNorm):
        assert not module.get_parameter("conv.bias").any() and "zero bias" in work.changes[0].why


def test_remove_rms_norm_written_by_hand() -> None:
    class RMS(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.enter, self.weight = nn.Linear(8, 16), nn.Parameter(torch.ones(16))
            self.leave = nn.Linear(16, 4)

        def forward(self, x: Tensor) -> Tensor:
            x = self.enter(x)
            x = self.weight * (x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + 1e-6))
            return self.leave(torch.tanh(x))

    work = workspace(RMS(), torch.randn(2, 8))
    RemoveNorms().run(work)
    assert work.ledger("").counts() == {"remove RMSNorm": 1}
    assert "weight" not in work.graph.emit().state_dict()


def test_scale_residuals() -> None:
    work = workspace("resnet18")
    ScaleResiduals(0.6).run(work)
    sums = [module for node in work.nodes if isinstance(module := work.module(node), WeightedSum)]
    assert len(sums) == 8 and all(set(m.weights) == {0.6, 0.8} for m in sums)
    assert aten.add.Tensor not in [node.target for node in work.nodes]


def test_scale_residuals_leaves_activations_alone() -> None:
    work = workspace("hand_written")
    ScaleResiduals().run(work)
    assert work.changes == []


@pytest.mark.parametrize("weight", [-0.1, 1.1])
def test_scale_residuals_domain(weight: float) -> None:
    with pytest.raises(InputError):
        ScaleResiduals(weight)


def test_reinitialize() -> None:
    work = workspace("dcgan_generator")
    RemoveNorms().run(work)
    Reinitialize("gaussian").run(work)
    assert work.ledger("").counts()["re-draw conv_transpose2d"] == 4
    last = work.graph.root.get_parameter("9.weight")
    taps = last.flatten(2).abs().amax((0, 1)) > 0
    assert int(taps.sum()) == 4  # delta: one tap for each residue of the stride
    q = [float(k.merged.q) for n, k in work.kernels().items() if operation_name(n) == "conv_transpose2d"]
    assert q[0] == pytest.approx(1, rel=0.05)


def test_reinitialize_reads_patch_embeddings_and_standardized_weights() -> None:
    class Patches(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.patch, self.leave = nn.Conv2d(3, 64, 4, 4), nn.Linear(64, 4)
            self.gain = nn.Parameter(torch.ones(4, 1))

        def forward(self, x: Tensor) -> Tensor:
            x = torch.tanh(self.patch(x).flatten(2).transpose(1, 2))
            weight = self.leave.weight - self.leave.weight.mean(1, keepdim=True)
            return nn.functional.linear(x, weight / weight.std(1, keepdim=True), self.leave.bias)

    work = workspace(Patches(), torch.randn(2, 3, 16, 16))
    Reinitialize().run(work)
    assert bool((work.graph.root.get_parameter("patch.weight") != 0).all())
    linear = next(node for node in work.nodes if operation_name(node) == "linear")
    assert isinstance(linear.args[1], fx.Node) and linear.args[1].target == "leave.weight"


def test_shape_activations() -> None:
    work = workspace("cnn")
    ShapeActivations(DKS(), TARGETS).run(work)
    sites = [module for node in work.nodes if isinstance(module := work.module(node), ShapedActivation)]
    assert len(sites) == 3 and "relu" not in names(work)
    assert work.graph.emit().eval()(torch.randn(3, 3, 32, 32)).shape == (3, 10)


def test_shape_activations_tat_keeps_homogeneity() -> None:
    work = workspace("mlp")
    ShapeActivations(TAT(), ShapingTargets(None, 0.1, 0.5, "", 0.9)).run(work)
    (site, *_) = (m for m in work.graph.root.modules() if isinstance(m, ShapedActivation))
    u = torch.linspace(-2, 2, 9)
    assert torch.allclose(site(u), torch.where(u > 0, u, 0.5 * u) * (2 / 1.25) ** 0.5)


def test_rescale_restores_q() -> None:
    work = workspace("cnn")
    Pipeline((RemoveNorms(), Reinitialize(), ShapeActivations(DKS(), TARGETS), Rescale())).run(work)
    before = {n: k for n, k in work.kernels().items() if isinstance(work.module(n), ShapedActivation)}
    assert len(before) == 3
    for node in before:
        assert float(work.kernels()[node.all_input_nodes[0]].merged.q) == pytest.approx(1, abs=1e-4)
    assert any(isinstance(work.module(node), Scale) for node in work.nodes)


def test_normalize_gates_alone_touches_gates_only() -> None:
    work = workspace("squeeze_excite")
    NormalizeGates().run(work)
    assert set(work.ledger("").counts()) <= {"normalize gate"}


def test_per_location_norm_comes_first() -> None:
    work = workspace("two_inputs")
    InsertPerLocationNorm().run(work)
    assert work.ledger("").counts() == {"per-location norm": 2}


class Idle(RemoveNorms):
    """Promises what RemoveNorms promises, and does nothing."""

    def rewrite(self, work: Workspace) -> None:
        pass


class Unbalanced(ScaleResiduals):
    def rewrite(self, work: Workspace) -> None:
        super().rewrite(work)
        node = next(n for n in work.nodes if isinstance(work.module(n), WeightedSum))
        work.replace_module(str(node.target), WeightedSum((1.0, 1.0)))


class Dangling(Pass):
    """Leaves a node that reads one placed after it."""

    def rewrite(self, work: Workspace) -> None:
        nodes = [n for n in work.nodes if n.op == "call_function"]
        nodes[0].prepend(nodes[-1])


class Half(Reinitialize):
    def rewrite(self, work: Workspace) -> None:
        super().rewrite(work)
        with torch.no_grad():
            work.graph.root.get_parameter("2.weight").mul_(3)


class Unshaped(ShapeActivations):
    def rewrite(self, work: Workspace) -> None:
        pass


class Uncorrected(Rescale):
    def rewrite(self, work: Workspace) -> None:
        pass


def averaging() -> Workspace:
    layers = nn.Conv2d(3, 8, 1), nn.AvgPool2d(2), nn.Conv2d(8, 8, 1), nn.Tanh(), nn.Conv2d(8, 4, 1)
    return workspace(nn.Sequential(*layers), torch.randn(2, 3, 8, 8))


@pytest.mark.parametrize(
    ("step", "model", "message"),
    [
        (Idle(), "cnn", "Idle broke its promise: batch_norm still normalize"),
        (Unbalanced(), "resnet18", "Unbalanced broke its promise: .* not normalized"),
        (Dangling(), "mlp", "Dangling left a malformed graph"),
        (Half(), "cnn", "Half broke its promise: 2.weight"),
        (Unshaped(DKS(), TARGETS), "mlp", "Unshaped broke its promise: .*relu"),
        (Uncorrected(), "averaging", "Uncorrected broke its promise: .*avg_pool2d"),
    ],
    ids=lambda value: type(value).__name__ if isinstance(value, Pass) else None,
)
def test_a_broken_promise_names_the_pass(step: Pass, model: str, message: str) -> None:
    with pytest.raises(PassError, match=message):
        step.run(averaging() if model == "averaging" else workspace(model))


def test_pipeline_runs_in_order_and_prints() -> None:
    seen: list[str] = []

    @dataclass(frozen=True)
    class Note(Pass):
        text: str = ""

        def rewrite(self, work: Workspace) -> None:
            work.notes.append(self.text)

    work = workspace("mlp")
    pipeline = Pipeline((Note("one"), Note("two")), progress=seen.append)
    pipeline.run(work)
    assert work.notes == ["one", "two"] and seen == ["Note", "Note"]
    assert str(pipeline).splitlines()[1] == "2. " + str(Note("two"))


def test_recipe_order() -> None:
    plan = Plan(DKS(), per_location_norm=True)
    kinds = [type(step).__name__ for step in plan.structure().passes]
    assert kinds == ["InsertPerLocationNorm", "RemoveNorms", "ScaleResiduals", "Reinitialize"]


def test_randomness_is_known_without_a_new_analysis() -> None:
    work = workspace("resnet18")
    Pipeline((RemoveNorms(), ScaleResiduals(), Reinitialize())).run(work)
    structural = {node for node in work.nodes if work.is_random(node)}
    assert structural == set(work.kernels())


def test_helpers_never_take_a_users_name() -> None:
    class Named(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.scale, self.shaped, self.weighted_sum = 2.0, nn.Dropout(0.5), "text"
            self.enter, self.leave = nn.Conv2d(3, 8, 3), nn.Linear(8, 4)

        def forward(self, x: Tensor) -> Tensor:
            x = torch.nn.functional.max_pool2d(self.enter(x), 2)
            return self.leave(self.shaped(torch.tanh(x * self.scale)).mean((2, 3)))

    work = workspace(Named(), torch.randn(2, 3, 12, 12))
    Pipeline((Reinitialize(), ShapeActivations(DKS(), TARGETS), Rescale())).run(work)
    module = work.graph.emit()
    assert isinstance(module.get_submodule("shaped"), nn.Dropout)
    assert {type(m) for m in module.modules()} >= {Scale, ShapedActivation}


def test_norms_of_weights_are_left_alone() -> None:
    work = workspace("nf_resnet50")
    RemoveNorms().run(work)
    assert sum(node.target in NORMS for node in work.nodes) == 53 and work.changes == []
