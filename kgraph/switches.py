"""Tiny modules that let functional operations follow the module they live in."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn


class TrainingSwitch(nn.Module):
    """Returns one constant in train mode and another in eval mode (a dropout rate, a flag)."""

    def __init__(self, train_value: Any, eval_value: Any) -> None:
        super().__init__()
        self.train_value, self.eval_value = train_value, eval_value

    def forward(self) -> Any:
        return self.train_value if self.training else self.eval_value

    def extra_repr(self) -> str:
        return f"train={self.train_value}, eval={self.eval_value}"


class DeviceAnchor(nn.Module):
    """Returns the device the module lives on, for ``arange`` and its like."""

    anchor: torch.Tensor

    def __init__(self, device: torch.device) -> None:
        super().__init__()
        self.register_buffer("anchor", torch.empty(0, device=device), persistent=False)

    def forward(self) -> torch.device:
        return self.anchor.device


class TypeAnchor(nn.Module):
    """Returns the floating point type that the module is in, for ``zeros`` and its like."""

    anchor: torch.Tensor

    def __init__(self, dtype: torch.dtype) -> None:
        super().__init__()
        self.register_buffer("anchor", torch.empty(0, dtype=dtype), persistent=False)

    def forward(self) -> torch.dtype:
        return self.anchor.dtype
