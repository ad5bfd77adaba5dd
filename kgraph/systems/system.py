"""What a system is: options as fields, the passes they stand for, and what of a model they set."""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import ClassVar, Literal

from kgraph.passes.base import Pass

Aspect = Literal["norms", "residuals", "activations", "weights"]


@dataclass(frozen=True)
class System(ABC):
    """A method that is a list of passes; `print(Pipeline(system.passes()))` is the recipe.

    Subclasses are frozen dataclasses whose fields are the options, checked when they are made.
    """

    label: ClassVar[str]
    """Name for ``transform(model, "...")`` with default options."""

    @property
    @abstractmethod
    def sets(self) -> frozenset[Aspect]:
        """What of a model it sets: two systems that set the same do not compose."""

    @abstractmethod
    def passes(self) -> tuple[Pass, ...]:
        """The recipe, in order."""

    def checks(self) -> tuple[Pass, ...]:
        """Passes that change nothing and say what came of it: they run once all systems have run."""
        return ()
