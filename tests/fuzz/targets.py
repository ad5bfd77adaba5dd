"""What can be fuzzed: `kgraph.analyze` and `kgraph.kernels`, with their generators, oracles and failures."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from .generator import generate, generate_reduced
from .judge import WIDTH, Comparison, Subject, Verdict, judge
from .oracle import Measured, measure, measure_kernels
from .program import Program
from .shrink import shrink
from .subjects import analyzed, example, kerneled

SHRINKING = 0.5
"""Effort while shrinking: programs that fail do so by far."""


@dataclass(frozen=True)
class Target:
    """Programs of seeds, and what judges them."""

    generate: Callable[[int], Program]
    subject: Subject

    def judge(self, seed: int, width: int = WIDTH, effort: float = 1.0) -> Verdict:
        return judge(self.generate(seed), self.subject, width=width, effort=effort)

    def smallest(self, verdict: Verdict) -> Program:
        """The smallest program that fails like that of ``verdict``."""
        program = self.generate(verdict.seed)
        if verdict.wrong and verdict.wrong[0].value != program.result.name:
            program = program.ending_with(verdict.wrong[0].value)
        return shrink(program, lambda smaller: self._alike(smaller, verdict))

    def wrong(self, program: Program) -> list[Comparison]:
        """What is wrong about a shrunk program."""
        return judge(program, self.subject, effort=SHRINKING, twice=False).wrong

    def _alike(self, program: Program, verdict: Verdict) -> bool:
        found = judge(program, self.subject, effort=SHRINKING, twice=False)
        kinds = {c.quantity for c in verdict.wrong}
        alike = found.status == verdict.status and found.detail == verdict.detail
        return alike and (not kinds or any(c.quantity in kinds and c.value == program.result.name for c in found.wrong))


def _kernels(program: Program, width: int, networks: int, seed: int) -> Measured:
    return measure_kernels(program, example(program, width), width, networks, seed)


TARGETS = {
    "analyze": Target(generate, Subject(analyzed, measure)),
    "kernels": Target(generate_reduced, Subject(kerneled, _kernels)),
}
