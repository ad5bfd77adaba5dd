"""Any other operation: run it as it is on joint draws, channels side by side as the operation expects them."""

from __future__ import annotations

import zlib
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, fx
from torch.utils import _pytree as pytree

from kgraph.canonical import aten
from kgraph.gram.align import DRAWN_CHANNELS, aligned
from kgraph.gram.complex_numbers import HINT, is_complex
from kgraph.gram.device import away, here
from kgraph.gram.field import Drawn, Field
from kgraph.gram.rules.probing import as_draws, as_tensor, result_axes
from kgraph.gram.rules.table import Context
from kgraph.gram.value import Axes, Value, size_of
from kgraph.how import EXACT, assumed
from kgraph.rules.pointwise import is_pointwise
from kgraph.rules.sampled import for_mode

MOVES = (
    aten.view.default,
    aten.reshape.default,
    aten._unsafe_view.default,
    aten.flatten.using_ints,
    aten.unflatten.int,
    aten.permute.default,
    aten.transpose.int,
    aten.movedim.int,
    aten.movedim.intlist,
    aten.t.default,
    aten.pixel_shuffle.default,
)


def sample(context: Context, args: tuple[Any, ...], kwargs: dict[str, Any], reason: str) -> Value:
    """The node's result as a field measured on draws; parameters that it reads count as the numbers they are.

    Raises:
        RuleError: the operation mixes inputs or channels in a way that draws of channels cannot show, or has a part
            of its own in an NTK that is asked for.
    """
    values = [leaf for leaf in pytree.tree_leaves((args, kwargs)) if isinstance(leaf, Value)]
    if is_complex(context.node):
        raise context.error(f"cannot follow {reason}, whose result is complex", HINT)
    if context.node.target in MOVES:  # what the result's dimensions mean cannot be told from their sizes
        raise context.error(f"cannot follow {reason}", _MEASURED)
    if any(len(v.groups) > 1 for v in values):
        return _group_by_group(context, args, kwargs, reason)
    parameters = _parameters(context, args, kwargs)
    context.refuse_ntk(parameters, reason)
    call = _operation(context, args, kwargs)
    axes = result_axes(context, call, values, reason)
    fields = tuple(v.one() for v in values)
    roots = frozenset().union(*(u.roots for u in fields))
    if _known_channels(args, kwargs, axes):
        roots |= {DRAWN_CHANNELS}
    given = assumed(f"{', '.join(parameters)} as they are") if parameters else EXACT
    how = max((given, *(u.how for u in fields)), key=lambda h: h.level)
    places = tuple(s for axis in axes for role, s in axis if role == "p")
    seed = 1_000_003 * context.engine.draws.seed + zlib.crc32(context.node.name.encode())
    run = _Run(call, tuple(v.axes for v in values), axes, seed)
    channels = size_of(tuple(t for axis in axes for t in axis if t[0] == "c"))
    return Value(((channels, Drawn(places, roots, how, fields, run)),), axes)


_MEASURED = "kgraph.empirical_ntk measures the NTK of the model as it is"
_ANY = 64
"""Channels that entry-by-entry operations are run on at a time, however many there are."""


def _group_by_group(context: Context, args: tuple[Any, ...], kwargs: dict[str, Any], reason: str) -> Value:
    """An operation entry by entry, on one group of channels after the other.

    Raises:
        RuleError: it is another one, or reads a tensor whose channels would have to be cut too.
    """
    leaves, tree = pytree.tree_flatten((args, kwargs))
    values = [x for x in leaves if isinstance(x, Value)]
    tensors = [x for x in leaves if isinstance(x, Tensor) and x.numel() > 1]
    if not is_pointwise(context.node.target) or tensors or len(values) > 2:
        raise context.error(
            f"no exact kernel rule ({reason}), and its operands have several groups of channels",
            f"Apply the operation before channels are put side by side; {_MEASURED}",
        )
    parts, axes, split = aligned(values[0], values[-1])
    assert split is not None
    own = (*axes[:split], (("c", _ANY), *axes[split][1:]), *axes[split + 1 :])
    groups: list[tuple[int, Field]] = []
    for size, *fields in parts:
        given = iter(Value(((_ANY, u),), own) for u in fields)
        plain = [next(given) if isinstance(x, Value) else x for x in leaves]
        part_args, part_kwargs = pytree.tree_unflatten(plain, tree)
        groups.append((size, sample(context, part_args, part_kwargs, reason).one()))
    return Value(tuple(groups), axes, split)


def _known_channels(args: tuple[Any, ...], kwargs: dict[str, Any], axes: Axes) -> bool:
    """Whether a known operand has a number for every channel."""
    at = next((d - len(axes) for d, axis in enumerate(axes) for role, _ in axis if role == "c"), None)
    tensors = [t for t in pytree.tree_leaves((args, kwargs)) if isinstance(t, Tensor)]
    return at is not None and any(t.ndim >= -at and bool((t != t.narrow(at, 0, 1)).any()) for t in tensors)


def _parameters(context: Context, args: tuple[Any, ...], kwargs: dict[str, Any]) -> list[str]:
    """Names of the parameters that the plain tensors among the arguments are, or are made of."""
    node = context.node
    given = [*zip(node.args, args, strict=True), *((node.kwargs[key], value) for key, value in kwargs.items())]
    queue = [source for source, value in given if isinstance(source, fx.Node) and isinstance(value, Tensor)]
    for source in queue:
        queue += [before for before in source.all_input_nodes if before not in queue]
    names = [str(source.target) for source in queue if source.op == "get_attr"]
    if node.op == "call_module":
        names += [
            f"{node.target}.{name}" for name, _ in context.module.get_submodule(str(node.target)).named_parameters()
        ]
    return [name for name in names if context.trained(name)]


def _operation(context: Context, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Callable[..., Any]:
    """The node's operation as a function of its random operands."""
    template, tree = pytree.tree_flatten((args, kwargs))
    types = _types([*context.node.args, *context.node.kwargs.values()], [*args, *kwargs.values()])
    node, mode, module = context.node, context.mode, context.module
    target: Any = module.get_submodule(str(node.target)) if node.op == "call_module" else node.target

    def run(*tensors: Tensor) -> Any:
        given = iter([_typed(x, dtype) for x, dtype in zip(tensors, types, strict=True)])
        leaves = [next(given) if isinstance(leaf, Value) else _plain(leaf, tensors[0].device) for leaf in template]
        own_args, own_kwargs = pytree.tree_unflatten(leaves, tree)
        return target(*for_mode(node, own_args, mode), **own_kwargs)

    # Modules stay where they were captured, and random numbers come from a generator that can be set back.
    tags = getattr(target, "tags", None)
    anywhere = tags is not None and torch.Tag.nondeterministic_seeded not in tags
    return run if anywhere else lambda *tensors: here(run(*away(tensors)))


def _types(sources: Sequence[Any], values: Sequence[Any]) -> list[torch.dtype | None]:
    """What the random operands hold where that is truth values or whole numbers: they are drawn as numbers."""
    types: list[torch.dtype | None] = []
    for source, value in zip(sources, values, strict=True):
        if isinstance(source, (list, tuple)):
            types += _types(source, value)
            continue
        made = source.meta.get("val") if isinstance(source, fx.Node) else None
        discrete = made.dtype if isinstance(made, Tensor) and not made.is_floating_point() else None
        types += [discrete for leaf in pytree.tree_leaves(value) if isinstance(leaf, Value)]
    return types


def _typed(x: Tensor, dtype: torch.dtype | None) -> Tensor:
    return x if dtype is None else x > 0.5 if dtype == torch.bool else x.to(dtype)


class _Run:
    """Draws [S, N, *places] of the operands, laid out as tensors of their axes, through the operation, and back."""

    def __init__(self, call: Any, operands: tuple[Axes, ...], result: Axes, seed: int) -> None:
        self.call, self.operands, self.result, self.seed = call, operands, result, seed

    def __call__(self, *draws: Tensor) -> Tensor:
        channels = size_of(tuple(t for axis in self.operands[0] for t in axis if t[0] == "c"))
        count = len(draws[0])
        turn = torch.arange(-(-count // channels) * channels)
        turn[count:] = turn[count:] % channels % count  # the last round is filled up with the first draws
        outputs = []
        with torch.random.fork_rng(devices=[]):  # an operation's own random numbers: by seed, the user's left alone
            torch.default_generator.manual_seed(self.seed)
            for chosen in turn.split(channels):
                tensors = [as_tensor(x[chosen], axes) for x, axes in zip(draws, self.operands, strict=True)]
                outputs.append(as_draws(self.call(*tensors), self.result))
        return torch.cat(outputs)[:count].to(draws[0])  # a comparison gives truth values


def _plain(value: Any, device: torch.device) -> Any:
    if not isinstance(value, Tensor):
        return value
    value = value.detach().to(device)
    return value.double() if value.is_floating_point() else value
