"""Arithmetic of parts: scale, function, sum and product. Exact, or integrated, or said to be neither.

Two parts that share no random parameter are independent: covariances add, products multiply. Two parts that are
functions of one and the same part are integrated as one function (x * sigmoid(x), x + relu(x), u + u). Functions
of several Gaussians are integrated by joint draws. Independence is never assumed silently.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import replace
from itertools import islice

import torch
from torch import Tensor

from kgraph import laws
from kgraph.biases import bias_of
from kgraph.draws import CONSTANTS_APART, evaluate, leaves_of, uneven, unknown_law
from kgraph.errors import InputError
from kgraph.how import EXACT, QUADRATURE, How, assumed
from kgraph.jumps import steep
from kgraph.kernel import DIFF, SAME, Apply, Bias, Gaussian, Mask, Pairs, Part, Product, Samples, Sum, Unknown
from kgraph.maps import Pointwise, closed_form
from kgraph.maps.tangent import by_factor
from kgraph.roots import Root, Roots
from kgraph.scatter import Scatter, both

IDENTITY = Pointwise(lambda u: u, closed_form("identity"))


def scale(part: Part, factor: float) -> Part:
    """``factor * v``: second moments times factor squared; exact."""
    if factor == 1.0:
        return part
    square = factor * factor
    scaled = replace(
        part,
        cov=part.cov * square,
        slope=part.slope * square,
        ntk=part.ntk * square,
        mean=part.mean * factor,
        scatter=part.scatter and part.scatter.scaled(square),
    )
    if isinstance(part.expr, Apply):
        return replace(scaled, expr=Apply(_rescaled(part.expr.fn, factor), part.expr.arg))
    return replace(scaled, expr=Sum(((factor, part),)))


_OF_ITSELF = assumed("the tangent of a gain or slope taken as independent of what it stands on")


def trained(part: Part, own: Tensor, *, of_itself: bool) -> Part:
    """``part`` behind parameters of its own, whose part in the NTK is ``own``, [P, 2].

    The tangent is a term of the expression, a Gaussian without variance: sums and functions of the part carry it on.

    Args:
        of_itself: whether the tangent is a function of the part (of a gain it is what the gain multiplies), so that
            functions of the part need more than ``own``.
    """
    if not bool(own.any()):
        return part
    ntk = part.ntk + own
    if isinstance(part.expr, Gaussian):
        return replace(part, ntk=ntk)
    nothing = torch.zeros_like(part.cov)
    tangent = Part(part.size, nothing, nothing, own, how=_OF_ITSELF if of_itself else EXACT)
    return replace(part, ntk=ntk, expr=Sum(((1.0, part), (1.0, tangent))))


def _with_tangents(result: Part, *read: Part) -> Part:
    """A function of parts: "assumed" where tangents in them depend on the parts."""
    terms = [term for part in read if isinstance(part.expr, Sum) for _, term in laws.terms_of(part)]
    depends = any(term.how == _OF_ITSELF and not term.cov.any() for term in terms)
    return replace(result, how=result.how | _OF_ITSELF) if depends else result


def _unscaled(part: Part) -> tuple[float, Part]:
    """The part that this one is a multiple of, and the factor."""
    factor = 1.0
    while isinstance(part.expr, Sum) and len(part.expr.terms) == 1:
        ((weight, part),) = part.expr.terms
        factor *= weight
    return factor, part


def _core(part: Part) -> tuple[float, Part, tuple[tuple[float, Part], ...]]:
    """A part that only `trained` made a sum: weight and term that it was, and the terms that are tangents alone."""
    outer, part = _unscaled(part)
    terms = part.expr.terms if isinstance(part.expr, Sum) else ()
    heard = tuple(islice(((w, t) for w, t in terms if not _silent(t)), 2))  # a residual stream has a thousand terms
    if len(heard) != 1 or len(terms) == 1:
        return outer, part, ()
    ((weight, term),) = heard
    return outer * weight, term, tuple((outer * w, t) for w, t in terms if t is not term)


def _silent(term: Part) -> bool:
    """Whether a term is a tangent alone."""
    return isinstance(term.expr, Gaussian) and not bool(term.cov.any())


def shift(part: Part, constant: float) -> Part:
    """``v + constant``: K' = K + 2 m constant + constant^2; exact."""
    if constant == 0.0:
        return part
    moved = replace(part, cov=part.cov + 2 * part.mean * constant + constant**2, mean=part.mean + constant)
    fn, base = as_function(part)
    return replace(moved, expr=Apply(_plus(fn, constant), base))


def apply(fn: Pointwise, part: Part) -> Part:
    """``fn(v)`` entry by entry: K' = E[fn fn], slope' = E[fn' fn'] slope (Price's theorem).

    Closed form or quadrature when ``v`` is Gaussian or a function of one Gaussian part, else joint draws.
    """
    inner, base = as_function(part)
    composed = fn if inner is IDENTITY else _compose(fn, inner)
    target = replace(part, expr=Apply(composed, base))
    if not (base.gaussian or base.factor is not None):  # a factor is remembered of affine images of Gaussians
        reason = _taken_as_gaussian(base)
        if not reason:
            return _with_tangents(_of_law(target, part.how), base)
        part = replace(part, how=part.how | assumed(reason))
    try:
        if part.factor is not None:  # an affine image of its base, with an NTK of its own
            return replace(_apply_gaussian(fn, part, part), expr=Apply(composed, base))
        return _with_tangents(_apply_gaussian(composed, base, part), base)
    except InputError:  # sqrt|u|: the function has a second moment, its derivative has none
        drawn = _of_law(target, part.how)
        slope, ntk = (torch.where(tangent == 0, 0.0, torch.nan) for tangent in (base.slope, base.ntk))  # noise has none
        return replace(drawn, slope=slope, ntk=ntk)


def _taken_as_gaussian(part: Part) -> str:
    """Why a sum of Gaussian parts and of parts of unknown law counts as Gaussian; "" where it is no such sum."""
    leaves = [part] if not isinstance(part.expr, Sum) else [term for _, term in part.expr.terms]
    reasons = [leaf.expr.reason for leaf in leaves if isinstance(leaf.expr, Unknown)]
    return reasons[0] if reasons and len(reasons) + sum(leaf.gaussian for leaf in leaves) == len(leaves) else ""


def _apply_gaussian(fn: Pointwise, base: Part, part: Part) -> Part:
    bias = bias_of(base)
    if bias is not None:
        return _apply_biased(fn, base, part, bias)
    centred = fn if base.mean == 0 else fn.affine(input_shift=base.mean)
    variance = (base.q - base.mean**2).clamp_min(0)
    value, slope = centred.dual(variance, variance, base.cov - base.mean**2)
    own = EXACT if centred.how == "exact" else QUADRATURE
    result = Part(
        size=part.size,
        cov=value,
        slope=slope * base.slope,
        ntk=slope * base.ntk + _of_factor(centred, base, (value, slope)),
        mean=float(centred.mean(variance)),
        roots=part.roots,
        expr=Apply(fn, base),
        how=part.how | own,
    )
    result = _scattered(result, centred, base, variance) if base.scatter is not None else result
    return infinite(result) if steep(result) else result


def _scattered(result: Part, centred: Pointwise, base: Part, variance: Tensor) -> Part:
    """The kernel of pairs of positions over their cosines; of unrelated inputs at one position as well."""
    scatter = base.scatter
    if scatter is None or not scatter.shows(float(variance)):
        return replace(result, scatter=None)
    if scatter.given:
        return replace(result, scatter=scatter.of_function(float(variance), float(result.q), result.mean))
    cov, slope, ntk = result.cov.clone(), result.slope.clone(), result.ntk.clone()
    value, gain = centred.dual(variance, variance, base.cov[:, DIFF, None] - base.mean**2 + scatter.cov)
    tangent = gain * (base.ntk[:, DIFF, None] + scatter.ntk)
    for field, nodes in ((cov, value), (slope, gain * base.slope[:, DIFF, None]), (ntk, tangent)):
        field[:, DIFF] = nodes @ scatter.weights
        field[Pairs.BACKGROUND, SAME] = field[Pairs.BACKGROUND, DIFF]
    left, moved = (nodes[Pairs.SELF] - field[Pairs.SELF, DIFF] for nodes, field in ((value, cov), (tangent, ntk)))
    return replace(result, cov=cov, slope=slope, ntk=ntk, scatter=Scatter(left, moved, scatter.weights))


def _apply_biased(fn: Pointwise, base: Part, part: Part, bias: Bias) -> Part:
    """A Gaussian about every value of the bias, which is one and the same for all inputs and positions."""
    rest = base.cov - base.mean**2 - bias.variance
    variance = rest[Pairs.SELF, SAME].clamp_min(0)
    value, slope, mean = torch.zeros_like(rest), torch.zeros_like(rest), 0.0
    for node, weight in zip(bias.nodes.tolist(), bias.weights.tolist(), strict=True):
        moved = fn.affine(input_shift=base.mean + node)
        own, own_slope = moved.dual(variance, variance, rest)
        value, slope = value + weight * own, slope + weight * own_slope
        mean += weight * float(moved.mean(variance))
    result = replace(
        part,
        cov=value,
        slope=slope * base.slope,
        ntk=slope * base.ntk,
        mean=mean,
        expr=Apply(fn, base),
        how=part.how | QUADRATURE,
    )
    return infinite(result) if steep(result) else result


def _of_factor(centred: Pointwise, base: Part, dual: tuple[Tensor, Tensor]) -> Tensor | float:
    """What a trained factor in front has more in the NTK than a tangent that is independent of the field."""
    if base.factor is None:
        return 0.0
    variance = (base.q - base.mean**2).clamp_min(0)
    around, (value, slope), b = base.cov - base.mean**2, dual, base.mean - base.factor.shift
    psi = by_factor(centred, b)
    own = value if psi is centred else psi.dual(variance, variance, around)[0]
    return base.factor.gain * (own - slope * (around + b * b))


def _of_terms(part: Part) -> Part | None:
    """A sum's kernel where its terms, those of one part taken together, are independent: covariances add."""
    terms = laws.terms_of(part)
    if any(not a.independent(b) for i, (_, a) in enumerate(terms) for _, b in terms[:i]):
        return None
    mean = sum(w * t.mean for w, t in terms)
    cov = sum((w * w * (t.cov - t.mean**2) for w, t in terms), torch.full_like(part.cov, mean**2))
    fields = {
        name: sum((w * w * getattr(t, name) for w, t in terms), torch.zeros_like(cov)) for name in ("slope", "ntk")
    }
    return replace(part, cov=cov, mean=mean, **fields)


def _of_law(part: Part, how: How) -> Part:
    """Fill in the kernel of ``part`` by the law of its expression, or by draws of it."""
    known = _of_terms(part) if isinstance(part.expr, Sum) else None
    if known is not None:
        return known
    law = laws.of_expression(part)
    known = law and laws.read(law)
    reason = unknown_law(part)
    how = how | assumed(reason) if reason else how
    result = (
        _from_draws(part, how)
        if known is None
        else replace(part, **known.tensors, mean=known.mean, how=how | known.how)
    )
    result = infinite(result) if steep(part) else result
    if isinstance(part.expr, Apply):
        laws.remember(result, law)  # what reads the result asks for it again
    return result


def _from_draws(part: Part, how: How) -> Part:
    """Fill in the kernel of ``part`` by draws of its expression."""
    values = evaluate(part)
    reason = unknown_law(part)
    how = how | assumed(reason) if reason else how
    cov, mean = (values.first * values.second).mean(-1), float(values.first.mean())
    # exchangeable positions of one input share a common component and nothing else: K_diff >= mean^2
    cov[Pairs.SELF, DIFF] = cov[Pairs.SELF, DIFF].clamp_min(mean**2)
    return replace(
        part,
        cov=cov,
        slope=values.slope.expand(*part.cov.shape, -1).mean(-1),
        ntk=values.ntk.expand(*part.cov.shape, -1).mean(-1),
        mean=mean,
        how=how.drawn(values.standard_error()),
    )


def infinite(part: Part) -> Part:
    """The part behind a jump: c falls like the root of 1 - c_input there, so that its slope at 1 is infinite."""
    slope = part.slope.clone()
    slope[[Pairs.UNIT, Pairs.SELF], SAME] = math.inf
    return replace(part, slope=slope)


def endless(part: Part) -> bool:
    """Whether the part's slope at c = 1 is infinite."""
    return bool(torch.isinf(part.slope[Pairs.UNIT, SAME]))


def add(left: Part, right: Part, left_weight: float = 1.0, right_weight: float = 1.0) -> Part:
    """``left_weight * left + right_weight * right``."""
    if left is right:
        return scale(left, left_weight + right_weight)
    common = _common_function(left, right, lambda u, v: left_weight * u + right_weight * v)
    common = common or _common_core(left, right, left_weight, right_weight)
    if common is not None:
        return _no_surer(common, left, right)
    left, right = scale(left, left_weight), scale(right, right_weight)
    cross = 2 * left.mean * right.mean
    total = Part(
        size=max(left.size, right.size),
        cov=left.cov + right.cov + cross,
        slope=left.slope + right.slope,
        ntk=left.ntk + right.ntk,
        mean=left.mean + right.mean,
        roots=left.roots | right.roots,
        expr=Sum(_terms(left) + _terms(right)),
        how=left.how | right.how,
        scatter=both(left.scatter, right.scatter),
    )
    if bool(cross) and left.independent(right) and uneven(left) and uneven(right):
        return replace(total, how=total.how | assumed(CONSTANTS_APART))  # E[g] E[h] stands for E[g h]
    return _settle(total, left, right)


def multiply(left: Part, right: Part) -> Part:
    """``left * right`` entry by entry: K' = K_left K_right when independent."""
    common = _common_function(left, right, lambda u, v: u * v) or _product_of_cores(left, right)
    if common is not None:
        return _no_surer(common, left, right)
    product = Part(
        size=max(left.size, right.size),
        cov=left.cov * right.cov,
        slope=left.slope * right.cov + left.cov * right.slope,
        ntk=left.ntk * right.cov + left.cov * right.ntk,
        mean=left.mean * right.mean,
        roots=left.roots | right.roots,
        expr=Product(left, right),
        how=left.how | right.how,
    )
    if left.independent(right) and uneven(left) and uneven(right):
        return replace(product, how=product.how | assumed(CONSTANTS_APART))
    if _reads(left, right) or _reads(right, left):
        return replace(product, how=product.how | assumed("sums of few channels taken as independent of the channels"))
    return _settle(product, left, right)


def _reads(one: Part, other: Part) -> bool:
    """Whether entries of a part are made of few of another's."""
    leaves = (leaf.expr for leaf in leaves_of(one))
    return any(isinstance(expr, Unknown) and not expr.reads.disjoint(other.roots) for expr in leaves)


def _settle(result: Part, left: Part, right: Part) -> Part:
    """Keep the independent formula, or measure the joint law, or say that independence is assumed."""
    if left.independent(right):
        return result
    if not entangled(left, right):
        found = _of_law(result, result.how)
        return _with_tangents(found, left, right) if isinstance(result.expr, Product) else found
    return replace(result, how=result.how | assumed("terms that share random weights are taken as independent"))


def entangled(left: Part, right: Part) -> bool:
    """Whether the two share random weights in a way their expressions do not show.

    They do not when every Gaussian part of ``left`` that shares a root with one of ``right`` *is* that part.
    """
    if left.independent(right):
        return False
    return not all(a is b or a.independent(b) for a in leaves_of(left) for b in leaves_of(right))


def _terms(part: Part) -> tuple[tuple[float, Part], ...]:
    return part.expr.terms if isinstance(part.expr, Sum) else ((1.0, part),)


def as_function(part: Part) -> tuple[Pointwise, Part]:
    """A part as a function of another one: itself under the identity where it is none."""
    return (part.expr.fn, part.expr.arg) if isinstance(part.expr, Apply) else (IDENTITY, part)


def _as_scaled_function(part: Part) -> tuple[Pointwise, Part]:
    factor, part = _unscaled(part)
    fn, base = as_function(part)
    return (fn if factor == 1.0 else fn.affine(output_scale=factor)), base


def _common_function(left: Part, right: Part, combine: Callable[[Tensor, Tensor], Tensor]) -> Part | None:
    """``combine(left, right)`` as one function, when both are functions of one and the same part."""
    f, f_base = as_function(left)
    g, g_base = as_function(right)
    if left is right:
        f, f_base, g, g_base = IDENTITY, left, IDENTITY, left
    if f_base is not g_base:
        return None
    return apply(Pointwise(lambda u: combine(f(u), g(u))), f_base)


def _common_core(left: Part, right: Part, left_weight: float, right_weight: float) -> Part | None:
    """The weighted sum of two parts that would be functions of one, did not parameters of their own follow."""
    (a, first, silent), (b, second, other) = _core(left), _core(right)
    tangents: dict[Part, float] = {}  # one parameter may come from both sides
    for side, terms in ((left_weight, silent), (right_weight, other)):
        for weight, term in terms:
            tangents[term] = tangents.get(term, 0.0) + side * weight
    if not tangents:
        return None
    one, two = left_weight * a, right_weight * b
    common = (
        scale(first, one + two) if first is second else _common_function(first, second, lambda u, v: one * u + two * v)
    )
    if common is None:
        return None
    own = torch.stack([w * w * t.ntk for t, w in tangents.items()]).sum(0)
    return replace(common, ntk=common.ntk + own, expr=Sum(((1.0, common), *((w, t) for t, w in tangents.items()))))


def _product_of_cores(left: Part, right: Part) -> Part | None:
    """The product of two parts that would be functions of one, did not parameters of their own follow."""
    (a, first, silent), (b, second, other) = _core(left), _core(right)
    if not (silent or other) or {t for _, t in silent} & {t for _, t in other}:
        return None
    common = _common_function(first, second, lambda u, v: a * b * u * v)
    if common is None:
        return None
    own = [w * w * t.ntk * right.cov for w, t in silent] + [w * w * t.ntk * left.cov for w, t in other]
    return trained(_with_tangents(common, left, right), torch.stack(own).sum(0), of_itself=False)


def joint_function(parts: Sequence[Part], combine: Callable[..., Tensor]) -> Part | None:
    """``combine`` of several parts as one function, when all are functions of one and the same part."""
    functions = [_as_scaled_function(part) for part in parts]
    if any(base is not functions[0][1] for _, base in functions):
        return None
    return _no_surer(apply(Pointwise(lambda u: combine(*(fn(u) for fn, _ in functions))), functions[0][1]), *parts)


def _no_surer(common: Part, *parts: Part) -> Part:
    """What was assumed of a part (the gain of a norm) is in its function too; what was drawn may be integrated now."""
    told = [part.how for part in parts if part.how.name == "assumed"]
    return replace(common, how=common.how | told[0]) if told else common


def _compose(outer: Pointwise, inner: Pointwise) -> Pointwise:
    return Pointwise(lambda u: outer(inner(u)))


def _rescaled(fn: Pointwise, factor: float) -> Pointwise:
    return fn.affine(output_scale=factor)


def _plus(fn: Pointwise, constant: float) -> Pointwise:
    return fn.affine(output_shift=constant)


def empirical(like: Part, first: Tensor, second: Tensor, slope: Tensor, ntk: Tensor, roots: Roots) -> Part:
    """A part known by draws: ``first[S]`` at input a and ``second[P, 2, S]`` at input b."""
    product = first * second
    square = first.square()
    error = float(square.std() / (len(square) ** 0.5 * square.mean().clamp_min(1e-300)))
    return Part(
        size=like.size,
        cov=product.mean(-1),
        slope=slope,
        ntk=ntk,
        mean=float(first.mean()),
        roots=roots,
        expr=Samples(first, second),
        how=like.how.drawn(error),
    )


def mask(like: Part, keep: float, height: float, shared: Tensor, name: str) -> Part:
    """``height`` with probability ``keep``, else 0: E[m m'] = height^2 keep where one draw serves both, else keep^2."""
    cov = height**2 * torch.where(shared, keep, keep**2).to(like.cov)
    zero = torch.zeros_like(cov)
    return Part(like.size, cov, zero, zero, height * keep, Roots({Root(name)}), Mask(keep, height, shared))


def drop(part: Part, probability: float, name: str, *, whole: bool = False) -> Part:
    """Dropout at train time, an independent mask m of mean 1: E[v_a(i)^2] grows by 1/(1-p), exactly.

    Every input, and unless ``whole`` every position, has a mask of its own; (a, a) is one input.
    """
    if probability >= 1:
        return scale(part, 0.0)
    shared = torch.zeros(part.cov.shape, dtype=torch.bool)
    shared[Pairs.SELF] = torch.tensor([True, whole])
    keep = 1.0 - probability
    return multiply(part, mask(part, keep, 1 / keep, shared, name))
