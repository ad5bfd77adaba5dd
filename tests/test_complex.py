"""Complex parameters and Fourier transforms, inside a network of real numbers."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor, nn

import kgraph
from kgraph.capture import capture

WIDTH, LENGTH, MODES = 24, 16, 5


class SpectralConv(nn.Module):
    """The layer of Fourier neural operators: Li et al. 2021, arXiv 2010.08895."""

    def __init__(self, kind: str) -> None:
        super().__init__()
        self.kind = kind
        weight = torch.randn(WIDTH, WIDTH, MODES, dtype=torch.cfloat) / math.sqrt(WIDTH)
        self.weight = nn.Parameter(weight if kind != "real pairs" else torch.view_as_real(weight))

    def forward(self, x: Tensor) -> Tensor:
        weight = torch.view_as_complex(self.weight) if self.kind == "real pairs" else self.weight
        modes = torch.fft.rfft(x, norm="ortho")
        mixed = torch.einsum("bim,iom->bom", modes[..., :MODES], weight)
        if self.kind == "written into zeros":
            out = torch.zeros(x.shape[0], WIDTH, LENGTH // 2 + 1, dtype=torch.cfloat)
            out[..., :MODES] = mixed
        else:
            out = nn.functional.pad(mixed, (0, LENGTH // 2 + 1 - MODES))
        return torch.fft.irfft(out, n=LENGTH, norm="ortho")


class Operator(nn.Module):
    def __init__(self, kind: str) -> None:
        super().__init__()
        self.lift = nn.Conv1d(2, WIDTH, 1)
        self.first, self.second = SpectralConv(kind), SpectralConv(kind)
        self.local, self.out = nn.Conv1d(WIDTH, WIDTH, 1), nn.Conv1d(WIDTH, 1, 1)

    def forward(self, x: Tensor) -> Tensor:
        h = self.lift(x)
        h = nn.functional.gelu(self.first(h) + self.local(h))
        return self.out(self.second(h))


X = torch.randn(2, 2, LENGTH, generator=torch.Generator().manual_seed(1))
KINDS = ("complex", "real pairs", "written into zeros")


@pytest.mark.parametrize("kind", KINDS)
def test_fourier_neural_operators(kind: str) -> None:
    model = Operator(kind).eval()
    torch.testing.assert_close(capture(model, X).emit().eval()(X), model(X))
    rows = kgraph.analyze(model, X).to_dict()["nodes"]
    assert all(row["q"] >= 0 and row["how"] != "exact" for row in rows if "fft" in row["name"])
    assert kgraph.transform(model, "tat", X)(X).shape == model(X).shape


class Mixer(nn.Module):
    """Fourier mixing over the last dimension (FNet: Lee-Thorp et al. 2021, arXiv 2105.03824) of a wide layer."""

    def __init__(self, whole: bool) -> None:
        super().__init__()
        self.layer, self.out, self.whole = nn.Linear(16, 512), nn.Linear(512, 4), whole
        nn.init.normal_(self.layer.weight, std=0.25)
        nn.init.zeros_(self.layer.bias)

    def forward(self, x: Tensor) -> Tensor:
        spectrum = torch.fft.fft(torch.relu(self.layer(x)), norm="ortho")
        return self.out(spectrum.real if not self.whole else spectrum.abs())


def test_moments_of_a_spectrum() -> None:
    """An orthonormal transform keeps E|z|^2 = E[h^2] = 1/2 (Parseval); taking real parts alone would halve it."""
    rows = {row["name"]: row for row in kgraph.analyze(Mixer(whole=True), torch.randn(2, 16)).to_dict()["nodes"]}
    spectrum = next(row for name, row in rows.items() if name.startswith("fft"))
    layer = rows["relu"]
    assert spectrum["q"] == pytest.approx(layer["q"], rel=0.1)
    assert spectrum["c"] == pytest.approx(layer["c"], abs=0.05)
    assert rows["abs_1"]["q"] == pytest.approx(layer["q"], rel=0.1)
