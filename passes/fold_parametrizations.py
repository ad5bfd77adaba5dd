"""Weight norm, spectral norm and other parametrizations become plain weights."""

from __future__ import annotations

from torch import nn
from torch.nn.utils import parametrize


def fold_parametrizations(model: nn.Module) -> list[str]:
    """Replace every parametrized tensor of ``model`` by its current value, in place; returns their names.

    The rewrite re-draws weights; a parametrization would normalize the new weights again.
    """
    folded = []
    for path, module in list(model.named_modules()):
        if parametrize.is_parametrized(module):
            for name in list(module.parametrizations):  # type: ignore[arg-type]
                parametrize.remove_parametrizations(module, name, leave_parametrized=True)
                folded.append(f"{path}.{name}" if path else name)
        folded += _fold_hooks(path, module)
    return folded


def _fold_hooks(path: str, module: nn.Module) -> list[str]:
    """The older weight_norm and spectral_norm live in forward hooks."""
    folded = []
    for key, hook in list(module._forward_pre_hooks.items()):
        if type(hook).__name__ in ("WeightNorm", "SpectralNorm"):
            name = hook.name  # type: ignore[attr-defined]
            hook.remove(module)  # type: ignore[attr-defined]
            del module._forward_pre_hooks[key]
            folded.append(f"{path}.{name}" if path else name)
    return folded
