"""What the command line calls MODEL: a factory, or a file that it saved itself; and which code that may run."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from torch import nn

from kgraph.errors import InputError
from kgraph.naming import NamingError, fingerprint, load_model, parts, read_kwargs
from kgraph.saved import Recipe, SavedModel, read, rebuild


def is_saved(name: str) -> bool:
    """Whether MODEL is meant as a file rather than a factory: no colon, and a suffix like it or a file there."""
    suffix = Path(name).suffix
    return ":" not in name and suffix != ".py" and (suffix in (".pt", ".pth", ".pkl", ".bin") or Path(name).is_file())


def load_any(name: str, kwargs: str = "{}", seed: int = 0, *, trust: bool = False) -> nn.Module:
    """The model that MODEL stands for.

    A saved file is not run. The factory that it names is, without ``trust``, only where the user could have meant
    it: a plain timm name, or a Python file below the present folder or that of the saved file, byte for byte the
    one that made the model, and only what that file defines itself.

    Raises:
        NamingError: MODEL names nothing; InputError, ModelError: see `kgraph.saved`.
    """
    if not is_saved(name):
        return load_model(name, kwargs, seed)
    if read_kwargs(kwargs):
        raise NamingError(f"--kwargs is for a factory, and '{name}' is a saved file: leave it out")
    saved = read(name, trust=trust)
    if not isinstance(saved, SavedModel):
        return saved
    recipe = saved.recipe
    found = _own(recipe, Path(name).resolve().parent)
    if found is None and not trust:
        raise InputError(
            f"'{name}' names code to run that does not lie by it as it was: {recipe.model}",
            hint=f"Pass --trust if you know who made the file, or build the model yourself: "
            f"kgraph.load({name!r}, model)",
        )
    model = load_model(found or recipe.model, recipe.kwargs, recipe.seed, own=not trust)
    return rebuild(saved, model)


def recipe_of(name: str, kwargs: str, seed: int, methods: Sequence[str], shortcut_weight: float | None) -> Recipe:
    """What `kgraph transform --out` writes down besides weights.

    Raises:
        NamingError: MODEL is a saved file itself, or there is no such file.
    """
    if is_saved(name):
        raise NamingError(f"'{name}' is transformed already; --out can save it again with --whole only")
    try:
        source = fingerprint(name)
    except OSError as error:
        raise NamingError(f"there is no file '{parts(name)[0]}'") from error
    return Recipe(name, kwargs, seed, source, tuple(methods), shortcut_weight)


def _own(recipe: Recipe, folder: Path) -> str | None:
    """The recorded factory, found again: by its name from here, or from the folder of the saved file."""
    where, what = parts(recipe.model)
    if where == "timm":
        return recipe.model
    if not recipe.source:
        return None
    for base in (Path.cwd(), folder):
        file = (base / where).resolve()
        if base.resolve() in file.parents and file.is_file() and fingerprint(f"{file}:{what}") == recipe.source:
            return f"{file}:{what}"
    return None


__all__ = ["is_saved", "load_any", "recipe_of"]
