"""From a seed to a random program."""

from __future__ import annotations

from . import functions, layers
from .builder import Builder, Value
from .program import Program, Shape

OPERATIONS = (*layers.OPERATIONS, *functions.OPERATIONS)
GIVEN = (Shape(2), Shape(2, (4,)), Shape(2, (6,), first=True), Shape(2, (4, 4), first=True))
"""Inputs: vectors, sequences of vectors, signals and images with channels first."""
STEPS = (3, 10)
"""Fewest and most operations behind the first layer."""


def generate(seed: int) -> Program:
    """The program of a seed: a first layer, then random operations on random earlier values."""
    return _grown(seed).program()


def generate_reduced(seed: int) -> Program:
    """The same with a result without positions, of a linear layer: one number an input and channel."""
    b = _grown(seed)
    result = b.program().result
    value, start = Value(result.name, result.shape), 2 if result.shape.first else 1
    if result.shape.places:
        every = tuple(range(start, start + len(result.shape.places)))
        value = b.put(f"{result.name}.mean({every})", Shape(result.shape.halves), value)
    head = b.layer(f'drawn(nn.Linear({value.shape.channels}, w), "normal", 1.0, "zero")')
    last = b.put(f"{head}({value.name})", Shape(2), value)
    return b.program(last)


def _grown(seed: int) -> Builder:
    given = GIVEN[seed % len(GIVEN)]
    b = Builder(seed, given, "train" if seed // len(GIVEN) % 2 else "eval")
    b.steady = seed // (2 * len(GIVEN)) % 2 == 1
    b.tokens = not given.first and len(given.places) == 1 and b.chance(0.15)
    if b.tokens:
        table = b.layer("nn.Embedding(8 * w, w)", "settled({}.weight, 1.0)")
        b.values[:] = [b.put(f"{table}(x)", given, Value("x", given))]
    elif b.chance(0.9):
        (layers.convolution if given.first else layers.linear)(b)
    wanted = b.random.randint(*STEPS) + len(b.statements)
    names, weights = zip(*OPERATIONS, strict=True)
    while len(b.statements) < wanted:
        (operation,) = b.random.choices(names, weights)
        operation(b)
    if b.tokens and b.chance(0.3):
        layers.tied_head(b)
    return b
