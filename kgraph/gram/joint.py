"""Joint draws of fields, for whatever has no closed form: maxima, batch statistics, gates of several Gaussians.

Every Gaussian leaf is drawn over all inputs and positions at once from its exact covariance, given the leaves drawn
before that it is correlated with; an expression is then evaluated draw by draw. A tangent needs one more set
of numbers: directions t with it as their covariance, pushed through the expression's derivative, E[(J t)_a (J t)_b].
"""

from __future__ import annotations

import weakref
from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor

from kgraph.errors import InputError, RuleError
from kgraph.gram import laws
from kgraph.gram.block import Block, Draws
from kgraph.gram.build import arguments
from kgraph.gram.calculus import Calculus
from kgraph.gram.device import normal, sobol
from kgraph.gram.field import Field
from kgraph.gram.layout import NeedsFull
from kgraph.gram.places import total_places

MOST_DRAWS = 8192
_MOST_NUMBERS = 1 << 26
_SOBOL_DIMENSIONS = 4096
_BLOCKS = 8


class NeedsAllPairs(Exception):
    """A joint draw needs the covariance of every input with every other."""


class JointDraws:
    """Draws [S, N, *places] of fields and of their directions; one object is one joint draw."""

    def __init__(self, engine: Calculus, seed: int) -> None:
        self.engine, self.seed = engine, seed
        self.count = MOST_DRAWS
        self.channels = 1  # of the inputs: as many draws as give every one of them the same weight
        self._fields: weakref.WeakKeyDictionary[Field, Draws] = weakref.WeakKeyDictionary()
        self._leaves: list[Field] = []
        self._drawn_once: dict[object, Tensor] = {}
        self.used: weakref.WeakSet[Field] = weakref.WeakSet()
        self._streams = 0

    def pair(self, u: Field, v: Field) -> Block:
        """Block of two fields, measured."""
        self.used.update((u, v))
        x, y = self.together(u, v)
        moment = partial(self.engine.layout.moment, self.engine.rows)
        tangents = {name: moment(t, y.tangents[name]) for name, t in x.tangents.items() if name in y.tangents}
        return Block(moment(x.value, y.value), tangents)

    def mean(self, u: Field) -> Tensor:
        """E[u], [N, *places]."""
        return self.of(u).value.mean(0)

    def standard_error(self, u: Field) -> float:
        """Relative standard error of the mean q value, from blocks of the draws."""
        x = self.of(u).value
        blocks = x[: len(x) // _BLOCKS * _BLOCKS].square().reshape(_BLOCKS, -1).mean(1)
        return float(blocks.std() / (_BLOCKS**0.5 * blocks.mean().clamp_min(1e-300)))

    def of(self, u: Field) -> Draws:
        """Draws of a field and of its directions."""
        if u not in self._fields:
            self._check(u)
            law = laws.draw.get(u)
            found = None if law is None else law(self, u)
            self._fields[u] = self._gaussian(u) if found is None else found
        return self._fields[u]

    def together(self, *fields: Field) -> list[Draws]:
        """Draws of several fields that are combined draw by draw.

        Raises:
            RuleError: one of them is an operation's over some channels, and has one draw for every few of the others'.
        """
        drawn = [self.of(u) for u in fields]
        if len({len(one.value) for one in drawn}) > 1:
            raise RuleError(
                "a result over groups of channels (a sum, a maximum, a norm) meets the channels that it was made of, "
                "which joint draws cannot follow",
                hint="Use kgraph.analyze; softmax and norms of torch.nn.functional have rules of their own",
            )
        return drawn

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

    def spread(self, u: Field) -> None:
        """Raise NeedsFull where positions are drawn one by one, for a field that is made of others at several."""
        if self.engine.layout.name == "diagonal" and any(arg.places for arg in arguments(u)):
            raise NeedsFull

    def once(self, key: object, drawn: Callable[[], Tensor]) -> Tensor:
        """Random numbers that several fields share, drawn for the first of them."""
        if key not in self._drawn_once:
            self._drawn_once[key] = drawn()
        return self._drawn_once[key]

    def normal(self, *shape: int) -> Tensor:
        """New Gaussian numbers for every draw, [S, *shape]."""
        return normal((self.count, *shape), self.generator())

    def generator(self) -> torch.Generator:
        self._streams += 1
        return torch.Generator("cpu").manual_seed(1_000_003 * self.seed + self._streams)

    def earlier(self, u: Field) -> list[Field]:
        """Gaussian leaves drawn before that the field may be correlated with."""
        return [leaf for leaf in self._leaves if leaf in self._fields and not leaf.independent(u)]

    def _gaussian(self, u: Field) -> Draws:
        """Draw a leaf given those drawn before that it is correlated with."""
        earlier = self.earlier(u)
        own = self.matrix(u, u, None)
        value = self._conditional(u, earlier, None, own, self._normals(*own.shape[:2])) + self.engine.mean(u)
        z = self._normals(*own.shape[:2]) if self.engine.seeds else Tensor()  # one for all: they never meet
        names = self.engine.pair(u, u).tangents
        tangents = {name: self._conditional(u, earlier, name, self.matrix(u, u, name), z) for name in names}
        self._leaves.append(u)
        return Draws(value, tangents)

    def _conditional(self, u: Field, earlier: list[Field], name: str | None, own: Tensor, z: Tensor) -> Tensor:
        """Numbers of covariance ``own`` from independent ones z, given what was drawn before."""
        if not earlier:
            return self._unflat(z @ root(own).mT, u)
        across = torch.cat([self.matrix(u, leaf, name) for leaf in earlier], 2)
        between = torch.cat([torch.cat([self.matrix(a, b, name) for b in earlier], 2) for a in earlier], 1)
        slope = across @ torch.linalg.pinv(between, hermitian=True, rtol=1e-12)
        known = torch.cat([self._flat(leaf, name) for leaf in earlier], 2) @ slope.mT
        return self._unflat(z @ root(own - slope @ across.mT).mT + known, u)

    def matrix(self, u: Field, v: Field, name: str | None) -> Tensor:
        """Covariance (None), or a tangent, of all of u with all of v."""
        uv, vu = self.engine.pair(u, v), self.engine.pair(v, u)
        if name is None:
            one, two = uv.cov - self.engine.outer_means(u, v).cov, vu.cov - self.engine.outer_means(v, u).cov
        else:
            one, two = uv.tangent(name), vu.tangent(name)
        return self.engine.layout.matrices(self.engine.rows, one, two, u.places, v.places)

    def _flat(self, u: Field, name: str | None) -> Tensor:
        """[S, N, *places] -> [batches, S, inputs x positions of one batch], centred."""
        drawn = self._fields[u]
        x = drawn.value - self.engine.mean(u) if name is None else drawn.along(name)
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


def root(matrix: Tensor) -> Tensor:
    """R with R R^T = matrix, which may be singular."""
    values, vectors = torch.linalg.eigh((matrix + matrix.mT) / 2)
    return vectors * values.clamp_min(0).sqrt()[..., None, :]
