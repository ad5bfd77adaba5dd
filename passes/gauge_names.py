"""Operations that keep a factor, or a constant as well, by name."""

from __future__ import annotations

from typing import Any

from torch import fx, nn

CARRY = {
    *("view", "reshape", "flatten", "unflatten", "transpose", "t", "numpy_T", "permute", "movedim", "unsqueeze"),
    *("squeeze", "expand", "contiguous", "clone", "select", "slice", "narrow", "split", "split_with_sizes", "chunk"),
    *("unbind", "getitem", "cat", "stack", "concat", "roll", "flip", "repeat", "index_select", "mean", "amax", "amin"),
    *("dropout", "feature_dropout", "alpha_dropout", "feature_alpha_dropout", "detach", "alias", "maximum", "minimum"),
    *("pixel_shuffle", "pixel_unshuffle", "channel_shuffle", "adaptive_max_pool1d"),
    *(f"{pool}_pool{d}d" for pool in ("max", "adaptive_avg") for d in (1, 2, 3)),
    *(f"upsample_{mode}" for mode in ("nearest1d", "nearest2d", "nearest3d", "linear1d", "bilinear2d")),
    *("upsample_bicubic2d", "upsample_trilinear3d"),
    *(f"{kind}_pad{d}d" for kind in ("reflection", "replication") for d in (1, 2, 3)),
    *("Dropout", "Dropout1d", "Dropout2d", "Dropout3d", "AlphaDropout", "FeatureAlphaDropout", "Identity", "Flatten"),
    *("Unflatten", "PixelShuffle", "PixelUnshuffle", "ChannelShuffle", "Upsample"),
    *(f"{pool}Pool{d}d" for pool in ("Max", "AdaptiveAvg") for d in (1, 2, 3)),
    *(f"{kind}Pad{d}d" for kind in ("Reflection", "Replication", "Circular") for d in (1, 2, 3)),
}
"""By name: what of constants a and b > 0 makes f(a + b x) = a + b f(x), in eval mode."""

CARRY_SCALE = {
    *("sum", "relu", "leaky_relu", "abs", "constant_pad_nd", "tril", "triu"),
    *("ReLU", "LeakyReLU", "ZeroPad1d", "ZeroPad2d", "ZeroPad3d"),
    *(f"avg_pool{d}d" for d in (1, 2, 3)),
    *(f"AvgPool{d}d" for d in (1, 2, 3)),
}
"""By name: what of b > 0 makes f(b x) = b f(x)."""


def pads(node: fx.Node, module: nn.Module | None) -> bool:
    """Whether an average counts zeros at the border."""
    padding: Any = node.args[3] if len(node.args) > 3 else node.kwargs.get("padding", 0)
    if isinstance(module, (nn.AvgPool1d, nn.AvgPool2d, nn.AvgPool3d)):
        padding = module.padding
    return any(padding) if isinstance(padding, (list, tuple)) else bool(padding)


def pads_a_number(node: fx.Node, name: str) -> bool:
    """Whether a constant other than zero is put around a tensor."""
    value = node.args[2] if len(node.args) > 2 else node.kwargs.get("value", 0)
    return name == "constant_pad_nd" and value not in (0, None)


__all__ = ["CARRY", "CARRY_SCALE", "pads", "pads_a_number"]
