"""Bilinear layers, and sums written with indices: each is a layer, attention logits, an average or a product.

bilinear   y_o = sum_ij W_oij u_i v_j + b_o,    K' = sw2 K(u, u') K(v, v') + sb2
"""

from __future__ import annotations

from typing import Any

from torch import Tensor, fx

from kgraph.canonical import aten
from kgraph.gram.field import Crossed, Field
from kgraph.gram.rules.affine import contracted, layer_output, make_layer
from kgraph.gram.rules.attention import attended, scores
from kgraph.gram.rules.merge import combine, times
from kgraph.gram.rules.table import Context, rule, untransposed
from kgraph.gram.value import CannotFollow, Value, permuted, roles


def _crossed(u: Field, v: Field) -> Field:
    if u.places != v.places:
        raise CannotFollow("a bilinear layer of values at unlike positions")
    return Crossed(u.places, u.roots | v.roots, u.how | v.how, u, v)


@rule(aten.bilinear.default)
def bilinear(context: Context, x: Any, y: Any, weight: Tensor, bias: Tensor | None = None) -> Value:
    if not (isinstance(x, Value) and isinstance(y, Value)):
        raise CannotFollow("a bilinear layer of a known tensor")
    u, axes = contracted(x, [len(x.axes) - 1])
    v, other = contracted(y, [len(y.axes) - 1])
    if axes != other:
        raise CannotFollow("a bilinear layer of values whose dimensions differ")
    context.read_one_way(2, 1)
    layer = make_layer(context, (context.name(2), context.name(3)), weight, bias, weight[0].numel())
    out = len(weight)
    field = layer_output(context, _crossed(u, v), layer, u.places)
    return Value(((out, field),), (*axes[:-1], (("c", out),) if out > 1 else ()))


@rule(aten.einsum.default)
def einsum(context: Context, equation: str, operands: list[Any], *_: object, **__: object) -> Value:
    """One weight and one or two random operands, or two random ones."""
    if "." in equation or "->" not in equation:
        raise CannotFollow("an einsum with dimensions that are not named")
    left, output = equation.replace(" ", "").split("->")
    terms = list(zip(left.split(","), operands, strict=True))
    if any(len(set(letters)) < len(letters) for letters, _ in terms):
        raise CannotFollow("an einsum along a diagonal")
    random = [(letters, x) for letters, x in terms if isinstance(x, Value)]
    known = [i for i, (_, x) in enumerate(terms) if not isinstance(x, Value)]
    if len(known) == 1 and len(random) <= 2:
        return _layer(context, random, terms[known[0]], known[0], output)
    if not known and len(random) == 2:
        return _two(context, random, output)
    raise CannotFollow("an einsum of several known tensors, or of many random ones")


def _layer(context: Context, random: list[tuple[str, Value]], known: tuple[str, Tensor], at: int, output: str) -> Value:
    """The known tensor sums over channels of every random operand."""
    names, weight = known
    fields: list[Field] = []
    kept: dict[str, tuple[tuple[str, int], ...]] = {}
    summed = 0
    for letters, x in random:
        dims = [i for i, letter in enumerate(letters) if letter in names]
        if not dims or any(letters[i] in output or roles(x.axes[i]) != {"c"} for i in dims):
            raise CannotFollow("an einsum with a known tensor that is no layer over channels")
        u, axes = contracted(x, dims)
        own = {letter: axis for letter, axis in zip(letters, axes, strict=True) if letter not in names}
        if fields and own != kept:
            raise CannotFollow("an einsum of values whose dimensions differ")
        fields, kept, summed = [*fields, u], own, summed + len(dims)
    free = [letter for letter in names if letter in output]
    if len(free) + summed != len(names) or [x for x in output if x not in free] != [x for x in kept if x in output]:
        raise CannotFollow("an einsum that sums over more than a layer does")
    listed: Any = context.node.args[1]
    argument = listed[at]
    base = untransposed(argument)[0] if isinstance(argument, fx.Node) else None
    name = context.named_of(base) or context.node.name
    context.note_way(argument, name, int(names[-1] not in free))
    sizes = dict(zip(names, weight.shape, strict=True))
    fan_in = weight.numel()
    for letter in free:
        fan_in //= sizes[letter]
    rows = [names.index(letter) for letter in free]
    units = weight.permute(*rows, *(i for i in range(weight.ndim) if i not in rows)).reshape(-1, fan_in)
    layer = make_layer(context, (name, ""), weight, None, fan_in, units=units)
    u = fields[0] if len(fields) == 1 else _crossed(*fields)
    result = layer_output(context, u, layer, u.places)
    axes = tuple((("c", sizes[x]),) if x in free and sizes[x] > 1 else kept.get(x, ()) for x in output)
    return Value(((weight.numel() // fan_in, result),), axes)


def _two(context: Context, random: list[tuple[str, Value]], output: str) -> Value:
    """Logits, a weighted average, or a product entry by entry, of two random operands."""
    (a, x), (b, y) = random
    shared = [letter for letter in a if letter in b]
    summed = [letter for letter in shared if letter not in output]
    if any(letter not in output for letter in (*a, *b) if letter not in shared):
        raise CannotFollow("an einsum that sums over a dimension of one operand")
    if not summed and set(a) == set(b) == set(output):
        return combine(_in_order(x, a, output), _in_order(y, b, output), times)
    lead = [letter for letter in output if letter in shared]
    first, second = ([letter for letter in own if letter not in shared] for own in (a, b))
    if len(summed) != 1 or len(first) != 1 or len(second) != 1:
        raise CannotFollow("an einsum of two random tensors that is neither logits nor an average")
    kinds = [roles(v.axes[own.index(summed[0])]) for own, v in random]
    if kinds == [{"c"}, {"c"}]:
        orders = ((*lead, *first, *summed), (*lead, *second, *summed))
        found = scores(context, _in_order(x, a, orders[0]), _in_order(y, b, orders[1]), 1.0)
        return _in_order(found, [*lead, *first, *second], output)
    if kinds != [{"p"}, {"p"}]:
        raise CannotFollow("an einsum of two random tensors that is neither logits nor an average")
    if roles(y.axes[b.index(second[0])]) != {"c"}:
        (a, x), (b, y), first, second = (b, y), (a, x), second, first
    found = attended(_in_order(x, a, (*lead, *first, *summed)), _in_order(y, b, (*lead, *summed, *second)))
    return _in_order(found, [*lead, *first, *second], output)


def _in_order(x: Value, letters: str | list[str], wanted: str | tuple[str, ...]) -> Value:
    order = [list(letters).index(letter) for letter in wanted]
    return x if order == list(range(len(order))) else permuted(x, order)
