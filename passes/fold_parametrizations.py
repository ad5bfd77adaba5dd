"""Weight norm, spectral norm and other parametrizations become plain weights."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn
from torch.nn.modules.module import _WrappedHook
from torch.nn.utils import parametrize

from kgraph.errors import ModelError

_NORMS_OF_TORCH = tuple(f"torch.nn.utils.{name}" for name in ("parametrizations", "weight_norm", "spectral_norm"))


def fold_parametrizations(model: nn.Module) -> list[str]:
    """Replace every parametrized tensor of ``model`` by its current value, in place; returns their names.

    The rewrite re-draws weights; a parametrization would normalize the new weights again.
    """
    if not isinstance(model, nn.Module):
        raise ModelError(f"expected a torch.nn.Module, got {type(model).__name__}", hint="Pass the model itself")
    folded = []
    for path, module in list(model.named_modules()):
        if parametrize.is_parametrized(module):
            _give_own_class(module)
            for name in list(module.parametrizations):  # type: ignore[arg-type]
                parametrize.remove_parametrizations(module, name, leave_parametrized=True)
                folded.append(f"{path}.{name}" if path else name)
            _forget_state_hooks(module)
    return folded + fold_hooks(model)


def constraints(model: nn.Module) -> list[str]:
    """Parametrizations that are no norms of torch's own: what they hold a weight to is lost with them."""
    return [
        f"{path}.{name}" if path else name
        for path, module in model.named_modules()
        if parametrize.is_parametrized(module)
        for name, chain in module.parametrizations.items()  # type: ignore[union-attr]
        if any(not _is_norm(one) for one in chain)
    ]


def _is_norm(parametrization: nn.Module) -> bool:
    of_torch = type(parametrization).__module__ == "torch.nn.utils.parametrizations"
    return of_torch and "Norm" in type(parametrization).__name__


def _give_own_class(module: nn.Module) -> None:
    """A class of the module's own: torch makes one per parametrized module, copies share it, and folding empties it."""
    shared = type(module)
    module.__class__ = type(shared.__name__, shared.__bases__, dict(shared.__dict__))  # pyright: ignore[reportAttributeAccessIssue]


def _forget_state_hooks(module: nn.Module) -> None:
    """torch's hooks that translate the names of a normalized weight: they outlive it, and one cannot be pickled."""
    for hooks in (module._state_dict_hooks, module._load_state_dict_pre_hooks):
        for key, hook in list(hooks.items()):
            inner = hook.hook if isinstance(hook, _WrappedHook) else hook
            if inner.__module__ in _NORMS_OF_TORCH:
                del hooks[key]


def fold_hooks(model: nn.Module) -> list[str]:
    """The same for the older weight_norm and spectral_norm, which live in forward hooks and cannot be captured."""
    folded = []
    for path, module, key, hook in _hooks(model):
        with torch.no_grad():
            hook(module, ())  # what the next forward would do: spectral norm first improves its estimate
        hook.remove(module)
        del module._forward_pre_hooks[key]
        _forget_state_hooks(module)
        folded.append(f"{path}.{hook.name}" if path else hook.name)
    return folded


def has_hooks(model: nn.Module) -> bool:
    """Whether `fold_hooks` would find any."""
    return bool(_hooks(model))


def _hooks(model: nn.Module) -> list[tuple[str, nn.Module, int, Any]]:
    return [
        (path, module, key, hook)
        for path, module in model.named_modules()
        for key, hook in module._forward_pre_hooks.items()
        if type(hook).__name__ in ("WeightNorm", "SpectralNorm")
    ]
