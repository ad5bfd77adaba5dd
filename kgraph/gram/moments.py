"""What is measured on a model's own tensors, measured once: their second moments, means and shares of taps."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeVar

from torch import Tensor

T = TypeVar("T")


class Moments:
    """Measurements by name of the tensor; of one model whose tensors do not change."""

    def __init__(self) -> None:
        self._known: dict[tuple[Callable[..., Any], str], Any] = {}

    def of(self, measure: Callable[[Tensor], T], name: str, tensor: Tensor) -> T:
        """``measure(tensor)``, of the model's tensor of that name."""
        key = (measure, name)
        if key not in self._known:
            self._known[key] = measure(tensor)
        return self._known[key]
