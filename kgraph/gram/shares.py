"""Tensors that are computed from parameters: how far they move when the parameters do, which is their part in an NTK.

A gain exp(g), a slice of a table, a weight times a constant, a normalized weight: what is trained is behind them. With
J the derivative of the tensor's entries by those of a parameter, the chain rule puts J J^T where a parameter itself has
the identity; of a weight's J J^T only the mean of the diagonal counts (the rest is o(1) at infinite width).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx

from kgraph.gram.device import here, uniform
from kgraph.gram.rules.table import Context, parameters_behind
from kgraph.gram.tangents import Own

_PROBES = 4
_INSTEAD = "kgraph.nngp leaves the NTK out, kgraph.empirical_ntk measures it"
Change = Callable[[Tensor], Tensor]


def unchanged(x: Tensor) -> Tensor:
    return x


@dataclass(frozen=True)
class _Source:
    """A tensor as a function of the parameters behind it."""

    names: tuple[str, ...]
    leaves: tuple[Tensor, ...]
    value: Tensor

    def slopes(self, v: Tensor) -> list[Tensor]:
        """``J^T v`` of every parameter."""
        found = torch.autograd.grad(self.value, self.leaves, v, retain_graph=True, materialize_grads=True)
        return [g.double() for g in found]


def _source(context: Context, node: fx.Node, change: Change) -> _Source:
    made, parameters = context.engine.made, parameters_behind(context, node)
    values: dict[fx.Node, Any] = {}
    with torch.enable_grad():
        for p in parameters:
            held: Any = context.module
            for part in str(p.target).split("."):
                held = getattr(held, part)
            values[p] = here(held.detach().clone()).requires_grad_()

        def value_of(n: fx.Node, reader: fx.Node) -> Any:
            if n not in values:
                values[n] = run(n) if n in made else made[reader][n]
            return values[n]

        def run(n: fx.Node) -> Any:
            target: Any = n.target
            args, kwargs = fx.map_arg((n.args, n.kwargs), lambda before: value_of(before, n))  # type: ignore[misc]
            return target(*args, **kwargs)

        value = change(values[node] if node in values else run(node))
    return _Source(tuple(str(p.target) for p in parameters), tuple(values[p] for p in parameters), value)


def _signs(like: Tensor, probe: int) -> Tensor:
    drawn = uniform(tuple(like.shape), torch.Generator("cpu").manual_seed(probe))
    return (2.0 * (drawn < 0.5).double() - 1.0).to(like)


def _shares(context: Context, source: _Source) -> tuple[dict[str, float], list[list[Tensor]]]:
    """Every parameter's share of the mean of the diagonal of J J^T, and ``J^T v`` of all probes v (entries +-1)."""
    probes = [source.slopes(_signs(source.value, probe)) for probe in range(_PROBES)]
    shares: dict[str, float] = {}
    for i, (name, leaf) in enumerate(zip(source.names, source.leaves, strict=True)):
        square = sum(float(found[i].square().sum()) for found in probes) / _PROBES
        speed = 1.0
        if context.engine.parametrization == "ntk":
            speed = context.variances.get(name, float(leaf.detach().double().square().mean()))
        shares[name] = speed * (square / max(source.value.numel(), 1))
    return shares, probes


def layer_terms(context: Context, name: str) -> Own:
    """Factors on a weight's or bias's own terms; none where nothing behind it moves."""
    node = context.named.get(name)
    if node is None or node.op == "get_attr":
        return context.own({name: 1.0}) if node is None or context.trained(name) else {}
    if not context.moves(node):
        return {}
    source = _source(context, node, unchanged)
    shares, _ = _shares(context, source)
    if context.engine.parametrization == "standard":
        return context.own(shares)
    moment = float(source.value.detach().double().square().mean())
    return context.own({name: share / moment for name, share in shares.items()}) if moment else {}


def entry_terms(context: Context, node: fx.Node, change: Change, places: bool) -> Own:
    """Own terms of a tensor that is used entry by entry: the mean square speed of its entries.

    Args:
        node: the tensor; ``change`` says what is made of it.
        places: whether it has positions: each must then have parameters of its own, and all move alike.

    Raises:
        RuleError: they do not.
    """
    source = _source(context, node, change)
    shares, probes = _shares(context, source)
    # |J^T v| is the same for all v where every entry of a parameter feeds one entry of the tensor.
    alike = all(
        torch.allclose(a.abs(), b.abs(), rtol=1e-5) for f in probes[1:] for a, b in zip(probes[0], f, strict=True)
    )
    if places and not (alike and _even(source)):
        what = f"no rule for the part of {source.names[0]!r} in the NTK: positions share it, or move unlike one another"
        raise context.error(what, _INSTEAD)
    _read(context, source, node.name)
    return context.own(shares)


def repeated(context: Context, node: fx.Node, change: Change, dims: list[int]) -> list[int]:
    """Those of ``dims`` along which a tensor repeats the same entries of its parameters: a row looked up everywhere."""
    source, found = _source(context, node, change), []
    for d in dims:
        value = source.value
        if not torch.equal(value, value.narrow(d, 0, 1).expand_as(value)):
            continue
        signs = _signs(value.narrow(d, 0, 1), 0)
        every = source.slopes(signs.expand_as(value).contiguous())
        # Equal to each of them added up: all the same, for none is longer than another.
        ends = [torch.zeros_like(value).index_copy(d, torch.tensor([i]), signs) for i in (0, value.shape[d] - 1)]
        alone = [source.slopes(one) for one in ends]
        if all(
            torch.allclose(one * value.shape[d], total)
            for each in alone
            for one, total in zip(each, every, strict=True)
        ):
            found.append(d)
    return found


def _read(context: Context, source: _Source, root: str) -> None:
    """Note that a tensor's parameters are read entry by entry under the name ``root``.

    Raises:
        RuleError: the same entries are read through another function too: their gradients add up.
    """
    for name, slope in zip(source.names, source.slopes(_signs(source.value, 0)), strict=True):
        support, readers = slope != 0, context.engine.readers.setdefault(name, {})
        if any(other != root and bool((support & seen).any()) for other, seen in readers.items()):
            what = f"no rule for the part of {name!r} in the NTK: it is read through several functions"
            raise context.error(what, _INSTEAD)
        readers[root] = support


def _even(source: _Source) -> bool:
    """Whether all entries that move have the same slope (those of one parameter entry each)."""
    found = [g.abs() for g in source.slopes(_signs(source.value, 0))]
    slopes = torch.cat([g[g > 0].reshape(-1) for g in found])
    moved = len(slopes) == source.value.numel()
    return moved and bool(slopes.max() - slopes.min() <= 1e-5 * slopes.max())
