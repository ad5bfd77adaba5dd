"""The table of kernel rules: one function per operation, found by the operation's canonical overload.

A rule takes the operation's own arguments - kernels where the tensor is random, plain tensors and numbers where
it is not - after a `Context`, and returns the kernel of the result.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, cast

from torch import fx
from torch.utils import _pytree as pytree

from kgraph.canonical import operation_name
from kgraph.errors import RuleError
from kgraph.kernel import Kernel, Pairs
from kgraph.rules.speeds import speed
from kgraph.site import Site, shape_of, site_of

Rule = Callable[..., Any]
_RULES: dict[object, Rule] = {}


@dataclass(frozen=True)
class Context:
    """What a rule may know besides its arguments.

    Attributes:
        node: the graph node being computed.
        mode: "train" or "eval".
        pairs: the input pairs the kernels are about.
        parametrization: "standard" (what PyTorch trains) or "ntk".
        sample: computes the node by the sampled rule instead.
        count_frozen: whether parameters that require no gradient have their part in the NTK too.
        known: values of the nodes so far.
    """

    node: fx.Node
    mode: str
    pairs: Pairs
    parametrization: str
    sample: Callable[[], Any]
    count_frozen: bool = False
    known: Mapping[fx.Node, Any] = field(default_factory=dict)

    def speed(self, argument: str | int | fx.Node) -> float:
        """How fast a known argument moves when what is trained behind it does: see `kgraph.rules.speeds`.

        By its name in the operation's schema, its place among the arguments, or the node itself; 0 where it is absent.
        """
        if isinstance(argument, str):
            schema = getattr(self.node.target, "_schema", None)
            if schema is None:  # a module's own parameters
                return 1.0
            argument = [a.name for a in schema.arguments].index(argument)
        if isinstance(argument, int):
            if argument >= len(self.node.args) or not isinstance(self.node.args[argument], fx.Node):
                return 0.0
            argument = cast(fx.Node, self.node.args[argument])
        return speed(argument, self.parametrization, self.count_frozen, self.known)

    @property
    def site(self) -> Site:
        return site_of(self.node)

    @property
    def shape(self) -> tuple[int, ...]:
        """Shape of the result at the example inputs."""
        return shape_of(self.node)

    def argument_name(self, index: int) -> str:
        """Name of the parameter (or node) behind argument ``index``: the random root it stands for."""
        argument = self.node.args[index]
        if isinstance(argument, fx.Node):
            return str(argument.target) if argument.op == "get_attr" else argument.name
        return self.node.name

    def operand(self, index: int) -> fx.Node:
        """Node of operand ``index``, counted through lists of tensors."""
        operands = [a for a in pytree.tree_leaves(self.node.args) if isinstance(a, fx.Node)]
        return operands[index]

    @property
    def signature(self) -> tuple[object, ...]:
        """The operation and its arguments but the first: equal for two calls of one layer."""
        rest = enumerate(self.node.args[1:], 1)
        arguments = [self.argument_name(i) if isinstance(a, fx.Node) else repr(a) for i, a in rest]
        return self.node.target, self.parametrization, self.shape, *arguments

    def error(self, what: str, hint: str = "") -> RuleError:
        return RuleError(what, node=self.node.name, source=self.site.source, hint=hint)


_TURNS = ("t", "transpose", "numpy_T", "mT", "permute")
TURNED = "^T"
"""Ends the name of a root whose weight is used the other way around: W x and W^T y are different numbers of one W."""
_VIEWS = ("contiguous", "clone", "to", "detach", "alias")


def parameter_of(node: fx.Node) -> tuple[str, bool]:
    """Name of the parameter (or node) that a weight is, and whether it is turned around on the way."""
    turned = False
    while node.op != "get_attr":
        name, source = operation_name(node), node.args[0] if node.args else None
        if name not in (*_TURNS, *_VIEWS) or not isinstance(source, fx.Node):
            return node.name, turned
        turned ^= name in _TURNS
        node = source
    return str(node.target), turned


def rule(*targets: object) -> Callable[[Rule], Rule]:
    """Register a rule for canonical overloads or module types.

    Raises:
        RuleError: one of them has a rule already.
    """

    def register(function: Rule) -> Rule:
        for target in targets:
            if target in _RULES:
                raise RuleError(f"{target} has two rules")
            _RULES[target] = function
        return function

    return register


def drops(node: fx.Node, mode: str) -> bool:
    """Whether the dropout at ``node`` drops: in train mode, and where the forward asks for it in eval mode as well."""
    return mode == "train" or bool(node.meta.get("always"))


def find_rule(target: object) -> Rule | None:
    """The rule of an operation, or None (then the sampled rule applies)."""
    return _RULES.get(target)


def known_targets() -> tuple[object, ...]:
    """Everything that has a rule."""
    return tuple(_RULES)


def require_kernel(context: Context, value: object) -> Kernel:
    """``value`` if it is a kernel.

    Raises:
        RuleError: the operation was called with another kind of operand than its rule covers.
    """
    if not isinstance(value, Kernel):
        raise context.error("the rule needs a random tensor here", "Report this model")
    return value
