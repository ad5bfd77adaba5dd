"""Recurrent layers: unrolled, one weight read at every step. The engine sees that it is one and the same.

The pre-activations at two times are correlated as their inputs are, K(W h_t, W h_s) = sw2 K(h_t, h_s): the plain
RNN is exact up to quadrature, the gated ones are measured on joint draws of all their gates at all times.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from kgraph.canonical import aten
from kgraph.gram import field as f
from kgraph.gram.build import mapped, moved, scaled, shifted, sliced
from kgraph.gram.field import Affine, Field
from kgraph.gram.places import Gather, Insert
from kgraph.gram.rules.affine import contracted, make_layer
from kgraph.gram.rules.merge import plus, times
from kgraph.gram.rules.table import Context, rule
from kgraph.gram.value import Axes, CannotFollow, Value, permuted, roles, single_place
from kgraph.maps import Pointwise, closed_form
from kgraph.roots import Root

SIGMOID = Pointwise(torch.sigmoid)
TANH = Pointwise(torch.tanh)
RELU = Pointwise(torch.relu, closed_form("relu"))


class _Cell:
    """One layer in one direction: its two affine maps."""

    def __init__(self, context: Context, weights: list[tuple[str, Tensor]]) -> None:
        self.context = context
        (in_name, w_in), (rec_name, w_rec) = weights[:2]
        biases = weights[2:] or [("", None), ("", None)]
        self.hidden = w_rec.shape[1]
        self.gates = w_rec.shape[0] // self.hidden
        self.layers = [
            make_layer(context, (name, b_name), w, b, w.shape[1])
            for (name, w), (b_name, b) in (((in_name, w_in), biases[0]), ((rec_name, w_rec), biases[1]))
        ]

    def affine(self, which: int, u: Field) -> list[Field]:
        """The layer's output on ``u``, cut into gates."""
        layer = self.layers[which]
        out = Affine(u.places, frozenset({Root(layer.root)}), u.how, arg=u, layer=layer)
        size, total = self.hidden, self.hidden * self.gates
        return [sliced(out, g * size, (g + 1) * size, total) for g in range(self.gates)]


def _complement(u: Field) -> Field:
    return shifted(scaled(u, -1.0), 1.0)


def _lstm_step(cell: _Cell, x: Field, state: tuple[Field, Field]) -> tuple[Field, Field]:
    h, c = state
    i, forget, g, o = (plus(a, b) for a, b in zip(cell.affine(0, x), cell.affine(1, h), strict=True))
    c = plus(times(mapped(SIGMOID, forget), c), times(mapped(SIGMOID, i), mapped(TANH, g)))
    return times(mapped(SIGMOID, o), mapped(TANH, c)), c


def _gru_step(cell: _Cell, x: Field, state: tuple[Field, Field]) -> tuple[Field, Field]:
    h, _ = state
    from_x, from_h = cell.affine(0, x), cell.affine(1, h)
    reset = mapped(SIGMOID, plus(from_x[0], from_h[0]))
    update = mapped(SIGMOID, plus(from_x[1], from_h[1]))
    new = mapped(TANH, plus(from_x[2], times(reset, from_h[2])))
    h = plus(times(mapped(_ONE_MINUS_SIGMOID, _argument(update)), new), times(update, h))
    return h, h


_ONE_MINUS_SIGMOID = Pointwise(lambda z: torch.sigmoid(-z))


def _argument(u: Field) -> Field:
    assert isinstance(u, f.Mapped)
    return u.arg


def _plain_step(fn: Pointwise) -> Any:
    def step(cell: _Cell, x: Field, state: tuple[Field, Field]) -> tuple[Field, Field]:
        (a,), (b,) = cell.affine(0, x), cell.affine(1, state[0])
        h = mapped(fn, plus(a, b))
        return h, h

    return step


def _zero(places: tuple[int, ...]) -> f.Known:
    return f.Known(places, data=torch.zeros(1, 1, *places, dtype=torch.float64))


def _unroll(cell: _Cell, step: Any, steps: list[Field], backwards: bool) -> tuple[list[Field], tuple[Field, Field]]:
    state: tuple[Field, Field] = (_zero(steps[0].places), _zero(steps[0].places))
    outputs = []
    for x in reversed(steps) if backwards else steps:
        state = step(cell, x, state)
        outputs.append(state[0])
    return outputs[::-1] if backwards else outputs, state


def _beside(fields: list[Field], axis: int) -> Field:
    """Fields of different times as positions of one."""
    if len(fields) == 1:
        return fields[0]
    pieces = tuple(moved(u, Insert(axis, 1)) for u in fields)
    roots = frozenset().union(*(u.roots for u in fields))
    places = (*fields[0].places[:axis], len(fields), *fields[0].places[axis:])
    return f.Joined(places, roots, fields[0].how, pieces, axis)


def _recurrent(context: Context, x: Value, step: Any, states: list[Any], options: tuple[Any, ...]) -> Any:
    weights, has_biases, layers, dropout, train, bidirectional, batch_first = options
    if any(isinstance(s, Value) or bool(torch.as_tensor(s).any()) for s in states):
        raise CannotFollow("a recurrent layer with a given first state")
    if dropout and train and context.mode == "train":
        raise CannotFollow("dropout between recurrent layers")
    names = [context.parameter(n) or str(n) for n in _listed(context)]
    per, directions = (4 if has_biases else 2), (2 if bidirectional else 1)
    if len(weights) != layers * directions * per:
        raise CannotFollow("a recurrent layer with projections")
    x = single_place(x if batch_first else permuted(x, (1, 0, 2)), 1)
    if roles(x.axes[2]) != {"c"} or roles(x.axes[1]) != {"p"}:  # time first, it is the inputs that are in its place
        raise CannotFollow("a recurrent layer over something that is no sequence of channels")
    length, u = x.shape[1], x.one()
    steps = [moved(u, Gather(0, torch.tensor([t]), True)) for t in range(length)]
    cells = [
        _Cell(context, list(zip(names, weights, strict=True))[i * per : (i + 1) * per])
        for i in range(layers * directions)
    ]
    last: list[tuple[Field, Field]] = []
    groups: list[list[Field]] = []
    for layer in range(layers):
        if layer:
            if directions == 2:
                raise CannotFollow("a second bidirectional recurrent layer")
            steps = groups[0]
        groups = []
        for direction in range(directions):
            outputs, state = _unroll(cells[layer * directions + direction], step, steps, direction == 1)
            groups.append(outputs)
            last.append(state)
    return _results(x, groups, last, cells[0].hidden, batch_first)


def _listed(context: Context) -> list[Any]:
    """Nodes of the weights: the last list among the arguments (an LSTM's states are a list too)."""
    lists: list[Any] = [a for a in context.node.args[1:] if isinstance(a, (list, tuple))]
    return list(lists[-1])


def _results(x: Value, groups: list[list[Field]], last: list[tuple[Field, Field]], size: int, first: bool) -> Any:
    sequence = [(size, _beside(outputs, 0)) for outputs in groups]
    split = 2 if len(sequence) > 1 else None
    y = Value(tuple(sequence), (x.axes[0], x.axes[1], (("c", size * len(sequence)),)), split)
    finals = []
    for which in (0, 1):
        fields = [state[which] for state in last]
        axis = (("p", len(fields)),) if len(fields) > 1 else ()
        finals.append(Value(((size, _beside(fields, 0)),), (axis, x.axes[0], (("c", size),))))
    return (y if first else permuted(y, (1, 0, 2))), *finals


@rule(aten.lstm.input)
def lstm(context: Context, x: Value, states: list[Any], weights: list[Tensor], *options: Any) -> Any:
    return _recurrent(context, x, _lstm_step, list(states), (weights, *options))


@rule(aten.gru.input)
def gru(context: Context, x: Value, state: Any, weights: list[Tensor], *options: Any) -> Any:
    return _recurrent(context, x, _gru_step, [state], (weights, *options))[:2]


@rule(aten.rnn_tanh.input)
def rnn_tanh(context: Context, x: Value, state: Any, weights: list[Tensor], *options: Any) -> Any:
    return _recurrent(context, x, _plain_step(TANH), [state], (weights, *options))[:2]


@rule(aten.rnn_relu.input)
def rnn_relu(context: Context, x: Value, state: Any, weights: list[Tensor], *options: Any) -> Any:
    return _recurrent(context, x, _plain_step(RELU), [state], (weights, *options))[:2]


def _one_step(context: Context, x: Any, states: list[Any], weights: tuple[Any, ...], step: Any) -> list[Value]:
    """A cell: one step, on a state that is given (zero, or a value of the network)."""
    if not isinstance(x, Value):
        raise CannotFollow("a cell that reads a known tensor")
    u, axes = contracted(x, [len(x.axes) - 1])
    at = 2, 3, 4, 5
    for index in at[:2]:
        context.read_one_way(index, 1)
    names = [(context.name(i), w) for i, w in zip(at, weights, strict=False) if w is not None]
    cell = _Cell(context, names)
    found = step(cell, u, tuple(_state(s, u, axes) for s in states))
    return [Value(((cell.hidden, h),), (*axes[:-1], (("c", cell.hidden),))) for h in found]


def _state(state: Any, like: Field, axes: Axes) -> Field:
    if not isinstance(state, Value):
        if bool(torch.as_tensor(state).any()):
            raise CannotFollow("a cell with a known state that is not zero")
        return _zero(like.places)
    if state.axes[:-1] != axes[:-1] or roles(state.axes[-1]) != {"c"}:
        raise CannotFollow("a cell whose state is laid out unlike its input")
    return state.one()


@rule(aten.gru_cell.default)
def gru_cell(context: Context, x: Any, state: Any, *weights: Any) -> Value:
    return _one_step(context, x, [state, state], weights, _gru_step)[0]


@rule(aten.lstm_cell.default)
def lstm_cell(context: Context, x: Any, states: list[Any], *weights: Any) -> list[Value]:
    return _one_step(context, x, list(states), weights, _lstm_step)


@rule(aten.rnn_tanh_cell.default)
def rnn_tanh_cell(context: Context, x: Any, state: Any, *weights: Any) -> Value:
    return _one_step(context, x, [state, state], weights, _plain_step(TANH))[0]


@rule(aten.rnn_relu_cell.default)
def rnn_relu_cell(context: Context, x: Any, state: Any, *weights: Any) -> Value:
    return _one_step(context, x, [state, state], weights, _plain_step(RELU))[0]
