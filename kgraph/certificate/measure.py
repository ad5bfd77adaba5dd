"""Measuring an emitted module: fresh weights, pairs of inputs, and moments of what its own nodes compute.

Over P pairs of inputs (a, b) and a close input a', at a node with values u, sums over pairs, locations and channels:

    q = mean u_a^2     C = sum u_a u_b / sqrt(sum u_a^2 sum u_b^2)
    slope = (sum |u_a' - u_a|^2 / sum u_a^2) / (|a' - a|^2 / |a|^2)

which is C'(1) by a finite difference of angle `kgraph.certificate.probes.ANGLE`. Over draws, ratios are of means, with
errors by the jackknife.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.utils import _pytree as pytree

from kgraph.analysis import Analysis
from kgraph.canonical import aten, operation_name
from kgraph.certificate.judge import RELATIVE_TOLERANCE, departures
from kgraph.certificate.predict import predicted
from kgraph.certificate.probes import GROWTH, SHARES, of_examples, of_tokens, white
from kgraph.certificate.redraw import Redraw
from kgraph.certificate.report import Certificate, CertificateRow, Figure
from kgraph.checks import callback, count, finite_inputs, seeded, with_finite_values, with_values
from kgraph.copies import copied
from kgraph.emitted import NAMES, EmittedModule
from kgraph.errors import InputError, KGraphError
from kgraph.failures import failed
from kgraph.inputs import Inputs, resolve_inputs
from kgraph.modules import Scale
from kgraph.promised import Point, Promise
from kgraph.propagate import TOKEN_VIEWS
from kgraph.untouched import untouched
from kgraph.weight_laws import Law

Progress = Callable[[int, int], None]
ROWS = 2 + len(SHARES)
_INPUT = "the input"  # no name of a node
_ENTRIES = 3 << 16
"""Entries of all first inputs of a draw, and of the inputs of one run, from which the number of pairs follows."""


def certify(
    module: EmittedModule,
    promise: Promise,
    laws: dict[str, Law],
    report: Analysis,
    method: str,
    *,
    n: int = 4,
    inputs: object = None,
    seed: int = 0,
    pairs: int | None = None,
    progress: Progress | None = None,
) -> Certificate:
    """Measure ``module`` beside its promise and its prediction ``report``; see `TransformRecord.certificate`."""
    count("n", n, 2, "A standard error needs at least 2 draws")
    seed = seeded(seed)
    callback("progress", progress)
    with_values(module)
    with_finite_values(module)
    given = resolve_inputs(module, inputs)
    finite_inputs(tuple(given))
    pairs = _pairs(given) if pairs is None else count("pairs", pairs)
    generator = torch.Generator().manual_seed(seed)
    own = _prepared(module)
    redraw, run = Redraw(own, laws), _Run(own, promise, given, inputs is not None, generator)
    moments = []
    with untouched(own), torch.no_grad():
        torch.manual_seed(seed)  # of what the forward draws itself; `untouched` puts the generators back
        for done in range(n):
            redraw(generator)
            moments.append(run.draw(pairs))
            if progress is not None:
                progress(done + 1, n)
    measured = {name: torch.stack([m[name] for m in moments]) for name in moments[0]}
    if promise.output not in measured:
        raise InputError(
            f"the output of {report.model} has no value for every input of the batch",
            hint="Measure a module that returns a tensor [N, ...]",
        )
    data = inputs is not None and run.real
    cosines = tuple(_figure(measured[_INPUT], _cosine(i)).value for i in range(len(SHARES))) if data else SHARES
    report = predicted(module, given, promise) if data else report
    rows = tuple(_row(p, measured[p.node], cosines, report, n) for p in promise.points if p.node in measured)
    left = [point.node for point in promise.points if point.node not in measured]
    notes = [
        redraw.note(),
        "constants that were measured on inputs are measured anew in every draw" if _measured(own) else "",
        f"not measured, inside a module call or without a batch dimension: {', '.join(left)}" if left else "",
    ]
    if data and any("q" in row.departures for row in rows):
        notes.append(_of_size(measured[_INPUT]))
    words = "the given inputs" if data else "white inputs" if run.real else "tokens"
    return Certificate(
        *(report.model, method, promise.words, rows, promise.output, cosines, words, n, pairs, seed),
        notes=tuple(filter(None, notes)),
    )


def _measured(module: EmittedModule) -> bool:
    return any(isinstance(one, Scale) and one.measured for one in module.modules())


def _of_size(moments: Tensor) -> str:
    q = _figure(moments, _q).value
    return f"the inputs have q = {q:.3g}, and the promise is about q = 1" if abs(q - 1) > RELATIVE_TOLERANCE else ""


def _prepared(module: EmittedModule) -> EmittedModule:
    """A copy in eval mode, half precision widened."""
    own = copied(module)
    assert isinstance(own, EmittedModule)
    half = {p.dtype for p in own.parameters()} & {torch.float16, torch.bfloat16}
    own = own.float() if half else own
    return own.eval()


def _pairs(given: Inputs) -> int:
    """More of small inputs: 256 vectors, 64 images of 32 x 32, 8 of 224 x 224."""
    return max(8, min(256, _ENTRIES // _size(pytree.tree_leaves(tuple(given)))))


def _size(leaves: list[Any]) -> int:
    """Entries of one example of the largest input."""
    return max((math.prod(x.shape[1:]) for x in leaves if isinstance(x, Tensor) and x.ndim), default=1)


class _Run:
    """Runs a module on pairs and reads the moments of the promise's points.

    Attributes:
        real: whether any input is of numbers; tokens have no batch of their own to measure.
    """

    def __init__(
        self, module: EmittedModule, promise: Promise, given: Inputs, as_given: bool, generator: torch.Generator
    ) -> None:
        self.module, self.promise, self.as_given, self.generator = module, promise, as_given, generator
        self.device = next((p.device for p in module.parameters()), torch.device("cpu"))
        self.leaves = pytree.tree_leaves(tuple(given))
        self.real = any(map(_is_real, self.leaves))
        names = module.meta.get(NAMES, {})
        self.points = {names.get(point.node, point.node): point.node for point in promise.points}

    def draw(self, pairs: int) -> dict[str, Tensor]:
        """Moments of every point, and of the input, for the weights as they are, over ``pairs`` pairs."""
        most = max(1, _ENTRIES // (ROWS * _size(self.leaves)))
        total: dict[str, Tensor] = {}
        for start in range(0, pairs, most):
            for name, part in self._run(min(most, pairs - start), fit=start == 0).items():
                total[name] = total[name] + part if name in total else part
        return total

    def _run(self, pairs: int, fit: bool) -> dict[str, Tensor]:
        inputs = [self._input(i, x, pairs) for i, x in enumerate(self.leaves)]
        recorder = Recorder(self.module, self.points, pairs, self.generator, fit=fit)
        try:
            recorder.run(*inputs, enable_io_processing=False)
        except KGraphError:
            raise
        except Exception as error:  # whatever the user's own modules raise
            raise InputError(
                f"the module does not run on a batch of {pairs * ROWS}: {failed(error)}",
                hint="A certificate needs a module whose first dimension is the batch, of any size",
            ) from error
        real = next((x for x in inputs if _is_real(x)), None)
        return recorder.moments if real is None else {**recorder.moments, _INPUT: moments_of(real, pairs)}

    def _input(self, index: int, x: Any, pairs: int) -> Any:
        if not isinstance(x, Tensor) or not x.ndim:
            return x
        if not _is_real(x):
            return x[:1].expand(pairs * ROWS, *x.shape[1:]).clone().to(self.device)
        if self.as_given:
            rows = of_examples(x, pairs, self.generator)
        else:
            rows = white(tuple(x.shape[1:]), self.promise.channels[index] - 1, pairs, self.generator)
        dtype = next((p.dtype for p in self.module.parameters() if p.is_floating_point()), x.dtype)
        return rows.flatten(0, 1).to(device=self.device, dtype=dtype)


def _is_real(x: object) -> bool:
    """Whether an input is a batch of vectors or images of numbers."""
    return isinstance(x, Tensor) and x.is_floating_point() and x.ndim > 1


class Recorder(fx.Interpreter):
    """Runs an emitted module, node by node, and keeps sums of products of the rows of pairs.

    Args:
        module: whose own nodes are run.
        points: by node of the module, the name of the sums to keep.
        pairs: of the batch, whose rows are those of the pairs one after another.
        generator: of the tokens.
        fit: whether constants that were measured on inputs are measured anew, as a transform would.
    """

    def __init__(
        self,
        module: fx.GraphModule,
        points: dict[str, str],
        pairs: int,
        generator: torch.Generator,
        *,
        fit: bool = False,
    ) -> None:
        super().__init__(module, garbage_collect_values=True)
        self.points, self.pairs, self.generator, self.fit = points, pairs, generator, fit
        self.tokens: set[fx.Node] = set()
        self.moments: dict[str, Tensor] = {}

    def run_node(self, n: fx.Node) -> Any:
        if operation_name(n) in TOKEN_VIEWS and any(i in self.tokens for i in n.all_input_nodes):
            self.tokens.add(n)
        if self.fit and n.op == "call_module":
            one = self.fetch_attr(str(n.target))
            if isinstance(one, Scale) and one.measured:
                one.fit(self.fetch_args_kwargs_from_env(n)[0][0])
        table = self._table(n)
        result = super().run_node(n) if table is None else self._embedded(n, table)
        if n.op == "placeholder" and isinstance(result, Tensor) and not result.is_floating_point() and result.ndim:
            self.tokens.add(n)
        if n.name in self.points and isinstance(result, Tensor):
            self._keep(self.points[n.name], result)
        return result

    def _table(self, n: fx.Node) -> Tensor | None:
        """The table of an embedding of the input's tokens."""
        if not any(i in self.tokens for i in n.all_input_nodes):
            return None
        if n.target is aten.embedding.default:
            return self.fetch_args_kwargs_from_env(n)[0][0]
        layer = self.fetch_attr(str(n.target)) if n.op == "call_module" else None
        return layer.weight if isinstance(layer, nn.Embedding) else None

    def _embedded(self, n: fx.Node, table: Tensor) -> Tensor:
        plain = super().run_node(n)
        shape = (self.pairs, *plain.shape[1:-1])
        ids = tuple(torch.randint(0, len(table), shape, generator=self.generator).to(table.device) for _ in range(3))
        return of_tokens(table, (ids[0], ids[1], ids[2])).flatten(0, 1).to(plain)

    def _keep(self, name: str, value: Tensor) -> None:
        if value.is_floating_point() and value.ndim and not value.shape[0] % (self.pairs * ROWS):
            self.moments[name] = moments_of(value, self.pairs)


def moments_of(value: Tensor, pairs: int) -> Tensor:
    """[n, sum u_a^2, then sum u_b^2 and sum u_a u_b for every cosine, sum |u_a' - u_a|^2] over pairs."""
    u = value.detach().reshape(pairs, ROWS, -1).double()
    a, close = u[:, 0], u[:, -1]
    sums = [u.new_tensor(float(a.numel())), a.square().sum()]
    for i in range(len(SHARES)):
        sums += [u[:, 1 + i].square().sum(), (a * u[:, 1 + i]).sum()]
    return torch.stack([*sums, (close - a).square().sum()]).cpu()


def _row(point: Point, m: Tensor, cosines: tuple[float, ...], report: Analysis, n: int) -> CertificateRow:
    known = {node.name: node for node in report.nodes}.get(point.node)
    row = CertificateRow(
        node=point.node,
        what=point.what,
        kind=point.kind,
        width=point.width,
        q=_figure(m, _q),
        c=tuple(_figure(m, _cosine(i)) for i in range(len(SHARES))),
        slope=_figure(m, lambda s: s[..., -1] / s[..., 1] / GROWTH),
        predicted_q=known.q if known else math.nan,
        predicted_c=known.c if known else (math.nan,) * len(cosines),
        predicted_slope=known.slope if known else math.nan,
        promised_q=point.q,
        promised_c=tuple(point.c_at(c) for c in cosines),
        promised_slope=point.slope,
    )
    return CertificateRow(**{**vars(row), "departures": departures(row, n)})


def _q(s: Tensor) -> Tensor:
    return (s[..., 1] + s[..., 2]) / (2 * s[..., 0])


def _cosine(i: int) -> Callable[[Tensor], Tensor]:
    return lambda s: s[..., 3 + 2 * i] / (s[..., 1] * s[..., 2 + 2 * i]).sqrt()


def _figure(moments: Tensor, of: Callable[[Tensor], Tensor]) -> Figure:
    """A function of the mean moments, its jackknife error, and its standard deviation over draws."""
    n = len(moments)
    without = of((moments.sum(0) - moments) / (n - 1))
    error = ((n - 1) / n * (without - without.mean()).square().sum()).sqrt()
    return Figure(float(of(moments.mean(0))), float(error), float(of(moments).std()))
