"""Operations without layers: functions entry by entry, sums, gates, moves, pools, attention, tokens, dropout."""

from __future__ import annotations

from dataclasses import replace

from .builder import Builder, Value, with_channels, with_places
from .layers import MOST_HALVES

MOST_DEGREE = 3
TAME = (
    *("torch.tanh({})", "torch.sigmoid({})", "torch.sin({})", "torch.cos({})", "torch.erf({})", "torch.atan({})"),
    *("F.hardtanh({})", "F.relu6(3 * {})", "{} / (1 + {}.abs())", "torch.exp(-{} ** 2)", "torch.clamp({}, -0.5, 1)"),
    *("torch.sign({})", "({} > 0).to({}.dtype)", "torch.round({})"),
    *("2 * torch.sigmoid({}) - 1", "F.hardsigmoid({})", "1 / (1 + {}.square())", "torch.sin(3 * {})"),
)
GROWING = (
    *(
        "F.relu({})",
        "F.relu({})",
        "F.leaky_relu({}, 0.2)",
        "F.gelu({})",
        'F.gelu({}, approximate="tanh")',
        "F.silu({})",
    ),
    *("F.elu({})", "F.selu({})", "F.softplus({})", "F.mish({})", "F.hardswish({})", "F.celu({}, 0.7)", "{}.abs()"),
    *("F.softshrink({})", "F.hardshrink({})", "F.logsigmoid({})", "F.tanhshrink({})", "F.threshold({}, 0.2, 0.0)"),
    *("{} * torch.sigmoid(1.702 * {})", "torch.where({} > 0, {}, 0.1 * {})", "torch.maximum({}, 0.2 * {})"),
    *("0.5 * {} * (1 + torch.tanh(0.8 * {}))", "{} * torch.tanh(F.softplus({}))", "F.relu({}) - 0.4", "0.5 * {} + 0.3"),
    *("F.relu({}) - F.relu(-{})", "{} + torch.sin({})", "torch.clamp({}, min=-0.5)", "F.relu({} + 0.5) * 1.3"),
)
SQUARES = ("{}.square()", "F.relu({}).square()", "{} * {}", "{}.pow(2) - 1")
MODULES = (
    "nn.ReLU()",
    "nn.GELU()",
    "nn.Softplus(beta=2)",
    "nn.LeakyReLU(0.3)",
    "nn.ELU(0.8)",
    "nn.Hardswish()",
    "nn.Tanh()",
)


def function(b: Builder) -> Value | None:
    v = b.recent(lambda v: True)
    assert v is not None
    if b.chance(0.15):
        return b.put(f"{b.layer(b.choose(MODULES))}({v.name})", v.shape, v)
    if b.chance(0.4):
        return b.put(b.choose(TAME).replace("{}", v.name), v.shape, v, degree=1)
    if v.degree == 1 and b.chance(0.1):
        return b.put(b.choose(SQUARES).replace("{}", v.name), v.shape, v, degree=2)
    return b.put(b.choose(GROWING).replace("{}", v.name), v.shape, v)


def merge(b: Builder) -> Value | None:
    """Sums, differences and means of two values that may share ancestors."""
    v = b.recent(lambda v: True)
    other = b.alike(v) if v is not None else None
    if v is None or other is None:
        return None
    texts = (
        *("{} + {o}", "{} + {o}", "{} - {o}", "0.6 * {} + 0.8 * {o}", "({} + {o}) / math.sqrt(2)"),
        *("torch.add({}, {o}, alpha=0.5)", "torch.stack([{}, {o}]).mean(0)", "torch.lerp({}, {o}, 0.3)"),
        *("torch.maximum({}, {o})", "sum([{}, {o}, 0.5 * {}])"),
    )
    return b.put(b.choose(texts).replace("{o}", other.name).replace("{}", v.name), v.shape, v, other)


def gate(b: Builder) -> Value | None:
    v = b.recent(lambda v: v.degree < MOST_DEGREE)
    other = b.alike(v) if v is not None else None
    if v is None or other is None:
        return None
    if v.degree + other.degree > MOST_DEGREE or b.chance(0.6):
        text, degree = (
            b.choose(("{} * torch.sigmoid({o})", "{} * torch.tanh({o})", "{} * ({o} > 0).to({}.dtype)")),
            v.degree,
        )
    else:
        text, degree = b.choose(("{} * {o}", "torch.mul({}, {o})")), v.degree + other.degree
    return b.put(text.replace("{o}", other.name).replace("{}", v.name), v.shape, v, other, degree=degree)


def concat(b: Builder) -> Value | None:
    """Over channels, with anything of the same positions; over positions, with anything of the same channels."""
    v = b.recent(lambda v: v.shape.halves < MOST_HALVES)
    if v is None:
        return None
    dim = v.shape.channel_dim
    others = [o for o in b.values if o.shape.places == v.shape.places and o.shape.first == v.shape.first]
    o = b.choose(others)
    halves = v.shape.halves + o.shape.halves
    if halves <= MOST_HALVES and (o.name != v.name or b.chance(0.2)):
        return b.put(f"torch.cat([{v.name}, {o.name}], {dim})", with_channels(v.shape, halves), v, o)
    places = v.shape.places
    if len(places) == 1 and places[0] <= 6 and o.shape == v.shape:
        along = 1 if dim == 2 else 2
        return b.put(f"torch.cat([{v.name}, {o.name}], {along})", with_places(v.shape, 2 * places[0]), v, o)
    return None


def cut(b: Builder) -> Value | None:
    """Chunks of channels, gates of chunks."""
    v = b.recent(lambda v: v.shape.halves >= 2 and v.shape.halves % 2 == 0)
    if v is None:
        return None
    n, dim, half = v.name, v.shape.channel_dim, with_channels(v.shape, v.shape.halves // 2)
    slices = "[:, w]".replace("w", f": {v.name}.shape[1] // 2") if dim == 1 else f"[..., : {v.name}.shape[-1] // 2]"
    texts = (
        f"{n}.chunk(2, {dim})[{b.choose((0, 1))}]",
        f"F.glu({n}, {dim})",
        f"{n}{slices}",
        f"torch.split({n}, {n}.shape[{dim}] // 2, {dim})[1]",
        f"torch.flip({n}, ({dim},)).narrow({dim}, 0, {n}.shape[{dim}] // 2)",
    )
    return b.put(b.choose(texts), half, v)


def move(b: Builder) -> Value | None:
    """Re-indexing of positions and channels."""
    v = b.recent(lambda v: bool(v.shape.places))
    if v is None:
        return None
    n, shape, places = v.name, v.shape, v.shape.places
    options: list[tuple[str, object]] = []
    if len(places) == 1:
        (t,) = places
        along = 2 if shape.first else 1
        options += [(f"{n}.transpose(1, 2)", replace(shape, first=not shape.first))] * 3
        options += [(f"torch.roll({n}, 1, {along})", shape), (f"torch.flip({n}, ({along},))", shape)]
        if t > 1:
            options += [(f"{n}.narrow({along}, 1, {t - 1})", with_places(shape, t - 1))]
        if t % 2 == 0:
            wide = (f"{n}.unflatten({along}, (2, {t // 2}))", with_places(shape, 2, t // 2))
            options += [wide]
        if shape.first:
            options += [(f"F.pad({n}, (1, 1))", with_places(shape, t + 2))]
    elif len(places) == 2:
        h, width = places
        if shape.first:
            options += [(f"{n}.flatten(2).transpose(1, 2)", replace(shape, places=(h * width,), first=False))] * 2
            options += [
                (f"{n}.permute(0, 2, 3, 1)", replace(shape, first=False)),
                (f"{n}.transpose(2, 3)", with_places(shape, width, h)),
            ]
            options += [(f"F.pad({n}, (1, 0, 0, 1))", with_places(shape, h + 1, width + 1))]
            options += [
                (f'F.interpolate({n}, scale_factor=2, mode="nearest")', with_places(shape, 2 * h, 2 * width))
            ] * (max(places) <= 4)
            options += [
                (f"F.pixel_unshuffle({n}, 2)", with_places(with_channels(shape, 4 * shape.halves), h // 2, width // 2))
            ] * (h % 2 == 0 and width % 2 == 0 and shape.halves == 1)
            options += [(f"F.pixel_shuffle({n}, 2)", with_places(with_channels(shape, 1), 2 * h, 2 * width))] * (
                shape.halves == MOST_HALVES and max(places) <= 3
            )
            options += [(f"F.channel_shuffle({n}, 2)", shape)]
        else:
            options += [
                (f"{n}.permute(0, 3, 1, 2)", replace(shape, first=True)),
                (f"{n}.flatten(1, 2)", with_places(shape, h * width)),
            ]
    text, moved = b.choose(options)
    return b.put(text, moved, v)  # type: ignore[arg-type]


def pool(b: Builder) -> Value | None:
    """Means, maxima and sums over windows and over all positions."""
    v = b.recent(lambda v: bool(v.shape.places))
    if v is None:
        return None
    n, shape, places = v.name, v.shape, v.shape.places
    start = 2 if shape.first else 1
    every = tuple(range(start, start + len(places)))
    flat = with_places(shape) if not shape.first else replace(shape, places=(), first=False)
    number = 1
    for size in places:
        number *= size
    texts = [
        (f"{n}.mean({every})", flat),
        (f"{n}.amax({every})", flat),
        (f"{n}.sum({every}) / math.sqrt({number})", flat),
    ]
    texts += [(f"{n}[:, {b.choose((0, -1))}]", with_places(shape))] * (not shape.first and len(places) == 1)
    if shape.first and min(places) >= 2:
        dims, half = len(places), with_places(shape, *((p - 2) // 2 + 1 for p in places))
        less = with_places(shape, *(p - 1 for p in places))
        texts += [
            (f"F.avg_pool{dims}d({n}, 2)", half),
            (f"F.max_pool{dims}d({n}, 2)", half),
            (f"F.avg_pool{dims}d({n}, 2, stride=1)", less),
        ]
        texts += [(f"F.adaptive_avg_pool{dims}d({n}, 2)", with_places(shape, *(2 for _ in places)))]
        texts += [(f"F.adaptive_max_pool{dims}d({n}, 1).flatten(1)", flat)]
        texts += [(f"F.max_pool{dims}d({n}, 3, stride=1, padding=1)", shape)] * (min(places) >= 3)
    text, pooled = b.choose(texts)
    return b.put(text, pooled, v)


def flatten(b: Builder) -> Value | None:
    """Positions into channels, where a linear layer reads them all."""
    v = b.recent(lambda v: bool(v.shape.places))
    if v is None:
        return None
    number = 1
    for size in v.shape.places:
        number *= size
    halves = v.shape.halves * number
    if halves > 24:
        return None
    return b.put(f"{v.name}.flatten(1)", replace(v.shape, halves=halves, places=(), first=False), v)


def attention(b: Builder) -> Value | None:
    """Softmax attention, fused or by hand, with the values themselves or projections in the three roles."""
    v = b.recent(lambda v: not v.shape.first and len(v.shape.places) == 1 and v.shape.halves == 2)
    if v is None:
        return None
    roles = [v]
    for _ in range(2):
        made = b.layer('drawn(nn.Linear(w, w), "normal", 1.0, "zero")')
        roles.append(b.put(f"{made}({v.name})", v.shape, v, degree=1) if b.chance(0.7) else v)
    q, k, values = (b.choose(roles) for _ in range(3))
    trio = f"({q.name}, {k.name}, {values.name})"
    split = "lambda t: t.unflatten(-1, (2, -1)).transpose(1, 2)"
    texts = (
        f"F.scaled_dot_product_attention({q.name}, {k.name}, {values.name})",
        f"F.scaled_dot_product_attention({q.name}, {k.name}, {values.name}, is_causal=True)",
        f"torch.softmax({q.name} @ {k.name}.transpose(1, 2) / math.sqrt({v.name}.shape[-1]), -1) @ {values.name}",
        f"F.scaled_dot_product_attention(*map({split}, {trio})).transpose(1, 2).flatten(2)",
        f"torch.softmax({q.name} @ {k.name}.transpose(1, 2) / {v.name}.shape[-1], -1) @ {values.name}",
    )
    return b.put(b.choose(texts), v.shape, q, k, values)


def mixing(b: Builder) -> Value | None:
    """Layers and fixed matrices over positions."""
    v = b.recent(lambda v: len(v.shape.places) == 1)
    if v is None:
        return None
    (t,) = v.shape.places
    if v.shape.first:
        made = b.layer(f'drawn(nn.Linear({t}, {t}), "normal", 1.0, "zero")')
        return b.put(f"{made}({v.name})", v.shape, v, degree=1)
    matrix = b.choose((f"torch.ones({t}, {t}).tril() / {t}", f"torch.eye({t}).roll(1, 0) * 0.5 + torch.eye({t}) * 0.5"))
    made = b.buffer(matrix)
    return b.put(f"{made} @ {v.name}", v.shape, v)


def table(b: Builder) -> Value | None:
    """Constants that join the values: position tables, class tokens, layer scales, buffers."""
    v = b.recent(lambda v: not v.shape.first)
    if v is None:
        return None
    n, c, places = v.name, v.shape.channels, v.shape.places
    kind = b.choose(
        ("scale", "shift", "buffer", "scalar", *(("token", "token", "positions") if len(places) == 1 else ()))
    )
    if kind == "token":
        made = b.layer(f"nn.Parameter(settled(torch.randn(1, 1, {c}), {b.choose((0.5, 1.0))}, center=True))")
        text = f"torch.cat([{made}.expand({n}.shape[0], -1, -1), {n}], 1)"
        return b.put(text, with_places(v.shape, places[0] + 1), v)
    if kind == "positions":
        made = b.layer(f"nn.Parameter(settled(torch.randn(1, {places[0]}, {c}), 0.5, center=True))")
        return b.put(f"{n} + {made}", v.shape, v)
    if kind == "buffer":
        return b.put(f"{n} {b.choose('+*')} {b.buffer(f'settled(torch.randn({c}), 1.0, center=True)')}", v.shape, v)
    if kind == "scalar":
        made = b.layer(f"nn.Parameter(torch.tensor({b.choose((0.5, 1.5))}))")
        return b.put(f"{n} * {made}", v.shape, v)
    law = "torch.full" if kind == "scale" else "torch.randn"
    inner = f"torch.full(({c},), 0.3)" if law == "torch.full" else f"settled(torch.randn({c}), 0.5, center=True)"
    made = b.layer(f"nn.Parameter({inner})")
    return b.put(f"{n} {'*' if kind == 'scale' else '+'} {made}", v.shape, v)


def spread(b: Builder) -> Value | None:
    """A vector at several positions: one value repeated, or channels dealt out."""
    v = b.recent(lambda v: not v.shape.places)
    if v is None:
        return None
    if v.shape.halves == MOST_HALVES:
        shape = replace(v.shape, halves=1, places=(4,))
        return b.put(f"{v.name}.unflatten(1, (4, -1))", shape, v)
    return b.put(f"{v.name}.unsqueeze(1).repeat(1, 3, 1)", with_places(v.shape, 3), v)


def dropout(b: Builder) -> Value | None:
    v = b.recent(lambda v: True)
    assert v is not None
    if v.shape.first and len(v.shape.places) == 2 and b.chance(0.4):
        return b.put(f"{b.layer('nn.Dropout2d(0.2)')}({v.name})", v.shape, v)
    text = b.choose((f"{b.layer('nn.Dropout(0.3)')}({v.name})", f"F.dropout({v.name}, 0.1, training=self.training)"))
    return b.put(text, v.shape, v)


OPERATIONS = (
    (function, 16),
    (merge, 6),
    (gate, 2.5),
    (concat, 2),
    (cut, 2),
    (move, 4),
    (pool, 3),
    (flatten, 0.7),
    (attention, 1.2),
    (mixing, 0.7),
    (table, 2.5),
    (spread, 0.7),
    (dropout, 0.8),
)
"""With their weights in the choice of the next."""
