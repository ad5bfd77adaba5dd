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
from kgraph.gram.block import Block
from kgraph.gram.device import normal
from kgraph.gram.engine import Engine
from kgraph.gram.joint import JointDraws, root
from kgraph.gram.laws import Draws
from kgraph.gram.layout import NeedsFull
from kgraph.gram.places import total_places


def _four(engine: Engine, x: Tensor, u: f.Field, v: f.Field, shared: int) -> Tensor:
    """A block [R, *s, i, *s', j] as [R, S, i, S', j]."""
    if engine.layout.name != "full":
        raise NeedsFull
    count = total_places(u.places[:shared])
    whole = x.expand(len(engine.rows.first), *u.places, *v.places) if x.ndim == 0 or len(x) == 1 else x
    return whole.reshape(-1, count, u.places[shared], count, v.places[shared])


def _crossed(left: Tensor, right: Tensor) -> Tensor:
    """[R, S, i, S', j] and [R, S, k, S', l] -> [R, S, i, k, S', j, l]."""
    return torch.einsum("rsiuj,rskul->rsikujl", left, right)


@laws.pair.alike(f.Scores)
def scores_block(engine: Engine, u: f.Scores, v: f.Scores) -> Block:
    """Block of two logit fields (their own: queries and keys of the same heads)."""
    shared = u.shared
    qq, kk = engine.pair(u.query, v.query), engine.pair(u.key, v.key)
    qk, kq = engine.pair(u.query, v.key), engine.pair(u.key, v.query)
    shape = (-1, *u.places, *v.places)
    factor = u.scale * v.scale * u.width

    def term(left: Tensor, right: Tensor, crossed: bool) -> Tensor:
        if crossed:
            a = _four(engine, left, u.query, v.key, shared)
            b = _four(engine, right, u.key, v.query, shared)
            return torch.einsum("rsiul,rskuj->rsikujl", a, b).reshape(shape)
        a = _four(engine, left, u.query, v.query, shared)
        b = _four(engine, right, u.key, v.key, shared)
        return _crossed(a, b).reshape(shape)

    tied = not (qk.zero or kq.zero)
    cov = factor * term(qq.cov, kk.cov, False)
    if tied:
        cov = cov + factor * term(qk.cov, kq.cov, True)
        x, y = engine.mean(u), engine.mean(v)
        cov = cov + engine.layout.outer(engine.rows, x, y, u.places, v.places)
    if qq.ntk is None or kk.ntk is None:
        return Block(cov)
    ntk = term(qq.ntk, kk.cov, False) + term(qq.cov, kk.ntk, False)
    if tied and qk.ntk is not None and kq.ntk is not None:
        ntk = ntk + term(qk.ntk, kq.cov, True) + term(qk.cov, kq.ntk, True)
    return Block(cov, factor * ntk)


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
    mean = draws.engine.mean(u)
    value = _scores(draws, u, ("cov", "cov")) + mean
    if not draws.engine.with_ntk:
        return value, None
    return value, _scores(draws, u, ("ntk", "cov")) + _scores(draws, u, ("cov", "ntk"))


def _scores(draws: JointDraws, u: f.Scores, names: tuple[str, str]) -> Tensor:
    """``s sqrt(d) Q Z K^T`` with Q Q^T and K K^T the kernels of queries and keys, [S, N, *places]."""
    inputs, shared = draws.engine.rows.inputs, total_places(u.places[: u.shared])
    q, k = (root(draws.matrix(t, t, name)[0]) for t, name in zip((u.query, u.key), names, strict=True))
    z = normal((draws.count, q.shape[1], k.shape[1]), draws.generator())
    ti, tk = u.places[u.shared], u.places[u.shared + 1]
    q, k = q.reshape(inputs * shared, ti, -1), k.reshape(inputs * shared, tk, -1)
    value = torch.stack([a @ z @ b.mT for a, b in zip(q, k, strict=True)], 1)
    return u.scale * u.width**0.5 * value.reshape(draws.count, inputs, *u.places)


@laws.draw(f.Attended)
def attended_draws(draws: JointDraws, u: f.Attended) -> Draws:
    """``sum_k A_ik v_k`` draw by draw."""
    draws.spread(u)
    (a, da), (v, dv) = draws.of(u.weights), draws.of(u.value)
    value = _averages(a, v)
    return value, None if da is None or dv is None else _averages(da, v) + _averages(a, dv)


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
    (a, da), (b, db) = draws.of(u.weights), draws.of(v.weights)

    def moment(x: Tensor, y: Tensor, middle: Tensor) -> Tensor:
        four = _four(engine, middle, u.value, v.value, u.shared)
        total = []
        for row, (one, two) in enumerate(zip(rows.first.tolist(), rows.second.tolist(), strict=True)):
            left = x[:, one].reshape(1, len(x), -1, *u.weights.places[-2:])
            right = y[:, two].reshape(1, len(y), -1, *v.weights.places[-2:])
            total.append(_contract(left, four[row : row + 1], right, len(x)))
        return torch.cat(total).reshape(-1, *u.places, *v.places)

    cov = moment(a, b, values.cov)
    if values.ntk is None:
        return Block(cov)
    if da is None or db is None:
        return Block(cov, torch.full_like(cov, float("nan")))
    return Block(cov, moment(a, b, values.ntk) + moment(da, db, values.cov))


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

    cov = contract(weights.cov, values.cov)
    if weights.ntk is None or values.ntk is None:
        return Block(cov)
    return Block(cov, contract(weights.ntk, values.cov) + contract(weights.cov, values.ntk))


@laws.mean(f.Attended)
def attended_mean(engine: Engine, u: f.Attended) -> Tensor:
    """``sum_k E[A_ik] E[v_k]``."""
    if not engine.mean(u.value).any():
        return torch.zeros((), dtype=torch.float64)
    return _averages(engine.mean(u.weights), engine.means(u.value))
