"""The walk: every node of a captured graph gets its field, in order, on real inputs."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor, fx
from torch.utils import _pytree as pytree

from kgraph.canonical import aten
from kgraph.capture import Graph
from kgraph.channel_dims import channel_dim
from kgraph.errors import RuleError
from kgraph.gram import field as f
from kgraph.gram.complex_numbers import refuse_complex
from kgraph.gram.device import away, here
from kgraph.gram.engine import Engine
from kgraph.gram.moments import Moments
from kgraph.gram.rules import Context, find_rule, sample, several, unary
from kgraph.gram.rules.table import untransposed
from kgraph.gram.tangents import Own
from kgraph.gram.value import Axis, CannotFollow, Value
from kgraph.propagate import known_result
from kgraph.roots import Root
from kgraph.rules.noise import draws_noise
from kgraph.rules.pointwise import is_pointwise
from kgraph.rules.sampled import for_mode
from kgraph.site import computed, located, site_of

Progress = Callable[[int, int], None]
Taker = Callable[[fx.Node, Value], None]


@dataclass(frozen=True)
class Options:
    """Options of a walk.

    Attributes:
        mode: "train" or "eval".
        variances: declared E[w^2] by parameter name; measured where absent.
        moments: what was measured on the model's tensors by earlier walks.
    """

    mode: str
    variances: Mapping[str, float] = field(default_factory=dict)
    moments: Moments = field(default_factory=Moments)


class Walk:
    """Evaluates a graph on fields.

    Args:
        graph: a captured model.
        engine: computes blocks.
        options: mode and declared values.
        take: called with every node whose value is random.
    """

    def __init__(self, graph: Graph, engine: Engine, options: Options, take: Taker) -> None:
        self.graph, self.engine, self.options, self.take = graph, engine, options, take
        self.values: dict[fx.Node, Any] = {}
        self.tokens: set[fx.Node] = set()
        self.uses = _uses(graph.module.graph)
        self.named = {str(n.target) if n.op == "get_attr" else n.name: n for n in graph.module.graph.nodes}

    def run(self, inputs: list[Any]) -> Any:
        """Value of the model's output; ``inputs`` are the placeholders' values, [N, ...] each."""
        given = iter(inputs)
        last_reader = _last_readers(self.graph.module.graph)
        result: Any = None
        for node in self.graph.module.graph.nodes:
            if node.op == "output":
                result = fx.map_arg(node.args[0], lambda n: self.values[n])
                break
            with located(node):
                value = self._evaluate(node, given)
            self.values[node] = value
            if isinstance(value, Value):
                with computed(node):
                    self.take(node, value)
            for done in last_reader.get(node, ()):
                self.values.pop(done, None)
        return result

    def final(self) -> tuple[fx.Node, Value] | None:
        """The first output that depends on the inputs, behind a run."""
        output = next(node for node in self.graph.module.graph.nodes if node.op == "output")
        known = ((node, self.values.get(node)) for node in output.all_input_nodes)
        return next(((node, value) for node, value in known if isinstance(value, Value)), None)

    def _evaluate(self, node: fx.Node, given: Any) -> Any:
        if node.op == "placeholder":
            return self._placeholder(node, next(given))
        if node.op == "get_attr":
            return self._attribute(node)
        args, kwargs = fx.map_arg((node.args, node.kwargs), lambda n: self.values[n])  # type: ignore[misc]
        if node.op == "call_module":
            return self._module(node, args, kwargs)
        return self._function(node, args, kwargs)

    def _placeholder(self, node: fx.Node, value: Any) -> Any:
        if isinstance(value, Tensor) and value.is_floating_point():
            moves = {name: seed.at_inputs for name, seed in self.engine.seeds.items() if seed.at_inputs}
            known = known_input(node, value, moves)
            self.engine.draws.channels = max(self.engine.draws.channels, known.channels)
            return known
        if isinstance(value, Tensor):
            self.tokens.add(node)
        return value

    def _attribute(self, node: fx.Node) -> Any:
        value: Any = self.graph.module
        for part in str(node.target).split("."):
            value = getattr(value, part)
        return here(value.detach()) if isinstance(value, Tensor) else value

    def _module(self, node: fx.Node, args: Any, kwargs: Any) -> Any:
        module = self.graph.module.get_submodule(str(node.target))
        if not _random(args, kwargs):
            return here(module(*away(args), **away(kwargs)))
        rule = find_rule(type(module))
        return self._apply(node, rule and (lambda c, *a, **k: rule(c, module, *a, **k)), args, kwargs)

    def _function(self, node: fx.Node, args: Any, kwargs: Any) -> Any:
        target: Any = node.target
        if target is aten.sym_size.int and isinstance(args[0], Value):
            return args[0].shape[args[1]]
        if target in _LOOKUPS and any(n in self.tokens for n in node.all_input_nodes):
            return self._apply(node, find_rule(target), args, kwargs)
        if not _random(args, kwargs):
            _refuse_noise(node)
            self._note_parameters(node)
            result = here(known_result(node, for_mode(node, args, self.options.mode), kwargs, self.tokens, self.values))
            if isinstance(result, Tensor) and not result.is_floating_point():
                self.tokens.update({node} if self.tokens.intersection(node.all_input_nodes) else ())
            return result
        refuse_complex(node, self.values)
        rule = find_rule(target)
        if rule is None and is_pointwise(target):
            found = unary(target, args, kwargs) if _one_random(args, kwargs) else several(target, args, kwargs)
            if found is not None:
                return found
        return self._apply(node, rule, args, kwargs)

    def _note_parameters(self, node: fx.Node) -> None:
        """Keep what a known tensor is computed from, if parameters are behind it: its NTK is theirs."""
        before = node.all_input_nodes
        if any(n.op == "get_attr" or n in self.engine.made for n in before):
            self.engine.made[node] = {n: self.values[n] for n in before}

    def _apply(self, node: fx.Node, rule: Any, args: Any, kwargs: Any) -> Any:
        context = Context(
            node,
            self.engine,
            self.options.mode,
            self.graph.module,
            self.uses,
            dict(self.options.variances),
            self.named,
            self.options.moments,
        )
        if rule is None:
            return sample(context, args, kwargs, "no rule for this operation")
        try:
            return rule(context, *args, **kwargs)
        except CannotFollow as reason:
            return sample(context, args, kwargs, str(reason))


_LOOKUPS = (aten.embedding.default, aten.embedding_bag.padding_idx)


def _refuse_noise(node: fx.Node) -> None:
    if draws_noise(node):
        raise RuleError(
            "the forward draws noise that no input decides: the kernel of two inputs is not a number of theirs alone",
            node=node.name,
            source=site_of(node).source or None,
            hint="Leave the noise out, or use kgraph.analyze, which averages over it",
        )


def known_input(node: fx.Node, x: Tensor, own: Own) -> Value:
    """Real inputs: a known field [N, C, *places], whose tangents start with ``own``."""
    channel = channel_dim(node, x.ndim)
    data = x.detach().double().movedim(channel, 1)
    sizes = [s for i, s in enumerate(x.shape) if i not in (0, channel) and s > 1]
    axes: list[Axis] = []
    for i, size in enumerate(x.shape):
        role = "b" if i == 0 else "c" if i == channel else "p"
        axes.append(((role, size),) if size > 1 or role == "b" else ())
    root = Root(f"input {node.name}")  # what else reads these numbers is not independent of them
    data = data.reshape(len(x), x.shape[channel], *sizes)
    known = f.Known(tuple(sizes), frozenset({root}), data=data, own=own, given=True)
    return Value(((x.shape[channel], known),), tuple(axes))


def _random(args: Any, kwargs: Any) -> bool:
    return any(isinstance(leaf, Value) for leaf in pytree.tree_leaves((args, kwargs)))


def _one_random(args: tuple[Any, ...], kwargs: dict[str, Any]) -> bool:
    tensors = [leaf for leaf in pytree.tree_leaves((args, kwargs)) if isinstance(leaf, (Value, Tensor))]
    return len(tensors) == 1 and any(isinstance(value, Value) for value in args)


def _uses(graph: fx.Graph) -> Counter[str]:
    """How many operations read each parameter."""
    count: Counter[str] = Counter()
    for node in graph.nodes:
        base, _ = untransposed(node)
        name = str(base.target) if base.op == "get_attr" else base.name
        readers = [user for user in node.users if untransposed(user)[0] is not base]
        count[name] += len(readers)
    return count


def _last_readers(graph: fx.Graph) -> dict[fx.Node, list[fx.Node]]:
    """For every node, the nodes that nobody reads after it."""
    last: dict[fx.Node, fx.Node] = {}
    for node in graph.nodes:
        for before in node.all_input_nodes:
            last[before] = node
    result: dict[fx.Node, list[fx.Node]] = {}
    for node, reader in last.items():
        result.setdefault(reader, []).append(node)
    return result
