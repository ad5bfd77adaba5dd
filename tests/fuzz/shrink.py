"""The smallest program that still fails: drop what comes after, then skip statement after statement."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from dataclasses import replace

from .program import Program, Statement


def shrink(program: Program, fails: Callable[[Program], bool]) -> Program:
    """The program with as few statements as this finds, given that ``fails`` of it.

    Args:
        program: one that fails.
        fails: whether a program still does.
    """
    while True:
        smaller = next((p for p in _smaller(program) if fails(p)), None)
        if smaller is None:
            return program
        program = smaller


def _smaller(program: Program) -> Iterator[Program]:
    """The shortest first: programs that end earlier, then those that skip one statement."""
    last = program.result
    inner = [program.ending_with(s.name) for s in program.statements[:-1] if s.shape == last.shape]
    yield from sorted(
        (p for p in inner if len(p.statements) < len(program.statements)), key=lambda p: len(p.statements)
    )
    shapes = {s.name: s.shape for s in program.statements} | ({} if program.tokens else {"x": program.given})
    for statement in program.statements[:-1]:
        for name in dict.fromkeys(("x", *statement.reads)):
            if name != statement.name and shapes.get(name) == statement.shape:
                yield _without(program, statement, name)


def _without(program: Program, statement: Statement, instead: str) -> Program:
    """The program that reads ``instead`` for what ``statement`` made."""

    def renamed(other: Statement) -> Statement:
        text = re.sub(rf"\b{statement.name}\b", instead, other.text)
        return replace(other, text=text, reads=tuple(instead if r == statement.name else r for r in other.reads))

    kept = tuple(renamed(s) for s in program.statements if s.name != statement.name)
    return replace(program, statements=kept).ending_with(kept[-1].name)
