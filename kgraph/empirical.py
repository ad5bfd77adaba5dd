"""The NTK of a finite network as it stands, measured by differentiating it: what `kgraph.ntk` is the limit of."""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call
from torch.utils import _pytree as pytree

from kgraph import checks
from kgraph.capture import check_model
from kgraph.checks import count, flag, with_finite_values, with_values
from kgraph.errors import InputError
from kgraph.first_run import does_not_run
from kgraph.float64 import InFloat64
from kgraph.gram.kernels import batched_inputs
from kgraph.gram.options import learning
from kgraph.inputs import Inputs

Factor = float | Tensor
Tensors = dict[str, Tensor]

BUDGET = 2**25
"""Entries of Jacobian rows held at a time (256 MiB), or two rows if those are more."""
MOST_DIRECTIONS = 64
"""Output directions differentiated at once: each holds its own gradients of all activations."""


@dataclass(frozen=True)
class EmpiricalNTK:
    """Measured NTK of a finite network.

    Attributes:
        matrix: Theta, [n1, n2], float64.
        standard_error: of every entry, from the random output directions; None when all outputs are summed.
        how: "exact", or how many directions were drawn.
    """

    matrix: Tensor
    standard_error: Tensor | None
    how: str


def empirical_ntk(
    model: nn.Module,
    x1: Any,
    x2: Any = None,
    *,
    sketch: int | None = None,
    multipliers: Mapping[str, Factor] | None = None,
    count_frozen: bool = False,
    seed: int = 0,
) -> EmpiricalNTK:
    """NTK of the network with the parameters it has, in float64; the normalization is that of `kgraph.ntk`.

        Theta(x, x') = (1/O) sum_o <df_o(x)/dp, m df_o(x')/dp>,   o over all O entries of an input's output

    The model stays as it was (parameters, buffers, gradients, mode). In train mode the batch statistics of x1 and
    of x2, each by itself, are used, and differentiated, and the running ones are not updated.

    Args:
        model: any bare module; its first floating-point output counts.
        x1, x2: inputs, [n, ...]: a tensor, or a tuple or dict of the model's arguments. x2 None: x1.
        sketch: number of random directions v, entries +-1/sqrt(O), in place of all outputs:
            Theta = E_v <d(v.f(x))/dp, m d(v.f(x'))/dp>, unbiased.
        multipliers: learning-rate multipliers m by parameter name (a tensor: entry by entry).
        count_frozen: whether parameters with ``requires_grad=False`` count too; else their m is 0, unless it is given.
        seed: of the directions and of the model's own random numbers (dropout); no global generator is touched.

    Raises:
        ModelError: not a bare module.
        InputError: fewer than two directions, an unknown parameter, or an output without one row an input.
    """
    with_values(check_model(model))
    with_finite_values(model)
    seed = checks.seeded(seed)
    if sketch is not None:
        count("sketch", sketch, 2, "A standard error needs at least 2 directions")
    parameters, buffers = _double_copy(model)
    factors = _factors(
        model, learning(model, {} if multipliers is None else multipliers, flag("count_frozen", count_frozen))
    )
    left = _rows(model, parameters, buffers, x1, seed)
    right = left if x2 is None else _rows(model, parameters, buffers, x2, seed)
    if left[0].shape != right[0].shape:
        raise InputError("the model's outputs on x1 and x2 have different sizes", hint="Pass inputs of one shape")
    wanted = {name: p for name, p in parameters.items() if _counts(factors.get(name, 1.0))}
    pair = _Pair(left, right, wanted or parameters, factors)
    outputs = len(left[0])
    if sketch is None:
        return EmpiricalNTK(pair.trace() / outputs, None, "exact")
    generator = torch.Generator().manual_seed(seed)
    signs = torch.randint(0, 2, (sketch, outputs), generator=generator).to(left[0]) * 2 - 1
    draws = pair.along(signs / math.sqrt(outputs))
    error = draws.std(0) / math.sqrt(sketch)
    return EmpiricalNTK(draws.mean(0), error, f"sampled: {sketch} of {outputs} output directions")


def _double(x: Any) -> Any:
    return x.detach().double() if isinstance(x, Tensor) and x.is_floating_point() else x


def _double_copy(model: nn.Module) -> tuple[Tensors, Tensors]:
    """Float64 leaves for the parameters (one for each tensor, however often tied), and copies of the buffers."""
    parameters = {name: _double(p).clone().requires_grad_() for name, p in model.named_parameters()}
    if not parameters:
        raise InputError("the model has no parameters", hint="There is no NTK to measure")
    return parameters, {name: _double(b).clone() for name, b in model.named_buffers()}


def _factors(model: nn.Module, multipliers: Mapping[str, Factor]) -> dict[str, Factor]:
    """Multipliers by the first name of each parameter; tied parameters answer to all of theirs."""
    first = {id(p): name for name, p in reversed(list(model.named_parameters()))}
    known = {name: first[id(p)] for name, p in model.named_parameters(remove_duplicate=False)}
    missing = [name for name in multipliers if name not in known]
    if missing:
        raise InputError(f"the model has no parameter {missing[0]!r}", hint="See model.named_parameters()")
    for name, factor in multipliers.items():
        if isinstance(factor, Tensor):
            if not bool((factor.isfinite() & (factor >= 0)).all()):
                raise InputError(f"multipliers[{name!r}] has negative or infinite entries", hint="Pass finite ones")
        else:
            checks.not_negative(f"multipliers[{name!r}]", factor)
    return {known[name]: factor for name, factor in multipliers.items()}


def _counts(factor: Factor) -> bool:
    return isinstance(factor, Tensor) or factor != 0


@contextmanager
def seeded(model: nn.Module, seed: int) -> Iterator[None]:
    """Run with set generators (the CPU's and the model's devices'), and put them back."""
    devices = sorted({p.device.index or 0 for p in model.parameters() if p.device.type == "cuda"})
    with torch.random.fork_rng(devices=devices):
        torch.default_generator.manual_seed(seed)
        for device in devices:
            torch.cuda.default_generators[device].manual_seed(seed)
        yield


def _rows(model: nn.Module, parameters: Tensors, buffers: Tensors, x: Any, seed: int) -> list[Tensor]:
    """Output of every input, [O] each, as functions of ``parameters``: one graph an input where inputs do not meet."""
    inputs, count = batched_inputs(pytree.tree_map(_double, x))

    def run(values: Tensors, rows: slice) -> Tensor:
        return _run(model, {**values, **{k: b.clone() for k, b in buffers.items()}}, _sliced(inputs, rows, count), seed)

    if count > 1 and _separate(run, parameters, count):
        return [run(parameters, slice(i, i + 1))[0] for i in range(count)]
    whole = run(parameters, slice(0, count))
    if len(whole) != count:
        raise InputError(
            f"the model's output has {len(whole)} rows for {count} inputs", hint="Its first dimension must be the batch"
        )
    return list(whole.unbind())


def _sliced(inputs: Inputs, rows: slice, count: int) -> Inputs:
    def cut(x: Any) -> Any:
        return x[rows] if isinstance(x, Tensor) and x.ndim and len(x) == count else x

    return Inputs(*pytree.tree_map(cut, tuple(inputs)))


def _run(model: nn.Module, tensors: Tensors, inputs: Inputs, seed: int) -> Tensor:
    """First floating-point output, [rows, O]."""
    modes = [(module, module.training) for module in model.modules()]
    try:
        with seeded(model, seed), torch.enable_grad(), InFloat64():
            output = functional_call(model, tensors, inputs.args, inputs.kwargs)
    except Exception as error:  # whatever the user's forward raises on bad inputs
        raise does_not_run(model, inputs, error) from error
    finally:
        for module, training in modes:
            module.training = training
    leaves = pytree.tree_leaves(output)
    found = next((x for x in leaves if isinstance(x, Tensor) and x.is_floating_point() and x.ndim), None)
    if found is None:
        raise InputError("the model returns no floating-point tensor", hint="There is no NTK to measure")
    return found.reshape(len(found), -1)


def _separate(run: Callable[[Tensors, slice], Tensor], parameters: Tensors, count: int) -> bool:
    """Whether each input's output is its own affair: so at generic parameters (a zero gain would hide the batch)."""
    generator = torch.Generator().manual_seed(0)

    def moved(p: Tensor) -> Tensor:
        noise = torch.randn(p.shape, generator=generator, dtype=p.dtype).to(p.device)
        return p.detach() + noise * (0.1 * p.detach().square().mean().sqrt() + 1e-2)

    generic = {name: moved(p) for name, p in parameters.items()}
    whole = run(generic, slice(0, count)).detach()
    if len(whole) != count:
        return False
    try:
        alone = torch.cat([run(generic, slice(i, i + 1)).detach() for i in range(count)])
    except InputError:  # a model that needs several inputs, as batch statistics do
        return False
    return alone.shape == whole.shape and torch.allclose(alone, whole, rtol=1e-9, atol=1e-12, equal_nan=True)


@dataclass(frozen=True)
class _Pair:
    """Outputs of two sets of inputs, [O] each, and the parameters that both depend on."""

    left: list[Tensor]
    right: list[Tensor]
    parameters: Tensors
    factors: Mapping[str, Factor]

    @property
    def _entries(self) -> int:
        return sum(p.numel() for p in self.parameters.values())

    @property
    def _chunk(self) -> int:
        """Directions at a time."""
        rows = len(self.left) + (len(self.right) if self.right is not self.left else 0)
        return max(1, min(MOST_DIRECTIONS, BUDGET // (rows * self._entries)))

    def trace(self) -> Tensor:
        """``sum_o <df_o(x)/dp, m df_o(x')/dp>``, [n1, n2]."""
        outputs = len(self.left[0])
        total = self.left[0].new_zeros(len(self.left), len(self.right))
        for start in range(0, outputs, self._chunk):
            count = min(self._chunk, outputs - start)
            directions = total.new_zeros(count, outputs)
            directions[torch.arange(count), start + torch.arange(count)] = 1.0
            total += self._block(directions).sum(0)
        return total

    def along(self, directions: Tensor) -> Tensor:
        """``<d(v.f(x))/dp, m d(v.f(x'))/dp>`` of every direction v, [k, n1, n2]."""
        return torch.cat([self._block(part) for part in directions.split(self._chunk)])

    def _block(self, directions: Tensor) -> Tensor:
        """[m, O] -> [m, n1, n2], by tiles of inputs that fit the budget."""
        tile = max(1, BUDGET // (2 * len(directions) * self._entries))
        result = directions.new_zeros(len(directions), len(self.left), len(self.right))
        for i in range(0, len(self.left), tile):
            first = self._jacobians(self.left[i : i + tile], directions)
            for j in range(0, len(self.right), tile):
                if self.right is self.left and j < i:
                    result[:, i : i + tile, j : j + tile] = result[:, j : j + tile, i : i + tile].mT
                    continue
                own = self.right is self.left and i == j
                second = first if own else self._jacobians(self.right[j : j + tile], directions)
                result[:, i : i + tile, j : j + tile] = self._products(first, second)
        return result

    def _jacobians(self, rows: Sequence[Tensor], directions: Tensor) -> list[Tensor]:
        """``d(v.f(x))/dp`` of every parameter, [m, rows, p] each."""
        wanted = tuple(self.parameters.values())
        gradients = [_gradients(row, wanted, directions) for row in rows]
        return [torch.stack(own, 1) for own in zip(*gradients, strict=True)]

    def _products(self, first: list[Tensor], second: list[Tensor]) -> Tensor:
        """Inner products over all parameters, [m, rows, rows]."""
        total = first[0].new_zeros(first[0].shape[0], first[0].shape[1], second[0].shape[1])
        for (name, p), a, b in zip(self.parameters.items(), first, second, strict=True):
            factor = self.factors.get(name, 1.0)
            weight = factor.to(p).expand_as(p).reshape(-1) if isinstance(factor, Tensor) else factor
            total += (a * weight) @ b.mT
        return total


def _gradients(row: Tensor, wanted: tuple[Tensor, ...], directions: Tensor) -> list[Tensor]:
    """``v^T drow/dp`` for every direction at once, [m, p] each; one by one where an operation does not batch."""
    if not row.requires_grad:
        return [directions.new_zeros(len(directions), p.numel()) for p in wanted]

    def grad(v: Tensor, batched: bool) -> tuple[Tensor, ...]:
        return torch.autograd.grad(
            row, wanted, v, retain_graph=True, is_grads_batched=batched, allow_unused=True, materialize_grads=True
        )

    if len(directions) > 1:
        try:
            with warnings.catch_warnings():
                warnings.filterwarnings("ignore", message="There is a performance drop")
                return [g.reshape(len(directions), -1) for g in grad(directions, True)]
        except RuntimeError:
            pass
    return [torch.stack(own).flatten(1) for own in zip(*(grad(v, False) for v in directions), strict=True)]
