"""The architectures, thin enough for two cores: 32x32 images of one channel in, ten classes out."""

from __future__ import annotations

from collections.abc import Callable

import torch
from timm.layers.create_conv2d import create_conv2d
from timm.layers.norm_act import BatchNormAct2d
from timm.models.convnext import ConvNeXt
from timm.models.efficientnet import tinynet_e
from timm.models.mlp_mixer import MlpMixer
from timm.models.mobilenetv3 import mobilenetv3_small_050
from timm.models.regnet import RegNet, RegNetCfg
from timm.models.resnet import BasicBlock, Bottleneck, ResNet
from timm.models.resnetv2 import ResNetV2
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor, nn
from torchvision.models import DenseNet

_IMAGES = {"in_chans": 1, "num_classes": 10}
_THIN = {"channels": (8, 16, 32, 64), "stem_width": 8, **_IMAGES}


def _plain(widths: tuple[int, ...], pools: tuple[int, ...]) -> nn.Module:
    """3x3 convolutions with BatchNorm and relu, no skips, max pooling behind some."""
    layers: list[nn.Module] = []
    inputs = 1
    for i, width in enumerate(widths):
        layers += [nn.Conv2d(inputs, width, 3, padding=1, bias=False), nn.BatchNorm2d(width), nn.ReLU()]
        layers += [nn.MaxPool2d(2)] if i in pools else []
        inputs = width
    return nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(inputs, 10))


def _mlp(depth: int, width: int) -> nn.Module:
    layers: list[nn.Module] = [nn.Flatten()]
    for i in range(depth):
        layers += [nn.Linear(1024 if i == 0 else width, width, bias=False), nn.BatchNorm1d(width), nn.ReLU()]
    return nn.Sequential(*layers, nn.Linear(width, 10))


def _discriminator() -> nn.Module:
    """DCGAN's: strided convolutions, BatchNorm, leaky relu of slope .2; ten classes for its one answer."""
    layers: list[nn.Module] = []
    inputs = 1
    for width in (16, 32, 64):
        layers += [nn.Conv2d(inputs, width, 4, 2, 1, bias=False), nn.BatchNorm2d(width), nn.LeakyReLU(0.2)]
        inputs = width
    return nn.Sequential(*layers, nn.Conv2d(inputs, 10, 4), nn.Flatten())


def _dense() -> nn.Module:
    net = DenseNet(growth_rate=8, block_config=(3, 6, 6, 4), num_init_features=16, num_classes=10)
    net.features.conv0 = nn.Conv2d(1, 16, 7, 2, 3, bias=False)
    return net


class _Segmenter(nn.Module):
    """A U-Net of three levels, read out by its average."""

    def __init__(self) -> None:
        super().__init__()
        self.down = nn.ModuleList([_pair(1, 8), _pair(8, 16), _pair(16, 32)])
        self.up = nn.ModuleList([nn.ConvTranspose2d(32, 16, 2, 2), nn.ConvTranspose2d(16, 8, 2, 2)])
        self.join = nn.ModuleList([_pair(32, 16), _pair(16, 8)])
        self.pool, self.head = nn.MaxPool2d(2), nn.Linear(8, 10)

    def forward(self, x: Tensor) -> Tensor:
        one = self.down[0](x)
        two = self.down[1](self.pool(one))
        y = self.down[2](self.pool(two))
        y = self.join[0](torch.cat((self.up[0](y), two), 1))
        y = self.join[1](torch.cat((self.up[1](y), one), 1))
        return self.head(y.mean((2, 3)))


def _pair(inputs: int, width: int) -> nn.Module:
    layers: list[nn.Module] = []
    for before in (inputs, width):
        layers += [nn.Conv2d(before, width, 3, padding=1, bias=False), nn.BatchNorm2d(width), nn.ReLU()]
    return nn.Sequential(*layers)


_V2 = {"stem_type": "same", "preact": True, "norm_layer": BatchNormAct2d, "conv_layer": create_conv2d, **_IMAGES}
WITH_SKIPS: dict[str, Callable[[], nn.Module]] = {
    "resnet18": lambda: ResNet(BasicBlock, (2, 2, 2, 2), **_THIN),  # pyright: ignore
    "resnet50": lambda: ResNet(Bottleneck, (3, 4, 6, 3), **_THIN),  # pyright: ignore
    "resnet18 + squeeze": lambda: ResNet(BasicBlock, (2, 2, 2, 2), block_args={"attn_layer": "se"}, **_THIN),  # pyright: ignore
    "resnext50": lambda: ResNet(Bottleneck, (3, 4, 6, 3), cardinality=4, base_width=32, **_THIN),  # pyright: ignore
    "resnetv2-18": lambda: ResNetV2((2, 2, 2, 2), (8, 16, 32, 64), stem_chs=8, basic=True, **_V2),  # pyright: ignore
    "resnetv2-50": lambda: ResNetV2((3, 4, 6, 3), (32, 64, 128, 256), stem_chs=8, **_V2),  # pyright: ignore
    "densenet": _dense,
    "convnext": lambda: ConvNeXt(**_IMAGES, depths=(2, 2, 6, 2), dims=(16, 32, 64, 96), patch_size=2),  # pyright: ignore
    "mobilenetv3": lambda: mobilenetv3_small_050(**_IMAGES, drop_rate=0.0),
    "efficientnet": lambda: tinynet_e(**_IMAGES, drop_rate=0.0),
    "regnet": lambda: RegNet(RegNetCfg(w0=16, wa=12.0, wm=1.8, depth=10, group_size=8, stem_width=16), **_IMAGES),  # pyright: ignore
    "mixer": lambda: MlpMixer(img_size=32, patch_size=4, num_blocks=6, embed_dim=64, **_IMAGES),  # pyright: ignore
    "vit": lambda: VisionTransformer(img_size=32, patch_size=4, embed_dim=64, depth=6, num_heads=4, **_IMAGES),  # pyright: ignore
    "u-net": _Segmenter,
}
WITHOUT_SKIPS: dict[str, Callable[[], nn.Module]] = {
    "vgg11": lambda: _plain((8, 16, 32, 32, 64, 64, 64, 64), (0, 1, 3)),
    "cnn50": lambda: _plain((16,) * 17 + (32,) * 17 + (64,) * 16, (16, 33)),
    "mlp50": lambda: _mlp(50, 128),
    "dcgan": _discriminator,
}
NETS = {**WITH_SKIPS, **WITHOUT_SKIPS}
