"""Graph parametrization: parents counted, bulk kept, borders evened, in every dimension and size, and exported."""

from __future__ import annotations

import copy
import io
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import kgraph
from kgraph.parent_scale import PARENT_SCALE, ParentScale, Taps

REFERENCE: dict[str, Any] = json.loads((Path(__file__).parent / "reference" / "order_chaos.json").read_text())
PARENTS = {
    "k4s2p1_n4": nn.ConvTranspose1d(2, 3, 4, 2, 1),
    "k3s2p1op1_n4": nn.ConvTranspose1d(2, 3, 3, 2, 1, output_padding=1),
    "k5s2p2op1_n4": nn.ConvTranspose1d(2, 3, 5, 2, 2, output_padding=1),
    "k6s2p2_n4": nn.ConvTranspose1d(2, 3, 6, 2, 2),
}
LAYERS: dict[str, tuple[nn.Module, tuple[int, ...]]] = {
    "transposed 1d": (nn.ConvTranspose1d(4, 6, 4, 2, 1), (4, 7)),
    "transposed 2d": (nn.ConvTranspose2d(4, 6, 4, 2, 1), (4, 4, 5)),
    "transposed 2d uneven": (nn.ConvTranspose2d(4, 6, 3, 2, 1, output_padding=1), (4, 4, 4)),
    "transposed 2d dilated, groups": (nn.ConvTranspose2d(4, 6, 3, (2, 1), 2, groups=2, dilation=(2, 1)), (4, 4, 5)),
    "transposed 3d": (nn.ConvTranspose3d(2, 4, 4, 2, 1), (2, 3, 2, 3)),
    "1d same": (nn.Conv1d(4, 6, 4, padding="same"), (4, 9)),
    "2d": (nn.Conv2d(4, 6, 3, padding=1), (4, 6, 5)),
    "2d strided, dilated, groups": (nn.Conv2d(4, 6, 3, 2, (2, 1), dilation=2, groups=2), (4, 9, 8)),
    "2d without bias": (nn.Conv2d(4, 6, 3, padding=1, bias=False), (4, 6, 5)),
    "3d": (nn.Conv3d(2, 4, 3, padding=1), (2, 4, 3, 4)),
    "padded apart": (nn.Sequential(nn.ZeroPad2d((1, 2, 0, 1)), nn.Conv2d(4, 6, 3)), (4, 6, 5)),
}


def counted(layer: Any, x: Tensor) -> Tensor:
    """Number of taps that meet the image at every output pixel, from the layer itself: ones with ones."""
    copied = copy.deepcopy(layer).double()
    convolution = copied[-1] if isinstance(copied, nn.Sequential) else copied
    with torch.no_grad():
        convolution.weight.fill_(1.0)
        if convolution.bias is not None:
            convolution.bias.zero_()
        total = copied(torch.ones_like(x).double())
    channels = convolution.in_channels // convolution.groups
    return total[:1, :1] / channels


def bare(layer: Any, x: Tensor) -> Tensor:
    """The layer without its bias."""
    copied = copy.deepcopy(layer)
    convolution = copied[-1] if isinstance(copied, nn.Sequential) else copied
    convolution.bias = None
    return copied(x)


@pytest.mark.parametrize("name", PARENTS)
def test_parents_of_the_reference(name: str) -> None:
    layer = PARENTS[name]
    shaped: Any = kgraph.graph_parametrize(layer, torch.randn(2, 2, 4))
    (scale,) = [m for m in shaped.modules() if isinstance(m, ParentScale)]
    stored = REFERENCE["dcnn"]["parents_1d"][name]
    assert scale.taps.parents((4,)).flatten().tolist() == stored
    assert scale.taps.most((4,)) == max(stored)


@pytest.mark.parametrize("name", LAYERS)
def test_definition(name: str) -> None:
    """conv(x, W) M + b with M counted by the layer itself; parameters, names and the model as they were."""
    layer, shape = LAYERS[name]
    x = torch.randn(3, *shape, dtype=torch.float64)
    layer = copy.deepcopy(layer).double()
    state = {key: value.clone() for key, value in layer.state_dict().items()}
    shaped: Any = kgraph.graph_parametrize(layer, x)
    count = counted(layer, x)
    scale = torch.where(count > 0.5, (count.max() / count.clamp_min(1)).sqrt(), 0.0)
    last: Any = layer[-1] if isinstance(layer, nn.Sequential) else layer
    bias = 0.0 if last.bias is None else last.bias.reshape(-1, *(1,) * (len(shape) - 1))
    expected = bare(layer, x) * scale + bias
    assert torch.allclose(shaped(x), expected, rtol=1e-13, atol=1e-13)
    assert list(shaped.state_dict()) == list(state)
    for key, value in shaped.state_dict().items():
        assert torch.equal(value, state[key])
    assert [change.what for change in shaped.kgraph.changes] == ["graph parametrization"]
    assert shaped.training == layer.training


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=["float32", "float64"])
@pytest.mark.parametrize("name", [name for name in LAYERS if name.startswith("transposed")])
def test_bulk_is_bit_identical(name: str, dtype: torch.dtype) -> None:
    layer, shape = LAYERS[name]
    layer = copy.deepcopy(layer).to(dtype)
    x = torch.randn(3, *shape, dtype=dtype)
    count = counted(layer, x)
    bulk = (count > count.max() - 0.5).expand_as(layer(x))
    before, after = layer(x), kgraph.graph_parametrize(layer, x)(x)
    assert bulk.any() and torch.equal(before[bulk], after[bulk])
    assert not torch.allclose(before, after)


def test_convolution_bulk_up_to_the_order_of_its_bias() -> None:
    """A fused convolution may add its bias first; without bias the bulk is bit-identical here too."""
    x = torch.randn(3, 4, 8, 8)
    for bias in (True, False):
        layer = nn.Conv2d(4, 6, 3, padding=1, bias=bias)
        before, after = layer(x)[..., 1:-1, 1:-1], kgraph.graph_parametrize(layer, x)(x)[..., 1:-1, 1:-1]
        assert torch.allclose(before, after, atol=1e-6)
        if not bias:
            assert torch.equal(before, after)


def test_pixels_without_parents_are_the_bias() -> None:
    layer = nn.ConvTranspose1d(2, 3, 1, 3)
    x = torch.randn(2, 2, 4)
    y = kgraph.graph_parametrize(layer, x)(x)
    assert layer.bias is not None
    assert torch.equal(y[..., 1], layer.bias.expand(2, 3)) and torch.equal(y[..., ::3], layer(x)[..., ::3])


def test_even_layers_are_kept() -> None:
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU(), nn.Conv2d(4, 4, 3, padding=1, padding_mode="circular"))
    shaped: Any = kgraph.graph_parametrize(model, torch.randn(2, 3, 8, 8))
    assert not shaped.kgraph.changes and len(shaped.kgraph.kept) == 2
    assert not [m for m in shaped.modules() if isinstance(m, ParentScale)]


def decoder() -> nn.Sequential:
    return nn.Sequential(
        nn.ConvTranspose2d(8, 6, 4, 2, 1),
        nn.ReLU(),
        nn.ConvTranspose2d(6, 4, 4, 2, 1),
        nn.ReLU(),
        nn.Conv2d(4, 3, 3, 1, 1),
    )


def test_other_sizes_and_twice() -> None:
    """A kept M serves its own size; another size is computed; a second run finds nothing to do."""
    x = torch.randn(2, 8, 4, 4)
    shaped: Any = kgraph.graph_parametrize(decoder(), x)
    dynamic: Any = kgraph.graph_parametrize(decoder(), x, dynamic=True)
    dynamic.load_state_dict(shaped.state_dict())
    for size in ((4, 4), (5, 3), (1, 1)):
        other = torch.randn(2, 8, *size)
        assert torch.allclose(shaped(other), dynamic(other), atol=1e-6)
    again: Any = kgraph.graph_parametrize(shaped, x)
    assert not again.kgraph.changes and torch.equal(again(x), shaped(x))
    assert all(m.scale is None for m in dynamic.modules() if isinstance(m, ParentScale))


@pytest.mark.filterwarnings("ignore:.*LeafSpec.*:FutureWarning")  # PyTorch's, about its own pickles
def test_casts_devices_and_copies_keep_the_scale_exact() -> None:
    x = torch.randn(2, 8, 4, 4)
    shaped: Any = kgraph.graph_parametrize(decoder(), x)
    expected = shaped(x)
    there_and_back = copy.deepcopy(shaped).bfloat16()
    assert there_and_back(x.bfloat16()).dtype == torch.bfloat16
    scale = next(m for m in there_and_back.float().modules() if isinstance(m, ParentScale))
    assert scale.scale is not None and torch.equal(scale.scale, scale.taps.scale((4, 4)))
    empty = copy.deepcopy(shaped).to("meta").to_empty(device="cpu")
    empty.load_state_dict(shaped.state_dict())
    assert torch.equal(empty(x), expected)
    stored = io.BytesIO()
    torch.save(shaped, stored)
    stored.seek(0)
    assert torch.equal(torch.load(stored, weights_only=False)(x), expected)
    with torch.autocast("cpu", torch.bfloat16):
        assert shaped(x).dtype == torch.bfloat16


def test_compiles_and_trains() -> None:
    x = torch.randn(2, 8, 4, 4)
    shaped: Any = kgraph.graph_parametrize(decoder(), x)
    compiled = torch.compile(shaped, backend="aot_eager")
    assert torch.allclose(compiled(x), shaped(x), atol=1e-6)
    shaped(x).square().mean().backward()
    assert all(p.grad is not None and bool(p.grad.abs().sum() > 0) for p in shaped.parameters())


def test_onnx(tmp_path: Path) -> None:
    onnx = pytest.importorskip("onnx")
    x = torch.randn(2, 8, 4, 4)
    shaped: Any = kgraph.graph_parametrize(decoder(), x)
    result = kgraph.export_onnx(shaped, tmp_path / "decoder.onnx", x)
    assert result.max_abs_error < 1e-5
    nodes = [node.op_type for node in onnx.load(result.path).graph.node]
    unit = ["ConvTranspose", "Mul", "Add"]
    assert nodes == [*unit, "Relu", *unit, "Relu", "Conv", "Mul", "Add"]


def test_dynamic_sizes_export() -> None:
    """One exported program for every image size."""
    x = torch.randn(2, 8, 4, 4)
    shaped: Any = kgraph.graph_parametrize(decoder(), x, dynamic=True).eval()
    sizes = dict.fromkeys((0, 2, 3), torch.export.Dim.DYNAMIC)
    program = torch.export.export(shaped, (x,), dynamic_shapes=(sizes,))
    other = torch.randn(3, 8, 6, 5)
    assert torch.allclose(program.module()(other), shaped(other), atol=1e-6)


def test_operator_is_in_the_captured_graph() -> None:
    from kgraph.capture import capture

    x = torch.randn(2, 8, 4, 4)
    shaped = kgraph.graph_parametrize(decoder(), x)
    targets = [node.target for node in capture(shaped, x).module.graph.nodes]
    assert targets.count(PARENT_SCALE) == 3


def test_taps_print_and_count() -> None:
    taps = Taps((4,), (2,), (1,), (1,), (1,), (0,), transposed=True)
    assert "transposed, kernel (4,)" in repr(ParentScale(taps, (4,)))
    assert taps.parents((4,)).flatten().tolist() == [1, 2, 2, 2, 2, 2, 2, 1]


@pytest.mark.parametrize("layer", [nn.ConvTranspose2d(8, 6, 4, 2, 1), nn.Conv2d(8, 6, 3, 1, 1)], ids=["up", "same"])
def test_exchangeable_kernel_is_the_average_of_the_exact_one(layer: nn.Module) -> None:
    """q after the scale, from `analyze`, for unit pixels that are unrelated and taps that weigh alike."""
    with torch.no_grad():
        layer.weight.copy_(0.1 * layer.weight.sign())  # type: ignore[operator, union-attr]
    shaped: Any = kgraph.graph_parametrize(layer, torch.randn(2, 8, 4, 4))
    report = kgraph.analyze(shaped, torch.randn(2, 8, 4, 4))
    exact = _white_variance(layer)
    assert report.final.q == pytest.approx(exact, rel=1e-6)
    uniform = kgraph.analyze(layer, torch.randn(2, 8, 4, 4)).final.q
    assert uniform < 0.98 * exact


def _white_variance(layer: Any) -> float:
    """c_max C_in E[w^2] + E[b^2], the same at every pixel."""
    transposed = isinstance(layer, nn.ConvTranspose2d)
    weight, bias = layer.weight.detach().double(), layer.bias.detach().double()
    return float((4 if transposed else 9) * 8 * weight.square().mean() + bias.square().mean())


class Twice(nn.Module):
    """One layer called twice: one weight and one bias."""

    def __init__(self, times: int) -> None:
        super().__init__()
        self.up, self.out, self.times = nn.ConvTranspose2d(4, 4, 4, 2, 1), nn.Conv2d(4, 2, 1), times

    def forward(self, x: Tensor) -> Tensor:
        y = self.up(x) + self.up(x) if self.times == 2 else 2 * self.up(x)
        return self.out(torch.relu(y))


def test_shared_layers_are_one_random_layer() -> None:
    x = torch.randn(3, 4, 3, 3)
    once, twice = (kgraph.graph_parametrize(Twice(times), x) for times in (1, 2))
    twice.load_state_dict(once.state_dict())
    for parametrization in ("ntk", "standard"):
        one, two = (kgraph.kernels(m, x, parametrization=parametrization, positions="full") for m in (once, twice))
        assert torch.allclose(one.nngp, two.nngp, rtol=1e-9)
        assert one.ntk is not None and two.ntk is not None and torch.allclose(one.ntk, two.ntk, rtol=1e-9)
        assert one.how == two.how == "exact"
