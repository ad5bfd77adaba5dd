"""Attention between fields: logits, and averages with random weights.

    pair(<q_i, k_k>, <q_j, k_l>) = s^2 d (K_q(i, j) K_k(k, l) + K_qk(i, l) K_kq(k, j))     d channels a head
    pair(sum_k A_ik v_k, sum_l A_jl v_l) = sum_kl E[A_ik A_jl] K_v(k, l)

Logits scaled by 1/sqrt(d) stay random; scaled by 1/d they are their mean s d K_qk(i, k). Source: Hron et al. 2020,
arXiv 2006.10540.
"""

from __future__ import annotations

import torch
from torch import Tensor

from kgraph.gram import field as f
from kgraph.gram import laws
from kgraph.gram.block import Block, Draws, added, names_of
from kgraph.gram.engine import Engine
from kgraph.gram.joint import JointDraws, root
from kgraph.gram.layout import NeedsFull
from kgraph.gram.places import total_places


def _four(engine: Engine, x: Tensor, u: f.Field, v: f.Field, shared: int) -> Tensor:
    """A block [R, *s, i, *s', j] as [R, S, i, S', j]."""
    if engine.layout.name != "full":
        raise NeedsFull
    count = total_places(u.places[:shared])
    whole = x.expand(len(engine.rows.first), *u.places, *v.places) if x.ndim == 0 or len(x) == 1 else x
    return whole.reshape(-1, count, u.places[shared], count, v.places[shared])


@laws.pair.alike(f.Scores)
def scores_block(engine: Engine, u: f.Scores, v: f.Scores) -> Block:
    """Block of two logit fields (their own: queries and keys of the same heads)."""
    shared = u.shared
    qq, kk = engine.pair(u.query, v.query), engine.pair(u.key, v.key)
    qk, kq = engine.pair(u.query, v.key), engine.pair(u.key, v.query)
    shape = (-1, *u.places, *v.places)
    factor = u.scale * v.scale * u.width

    def straight(left: Tensor, right: Tensor) -> Tensor:
        a, b = _four(engine, left, u.query, v.query, shared), _four(engine, right, u.key, v.key, shared)
        return torch.einsum("rsiuj,rskul->rsikujl", a, b).reshape(shape)

    def crossed(left: Tensor, right: Tensor) -> Tensor:
        a, b = _four(engine, left, u.query, v.key, shared), _four(engine, right, u.key, v.query, shared)
        return torch.einsum("rsiul,rskuj->rsikujl", a, b).reshape(shape)

    block = qq.product(kk, straight)
    if not (qk.zero or kq.zero):
        block = block + qk.product(kq, crossed)
    return block.times(factor) + engine.outer_means(u, v)


@laws.mean(f.Scores)
def scores_mean(engine: Engine, u: f.Scores) -> Tensor:
    """``s d K_qk(i, k)`` within one input, [N, *places] (0 where queries and keys share nothing)."""
    block = engine.pair(u.query, u.key)
    if block.zero:
        return torch.zeros((), dtype=torch.float64)
    four = _four(engine, block.cov, u.query, u.key, u.shared)[engine.rows.own]
    return u.scale * u.width * four.diagonal(dim1=1, dim2=3).movedim(-1, 1).reshape(-1, *u.places)


@laws.draw(f.Scores)
def scores_draws(draws: JointDraws, u: f.Scores) -> Draws | None:
    """Logits whose queries and keys are drawn nowhere else: a product of two small factors, no large matrix."""
    draws.spread(u)
    if draws.earlier(u):
        return None
    mean, (q, k) = draws.engine.mean(u), _roots(draws, u, None)
    z, *dz = (draws.normal(q.shape[1], k.shape[1]) for _ in range(3 if draws.engine.seeds else 1))
    tangents: dict[str, Tensor] = {}
    for name in names_of(draws.engine.pair(t, t) for t in (u.query, u.key)):
        dq, dk = _roots(draws, u, name)
        tangents[name] = _scores(draws, u, dq, dz[0], k) + _scores(draws, u, q, dz[1], dk)
    return Draws(_scores(draws, u, q, z, k) + mean, tangents)


def _roots(draws: JointDraws, u: f.Scores, name: str | None) -> tuple[Tensor, Tensor]:
    """Q and K with Q Q^T and K K^T the covariances (None) or a tangent of queries and of keys."""
    return root(draws.matrix(u.query, u.query, name)[0]), root(draws.matrix(u.key, u.key, name)[0])


def _scores(draws: JointDraws, u: f.Scores, q: Tensor, z: Tensor, k: Tensor) -> Tensor:
    """``s sqrt(d) Q Z K^T``, [S, N, *places]."""
    inputs, shared = draws.engine.rows.inputs, total_places(u.places[: u.shared])
    ti, tk = u.places[u.shared], u.places[u.shared + 1]
    q, k = q.reshape(inputs * shared, ti, -1), k.reshape(inputs * shared, tk, -1)
    value = torch.stack([a @ z @ b.mT for a, b in zip(q, k, strict=True)], 1)
    return u.scale * u.width**0.5 * value.reshape(draws.count, inputs, *u.places)


@laws.draw(f.Attended)
def attended_draws(draws: JointDraws, u: f.Attended) -> Draws:
    """``sum_k A_ik v_k`` draw by draw."""
    draws.spread(u)
    weights, value = draws.together(u.weights, u.value)
    return weights.product(value, _averages)


def _averages(weights: Tensor, value: Tensor) -> Tensor:
    """[..., i, k] and [..., k] -> [..., i]."""
    return (weights @ value[..., None])[..., 0]


@laws.pair.alike(f.Attended)
def attended_block(engine: Engine, u: f.Attended, v: f.Attended) -> Block:
    """Block of two averages with random weights that share no random number with what they average."""
    values = engine.pair(u.value, v.value)
    known = isinstance(u.weights, f.Known) and isinstance(v.weights, f.Known)
    weighted = _known_weights if known else _drawn_weights if _drawn(u.weights) else _block_weights
    return weighted(engine, u, v, values)


def _drawn(weights: f.Field) -> bool:
    """Whether weights are known by draws alone; masks are drawn with what they mask."""
    return isinstance(weights, (f.Drawn, f.Masked))


def _contract(left: Tensor, middle: Tensor, right: Tensor, count: int) -> Tensor:
    """Mean over draws of A K A'^T per row: [R, n, S, i, k], [R, S, k, S', l], [R, n, S', j, l]."""
    half = torch.einsum("rnsik,rskul->rnsiul", left, middle)
    return torch.einsum("rnsiul,rnujl->rsiuj", half, right) / count


def _known_weights(engine: Engine, u: f.Attended, v: f.Attended, values: Block) -> Block:
    assert isinstance(u.weights, f.Known) and isinstance(v.weights, f.Known)
    rows = engine.rows

    def side(weights: f.Known, which: Tensor) -> Tensor:
        data = weights.data[:, 0].expand(rows.inputs, *weights.places)
        places = weights.places
        return data.reshape(rows.inputs, 1, -1, places[-2], places[-1])[which]

    left, right = side(u.weights, rows.first), side(v.weights, rows.second)
    shape = (-1, *u.places, *v.places)
    return values.each(lambda x: _contract(left, _four(engine, x, u.value, v.value, u.shared), right, 1).reshape(shape))


def _drawn_weights(engine: Engine, u: f.Attended, v: f.Attended, values: Block) -> Block:
    rows, draws = engine.rows, engine.draws
    draws.used.update((u, v))
    left, right = draws.of(u.weights), draws.of(v.weights)

    def moment(x: Tensor, y: Tensor, middle: Tensor) -> Tensor:
        four = _four(engine, middle, u.value, v.value, u.shared)
        total = []
        for row, (one, two) in enumerate(zip(rows.first.tolist(), rows.second.tolist(), strict=True)):
            a = x[:, one].reshape(1, len(x), -1, *u.weights.places[-2:])
            b = y[:, two].reshape(1, len(y), -1, *v.weights.places[-2:])
            total.append(_contract(a, four[row : row + 1], b, len(x)))
        return torch.cat(total).reshape(-1, *u.places, *v.places)

    tangents = {name: moment(left.value, right.value, t) for name, t in values.tangents.items()}
    both = {
        name: moment(t, right.tangents[name], values.cov) for name, t in left.tangents.items() if name in right.tangents
    }
    return Block(moment(left.value, right.value, values.cov), added(tangents, both))


def _block_weights(engine: Engine, u: f.Attended, v: f.Attended, values: Block) -> Block:
    """Weights whose block is in closed form (logits used as they are)."""
    weights = engine.pair(u.weights, v.weights)
    count = total_places(u.places[: u.shared])
    i, k = u.weights.places[-2:]
    j, m = v.weights.places[-2:]

    def contract(x: Tensor, y: Tensor) -> Tensor:
        six = x.reshape(-1, count, i, k, count, j, m)
        four = _four(engine, y, u.value, v.value, u.shared)
        return torch.einsum("rsikujl,rskul->rsiuj", six, four).reshape(-1, *u.places, *v.places)

    return weights.product(values, contract)


@laws.mean(f.Attended)
def attended_mean(engine: Engine, u: f.Attended) -> Tensor:
    """``sum_k E[A_ik] E[v_k]``."""
    if not engine.mean(u.value).any():
        return torch.zeros((), dtype=torch.float64)
    return _averages(engine.mean(u.weights), engine.means(u.value))
