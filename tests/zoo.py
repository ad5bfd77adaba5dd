"""Small versions of many architectures: builders that return ``(model, example_inputs)``, by name in `ZOO`.

Random weights come from the caller's seed (``build`` forks the global generator), so every test sees one model.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

Built = tuple[nn.Module, Any]


def define_torchvision_operators() -> torch.library.Library | None:
    """Schemas that torchvision's import expects and that a CPU-only torch lacks; None if they exist already."""
    if "torchvision::nms" in torch._C._dispatch_get_all_op_names():
        return None
    library = torch.library.Library("torchvision", "FRAGMENT")
    for name in ("nms", "qnms"):
        library.define(f"{name}(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
    return library


_LIBRARY = define_torchvision_operators()  # kept: the schemas live as long as this object


def build(name: str, seed: int = 0) -> Built:
    """The model called ``name`` and its example inputs; the global generator is left as it was."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return ZOO[name]()


def mlp(width: int = 512, depth: int = 3, activation: type[nn.Module] = nn.ReLU) -> Built:
    layers: list[nn.Module] = [nn.Linear(32, width)]
    for _ in range(depth - 1):
        layers += [activation(), nn.Linear(width, width)]
    return nn.Sequential(*layers, activation(), nn.Linear(width, 10)), torch.randn(2, 32)


def cnn(width: int = 64) -> Built:
    model = nn.Sequential(
        nn.Conv2d(3, width, 3, padding=1),
        nn.ReLU(),
        nn.Conv2d(width, width, 3, stride=2, padding=1),
        nn.BatchNorm2d(width),
        nn.ReLU(),
        nn.MaxPool2d(2),
        nn.Conv2d(width, width, 3),
        nn.Tanh(),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
        nn.Linear(width, 10),
    )
    return model, torch.randn(2, 3, 32, 32)


def dcgan_generator(latent: int = 64, width: int = 32) -> Built:
    def up(before: int, after: int, stride: int, padding: int) -> list[nn.Module]:
        return [
            nn.ConvTranspose2d(before, after, 4, stride, padding, bias=False),
            nn.BatchNorm2d(after),
            nn.ReLU(),
        ]

    model = nn.Sequential(
        *up(latent, width * 8, 1, 0),
        *up(width * 8, width * 4, 2, 1),
        *up(width * 4, width * 2, 2, 1),
        nn.ConvTranspose2d(width * 2, 3, 4, 2, 1, bias=False),
        nn.Tanh(),
    )
    return model, torch.randn(2, latent, 1, 1)


class DoubleConv(nn.Sequential):
    def __init__(self, before: int, after: int) -> None:
        super().__init__(
            nn.Conv2d(before, after, 3, padding=1),
            nn.BatchNorm2d(after),
            nn.ReLU(),
            nn.Conv2d(after, after, 3, padding=1),
            nn.BatchNorm2d(after),
            nn.ReLU(),
        )


class UNet(nn.Module):
    """Two levels down and up, with concatenated skips."""

    def __init__(self, width: int, mode: str) -> None:
        super().__init__()
        self.mode = mode
        self.enter, self.down1, self.down2 = (
            DoubleConv(3, width),
            DoubleConv(width, width * 2),
            DoubleConv(width * 2, width * 4),
        )
        self.up1, self.up2 = DoubleConv(width * 6, width * 2), DoubleConv(width * 3, width)
        self.head = nn.Conv2d(width, 2, 1)

    def _up(self, x: Tensor) -> Tensor:
        corners = None if self.mode == "nearest" else False
        return functional.interpolate(x, scale_factor=2, mode=self.mode, align_corners=corners)

    def forward(self, x: Tensor) -> Tensor:
        one = self.enter(x)
        two = self.down1(functional.max_pool2d(one, 2))
        three = self.down2(functional.max_pool2d(two, 2))
        x = self.up1(torch.cat([self._up(three), two], 1))
        x = self.up2(torch.cat([self._up(x), one], 1))
        return self.head(x)


def unet(width: int = 16, mode: str = "nearest") -> Built:
    return UNet(width, mode), torch.randn(2, 3, 32, 32)


def timm_model(name: str, size: int = 64, **options: Any) -> Built:
    """A timm model at a small image size."""
    import timm

    return timm.create_model(name, pretrained=False, **options), torch.randn(2, 3, size, size)


def vgg16() -> Built:
    """timm's VGG-16 at a quarter of its width; its classifier needs 7 x 7 features, hence 224 x 224 pixels."""
    from timm.models.vgg import VGG

    stages = [(16, 2), (32, 2), (64, 3), (128, 3), (128, 3)]
    cfg = [layer for width, count in stages for layer in (*[width] * count, "M")]
    return VGG(cfg, mlp_ratio=0.125), torch.randn(2, 3, 224, 224)


def bert() -> Built:
    from transformers import BertConfig, BertModel

    config = BertConfig(
        vocab_size=100,
        hidden_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        intermediate_size=128,
        max_position_embeddings=32,
    )
    return BertModel(config), {"input_ids": torch.randint(0, 100, (2, 16))}


def gpt2() -> Built:
    from transformers import GPT2Config, GPT2LMHeadModel

    config = GPT2Config(vocab_size=100, n_embd=64, n_layer=2, n_head=4, n_positions=32, use_cache=False)
    return GPT2LMHeadModel(config), {"input_ids": torch.randint(0, 100, (2, 16))}


def llama() -> Built:
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        vocab_size=100,
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=32,
        use_cache=False,
    )
    return LlamaForCausalLM(config), {"input_ids": torch.randint(0, 100, (2, 16))}


class Recurrent(nn.Module):
    """Sequence classifier on the last state of an LSTM or a GRU."""

    def __init__(self, kind: type[nn.LSTM] | type[nn.GRU], width: int) -> None:
        super().__init__()
        self.cell = kind(16, width, batch_first=True)
        self.head = nn.Linear(width, 10)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.cell(x)[0][:, -1])


class Siamese(nn.Module):
    """One encoder applied to two inputs; the outputs are compared."""

    def __init__(self, width: int = 256) -> None:
        super().__init__()
        self.encoder = nn.Sequential(nn.Linear(32, width), nn.ReLU(), nn.Linear(width, width), nn.Tanh())
        self.head = nn.Linear(width, 1)

    def forward(self, left: Tensor, right: Tensor) -> Tensor:
        return self.head(self.encoder(left) * self.encoder(right))


class HandSwish(nn.Module):
    """x * sigmoid(x), written out."""

    def forward(self, x: Tensor) -> Tensor:
        return x * torch.sigmoid(x)


class HandHardswish(nn.Module):
    """x * relu6(x + 3) / 6, written out."""

    def forward(self, x: Tensor) -> Tensor:
        return x * functional.relu6(x + 3) / 6


class SkipRelu(nn.Module):
    """x + relu(x)."""

    def forward(self, x: Tensor) -> Tensor:
        return x + torch.relu(x)


class SqueezeExcite(nn.Module):
    """Convolution with a channel gate computed from its own global average."""

    def __init__(self, width: int = 64) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, width, 3, padding=1)
        self.squeeze, self.excite = nn.Conv2d(width, width // 4, 1), nn.Conv2d(width // 4, width, 1)
        self.after = nn.Conv2d(width, width, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        x = torch.relu(self.conv(x))
        gate = torch.sigmoid(self.excite(torch.relu(self.squeeze(x.mean((2, 3), keepdim=True)))))
        return self.after(x * gate)


class SwiGLU(nn.Module):
    """Gated layers: silu(a) * b of two projections, then GLU by chunking one projection."""

    def __init__(self, width: int = 256) -> None:
        super().__init__()
        self.gate, self.up = nn.Linear(32, width), nn.Linear(32, width)
        self.down = nn.Linear(width, width)
        self.both = nn.Linear(width, 2 * width)
        self.head = nn.Linear(width, 10)

    def forward(self, x: Tensor) -> Tensor:
        x = self.down(functional.silu(self.gate(x)) * self.up(x))
        value, gate = self.both(x).chunk(2, -1)
        return self.head(functional.glu(torch.cat([value, gate], -1)) + value * torch.sigmoid(gate))


class TwoInputs(nn.Module):
    """An image branch and a vector branch, added and concatenated."""

    def __init__(self, width: int = 128) -> None:
        super().__init__()
        self.image = nn.Sequential(nn.Conv2d(3, width, 3), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten())
        self.vector = nn.Sequential(nn.Linear(16, width), nn.ReLU())
        self.head = nn.Linear(2 * width, 10)

    def forward(self, image: Tensor, vector: Tensor) -> Tensor:
        one, two = self.image(image), self.vector(vector)
        return self.head(torch.cat([one, one + two], 1))


def lstm(width: int = 64) -> Built:
    return Recurrent(nn.LSTM, width), torch.randn(2, 6, 16)


def gru(width: int = 64) -> Built:
    return Recurrent(nn.GRU, width), torch.randn(2, 6, 16)


def siamese() -> Built:
    return Siamese(), (torch.randn(2, 32), torch.randn(2, 32))


def hand_written(width: int = 256) -> Built:
    layers: list[nn.Module] = [nn.Linear(32, width)]
    for activation in (HandSwish(), HandHardswish(), SkipRelu()):
        layers += [activation, nn.Linear(width, width)]
    return nn.Sequential(*layers), torch.randn(2, 32)


def squeeze_excite() -> Built:
    return SqueezeExcite(), torch.randn(2, 3, 16, 16)


def swiglu() -> Built:
    return SwiGLU(), torch.randn(2, 32)


def two_inputs() -> Built:
    return TwoInputs(), (torch.randn(2, 3, 12, 12), torch.randn(2, 16))


ZOO: dict[str, Callable[[], Built]] = {
    "mlp": mlp,
    "cnn": cnn,
    "dcgan_generator": dcgan_generator,
    "unet": unet,
    "unet_bilinear": lambda: unet(mode="bilinear"),
    "resnet18": lambda: timm_model("resnet18"),
    "resnet50": lambda: timm_model("resnet50"),
    "vgg16": vgg16,
    "densenet121": lambda: timm_model("densenet121", block_config=(3, 6, 12, 8)),  # half its layers
    "mobilenetv3_small": lambda: timm_model("mobilenetv3_small_100"),
    "efficientnet_b0": lambda: timm_model("efficientnet_b0"),
    "convnext_atto": lambda: timm_model("convnext_atto"),
    "convnext_tiny": lambda: timm_model("convnext_tiny"),
    "vit_tiny": lambda: timm_model("vit_tiny_patch16_224", img_size=64),
    "mixer_s32": lambda: timm_model("mixer_s32_224", img_size=64),
    "resnetv2_50": lambda: timm_model("resnetv2_50"),
    "nf_resnet50": lambda: timm_model("nf_resnet50"),
    "swin_tiny": lambda: timm_model("swin_tiny_patch4_window7_224", 112, img_size=112, depths=(2, 2, 2, 2)),
    "poolformer_s12": lambda: timm_model("poolformer_s12"),
    "bert": bert,
    "gpt2": gpt2,
    "llama": llama,
    "lstm": lstm,
    "gru": gru,
    "siamese": siamese,
    "hand_written": hand_written,
    "squeeze_excite": squeeze_excite,
    "swiglu": swiglu,
    "two_inputs": two_inputs,
}
