"""Every parameter of every public call, with values that are wrong for it: each is refused by name, none is taken.

`CALLS` holds a call that works for everything public, `BAD` for each of its parameters the wrong values. A parameter
that is new and has no entry fails `test_the_table_is_complete`.
"""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable, Iterator, Sequence
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import kgraph
import kgraph.checks
import kgraph.passes
from kgraph import KGraphError
from kgraph.capture import capture
from kgraph.export import OnnxExport
from kgraph.monte_carlo import MonteCarlo
from kgraph.report import Comparison, Report

X = torch.randn(3, 4, generator=torch.Generator().manual_seed(0))
NAN, INF = math.nan, math.inf
HUGE = 2**80


def small() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(4, 4), nn.Tanh(), nn.Linear(4, 2))


def with_value(value: float) -> nn.Module:
    model = small()
    with torch.no_grad():
        model[2].weight[0, 1] = value  # type: ignore[index]
    return model


class Residual(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.inner = nn.Linear(4, 4)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x + torch.relu(self.inner(x))


class Refuses(nn.Module):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        raise LookupError("no such table")


def but(values: Sequence[Any], *out: Any) -> list[Any]:
    """The values without some, told by what they look like: 1 is not True, and tensors do not compare."""
    return [value for value in values if repr(value) not in map(repr, out)]


SMALL = small()
BASIC: list[Any] = [object(), [object()], {"a": 1}]
FLAG = ["yes", "no", 0, 1, 2.0, NAN, *BASIC]
NUMBER = ["1", "a", NAN, True, 1j, b"1", [1.0], torch.ones(2), *BASIC]
POSITIVE = [*NUMBER, 0, -1.0, INF, -INF]
AT_LEAST_0 = [*NUMBER, -1.0, INF]
COUNT = ["8", "a", 1.5, True, NAN, INF, -1, 0, 1, HUGE, *BASIC]
SEED = ["a", "1", 1.5, None, True, NAN, 2**63, -(2**63) - 1, HUGE, *BASIC]
WORD = ["", "nonsense", "TRAIN ", 0, 1.5, True, b"train", ("train",), *BASIC]
NODE = ["", "nonsense", 0, True, *BASIC]
MODEL = [None, 0, "timm:resnet50", nn.ReLU, torch.tanh, X, with_value(NAN), with_value(INF), Refuses(), *BASIC]
INPUTS = [0, "x", True, 1.5, X[:, :3], torch.ones(3, 7), torch.ones(0, 4), (X, X), [], (), {}, {"nonsense": X}, *BASIC]
ROWS = [*INPUTS, None, X * NAN, torch.full((3, 4), INF), torch.tensor(1.0)]
PATHS = [0, None, True, b"file", "", "a\0b", 1.5, "/", "/dev/null", "/no/such/folder/file", *BASIC]
BY_NAME = [0, "a", ["0.weight"], {"nonsense": 1.0}, {0: 1.0}, *({"0.weight": v} for v in ("1", NAN, -1.0, None, INF))]
METHOD = [
    None,
    0,
    "",
    "nonsense",
    nn.ReLU,
    [],
    ["tat", "tat"],
    ["tat", "dks"],
    ["nonsense"],
    [None],
    kgraph.TAT,
    *BASIC,
]
ACTIVATION = [None, 0, "", "nonsense", [torch.tanh], lambda: 0, torch.softmax, nn.Softmax(-1), *BASIC]
GRID = [0, "ab", [], [1.0], [2.0, 1.0], [0.0, NAN], [0.0, INF], [-1.0, 1.0], ["a", "b"], *BASIC]

OPTIONS = {"parametrization": WORD, "mode": WORD, "seed": SEED, "count_frozen": FLAG}
DECLARED = {"distribution": WORD, "weight_variance": AT_LEAST_0, "bias_variance": AT_LEAST_0, "input_q": POSITIVE}
KERNELS = {"x1": ROWS, "x2": but(ROWS, None)}
"""`x2=None` means x1."""

TEXT = {"width": [*but(COUNT, 1), None], "all_nodes": [None, *FLAG]}

BAD: dict[str, dict[str, Sequence[Any]]] = {
    "DKS": {"zeta": [*POSITIVE, 1.0, None], "keep_relu": [None, *FLAG]},
    "TAT": {"eta": [*POSITIVE, 1.0, None], "tau": [*POSITIVE, None]},
    "EdgeOfChaos": {"q": POSITIVE, "sigma_b": AT_LEAST_0, "distribution": [None, *WORD], "remove_norms": [None, *FLAG]},
    "NTKChaos": {"beta": [*AT_LEAST_0, 1.0, None], "r": POSITIVE, "form": [None, *WORD], "graph": [None, *FLAG]},
    "ResidualScaling": {"beta": [*NUMBER, INF, None], "weights": [None, *WORD], "hurst": [*POSITIVE, 1.0]},
    "analyze": {
        "model": MODEL,
        "example_inputs": INPUTS,
        "positions": [None, *WORD],
        "mode": WORD,
        "parametrization": [None, *WORD],
        "count_frozen": [None, *FLAG],
        "inputs": [None, *WORD],
    },
    "InputMoments": {
        "q": [None, *POSITIVE],
        "c": [None, *NUMBER, INF, 1.0, 1.5, -1.5],
        "c_within": [None, *NUMBER, INF, 1.5],
        "c_apart": [None, *NUMBER, INF, -2.0],
        "spread": [None, *NUMBER, INF, -0.1],
    },
    "InputMoments.of": {
        "x": [None, 0, "a", X[:1], X * 0, X * NAN, torch.ones(3, 4), torch.ones(3, 4).long(), torch.ones(4), *BASIC],
        "channel": ["1", NAN, True, 0, 9, -1, None, *BASIC],
    },
    "transform": {
        "model": MODEL,
        "method": METHOD,
        "example_inputs": INPUTS,
        "shortcut_weight": [*AT_LEAST_0, 1.5],
        "seed": SEED,
        "inplace": [None, *FLAG],
        "distribution": [None, *WORD],
        "per_location_norm": [None, *FLAG],
    },
    "shaping_targets": {
        "model": MODEL,
        "method": METHOD,
        "example_inputs": INPUTS,
        "shortcut_weight": [*AT_LEAST_0, 1.5],
    },
    "export_onnx": {
        "model": MODEL,
        "path": PATHS,
        "example_inputs": [*INPUTS, X * NAN],
        "opset": [*COUNT, None, 17, 24, 20.0],
        "certificate": [0, "a", *BASIC],
        "fold": [None, *FLAG],
    },
    "fold": {"model": [*MODEL, SMALL]},
    "load": {"path": [*PATHS, "missing.pt"], "model": [v for v in MODEL if not isinstance(v, nn.Module)]},
    "montecarlo": {
        "model": MODEL,
        "example_inputs": INPUTS,
        "cosines": [None, 0, "ab", 0.5, ("a",), (2.0,), (NAN,), (True,), (), *BASIC],
        "draws": [*COUNT, None],
        "seed": SEED,
        "mode": WORD,
        "background": but(COUNT, 0, 1),
        "progress": [0, "a", True, *BASIC],
    },
    "empirical_ntk": {
        "model": MODEL,
        **KERNELS,
        "sketch": COUNT,
        "multipliers": BY_NAME,
        "count_frozen": [None, *FLAG],
        "seed": SEED,
    },
    "kernels": {
        "model": MODEL,
        **KERNELS,
        "nodes": [None, 0, "linear", ["nonsense"], [0], True, *BASIC],
        "parametrization": [None, *WORD],
        "positions": [None, *WORD],
        "mode": WORD,
        "with_ntk": [None, *FLAG],
        "variances": BY_NAME,
        "multipliers": BY_NAME,
        "count_frozen": [None, *FLAG],
        "seed": SEED,
        "memory_gib": [*but(POSITIVE, INF), None],
    },
    "kernel_function": {
        "model": MODEL,
        "example_inputs": ROWS,
        "nodes": [None, 0, "linear", [0], True, *BASIC],
        "parametrization": [None, *WORD],
        "positions": [None, *WORD],
        "mode": WORD,
        "variances": BY_NAME,
        "multipliers": BY_NAME,
        "count_frozen": [None, *FLAG],
        "seed": SEED,
        "memory_gib": [*but(POSITIVE, INF), None],
    },
    "nngp": {"model": MODEL, **KERNELS, "options": [{"nonsense": 1}, {"mode": ""}, {"with_ntk": True}, {"seed": "a"}]},
    "ntk": {
        "model": MODEL,
        **KERNELS,
        "parametrization": [None, *WORD],
        "options": [{"nonsense": 1}, {"mode": ""}, {"with_ntk": False}, {"seed": "a"}],
    },
    "ntk_report": {
        "model": MODEL,
        "x": ROWS,
        "parametrization": [None, *WORD],
        "multipliers": BY_NAME,
        "count_frozen": [None, *FLAG],
        "mode": WORD,
        "seed": SEED,
    },
    "compare": {
        "model": MODEL,
        "x1": [*ROWS, X[:1]],
        "draws": [*COUNT, None],
        "seed": SEED,
        "parametrization": [None, *WORD],
        "count_frozen": [None, *FLAG],
    },
    "isometry": {
        "model": MODEL,
        "example_inputs": INPUTS,
        "start": NODE,
        "end": NODE,
        "mode": [None, *WORD],
        "measure": [None, *FLAG],
        "probes": [*COUNT, None],
        "seed": SEED,
    },
    "fluctuations": {
        "model": MODEL,
        "example_inputs": INPUTS,
        **DECLARED,
        "parametrization": [None, *WORD],
        "deficit": [None, *WORD],
    },
    "measure_fluctuations": {
        "model": MODEL,
        "example_inputs": INPUTS,
        "draws": [*COUNT, 2, None],
        "seed": SEED,
        "dntk": [None, 0, 1, "nonsense", ["nonsense"], [0], *BASIC],
        "ddntk": [None, 0, 1, "nonsense", ["nonsense"], [0], *BASIC],
        **DECLARED,
        "parametrization": [None, *WORD],
        "progress": [0, "a", True, *BASIC],
    },
    "explain": {"model": MODEL, "example_inputs": INPUTS, "mode": WORD, "inputs": [None, *WORD], "seed": SEED},
    "order_chaos": {
        "model": MODEL,
        "example_inputs": [*INPUTS, X * NAN],
        "parametrization": [None, *WORD],
        "period": COUNT,
        "inputs": [*COUNT, None],
        "seed": SEED,
    },
    "residual_depth": {
        "model": [*MODEL, SMALL],
        "example_inputs": INPUTS,
        "draws": [*but(COUNT, 0), None],
        "inputs": [*COUNT, None],
        "mode": WORD,
        "seed": SEED,
    },
    "graph_parametrize": {"model": MODEL, "example_inputs": INPUTS, "dynamic": [None, *FLAG]},
    "param_groups": {
        "model": MODEL,
        "lr": [*POSITIVE, None],
        "beta": [*AT_LEAST_0, 1.0],
        "example_inputs": INPUTS,
        "stride_exponent": [*NUMBER, INF, None],
    },
    "critical_point": {"activation": ACTIVATION, "q": AT_LEAST_0, "sigma_b2": AT_LEAST_0},
    "mean_field": {
        "activation": ACTIVATION,
        "sigma_w2": [*AT_LEAST_0, None],
        "sigma_b2": [*AT_LEAST_0, None],
        "q0": [*POSITIVE, None],
    },
    "phase_diagram": {"activation": ACTIVATION, "sigma_w": GRID, "sigma_b": GRID},
    "shape_activation": {
        "phi": ACTIVATION,
        "psi": [*POSITIVE, 1.0],
        "kappa": POSITIVE,
        "negative_slope": [*NUMBER, 1.5, -1.5, INF],
    },
    "Report.flagged": {"kinds": [(0,), ("nonsense",), (None,)]},
    "Report.text": {"all_nodes": [None, *FLAG], "width": but(COUNT, 1)},
    "Report.to_json": {"path": but(PATHS, None)},
    "Report.to_csv": {"path": but(PATHS, None)},
    "Report.to_html": {"path": but(PATHS, None), "ledger": [0, "a", *BASIC], "certificate": [0, "a", *BASIC]},
    "Report.from_json": {"text": [None, 0, "", "{}", "[1]", "nonsense", b"{}", *BASIC]},
    "Report.section": {"label": [None, 0, *BASIC]},
    "Comparison.text": {"width": but(COUNT, 1), "examples": [*but(COUNT, 0, 1), None]},
    "Comparison.to_json": {"path": but(PATHS, None)},
    "Comparison.to_html": {"path": but(PATHS, None), "certificate": [0, "a", *BASIC]},
    "TransformRecord.certificate": {
        "n": [*COUNT, None],
        "inputs": [*INPUTS, X * NAN, X * 0],
        "seed": SEED,
        "pairs": but(COUNT, 1),
        "progress": [0, "a", True, *BASIC],
    },
    "Certificate.text": TEXT,
    "Certificate.to_json": {"path": but(PATHS, None)},
    "Explanation.text": TEXT,
    "Explanation.to_json": {"path": but(PATHS, None)},
    "KernelComparison.disagreements": {"sigmas": [*POSITIVE, None], "width_factor": [*AT_LEAST_0, None]},
    "KernelComparison.text": {"width": [*but(COUNT, 1), None], "all_nodes": [None, *FLAG]},
    "KernelComparison.plot": {"path": [*PATHS, "a.nonsense"]},
    "Kernels.to": {"device": [None, 0.5, "nonsense", *BASIC]},
    "NodeGram.to": {"device": [None, 0.5, "nonsense", *BASIC]},
    "Fluctuations.widening": {"relative": [*POSITIVE, None]},
    "MeasuredFluctuations.disagreements": {
        "predicted": [0, "a", *BASIC],
        "quantities": [None, 0, "V", ("nonsense",), (0,), *BASIC],
        "sigmas": [*POSITIVE, None],
        "slack": [*AT_LEAST_0, None],
        "width_factor": [*AT_LEAST_0, None],
    },
    "Fluctuations.text": TEXT,
    "Isometry.text": TEXT,
    "MeasuredFluctuations.text": TEXT,
    "MonteCarlo.allowances": {"analysis": [None, 0, *BASIC], "curvature": [*AT_LEAST_0, None]},
    "MonteCarlo.disagreements": {
        "analysis": [None, 0, *BASIC],
        "sigmas": [*POSITIVE, None],
        "curvature": [*AT_LEAST_0, None],
    },
    "OrderChaosReport.text": {"width": [*but(COUNT, 1), None]},
    "PhaseDiagram.plot": {"path": [*PATHS, "a.nonsense"]},
    "ResidualDepth.text": {"width": [*but(COUNT, 1), None]},
    "ResidualDepth.plot": {"path": [*PATHS, "a.nonsense"]},
    "passes.GraphParametrize": {"dynamic": [None, *FLAG]},
    "passes.NormalizeGates": {"tolerance": [*POSITIVE, None], "only_gates": [None, *FLAG], "keep": [None, *WORD]},
    "passes.Pipeline": {
        "passes": [None, 0, "tat", [0], kgraph.passes.RemoveNorms(), (kgraph.passes.RemoveNorms,), *BASIC],
        "progress": [0, "a", True, *BASIC],
    },
    "passes.Reinitialize": {"distribution": [None, *WORD], "delta": [None, *FLAG]},
    "passes.Rescale": {"tolerance": [*POSITIVE, None], "only_gates": [None, *FLAG], "keep": [None, *WORD]},
    "passes.ScaleResiduals": {"shortcut_weight": [*AT_LEAST_0, 1.5, None], "only_shortcuts": [None, *FLAG]},
    "passes.ShapeActivations": {
        "method": [None, 0, "tat", kgraph.TAT, kgraph.EdgeOfChaos(), *BASIC],
        "targets": [0, "a", *BASIC],
    },
    "passes.Workspace": {"graph": [None, 0, SMALL, *BASIC], "mode": [None, *WORD], "seed": SEED},
    "passes.fold_parametrizations": {"model": [v for v in MODEL if not isinstance(v, nn.Module)]},
}

MADE_BY_KGRAPH = {
    *(
        "EmpiricalNTK",
        "Fluctuations",
        "Isometry",
        "KernelComparison",
        "KernelFunction",
        "Kernels",
        "LayerIsometry",
        "MeanField",
    ),
    *("MeasuredFluctuations", "MeasuredNode", "NTKReport", "NodeComparison", "NodeFluctuations", "NodeGram"),
    *("OrderChaosReport", "PhaseDiagram", "ResidualDepth", "ShapedConstants", "TransformRecord", "passes.Pass"),
    *("Report", "Comparison", "MonteCarlo", "OnnxExport", "Certificate", "CertificateRow", "Figure"),
    *("Effect", "Explanation", "FoldReport"),
}
"""Results: nobody builds them by hand; their methods are in the table."""
INTERNAL = {
    "passes.Workspace": (
        *("first", "changes", "kept", "unmet", "notes", "settled", "laws", "shaped"),
        *("_propagation", "_random", "_regions", "_names"),
    ),
}
"""Fields that passes fill."""


@cache
def graph() -> Any:
    return capture(SMALL, X)


@cache
def result(of: str) -> Any:
    made: dict[str, Callable[[], Any]] = {
        "InputMoments": lambda: kgraph.InputMoments(),
        "Report": lambda: kgraph.analyze(SMALL, X),
        "Comparison": lambda: kgraph.transform(SMALL, "tat", X).kgraph.comparison,
        "TransformRecord": lambda: kgraph.transform(SMALL, "tat", X).kgraph,
        "Certificate": lambda: kgraph.transform(SMALL, "tat", X).kgraph.certificate(2, pairs=2),
        "KernelComparison": lambda: kgraph.compare(SMALL, X, draws=2),
        "MonteCarlo": lambda: kgraph.montecarlo(SMALL, X, draws=2),
        "Isometry": lambda: kgraph.isometry(SMALL, X),
        "Kernels": lambda: kgraph.kernels(SMALL, X),
        "NodeGram": lambda: kgraph.kernels(SMALL, X).output,
        "Fluctuations": lambda: kgraph.fluctuations(SMALL, X),
        "MeasuredFluctuations": lambda: kgraph.measure_fluctuations(SMALL, X, draws=3),
        "Explanation": lambda: kgraph.explain(SMALL, X),
        "OrderChaosReport": lambda: kgraph.order_chaos(SMALL, X),
        "PhaseDiagram": lambda: kgraph.phase_diagram("tanh", sigma_w=[1.0, 1.5], sigma_b=[0.1, 0.2]),
        "ResidualDepth": lambda: kgraph.residual_depth(nn.Sequential(Residual(), Residual()), X, draws=0),
    }
    return made[of]()


ANALYSIS = kgraph.analyze(SMALL, X).analysis
DEFAULTS: dict[str, dict[str, Any]] = {
    "InputMoments.of": {"x": X},
    "critical_point": {"activation": "tanh", "q": 0.5},
    "mean_field": {"activation": "tanh", "sigma_w2": 1.5},
    "phase_diagram": {"activation": "tanh", "sigma_w": [1.0, 1.5], "sigma_b": [0.1, 0.2]},
    "fold": {"model": kgraph.transform(SMALL, "tat", X)},
    "shape_activation": {"phi": "tanh", "psi": 1.5},
    "residual_depth": {"model": nn.Sequential(Residual(), Residual()), "draws": 0},
    "param_groups": {"lr": 0.1, "beta": 0.1},
    "measure_fluctuations": {"draws": 3},
    "compare": {"draws": 2},
    "montecarlo": {"draws": 2},
    "isometry": {"measure": False},
    "ResidualScaling": {"weights": "fbm", "hurst": 0.3},
    "passes.Pipeline": {"passes": ()},
    "MonteCarlo.allowances": {"analysis": ANALYSIS},
    "MonteCarlo.disagreements": {"analysis": ANALYSIS},
    "Report.from_json": {},
    "Report.flagged": {},
}
INSTEAD = {
    ("critical_point", "sigma_b2"): {"activation": "tanh"},
    ("shape_activation", "kappa"): {"phi": "tanh"},
    ("shape_activation", "negative_slope"): {"phi": "relu"},
    ("ResidualScaling", "beta"): {},
    ("ResidualScaling", "weights"): {},
}
"""Other defaults, where two options exclude each other."""
MADE = {"model": SMALL, "example_inputs": X, "x1": X, "x": X, "path": "file.onnx"}
READS_INPUTS = ("model", "example_inputs", "x1", "x2", "x")


def function_of(name: str) -> Callable[..., Any]:
    where, _, method = name.rpartition(".")
    if where == "passes":
        return getattr(kgraph.passes, method)
    return getattr(result(where), method) if where else getattr(kgraph, name)


def arguments_of(name: str, parameter: str, value: Any) -> tuple[list[Any], dict[str, Any]]:
    """A call that works but for one parameter; with a captured graph where the call takes one and need not read it."""
    signature = inspect.signature(function_of(name)).parameters
    given = {one: MADE[one] for one in signature if one in MADE and "." not in name}
    if "model" in given and "Graph" in str(signature["model"].annotation) and parameter not in READS_INPUTS:
        given["model"] = graph()
    if name == "passes.Workspace":
        given["graph"] = graph()
    given |= INSTEAD.get((name, parameter), DEFAULTS.get(name, {}))
    if parameter == "kinds":
        return list(value), given
    return [], given | value if parameter == "options" else given | {parameter: value}


def cases() -> Iterator[Any]:
    for name, parameters in BAD.items():
        for parameter in parameters:
            yield pytest.param(name, parameter, id=f"{name}-{parameter}")


@pytest.mark.parametrize(("name", "parameter"), cases())
def test_wrong_values_are_refused_by_name(
    name: str, parameter: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    taken = []
    for value in BAD[name][parameter]:
        args, given = arguments_of(name, parameter, value)
        try:
            function_of(name)(*args, **given)
        except KGraphError:
            continue
        except TypeError as error:
            if name in ("nngp", "ntk") and parameter == "options" and "keyword argument" in str(error):
                continue  # Python's own word for a keyword that no call has
            taken.append((value, repr(error)[:100]))
        except Exception as error:
            taken.append((value, repr(error)[:100]))
        else:
            taken.append((value, "taken"))
    assert not taken, "\n".join(f"{value!r}: {what}" for value, what in taken)
    assert not list(tmp_path.iterdir())


def public() -> Iterator[tuple[str, set[str]]]:
    """Everything a user can call, with its parameters."""
    for name in kgraph.__all__:
        thing = getattr(kgraph, name)
        if inspect.isclass(thing) and issubclass(thing, Exception):
            continue
        if name not in MADE_BY_KGRAPH:
            yield name, set(inspect.signature(thing).parameters)
        if inspect.isclass(thing):
            yield from methods(name, thing)
    for thing in (Report, Comparison, MonteCarlo, OnnxExport):
        yield from methods(thing.__name__, thing)
    for name in kgraph.passes.__all__:
        if f"passes.{name}" not in MADE_BY_KGRAPH:
            thing = getattr(kgraph.passes, name)
            yield f"passes.{name}", set(inspect.signature(thing).parameters) - set(INTERNAL.get(f"passes.{name}", ()))


def methods(name: str, of: type) -> Iterator[tuple[str, set[str]]]:
    for method in sorted(set(dir(of))):
        plain = inspect.getattr_static(of, method)
        if not method.startswith("_") and (inspect.isfunction(plain) or isinstance(plain, classmethod)):
            yield f"{name}.{method}", set(inspect.signature(getattr(of, method)).parameters) - {"self"}


@pytest.mark.parametrize(("name", "parameters"), [pytest.param(*one, id=one[0]) for one in public()])
def test_the_table_is_complete(name: str, parameters: set[str]) -> None:
    assert set(BAD.get(name, {})) == parameters


@pytest.mark.parametrize("name", [name for name in BAD if "." not in name])
def test_the_control_works(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The same calls without a wrong value run: it was the value that was refused."""
    if name == "load":
        pytest.skip("see the tests of saved models")
    monkeypatch.chdir(tmp_path)
    _, given = arguments_of(name, "options", {})
    function_of(name)(**given)


@pytest.mark.parametrize("value", [NAN, INF, -INF])
def test_weights_without_a_value_are_named(value: float, tmp_path: Path) -> None:
    model = with_value(value)
    calls: list[Callable[[], Any]] = [
        lambda: kgraph.analyze(model, X),
        lambda: kgraph.transform(model, "tat", X),
        lambda: kgraph.kernels(model, X),
        lambda: kgraph.empirical_ntk(model, X),
        lambda: kgraph.export_onnx(model, tmp_path / "m.onnx", X),
    ]
    for call in calls:
        with pytest.raises(kgraph.ModelError, match=r"parameter 2\.weight has 1 of 8 values that are nan or infinite"):
            call()
    assert not list(tmp_path.iterdir())


def test_masks_may_be_infinite_and_large_sums_overflow() -> None:
    model = small()
    model.register_buffer("mask", torch.full((4, 4), -INF).triu(1), persistent=False)
    with torch.no_grad():
        model[0].bias.fill_(3e38)  # type: ignore[index]
    kgraph.checks.with_finite_values(model)
    model.register_buffer("mean", torch.tensor([1.0, NAN]))
    with pytest.raises(kgraph.ModelError, match="buffer mean has 1 of 2"):
        kgraph.checks.with_finite_values(model)


class Root(nn.Module):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return torch.sqrt(x)


def test_an_export_is_not_compared_by_nan(tmp_path: Path) -> None:
    """The square root of negative inputs is nan on both sides, which is no agreement."""
    with pytest.raises(kgraph.ExportError, match="holds nan on the example inputs"):
        kgraph.export_onnx(Root(), tmp_path / "m.onnx", -torch.ones(2, 3))
    assert not list(tmp_path.iterdir())
    assert kgraph.export_onnx(Root(), tmp_path / "m.onnx", torch.ones(2, 3)).max_abs_error < 1e-5
