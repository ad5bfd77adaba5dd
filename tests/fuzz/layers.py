"""Operations with parameters: linear layers, convolutions, norms, shared and computed weights, cells."""

from __future__ import annotations

from dataclasses import replace

from .builder import Builder, Value, with_channels, with_places

MOST_HALVES = 4
WEIGHTS = ("default", "default", "normal", "normal", "xavier", "orthogonal")
STEADY_BIASES = ("zero", "normal", "uniform", "constant")
"""Whose variance does not depend on the width."""
BIASES = ("default", "default", *STEADY_BIASES)


def _law(b: Builder) -> tuple[str, str]:
    """Arguments of the layer, and of `drawn`."""
    weight, gain = b.choose(WEIGHTS), b.choose((1.0, 1.4))
    bias = None if b.chance(0.3) else b.choose(STEADY_BIASES if b.steady else BIASES)
    return f", bias={bias is not None}", f'"{weight}", {gain}, "{bias or "zero"}"'


def _frozen(b: Builder) -> tuple[str, ...]:
    return ("{}.requires_grad_(False)",) if b.chance(0.04) else ()


def dense(b: Builder, inputs: str, outputs: str) -> str:
    options, law = _law(b)
    return b.layer(f"drawn(nn.Linear({inputs}, {outputs}{options}), {law})", *_frozen(b))


def _width(b: Builder) -> int:
    return b.choose((1, 2, 2, 2, 3, MOST_HALVES))


def linear(b: Builder) -> Value | None:
    v = b.recent(lambda v: not v.shape.first)
    if v is None:
        return None
    shape = with_channels(v.shape, _width(b))
    return b.put(f"{dense(b, v.shape.channels, shape.channels)}({v.name})", shape, v, degree=1)


def convolution(b: Builder) -> Value | None:
    v = b.recent(lambda v: v.shape.first)
    if v is None:
        return None
    dims, smallest = len(v.shape.places), min(v.shape.places)
    kernel = b.choose([k for k in (1, 2, 3) if k <= smallest])
    stride = b.choose((1, 1, 1, 2))
    dilation = 2 if stride == 1 and kernel == 2 and smallest > 2 and b.chance(0.5) else 1
    reach = dilation * (kernel - 1)
    padding = b.choose((0, reach // 2, reach // 2, 1)) if smallest > 1 else 0
    mode = b.choose((*8 * ("zeros",), "reflect", "circular", "replicate")) if padding else "zeros"
    halves = _width(b)
    groups, outputs = b.choose((*4 * (("1", halves),), ("2", 2), (v.shape.channels, v.shape.halves)))
    shape = with_channels(v.shape, outputs)
    places = [(n + 2 * padding - reach - 1) // stride + 1 for n in v.shape.places]
    options, law = _law(b)
    if groups == v.shape.channels:  # no square to be orthogonal; Xavier's fan-out counts every group
        law = law.replace("orthogonal", "normal").replace("xavier", "normal")
    made = b.layer(
        f"drawn(nn.Conv{dims}d({v.shape.channels}, {shape.channels}, {kernel}, stride={stride}, padding={padding}, "
        f'dilation={dilation}, groups={groups}, padding_mode="{mode}"{options}), {law})',
        *_frozen(b),
    )
    return b.put(f"{made}({v.name})", with_places(shape, *places), v, degree=1)


def transposed_convolution(b: Builder) -> Value | None:
    v = b.recent(lambda v: v.shape.first and max(v.shape.places) <= 4)
    if v is None:
        return None
    dims, stride = len(v.shape.places), b.choose((1, 2))
    kernel, padding = b.choose(((2, 0), (3, 1), (4, 1))) if stride == 2 else b.choose(((3, 1), (1, 0), (2, 0)))
    shape = with_channels(v.shape, b.choose((1, 2)))
    places = [(n - 1) * stride - 2 * padding + kernel for n in v.shape.places]
    if min(places) < 1:
        return None
    options, law = _law(b)
    made = b.layer(
        f"drawn(nn.ConvTranspose{dims}d({v.shape.channels}, {shape.channels}, {kernel}, stride={stride}, "
        f"padding={padding}{options}), {law.replace('orthogonal', 'normal')})"
    )
    return b.put(f"{made}({v.name})", with_places(shape, *places), v, degree=1)


def norm(b: Builder) -> Value | None:
    v = b.recent(lambda v: True)
    if v is None:
        return None
    c = v.shape.channels
    if not v.shape.first:
        made = b.choose((f"nn.LayerNorm({c})", f"nn.LayerNorm({c})", f"nn.RMSNorm({c})"))
        if not v.shape.places and b.chance(0.4):
            made = f"nn.BatchNorm1d({c})"
    else:
        dims = len(v.shape.places)
        batch = f"nn.BatchNorm{dims}d({c})"
        alone = f"nn.InstanceNorm{dims}d({c})" if min(v.shape.places) > 1 else batch
        made = b.choose(
            (batch, batch, f"nn.GroupNorm(1, {c})", f"nn.GroupNorm(4, {c})", f"nn.GroupNorm({c} // 4, {c})", alone)
        )
    after = ("nn.init.constant_({}.weight, 0.7)",) if "Instance" not in made and b.chance(0.3) else ()
    if after and "RMS" not in made and b.chance(0.5):
        after = (*after, "settled(nn.init.normal_({}.bias), 0.3, center=True)")
    if "Batch" in made and b.chance(0.3):
        after = (*after, "{}.running_var.fill_(0.5)", "{}.running_mean.fill_(0.1)")
    return b.put(f"{b.layer(made, *after)}({v.name})", v.shape, v)


def norm_by_hand(b: Builder) -> Value | None:
    v = b.recent(lambda v: not v.shape.first)
    if v is None:
        return None
    n = v.name
    texts = (
        f"F.normalize({n}, dim=-1) * math.sqrt({n}.shape[-1])",
        f"{n} * torch.rsqrt({n}.square().mean(-1, keepdim=True) + 1e-6)",
        f"({n} - {n}.mean(-1, keepdim=True)) / ({n}.std(-1, keepdim=True) + 1e-6)",
        f"{n} / {n}.norm(dim=-1, keepdim=True) * math.sqrt({n}.shape[-1])",
        f"F.layer_norm({n}, {n}.shape[-1:])",
    )
    return b.put(b.choose(texts), v.shape, v)


def tied(b: Builder) -> Value | None:
    """One layer called twice."""
    v = b.recent(lambda v: not v.shape.first)
    if v is None:
        return None
    made = dense(b, v.shape.channels, v.shape.channels)
    once = b.put(f"{made}({v.name})", v.shape, v, degree=1)
    between = b.put(
        b.choose(("F.relu({})", "torch.tanh({})", "F.gelu({})", "{} + {}")).replace("{}", once.name), v.shape, once
    )
    return b.put(f"{made}({between.name})", v.shape, between, degree=1)


def tied_head(b: Builder) -> Value | None:
    """Logits by the table that made the tokens' vectors."""
    v = b.recent(lambda v: not v.shape.first and v.shape.halves == 2)
    if v is None:
        return None
    (table,) = (name for name, text in b.layers.items() if "nn.Embedding" in text)
    return b.put(f"F.linear({v.name}, self.{table}.weight)", with_channels(v.shape, 16), v)


def computed_weight(b: Builder) -> Value | None:
    """Weights made in forward: equalized learning rate, weight norm, einsum."""
    v = b.recent(lambda v: not v.shape.first)
    if v is None:
        return None
    inputs = v.shape.channels
    weight = b.layer(f"nn.Parameter(settled(torch.randn(w, {inputs}), 1.0))")
    dims = "btij"[: 1 + len(v.shape.places)]
    texts = (
        f"F.linear({v.name}, {weight} / math.sqrt({v.name}.shape[-1]))",
        f"F.linear({v.name}, F.normalize({weight}, dim=1))",
        f'torch.einsum("{dims}c,dc->{dims}d", {v.name}, {weight}) * {v.name}.shape[-1] ** -0.5',
        f"({v.name} @ {weight}.t()) / math.sqrt({v.name}.shape[-1])",
    )
    return b.put(b.choose(texts), with_channels(v.shape, 2), v, degree=1)


def prelu(b: Builder) -> Value | None:
    v = b.recent(lambda v: True)
    if v is None:
        return None
    by_channel = v.shape.channel_dim == 1
    made = b.layer(f"nn.PReLU({v.shape.channels})" if by_channel and b.chance(0.5) else "nn.PReLU()")
    return b.put(f"{made}({v.name})", v.shape, v)


def recurrence(b: Builder) -> Value | None:
    """A plain recurrent cell over the positions, unrolled."""
    v = b.recent(lambda v: not v.shape.first and len(v.shape.places) == 1)
    if v is None:
        return None
    read, turn = dense(b, v.shape.channels, "w"), dense(b, "w", "w")
    function = b.choose(("torch.tanh", "F.relu"))
    state_shape = replace(v.shape, halves=2, places=())
    state = b.put(f"{function}({read}({v.name}[:, 0]))", state_shape, v, degree=1)
    for t in range(1, min(v.shape.places[0], 3)):
        state = b.put(f"{function}({read}({v.name}[:, {t}]) + {turn}({state.name}))", state_shape, v, state, degree=1)
    return state


def gated_cell(b: Builder) -> Value | None:
    """One or two steps of a GRU cell with PyTorch's own parameters."""
    v = b.recent(lambda v: not v.shape.first and len(v.shape.places) == 1 and v.shape.halves >= 2)
    if v is None or b.steady:
        return None
    made = b.layer(
        f"nn.GRUCell({v.shape.channels}, w)",
        "[settled(p, (3 * w) ** -0.5, center=p.ndim == 1) for p in {}.parameters()]",
    )
    state_shape = replace(v.shape, halves=2, places=())
    state = b.put(f"{made}({v.name}[:, 0])", state_shape, v, degree=1)
    return b.put(f"{made}({v.name}[:, -1], {state.name})", state_shape, v, state, degree=1)


OPERATIONS = (
    (linear, 9),
    (convolution, 9),
    (transposed_convolution, 2),
    (norm, 4),
    (norm_by_hand, 1),
    (tied, 1),
    (computed_weight, 1),
    (prelu, 1),
    (recurrence, 0.6),
    (gated_cell, 0.3),
)
"""With their weights in the choice of the next."""
