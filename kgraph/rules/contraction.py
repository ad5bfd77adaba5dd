"""Products with a known tensor: a parameter is a linear layer, a constant over positions is a map of positions.

x W, einsum("bc,cd->bd", x, W)     a parameter: K' = fan_in E[W^2] K over what is summed
A x, einsum("ij,bjc->bic", A, x)   a constant that mixes positions (an adjacency): the map itself
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

from torch import Tensor, fx

from kgraph.canonical import aten
from kgraph.entries import said
from kgraph.how import EXACT, How
from kgraph.kernel import Axes, Kernel
from kgraph.rules.linear import Affine, contract, last_dim, to_positions
from kgraph.rules.spatial import over_positions
from kgraph.rules.speeds import is_parameter
from kgraph.rules.table import TURNED, Context, parameter_of, rule
from kgraph.rules.weights import assumed_of, mean_square, off_centre, uneven_rows
from kgraph.rules.zero_sums import zero_sums


@rule(aten.mm.default, aten.matmul.default)
def matmul(context: Context, x: Kernel | Tensor, weight: Kernel | Tensor) -> Kernel:
    if isinstance(x, Kernel) and _is_matrix(weight):
        assert isinstance(weight, Tensor)
        return last_dim(context, x, weight, None, weight.shape[1], 1, turned=True)
    if isinstance(weight, Kernel) and _is_matrix(x) and len(weight.axes) > 1:
        assert isinstance(x, Tensor)
        letters = "".join(chr(ord("a") + i) for i in range(len(weight.axes) - 2))
        return _contracted(context, Letters("yz", f"{letters}zx", f"{letters}yx"), weight, x, 0)
    return context.sample()


def _is_matrix(value: object) -> bool:
    return isinstance(value, Tensor) and value.ndim == 2 and value.is_floating_point()


@dataclass(frozen=True)
class Letters:
    """Dimensions of a product: of the known factor, of the random one, and of the result."""

    known: str
    random: str
    out: str

    @property
    def plain(self) -> bool:
        """Whether nothing is repeated, and every letter is summed over or kept by one factor only."""
        once = all(len(set(word)) == len(word) for word in (self.known, self.random, self.out))
        shared = set(self.known) & set(self.random)
        return (
            once
            and bool(shared)
            and not shared & set(self.out)
            and set(self.known + self.random) - shared == {*self.out}
        )


@rule(aten.einsum.default)
def einsum(context: Context, equation: str, operands: list[Kernel | Tensor], **_: object) -> Kernel:
    """A random tensor times a known one; everything else is drawn."""
    words, out = _words(equation)
    kernels = [i for i, operand in enumerate(operands) if isinstance(operand, Kernel)]
    if len(operands) != 2 or len(kernels) != 1 or out is None or len(words) != 2:
        return context.sample()
    x, known = operands[kernels[0]], operands[1 - kernels[0]]
    assert isinstance(x, Kernel)
    letters = Letters(words[1 - kernels[0]], words[kernels[0]], out)
    if not isinstance(known, Tensor) or not known.is_floating_point() or not letters.plain:
        return context.sample()
    return _contracted(context, letters, x, known, 1 - kernels[0])


def _words(equation: str) -> tuple[list[str], str | None]:
    """Letters of every operand and of the result; None for the result where dots stand in."""
    left, _, right = equation.replace(" ", "").partition("->")
    return left.split(","), right if "." not in equation and "->" in equation else None


def _contracted(context: Context, letters: Letters, x: Kernel, known: Tensor, index: int) -> Kernel:
    """The product over the shared letters; ``index`` is the known factor's place among the operands."""
    source = context.operand(index)
    if is_parameter(source):
        return _by_parameter(context, letters, x, known, source)
    return _by_constant(context, letters, x, known)


def _by_parameter(context: Context, letters: Letters, x: Kernel, weight: Tensor, source: fx.Node) -> Kernel:
    """A linear layer that sums over the shared letters."""
    name, turned = parameter_of(source)
    summed = tuple(i for i, letter in enumerate(letters.random) if letter in letters.known)
    if any(role == "b" for i in summed for role, _ in x.axes[i]):
        return context.sample()
    leads = letters.known[0] not in letters.random  # like a layer's weight [out, in]; x @ W reads it the other way
    root, other = (name, name + TURNED) if turned ^ leads else (name + TURNED, name)
    if any(part.roots.named(other) for part in x.parts):
        return context.sample()
    fan_in = math.prod(x.shape[i] for i in summed)
    layer = Affine(fan_in * mean_square(weight), 0.0, 0.0, fan_in, False, root, (context.speed(source), 0.0))
    sizes = dict(zip(letters.known, weight.shape, strict=True))
    axes: Axes = tuple(
        to_positions(x.axes[letters.random.index(letter)]) if letter in letters.random else (("c", sizes[letter]),)
        for letter in letters.out
    )
    zero = zero_sums(context, source, _by_unit(letters, weight))
    result, rows = contract(context, x, summed, layer, axes, zero), _of_rows(letters, weight)
    return result if rows is EXACT else said(result, rows)


def _of_rows(letters: Letters, weight: Tensor) -> How:
    """What is assumed of its units, which the letters that stay count."""
    uneven = any(letter not in letters.random for letter in letters.known) and uneven_rows(_by_unit(letters, weight))
    return assumed_of(None, off_centre(weight), uneven)


def _by_unit(letters: Letters, weight: Tensor) -> Tensor:
    """The weight as [units, inputs of one]."""
    kept = [i for i, letter in enumerate(letters.known) if letter not in letters.random]
    rows = weight.permute(*kept, *(i for i in range(weight.ndim) if i not in kept))
    return rows.flatten(len(kept)).flatten(0, len(kept) - 1) if kept else rows.reshape(1, -1)


def _by_constant(context: Context, letters: Letters, x: Kernel, known: Tensor) -> Kernel:
    """A matrix over one dimension of positions."""
    shared = [letter for letter in letters.random if letter in letters.known]
    if known.ndim != 2 or len(shared) != 1:
        return context.sample()
    dim = letters.random.index(shared[0])
    if any(role != "p" for role, _ in x.axes[dim]):
        return context.sample()
    own = next(letter for letter in letters.known if letter != shared[0])
    rows = known.detach().double()
    mapped = over_positions(x, [dim], [rows if letters.known[0] == own else rows.T])
    order = [letters.random.replace(shared[0], own).index(letter) for letter in letters.out]
    split = None if mapped.split is None else order.index(mapped.split)
    return replace(mapped, axes=tuple(mapped.axes[i] for i in order), split=split)
