"""Joint draws of fields, for whatever has no closed form: maxima, batch statistics, gates of several Gaussians.

Every Gaussian leaf is drawn over all inputs and positions at once from its exact covariance, given the leaves drawn
before that it is correlated with; an expression is then evaluated draw by draw. The NTK needs one more set of
numbers: directions t with covariance NTK, pushed through the expression's derivative, E[(J t)_a (J t)_b].
"""

from __future__ import annotations

import weakref
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from kgraph.errors import InputError
from kgraph.gram import field as f
from kgraph.gram.block import Block
from kgraph.gram.build import arguments
from kgraph.gram.device import normal, sobol, uniform
from kgraph.gram.field import Field
from kgraph.gram.layout import NeedsFull
from kgraph.gram.places import apply, total_places
from kgraph.maps.quadrature import value_and_slope

if TYPE_CHECKING:
    from kgraph.gram.engine import Engine

MOST_DRAWS = 8192
_MOST_NUMBERS = 1 << 26
_SOBOL_DIMENSIONS = 4096
_BLOCKS = 8


class NeedsAllPairs(Exception):
    """A joint draw needs the covariance of every input with every other."""


class JointDraws:
    """Draws [S, N, *places] of fields and of their NTK directions; one object is one joint draw."""

    def __init__(self, engine: Engine, seed: int) -> None:
        self.engine, self.seed = engine, seed
        self.count = MOST_DRAWS
        self.channels = 1  # of the inputs: as many draws as give every one of them the same weight
        self._fields: weakref.WeakKeyDictionary[Field, tuple[Tensor, Tensor | None]] = weakref.WeakKeyDictionary()
        self._leaves: list[Field] = []
        self._masks: dict[str, Tensor] = {}
        self._directions: dict[object, Tensor] = {}
        self.used: weakref.WeakSet[Field] = weakref.WeakSet()
        self._streams = 0

    def pair(self, u: Field, v: Field) -> Block:
        """Block of two fields, measured."""
        self.used.update((u, v))
        x, y = self.of(u), self.of(v)
        cov = self.engine.layout.moment(self.engine.rows, x[0], y[0])
        if not self.engine.with_ntk:
            return Block(cov)
        if x[1] is None or y[1] is None:
            return Block(cov, torch.full_like(cov, float("nan")))
        return Block(cov, self.engine.layout.moment(self.engine.rows, x[1], y[1]))

    def mean(self, u: Field) -> Tensor:
        """E[u], [N, *places]."""
        return self.of(u)[0].mean(0)

    def standard_error(self, u: Field) -> float:
        """Relative standard error of the mean q value, from blocks of the draws."""
        x = self.of(u)[0]
        blocks = x[: len(x) // _BLOCKS * _BLOCKS].square().reshape(_BLOCKS, -1).mean(1)
        return float(blocks.std() / (_BLOCKS**0.5 * blocks.mean().clamp_min(1e-300)))

    def of(self, u: Field) -> tuple[Tensor, Tensor | None]:
        """Draws of a field and of its NTK directions."""
        if u not in self._fields:
            self._check(u)
            self._fields[u] = self._draw(u)
        return self._fields[u]

    def _check(self, u: Field) -> None:
        if not self.engine.rows.complete:
            raise NeedsAllPairs
        numbers = self.engine.rows.inputs * total_places(u.places)
        if not self._fields:
            while self.count > 512 and self.count * numbers > _MOST_NUMBERS:
                self.count //= 2
            self.count -= self.count % self.channels if self.channels <= self.count else 0
        if self.count * numbers > 8 * _MOST_NUMBERS:
            raise InputError(
                f"joint draws of {numbers} numbers at a time do not fit in memory",
                hint="Pass fewer or smaller inputs",
            )

    def _draw(self, u: Field) -> tuple[Tensor, Tensor | None]:
        if self.engine.layout.name == "diagonal" and _moves(u):
            raise NeedsFull  # positions are drawn one by one
        match u:
            case f.Known():
                return self._known(u)
            case f.Mapped(fn=fn, arg=arg):
                value, direction = self.of(arg)
                out, slope = value_and_slope(fn.fn, value)
                return out, None if direction is None else slope * direction
            case f.Sum(terms=terms):
                drawn = [(w, self.of(t)) for w, t in terms]
                value = torch.stack([w * d[0] for w, d in drawn]).sum(0)
                return value, _total([None if d[1] is None else w * d[1] for w, d in drawn])
            case f.Product(left=left, right=right):
                (x, dx), (y, dy) = self.of(left), self.of(right)
                return x * y, None if dx is None or dy is None else dx * y + x * dy
            case f.Moved(arg=arg, op=op):
                return self._each(arg, lambda x: apply(op, x, 2, arg.places))
            case f.Located(arg=arg, gain=gain, shift=shift):
                value, direction = self.of(arg)
                return value * gain + shift, None if direction is None else direction * gain
            case f.Joined(args=args, axis=axis):
                drawn = [self.of(arg) for arg in args]
                value = torch.cat([d[0] for d in drawn], 2 + axis)
                directions = [d[1] for d in drawn]
                known = [d for d in directions if d is not None]
                return value, torch.cat(known, 2 + axis) if len(known) == len(directions) else None
            case f.Masked(arg=arg):
                factor = self._mask(u)
                return self._each(arg, lambda x: x * factor)
            case f.Drawn(args=args, run=run):
                return self._run(run, args)
            case f.Attended():
                return self._attended(u)
            case f.Scores() if all(leaf.independent(u) for leaf in self._leaves if leaf in self._fields):
                return self._scores(u)
        return self._gaussian(u)

    def _each(self, arg: Field, change: object) -> tuple[Tensor, Tensor | None]:
        value, direction = self.of(arg)
        return change(value), None if direction is None else change(direction)  # type: ignore[operator]

    def generator(self) -> torch.Generator:
        self._streams += 1
        return torch.Generator("cpu").manual_seed(1_000_003 * self.seed + self._streams)

    def _known(self, u: f.Known) -> tuple[Tensor, Tensor | None]:
        """Channels in turn (the same ones of every known tensor), all equally often; evenly spread if too many."""
        inputs, channels = self.engine.rows.inputs, u.data.shape[1]
        turn = torch.arange(self.count)
        chosen = turn % channels if channels <= self.count else turn * channels // self.count
        value = u.data[:, chosen].transpose(0, 1).expand(-1, inputs, *u.places)
        if not self.engine.with_ntk:
            return value, None
        return value, (u.gain**0.5 * self._direction(u)).expand(-1, inputs, *u.places)

    def _direction(self, u: f.Known) -> Tensor:
        """One direction for a parameter, however often it is read."""
        key = u.roots, u.places
        if key not in self._directions:
            self._directions[key] = normal((self.count, 1, *u.places), self.generator())
        return self._directions[key]

    def _mask(self, u: f.Masked) -> Tensor:
        if u.mask.name not in self._masks:
            places = (1,) * len(u.places) if u.whole else u.places
            drawn = uniform((self.count, self.engine.rows.inputs, *places), self.generator())
            self._masks[u.mask.name] = (drawn < u.keep).double() / u.keep
        return self._masks[u.mask.name]

    def _run(self, run: object, args: tuple[Field, ...]) -> tuple[Tensor, Tensor | None]:
        drawn = [self.of(arg) for arg in args]
        values = tuple(d[0].contiguous() for d in drawn)
        directions = [d[1] for d in drawn]
        if not self.engine.with_ntk or any(d is None for d in directions):
            return run(*values), None  # type: ignore[operator]
        tangents = tuple(d.contiguous() for d in directions if d is not None)
        try:
            return torch.func.jvp(run, values, tangents)[:2]  # type: ignore[arg-type]
        except (NotImplementedError, RuntimeError):
            return run(*values), None  # type: ignore[operator]

    def _attended(self, u: f.Attended) -> tuple[Tensor, Tensor | None]:
        from kgraph.gram.attention import attended_draws

        (a, da), (v, dv) = self.of(u.weights), self.of(u.value)
        value = attended_draws(a, v, u.shared)
        if da is None or dv is None:
            return value, None
        return value, attended_draws(da, v, u.shared) + attended_draws(a, dv, u.shared)

    def _scores(self, u: f.Scores) -> tuple[Tensor, Tensor | None]:
        """Logits whose queries and keys are drawn nowhere else: a product of two small factors, no large matrix."""
        from kgraph.gram.attention import scores_draws

        mean = self.engine.mean(u)
        value = scores_draws(self, u, ("cov", "cov")) + mean
        if not self.engine.with_ntk:
            return value, None
        return value, scores_draws(self, u, ("ntk", "cov")) + scores_draws(self, u, ("cov", "ntk"))

    def _gaussian(self, u: Field) -> tuple[Tensor, Tensor | None]:
        """Draw a leaf given those drawn before that it is correlated with."""
        earlier = [leaf for leaf in self._leaves if leaf in self._fields and not leaf.independent(u)]
        value = self._conditional(u, earlier, "cov")
        mean = self.engine.mean(u)
        value = value + mean
        direction = self._conditional(u, earlier, "ntk") if self.engine.with_ntk else None
        self._leaves.append(u)
        return value, direction

    def _conditional(self, u: Field, earlier: list[Field], name: str) -> Tensor:
        own = self.matrix(u, u, name)
        known = Tensor()
        if earlier:
            across = torch.cat([self.matrix(u, leaf, name) for leaf in earlier], 2)
            between = torch.cat([torch.cat([self.matrix(a, b, name) for b in earlier], 2) for a in earlier], 1)
            slope = across @ torch.linalg.pinv(between, hermitian=True, rtol=1e-12)
            known = torch.cat([self._flat(leaf, 0 if name == "cov" else 1) for leaf in earlier], 2) @ slope.mT
            own = own - slope @ across.mT
        z = self._normals(own.shape[0], own.shape[1])
        drawn = z @ root(own).mT
        drawn = drawn + known if earlier else drawn
        return self._unflat(drawn, u)

    def matrix(self, u: Field, v: Field, name: str) -> Tensor:
        uv, vu = self.engine.pair(u, v), self.engine.pair(v, u)
        one, two = getattr(uv, name), getattr(vu, name)
        if name == "cov":
            one, two = one - self.engine.outer_means(u, v).cov, two - self.engine.outer_means(v, u).cov
        return self.engine.layout.matrices(self.engine.rows, one, two, u.places, v.places)

    def _flat(self, u: Field, which: int) -> Tensor:
        """[S, N, *places] -> [batches, S, inputs x positions of one batch], centred."""
        x = self._fields[u][which]
        assert x is not None
        if which == 0:
            x = x - self.engine.mean(u)
        batches, _ = self.engine.layout.draws_shape(u.places)
        flat = x.flatten(2) if u.places else x[..., None]
        return flat.permute(2, 0, 1) if batches > 1 or not u.places else flat.flatten(1)[None]

    def _unflat(self, x: Tensor, u: Field) -> Tensor:
        batches, count = self.engine.layout.draws_shape(u.places)
        inputs = self.engine.rows.inputs
        if batches > 1 or count == 1:
            return x.permute(1, 2, 0).reshape(self.count, inputs, *u.places)
        return x[0].reshape(self.count, inputs, *u.places)

    def _normals(self, batches: int, size: int) -> Tensor:
        """[batches, S, size]: Sobol points where few numbers are drawn, mean and covariance set right."""
        generator = self.generator()
        total = batches * size
        if total <= _SOBOL_DIMENSIONS:
            z = torch.special.ndtri(sobol(self.count, total, generator).clamp(1e-12, 1 - 1e-12))
        else:
            z = normal((self.count, total), generator)
        z = z.reshape(self.count, batches, size).transpose(0, 1)
        z = z - z.mean(1, keepdim=True)
        if size > self.count // 8:
            return z
        chol = torch.linalg.cholesky(z.mT @ z / self.count)
        return torch.linalg.solve_triangular(chol, z.mT, upper=False).mT


def _moves(u: Field) -> bool:
    """Whether the field at one position is made of others at several, or elsewhere."""
    return isinstance(u, (f.Moved, f.Joined, f.Attended, f.Scores, f.Drawn)) and any(arg.places for arg in arguments(u))


def _total(terms: list[Tensor | None]) -> Tensor | None:
    known = [term for term in terms if term is not None]
    return torch.stack(known).sum(0) if len(known) == len(terms) else None


def root(matrix: Tensor) -> Tensor:
    """R with R R^T = matrix, which may be singular."""
    values, vectors = torch.linalg.eigh((matrix + matrix.mT) / 2)
    return vectors * values.clamp_min(0).sqrt()[..., None, :]
