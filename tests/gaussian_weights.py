"""PyTorch draws uniform weights; of few inputs, that they are no Gaussians shows, and reports say so."""

from __future__ import annotations

from typing import TypeVar

import torch
from torch import nn

Module = TypeVar("Module", bound=nn.Module)


def with_gaussian_weights(model: Module) -> Module:
    """The model itself, its matrices drawn anew as Gaussians of as large a variance."""
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim > 1:
                parameter.normal_(0, float(parameter.square().mean().sqrt()), generator=generator)
    return model
