"""The table of rules on fields: one function an operation, found by its canonical overload or module type."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor, fx, nn

from kgraph.canonical import aten
from kgraph.errors import RuleError
from kgraph.gram.engine import Engine
from kgraph.gram.moments import Moments, T
from kgraph.gram.tangents import Own, own_terms
from kgraph.gram.value import Value
from kgraph.site import site_of

Rule = Callable[..., Any]
_RULES: dict[object, Rule] = {}


@dataclass(frozen=True)
class Context:
    """What a rule may know besides its arguments.

    Attributes:
        node: the graph node being computed.
        engine: computes blocks.
        mode: "train" or "eval".
        module: the graph's module.
        uses: how often each parameter is read.
        variances: declared variances by parameter name; measured where a name is not in it.
        named: nodes by the name of the parameter that they are, or by their own.
        moments: what was measured on the model's tensors.
    """

    node: fx.Node
    engine: Engine
    mode: str
    module: nn.Module
    uses: Counter[str]
    variances: dict[str, float] = field(default_factory=dict)
    named: dict[str, fx.Node] = field(default_factory=dict)
    moments: Moments = field(default_factory=Moments)

    def measured(self, measure: Callable[[Tensor], T], name: str, tensor: Tensor) -> T:
        """``measure(tensor)``; once, where it is the model's own tensor of that name."""
        node = self.named.get(name)
        return self.moments.of(measure, name, tensor) if node is not None and node.op == "get_attr" else measure(tensor)

    def parameter(self, value: Any) -> str | None:
        """Name of the parameter that an argument of the node is, else None."""
        is_parameter = isinstance(value, fx.Node) and value.op == "get_attr"
        return str(value.target) if is_parameter else None

    def name(self, index: int) -> str:
        """Name of the parameter (or node) behind argument ``index``."""
        argument = self.node.args[index] if index < len(self.node.args) else None
        if isinstance(argument, fx.Node):
            argument, _ = untransposed(argument)
            return self.parameter(argument) or argument.name
        return self.node.name

    def read_one_way(self, index: int, along: int) -> None:
        """Note that a layer sums over dimension ``along`` of the weight that is argument ``index``.

        Raises:
            RuleError: another layer sums over the other one: W and its transpose are not independent, and what
                they do to each other's outputs is no function of kernels.
        """
        self.note_way(self.node.args[index] if index < len(self.node.args) else None, self.name(index), along)

    def note_way(self, argument: object, name: str, along: int) -> None:
        """The same for any node that is the weight, under its name."""
        way = along ^ (isinstance(argument, fx.Node) and untransposed(argument)[1])
        if self.engine.ways.setdefault(name, way) != way:
            raise self.error(
                f"{name!r} is used as it is and transposed: the two are not independent, and there is no rule for it",
                "Give the layers weights of their own",
            )
        for base in _made_of(argument) if isinstance(argument, fx.Node) else ():
            if self.engine.made_of.setdefault(base, name) != name:
                raise self.error(
                    f"{base!r} is behind two weights, {self.engine.made_of[base]!r} and {name!r}: there is no rule for "
                    "layers whose weights are functions of one another",
                    "Compute the weight once, or give the layers weights of their own",
                )

    def trained(self, name: str) -> bool:
        """Whether a tensor of the module is a parameter."""
        owner, _, leaf = name.rpartition(".")
        return leaf in dict(self.module.get_submodule(owner).named_parameters(recurse=False))

    def named_of(self, argument: object) -> str | None:
        """Name of the parameter that an argument of the node is, else the argument's own."""
        return None if not isinstance(argument, fx.Node) else self.parameter(argument) or argument.name

    def trains(self, index: int) -> bool:
        """Whether argument ``index`` of the node is computed from a parameter."""
        argument = self.node.args[index]
        return isinstance(argument, fx.Node) and bool(parameters_behind(self, argument))

    def refuse_declared(self, name: str, why: str) -> None:
        """Raise a RuleError if a variance is declared of a parameter behind the tensor ``name``, but not of itself."""
        behind = [str(p.target) for p in parameters_behind(self, self.named.get(name))]
        declared = [p for p in behind if p in self.variances and p != name]
        if declared:
            raise self.error(f"the variance declared of {declared[0]!r} has no rule: {why}", "Set its entries instead")

    def own(self, shares: Mapping[str, float]) -> Own:
        """Own terms of the tangents that parameters have shares in."""
        return own_terms(self.engine.seeds, shares)

    def moves(self, node: object) -> bool:
        """Whether a known tensor is computed from parameters, and a tangent is carried that is theirs."""
        theirs = any(seed.others or seed.multipliers for seed in self.engine.seeds.values())
        return theirs and bool(parameters_behind(self, node))

    def refuse_ntk(self, parameters: Sequence[str], reason: str) -> None:
        """Raise a RuleError if a tangent has own terms of ``parameters``: their part in the NTK has no rule."""
        if self.own(dict.fromkeys(parameters, 1.0)):
            what = f"no exact kernel rule ({reason}), and the part of {parameters[0]} in the NTK is not known"
            raise self.error(what, "kgraph.nngp leaves the NTK out, kgraph.empirical_ntk measures it")

    def error(self, what: str, hint: str = "") -> RuleError:
        return RuleError(what, node=self.node.name, source=site_of(self.node).source, hint=hint)


def parameters_behind(context: Context, node: object) -> list[fx.Node]:
    """Trained parameters that a known tensor is, or is computed from."""
    queue = [node] if isinstance(node, fx.Node) else []
    for source in queue:
        queue += [before for before in context.engine.made.get(source, ()) if before not in queue]
    return [n for n in queue if n.op == "get_attr" and context.trained(str(n.target))]


_TRANSPOSES = (aten.t.default, aten.transpose.int, aten.permute.default, aten.numpy_T.default, aten.mT.default)


_CUTS = (aten.slice.Tensor, aten.select.int, aten.chunk.default, aten.split.Tensor, aten.split_with_sizes.default)


def _made_of(weight: fx.Node) -> list[str]:
    """Parameters of a weight's size that it is computed from entry by entry; parts of one are independent."""
    size = _entries(weight)
    found, queue, seen = [], [weight], {weight}
    while queue:
        node = queue.pop()
        if node.op == "get_attr" and _entries(node) == size:
            found.append(str(node.target))
        if node.target not in _CUTS:
            new = [n for n in node.all_input_nodes if n not in seen]
            seen.update(new)
            queue += new
    return found


def _entries(node: fx.Node) -> int | None:
    value = node.meta.get("val")
    return value.numel() if isinstance(value, Tensor) else None


def untransposed(node: fx.Node) -> tuple[fx.Node, bool]:
    """The matrix that a node is a transpose of (or the node itself), and whether it is turned."""
    turned = False
    while node.op == "call_function" and node.target in _TRANSPOSES:
        before, *how = node.args
        value = before.meta.get("val") if isinstance(before, fx.Node) else None
        if not isinstance(before, fx.Node) or not isinstance(value, Tensor) or value.ndim != 2:
            break
        permuted = node.target is aten.permute.default
        one, two = (int(dim) % 2 for dim in (how[0] if permuted else how or (0, 1)))  # type: ignore[union-attr, arg-type]
        turned ^= (one, two) == (1, 0) if permuted else one != two
        node = before
    return node, turned


def rule(*targets: object) -> Callable[[Rule], Rule]:
    """Register a rule.

    Raises:
        RuleError: a target has a rule already.
    """

    def register(function: Rule) -> Rule:
        for target in targets:
            if target in _RULES:
                raise RuleError(f"{target} has two rules")
            _RULES[target] = function
        return function

    return register


def find_rule(target: object) -> Rule | None:
    return _RULES.get(target)


def is_value(x: object) -> bool:
    return isinstance(x, Value)


def is_tensor(x: object) -> bool:
    return isinstance(x, Tensor)
