"""Drawing the weights of an emitted module anew, in a copy that nobody else sees."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor, nn

from kgraph.emitted import EmittedModule
from kgraph.monte_carlo import as_they_are, signed_permutation
from kgraph.weight_laws import Law


class Redraw:
    """Draws a module's parameters in place; tied ones once.

    Those whose law is recorded are drawn from it, whatever they hold now: trained or loaded weights are forgotten.
    Others get a random signed permutation of their channels, which keeps their variance, but for tables of embeddings
    (rows of which are random inputs already) and single numbers.

    Args:
        module: its parameters are overwritten.
        laws: by parameter name.
    """

    def __init__(self, module: EmittedModule, laws: Mapping[str, Law]) -> None:
        self.module = module
        named = dict(module.named_parameters(remove_duplicate=False))
        self.laws = {id(named[name]): (named[name], law) for name, law in laws.items() if name in named}
        kept = as_they_are(module.graph) | set(_tables(module))
        known = {*self.laws, *(id(named[name]) for name in kept if name in named)}
        others = {id(p): (name, p) for name, p in named.items() if id(p) not in known and p.numel() > 1}
        self.permuted = tuple(name for name, _ in others.values())
        self.others = [(parameter, parameter.detach().clone()) for _, parameter in others.values()]

    @torch.no_grad()
    def __call__(self, generator: torch.Generator) -> None:
        for parameter, law in self.laws.values():
            law.draw_(parameter, generator)
        for parameter, original in self.others:
            parameter.copy_(_permuted(original, generator))

    def note(self) -> str:
        """How the weights are drawn."""
        names = ", ".join(self.permuted[:3]) + (f" and {len(self.permuted) - 3} more" if len(self.permuted) > 3 else "")
        return f"no law is recorded for {names}: permuted, with random signs" if self.permuted else ""


def _permuted(tensor: Tensor, generator: torch.Generator) -> Tensor:
    return signed_permutation(tensor, generator) if tensor.is_floating_point() else tensor


def _tables(module: nn.Module) -> list[str]:
    found = []
    for path, one in module.named_modules():
        if isinstance(one, nn.Embedding):
            found.append(f"{path}.weight".lstrip("."))
    return found
