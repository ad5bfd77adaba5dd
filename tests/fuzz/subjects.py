"""kgraph's side: what its calls say of a program, value by value."""

from __future__ import annotations

import math
import warnings
from dataclasses import dataclass

import torch
from torch import Tensor, nn

import kgraph

from .program import Program

INPUTS = 3
"""Real inputs, for kernels; for analyses they give shapes only."""
TABLES = 8
"""Models of which kgraph's numbers are averaged where they follow a few random numbers that the oracle draws anew."""
SMALL_SLOPE = 1e-2
"""Slopes below it count in absolute terms."""


@dataclass(frozen=True)
class Row:
    """What kgraph says of one value.

    Attributes:
        numbers: by quantity.
        scales: what errors are counted in, by quantity: the size of the number, where that is not of order one.
        how: how it got them.
        error: the relative error that it prints.
    """

    numbers: dict[str, float]
    scales: dict[str, float]
    how: str
    error: float = 0.0


def example(program: Program, width: int) -> Tensor:
    """Inputs of the program, in double precision where they are numbers."""
    generator = torch.Generator().manual_seed(program.seed)
    if program.tokens:
        return torch.randint(0, 8 * width, (INPUTS, *program.given.places), generator=generator)
    return torch.randn(INPUTS, *program.given.sizes(width), generator=generator, dtype=torch.float64)


def _model(program: Program, width: int, table: int = 0) -> nn.Module:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(program.seed + 1_000_003 * table)
        return program.compiled()(width).double().train(program.mode == "train")


def analyzed(program: Program, width: int) -> dict[str, Row]:
    """`kgraph.analyze`: the last row of every statement's line; none where inputs mean something else to it."""
    if program.ambiguous:
        return {}
    found = [_analyzed(program, width, table) for table in range(TABLES if program.tabled else 1)]
    return {name: _mean([rows[name] for rows in found]) for name in found[0]}


def _mean(rows: list[Row]) -> Row:
    numbers = {key: sum(row.numbers[key] for row in rows) / len(rows) for key in rows[0].numbers}
    scales = {key: sum(row.scales[key] for row in rows) / len(rows) for key in rows[0].scales}
    return Row(numbers, scales, rows[0].how, rows[0].error)


def _analyzed(program: Program, width: int, table: int) -> dict[str, Row]:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        report = kgraph.analyze(_model(program, width, table), example(program, width))
    file = program.compiled().file
    lines = {f"{file}:{line}": name for name, line in program.lines().items()}
    sizes = {s.name: s.shape.sizes(width) for s in program.statements}
    rows = {}
    for node in report.nodes:
        name = lines.get(node.source)
        if name is not None and tuple(node.shape[1:]) == sizes[name]:
            numbers = {"q": node.q, "slope": node.slope, "ntk": node.ntk}
            numbers["c positions"] = node.c_positions if program.told else math.nan
            numbers |= {f"c {cosine:g}": c for cosine, c in zip(report.analysis.cosines, node.c, strict=True)}
            error = float(node.note.removeprefix("+-")) if node.how == "sampled" else 0.0
            scales = {"q": node.q, "ntk": node.ntk, "slope": max(node.slope, SMALL_SLOPE)}
            rows[name] = Row(numbers, scales, node.how, error)
    return rows


def kerneled(program: Program, width: int) -> dict[str, Row]:
    """`kgraph.kernels` of the result, entry by entry, as shares of the q values of the two inputs."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        found = kgraph.kernels(_model(program, width), example(program, width))
    assert found.ntk is not None
    numbers, scales = {}, {}
    for name, matrix in (("nngp", found.nngp), ("ntk", found.ntk)):
        sizes = matrix.diagonal().sqrt()
        numbers |= entries(name, matrix)
        scales |= entries(name, sizes[:, None] * sizes[None])
    return {program.result.name: Row(numbers, scales, found.how)}


def entries(name: str, matrix: Tensor) -> dict[str, float]:
    """Upper triangle by name of the entry."""
    return {f"{name} {i} {j}": float(matrix[i, j]) for i in range(INPUTS) for j in range(i, INPUTS)}
