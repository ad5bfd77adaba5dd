"""Random graphs against plain torch: forty and ten in the suite, as many as wanted by `python -m tests.fuzz`."""

from __future__ import annotations

import inspect
from dataclasses import replace
from types import ModuleType

import pytest
import torch
from fuzz import builder, functions, generator, layers, oracle, program, subjects
from fuzz.builder import Builder
from fuzz.generator import generate, generate_reduced
from fuzz.judge import Subject, Verdict, judge
from fuzz.oracle import measure
from fuzz.program import Program, Shape
from fuzz.runs import calibration, figures
from fuzz.shrink import shrink
from fuzz.subjects import Row, analyzed
from fuzz.targets import TARGETS, Target

from kgraph.errors import RuleError

EFFORT = 0.4


def check(target: str, seed: int) -> None:
    verdict = TARGETS[target].judge(seed, effort=EFFORT)
    text = "\n".join([verdict.detail, *map(str, verdict.wrong), TARGETS[target].generate(seed).source()])
    assert verdict.status in ("right", "refused"), text


@pytest.mark.parametrize("seed", range(54))
def test_analyze(seed: int) -> None:
    check("analyze", seed)


@pytest.mark.parametrize("seed", range(10))
def test_kernels(seed: int) -> None:
    check("kernels", seed)


# Negative controls: what the judge must not let pass


def plain(seed: int) -> Program:
    """A network that kgraph is right about."""
    b = Builder(seed, Shape(2), "eval")
    value = b.values[0]
    for _ in range(2):
        made = b.layer('drawn(nn.Linear(w, w), "normal", 1.4, "normal")')
        value = b.put(f"F.relu({made}({value.name}))", value.shape, value)
    return b.program(value)


def off_by(quantity: str, factor: float) -> Target:
    def said(program: Program, width: int) -> dict[str, Row]:
        rows = analyzed(program, width)
        return {
            name: replace(row, numbers=row.numbers | {quantity: factor * row.numbers[quantity]})
            for name, row in rows.items()
        }

    return Target(plain, Subject(said, measure))


@pytest.mark.parametrize(
    ("quantity", "factor", "width"), [("q", 1.1, 24), ("c 0.9", 1.1, 24), ("slope", 1.1, 24), ("ntk", 1.2, 48)]
)
def test_wrong_numbers_are_found(quantity: str, factor: float, width: int) -> None:
    """The NTK, of one gradient a network, by a fifth."""
    verdict = off_by(quantity, factor).judge(0, width)
    assert verdict.status == "wrong"
    assert {c.quantity for c in verdict.wrong} == {quantity}
    assert off_by(quantity, 1.0).judge(0, width).status == "right"


def test_errors_are_refusals_or_crashes() -> None:
    def raising(error: Exception) -> Verdict:
        def said(program: Program, width: int) -> dict[str, Row]:
            raise error

        return judge(generate(0), Subject(said, measure))

    refused, crashed = raising(RuleError("'a' of 3 rows has no rule")), raising(IndexError("list"))
    assert (refused.status, refused.detail) == ("refused", "RuleError: of # rows has no rule")
    assert (crashed.status, crashed.detail) == ("crashed", "IndexError: list")


# Programs


def test_every_program_runs_and_every_operation_comes_up() -> None:
    """With the shapes that its statements say."""
    text = []
    for seed in range(300):
        program = (generate, generate_reduced)[seed % 2](seed)
        text.append(program.text)
        network = program.compiled(every=True)(16).train(program.mode == "train")
        sizes = program.given.places if program.tokens else program.given.sizes(16)
        x = torch.randint(0, 128, (4, *sizes)) if program.tokens else torch.randn(4, *sizes)
        values = network(x)
        assert {s.name: tuple(values[s.name].shape[1:]) for s in program.statements} == {
            s.name: s.shape.sizes(16) for s in program.statements
        }
    words = (
        *("Linear", "Conv1d", "Conv2d", "ConvTranspose", "groups=2", "circular", "Embedding", "GRUCell", "PReLU"),
        *("BatchNorm", "GroupNorm", "LayerNorm", "RMSNorm", "InstanceNorm", "ropout", "requires_grad_", "einsum"),
        *("scaled_dot_product", "softmax", "max_pool", "avg_pool", "cat(", "chunk", "stack", "flatten", "roll"),
        *("permute", "narrow", "interpolate", "register_buffer", "expand", "sigmoid", "torch.sign"),
    )
    assert [word for word in words if not any(word in t for t in text)] == []
    assert len(layers.OPERATIONS) + len(functions.OPERATIONS) > 20


def test_oracle_and_generator_share_no_code_with_kgraph() -> None:
    """Negative control: kgraph's side of the judge does."""

    def imports(module: ModuleType) -> str:
        return "".join(line for line in inspect.getsource(module).splitlines() if "import" in line)

    assert not any("kgraph" in imports(m) for m in (builder, functions, generator, layers, oracle, program))
    assert "kgraph" in imports(subjects)


def test_seeds_are_programs() -> None:
    assert generate(7).source() == generate(7).source()
    assert len({generate(seed).text for seed in range(30)}) == 30


def test_shrinking_keeps_what_fails() -> None:
    program = next(p for p in map(generate, range(500)) if "F.relu" in p.text and len(p.statements) > 6)
    small = shrink(program, lambda p: "F.relu" in p.text)
    assert "F.relu" in small.text and len(small.statements) < len(program.statements)
    assert set(small.layers) <= set(program.layers)


def test_figures() -> None:
    line = {"seed": 3, "status": "wrong", "detail": "", "counts": {"exact": 2}, "compared": 5, "sampled": []}
    close = {"quantity": "q", "printed": 0.01, "error": 0.001, "deviation": 0.019}
    far, vague = close | {"deviation": -0.03}, close | {"error": 0.1}
    found = figures([line, line | {"seed": 4, "status": "right", "sampled": [close, far, vague]}])
    assert found["failures"] == {"wrong": [3], "crashed": [], "slow": [], "large": []}
    assert found["sampled"] == {"q": {"numbers": 2, "within": 0.5}}
    assert calibration([]) == {}
