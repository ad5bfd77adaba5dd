"""What operations write a program with: a seeded choice of values, layers and statements."""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import TypeVar

from .program import Program, Shape, Statement

Choice = TypeVar("Choice")


@dataclass(frozen=True)
class Value:
    """A value of the program.

    Attributes:
        name: of its statement.
        shape: behind the batch.
        degree: of the polynomial in Gaussians that it grows like; products of too high a degree have no mean that
            a measurement could find.
    """

    name: str
    shape: Shape
    degree: int = 1


class Builder:
    """A program in the making."""

    def __init__(self, seed: int, given: Shape, mode: str) -> None:
        self.random = random.Random(seed)
        self.seed, self.given, self.mode = seed, given, mode
        self.layers: dict[str, str] = {}
        self.statements: list[Statement] = []
        self.values: list[Value] = [Value("x", given)]
        self.made, self.tokens, self.steady = 0, False, False

    def choose(self, options: Sequence[Choice]) -> Choice:
        return self.random.choice(options)

    def chance(self, probability: float) -> bool:
        return self.random.random() < probability

    def _new(self, letter: str) -> str:
        self.made += 1
        return f"{letter}{self.made}"

    def layer(self, text: str, *after: str) -> str:
        """A module or parameter of the constructor, and lines after it that read it as ``{}``; the name to call."""
        name = self._new("l")
        lines = [f"self.{name} = {text}", *(line.format(f"self.{name}") for line in after)]
        self.layers[name] = "; ".join(lines)
        return f"self.{name}"

    def buffer(self, text: str) -> str:
        """A constant of the constructor; the name to read."""
        name = self._new("l")
        self.layers[name] = f'self.register_buffer("{name}", {text})'
        return f"self.{name}"

    def put(self, text: str, shape: Shape, *reads: Value, degree: int | None = None) -> Value:
        """Add the statement ``v = text``, where ``text`` names the values that it reads."""
        name = self._new("v")
        self.statements.append(Statement(name, text, tuple(v.name for v in reads), shape))
        grown = degree if degree is not None else max((v.degree for v in reads), default=1)
        value = Value(name, shape, grown)
        self.values.append(value)
        return value

    def recent(self, suits: Callable[[Value], bool]) -> Value | None:
        """A value that suits, the latest with probability 2 / 3."""
        options = [v for v in self.values if suits(v)]
        if not options:
            return None
        return options[-1] if self.chance(2 / 3) else self.choose(options)

    def alike(self, value: Value) -> Value | None:
        """Another value of the same shape."""
        options = [v for v in self.values if v.shape == value.shape and v.name != value.name]
        return self.choose(options) if options else None

    def program(self, last: Value | None = None) -> Program:
        """The program that returns ``last``, or else the value that most statements lead to."""
        made = Program(
            self.seed, dict(self.layers), tuple(self.statements), self.given, self.tokens, self.mode, self.steady
        )
        ends = [last.name] if last is not None else [s.name for s in self.statements]
        return max((made.ending_with(name) for name in ends), key=lambda p: len(p.statements))


def with_channels(shape: Shape, halves: int) -> Shape:
    return replace(shape, halves=halves)


def with_places(shape: Shape, *places: int) -> Shape:
    return replace(shape, places=places)
