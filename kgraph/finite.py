"""Runs of the finite network: probe inputs with set cosines, background inputs for batch statistics, moments.

A probe's rows are input a, then one input b for every cosine, then the background. Where batch statistics are used,
they are those of the background, so that a probe does not normalize itself.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor, fx
from torch.utils import _pytree as pytree

from kgraph.canonical import aten, operation_name
from kgraph.capture import Graph
from kgraph.channel_dims import channel_dim
from kgraph.propagate import TOKEN_VIEWS
from kgraph.rules.embedding import token_rows
from kgraph.rules.sampled import for_mode
from kgraph.rules.speeds import same_tensor
from kgraph.site import shape_of
from kgraph.written_buffers import writes, written


def tied(table: fx.Node) -> bool:
    """Whether anything but embeddings reads the tensor of a `get_attr` node: a head that is the embedding's table."""
    users = [user for node in same_tensor(table) for user in node.users]
    return any(user.target is not aten.embedding.default for user in users)


class Runner(fx.Interpreter):
    """Runs the flat graph on probes and background, and records moments of the probe rows at every node."""

    def __init__(self, graph: Graph, cosines: tuple[float, ...], mode: str, background: int | None) -> None:
        super().__init__(graph.module, garbage_collect_values=True)
        self.graph_, self.cosines, self.mode = graph, cosines, mode
        self.probes = 1 + len(cosines)
        self.size = self.probes + (background if background is not None else self._background())
        self.widths: dict[str, int] = {}
        self.moments: dict[str, Tensor] = {}
        self.tokens: set[fx.Node] = set()
        self.channels: dict[fx.Node, int] = {}

    def _background(self) -> int:
        norms = [n for n in self.module.graph.nodes if n.target is aten.batch_norm.default]  # type: ignore[union-attr]
        if self.mode != "train" or not norms:
            return 0
        smallest = min(math.prod(shape_of(n)[2:]) for n in norms)
        return max(16, min(256, -(-1024 // max(smallest, 1))))

    def run(self, generator: torch.Generator) -> dict[str, Tensor]:  # type: ignore[override]
        self.generator, self.moments = generator, {}
        leaves, _spec = pytree.tree_flatten(self.graph_.inputs)
        nodes = [n for n in self.module.graph.nodes if n.op == "placeholder"]  # type: ignore[union-attr]
        inputs = [self._input(node, value) for node, value in zip(nodes, leaves, strict=True)]
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(int(torch.randint(0, 2**31, (), generator=generator)))
            super().run(*inputs, enable_io_processing=False)
        return self.moments

    def _input(self, node: fx.Node, value: Any) -> Any:
        if not isinstance(value, Tensor) or value.ndim == 0:
            return value
        if not value.is_floating_point():
            self.tokens.add(node)
            return value[:1].expand(self.size, *value.shape[1:]).clone()
        return self._probes(tuple(value.shape[1:]), channel_dim(node, value.ndim) - 1).to(value)

    def _probes(self, shape: tuple[int, ...], channel: int) -> Tensor:
        """Probe a, probes b with exact cosines to it at every position, then the background; q = 1 everywhere."""
        z = torch.randn((self.size, *shape), generator=self.generator, dtype=torch.float64).movedim(channel + 1, -1)

        def unit(x: Tensor) -> Tensor:
            return x / x.square().mean(-1, keepdim=True).sqrt()

        a = unit(z[0])
        rows = [a]
        for cosine, other in zip(self.cosines, z[1 : self.probes], strict=True):
            if other.shape[-1] > 1:
                other = unit(other - (other * a).mean(-1, keepdim=True) * a)
            rows.append(cosine * a + math.sqrt(1 - cosine**2) * other)
        return torch.cat([torch.stack(rows), unit(z[self.probes :])]).movedim(-1, channel + 1)

    def run_node(self, n: fx.Node) -> Any:
        if operation_name(n) in TOKEN_VIEWS and any(i in self.tokens for i in n.all_input_nodes):
            self.tokens.add(n)
        if n.target is aten.embedding.default and any(i in self.tokens for i in n.all_input_nodes):
            result = self._embedded(n)
        elif n.target is aten.batch_norm.default and self.mode == "train":
            result = self._batch_norm(n)
        elif n.op == "call_function" and writes(n):
            args, kwargs = self.fetch_args_kwargs_from_env(n)
            result = written(n, tuple(args), kwargs, self.env)
        else:
            result = self._plain(n)
        self._record(n, result)
        return result

    def _plain(self, n: fx.Node) -> Any:
        args, kwargs = self.fetch_args_kwargs_from_env(n)
        if n.op == "placeholder":
            return super().run_node(n)
        args = for_mode(n, tuple(args), self.mode)
        if n.target is aten.batch_norm.default and args[3] is not None:
            args = (*args[:5], False, *args[6:])
        return getattr(self, n.op)(n.target, args, kwargs)

    def _embedded(self, n: fx.Node) -> Tensor:
        """Gaussian rows with the table's own mean and variance, and the probes' cosines."""
        args, _ = self.fetch_args_kwargs_from_env(n)
        table, ids = args[0], args[1]
        known = token_rows(table, args[2] if len(args) > 2 else -1).double()
        if isinstance(n.args[0], fx.Node) and tied(n.args[0]):
            return self._own_rows(known, tuple(ids.shape[1:])).to(table)
        mean, scale = known.mean(), known.std()
        rows = self._probes((*ids.shape[1:], table.shape[1]), ids.ndim - 1)
        return (mean + scale * rows).to(table)

    def _own_rows(self, table: Tensor, places: tuple[int, ...]) -> Tensor:
        """Rows of the table itself, as others read them too; the second input of a pair is a mixture of two."""
        pick = [torch.randint(0, len(table), (self.size, *places), generator=self.generator) for _ in range(2)]
        a, other, mean = table[pick[0][:1]], table[pick[1]], table.mean()
        c = torch.ones(self.size, *(1 for _ in places), 1, dtype=torch.float64)
        c[1 : self.probes, ...] = torch.tensor(self.cosines, dtype=torch.float64).reshape(-1, *(1 for _ in places), 1)
        rows = mean + c * (a - mean) + (1 - c * c).sqrt() * (other - mean)
        rows[self.probes :] = table[pick[0][self.probes :]]
        return rows

    def _batch_norm(self, n: fx.Node) -> Any:
        args, kwargs = self.fetch_args_kwargs_from_env(n)
        x, weight, bias, eps = args[0], args[1], args[2], args[7]
        if not (isinstance(x, Tensor) and x.shape[0] == self.size and self.size > self.probes):
            return n.target(*args, **kwargs)  # type: ignore[operator]
        dims = [0, *range(2, x.ndim)]
        rest = x[self.probes :]
        mean, variance = rest.mean(dims), rest.var(dims, unbiased=False)
        return torch.nn.functional.batch_norm(x, mean, variance, weight, bias, False, 0.0, eps)

    def _record(self, n: fx.Node, value: Any) -> None:
        batched = isinstance(value, Tensor) and value.is_floating_point() and value.ndim > 1
        if not batched or value.shape[0] % self.size or n.op in ("get_attr", "output"):
            return
        channel = self.channels[n] = self._channel(n, value)
        folded = value.detach().double().movedim(channel, -1)
        rows = folded.reshape(self.size, -1, folded.shape[-1])[: self.probes]
        a = rows[0]
        entries = [a.square().mean()]
        for b in rows[1:]:
            entries += [b.square().mean(), (a * b).mean()]
        self.moments[n.name] = torch.stack([*entries, *_local(rows, self.generator)])
        self.widths[n.name] = value.shape[channel]

    def _channel(self, n: fx.Node, value: Tensor) -> int:
        """Dimension of the channels: told by the operation, else as in the input of the same layout."""
        name, dims = operation_name(n), value.ndim
        if name.startswith(_FIRST) and dims > 2:
            return 1
        if name in _LAST or dims == 2:
            return dims - 1
        source = next((i for i in n.all_input_nodes if i in self.channels), None)
        before = 0 if source is None else len(shape_of(source))
        if source is None or before != dims:
            return 1 if dims in (4, 5) else dims - 1
        if name in ("permute", "transpose"):
            order = list(range(dims))
            moved = torch.empty([1] * dims).expand([d + 2 for d in order])
            return list(getattr(moved, name)(*n.args[1:]).shape).index(self.channels[source] + 2)
        return self.channels[source]


_FIRST = ("conv", "batch_norm", "group_norm", "instance_norm", "max_pool", "avg_pool", "adaptive", "upsample", "pixel")
_LAST = ("linear", "addmm", "layer_norm", "rms_norm", "embedding", "scaled_dot_product_attention")
_PLACES = 256


def _local(rows: Tensor, generator: torch.Generator) -> list[Tensor]:
    """First and second moments, over positions, of single networks' kernels at one position and at two.

    ``rows[probes, positions, channels]``; of many positions, some are taken.
    """
    if rows.shape[1] > _PLACES:
        rows = rows[:, torch.randperm(rows.shape[1], generator=generator)[:_PLACES]]
    same = rows.square().mean(-1)
    apart = (rows * rows.roll(1, 1)).mean(-1) if rows.shape[1] > 1 else same
    crossed = (rows[:1] * rows[1:]).mean(-1) if len(rows) > 1 else same
    spread = crossed.var(1, unbiased=False).mean() if crossed.shape[1] > 1 else crossed.new_zeros(())
    return [same.mean(), same.square().mean(), apart.mean(), apart.square().mean(), spread]
