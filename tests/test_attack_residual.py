"""Residual scaling against models written by hand with the alpha that is said, and paths drawn along depth."""

from __future__ import annotations

import torch
from torch import Tensor, nn

import kgraph
from kgraph import ResidualScaling

W = 24


class Block(nn.Module):
    """h + alpha V relu(W h)."""

    def __init__(self) -> None:
        super().__init__()
        self.inner, self.outer = nn.Linear(W, W, bias=False), nn.Linear(W, W, bias=False)
        for layer in (self.inner, self.outer):
            nn.init.normal_(layer.weight, std=W**-0.5)

    def forward(self, h: Tensor, alpha: float = 1.0) -> Tensor:
        return h + alpha * self.outer(torch.relu(self.inner(h)))


def blocks(count: int) -> nn.ModuleList:
    return nn.ModuleList(Block() for _ in range(count))


class Group(nn.Module):
    """A residual block around residual blocks, as in super-resolution networks: h + alpha V blocks(h)."""

    def __init__(self) -> None:
        super().__init__()
        self.blocks, self.outer = blocks(3), nn.Linear(W, W, bias=False)

    def forward(self, h: Tensor, alpha: float = 1.0, inner: float = 1.0) -> Tensor:
        y = h
        for block in self.blocks:
            y = block(y, inner)
        return h + alpha * self.outer(y)


class Fork(nn.Module):
    """Two heads of residual blocks on one trunk of them."""

    def __init__(self) -> None:
        super().__init__()
        self.trunk, self.left, self.right = blocks(3), blocks(2), blocks(2)

    def forward(self, h: Tensor, main: float = 1.0, side: float = 1.0) -> tuple[Tensor, Tensor]:
        for block in self.trunk:
            h = block(h, main)
        left = right = h
        for one, two in zip(self.left, self.right, strict=True):
            left, right = one(left, main), two(right, side)
        return left, right


def assert_same(found: object, expected: object) -> None:
    """Float32 networks of a dozen layers: equal up to 1e-4, where a wrong alpha changes outputs by order one."""
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)


def test_a_chain_around_chains_has_its_own_length() -> None:
    groups, x = nn.ModuleList(Group() for _ in range(4)), torch.randn(3, W)
    shaped = kgraph.transform(nn.Sequential(*groups), ResidualScaling(), x)
    expected = x
    for group in groups:
        expected = group(expected, 4**-0.5, 3**-0.5)
    assert_same(shaped(x), expected)


def test_a_second_head_reads_the_scaled_trunk() -> None:
    model, x = Fork(), torch.randn(3, W)
    shaped = kgraph.transform(model, ResidualScaling(), x)
    assert_same(shaped(x), model(x, 5**-0.5, 2**-0.5))  # trunk and left: one chain of 5


class Tied(nn.Module):
    """One block, L times."""

    def __init__(self, length: int) -> None:
        super().__init__()
        self.block, self.length = Block(), length

    def forward(self, h: Tensor, alpha: float = 1.0) -> Tensor:
        for _ in range(self.length):
            h = self.block(h, alpha)
        return h


def test_blocks_that_share_weights_add_up() -> None:
    # the same V relu(W h), nearly, in every block: L alpha of it in all, so that alpha = 1 / L keeps it
    for method in (ResidualScaling(), ResidualScaling(weights="fbm", hurst=0.7)):
        model, x = Tied(4), torch.randn(3, W)
        shaped = kgraph.transform(model, method, x)
        assert_same(shaped(x), model(x, 1 / 4))
        assert "share weights" in shaped.kgraph.ledger.notes[0]


def test_copies_of_one_draw_are_named() -> None:
    layer = nn.TransformerEncoderLayer(16, 2, 32, batch_first=True, norm_first=True)  # TransformerEncoder copies it
    shaped = kgraph.transform(
        nn.TransformerEncoder(layer, 3, enable_nested_tensor=False), ResidualScaling(), torch.randn(2, 4, 16)
    )
    assert "copies of one draw" in shaped.kgraph.ledger.notes[0]
    independent = kgraph.transform(nn.Sequential(Block(), Block()), ResidualScaling(), torch.randn(2, W))
    assert "copies" not in independent.kgraph.ledger.notes[0]


class Hidden(nn.Module):
    """Two residual sums inside other operations."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second, self.gain = nn.Linear(W, W), nn.Linear(W, W), nn.Parameter(torch.ones(W))

    def forward(self, h: Tensor) -> Tensor:
        h = torch.addcmul(h, self.gain, self.first(torch.relu(h)))
        return torch.lerp(h, self.second(torch.relu(h)), 0.3)


def test_sums_inside_other_operations_are_named() -> None:
    shaped = kgraph.transform(nn.Sequential(Hidden(), Block(), Block()), ResidualScaling(), torch.randn(2, W))
    said = [change.why for change in shaped.kgraph.ledger.kept]
    assert sum("addcmul hides the sum" in why for why in said) == 1
    assert sum("lerp hides the sum" in why for why in said) == 1


class Transposed(nn.Module):
    """A block of a grouped transposed convolution behind a constant matrix."""

    matrix: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.ConvTranspose1d(40, 40, 3, padding=1, groups=4)
        self.register_buffer("matrix", torch.eye(9))

    def forward(self, h: Tensor) -> Tensor:
        return h + self.layer(torch.relu(h @ self.matrix))


def test_fan_in_of_grouped_transposed_convolutions_and_constants() -> None:
    model, x = nn.Sequential(*(Transposed() for _ in range(6))), torch.randn(2, 40, 9)
    shaped = kgraph.transform(model, ResidualScaling(weights="fbm", hurst=0.3), x)
    weights = torch.stack([dict(shaped.named_parameters())[f"{i}.layer.weight"].detach() for i in range(6)])
    # 40 / 4 inputs times 3 taps; 7200 entries of negative correlation along depth: relative error below sqrt(2 / 7200)
    assert abs(30 * float(weights.square().mean()) - 1) < 5 * (2 / 7200) ** 0.5
    assert all(torch.equal(buffer, torch.eye(9)) for name, buffer in shaped.named_buffers() if "matrix" in name)
