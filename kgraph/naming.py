"""Models and inputs as the command line names them."""

from __future__ import annotations

import hashlib
import importlib
import importlib.util
import json
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
from torch import Tensor, nn

from kgraph.checks import seeded
from kgraph.failures import failed
from kgraph.suggestions import meant

FORMS = "timm:NAME, package.module:FACTORY or path/to/file.py:FACTORY"
_DTYPES = {"float": torch.float32, "double": torch.float64, "half": torch.float16, "bool": torch.bool}
_INTEGERS = {"int": torch.int32, "long": torch.int64}


class NamingError(ValueError):
    """The command line names something that is not there; the message is for the user as it stands."""


def load_model(name: str, kwargs: str = "{}", seed: int = 0, *, own: bool = False) -> nn.Module:
    """The model that `name` stands for, its factory called with `kwargs` (JSON) after seeding torch.

    Args:
        own: only what the named file itself defines, not what it imports.

    Raises:
        NamingError: there is no such module, file or factory, or it does not give a model.
        InputError: a seed that PyTorch does not take.
    """
    options = read_kwargs(kwargs)
    where, what = parts(name)
    torch.manual_seed(seeded(seed))  # the factory draws its weights from the global generator: no other way in
    if where == "timm":
        return _timm(what, options)
    module = _import_file(Path(where)) if where.endswith(".py") else _import_module(where)
    factory = _find(module, where, what)
    if own and not isinstance(factory, nn.Module) and getattr(factory, "__module__", None) != module.__name__:
        raise NamingError(f"'{where}' does not define '{what}' itself")
    return _call(factory, name, options)


def parts(name: str) -> tuple[str, str]:
    """Where a model is and what it is called there.

    Raises:
        NamingError: not of one of the forms.
    """
    where, colon, what = name.rpartition(":")
    if not (colon and where and what):
        raise NamingError(f"'{name}' does not name a model: write {FORMS}")
    return where, what


def fingerprint(name: str) -> str:
    """SHA-256 of the Python file that a model's name leads to; "" where it names no file."""
    where, _ = parts(name)
    return hashlib.sha256(Path(where).read_bytes()).hexdigest() if where.endswith(".py") else ""


def read_kwargs(text: str) -> dict[str, Any]:
    """Keyword arguments from a JSON object."""
    try:
        options = json.loads(text)
    except (json.JSONDecodeError, RecursionError) as error:
        raise NamingError(f"--kwargs is not JSON ({error}); write e.g. '{{\"width\": 3}}'") from error
    if not isinstance(options, dict):
        raise NamingError(f"--kwargs must be a JSON object such as '{{\"width\": 3}}', not {text}")
    return options


def read_input(text: str) -> Tensor:
    """An example input from its shape: "2,3,32,32" is Gaussian, "2,128:long" holds token ids 0 and 1."""
    shape_text, _, kind = text.partition(":")
    try:
        shape = tuple(int(size) for size in shape_text.replace("x", ",").split(","))
    except ValueError:
        raise NamingError(f"--input {text}: write a shape such as 1,3,224,224 or 1,128:long") from None
    if min(shape) < 1:
        raise NamingError(f"--input {text}: sizes are 1 or more")
    if kind and kind not in (*_DTYPES, *_INTEGERS):
        raise NamingError(f"--input {text}: unknown type '{kind}', use {', '.join([*_DTYPES, *_INTEGERS])}")
    generator = torch.Generator().manual_seed(0)
    try:
        if kind in _INTEGERS:
            return torch.randint(0, 2, shape, generator=generator, dtype=_INTEGERS[kind])
        return torch.randn(shape, generator=generator).to(_DTYPES[kind or "float"])
    except (RuntimeError, TypeError) as error:
        raise NamingError(f"--input {text}: a tensor of that size cannot be made: {failed(error)}") from error


def _timm(name: str, options: dict[str, Any]) -> nn.Module:
    try:
        import timm
    except ImportError as error:
        raise NamingError(f"'timm:{name}' needs timm ({error}); install it with: pip install timm") from error
    except Exception as error:  # a torchvision made for another torch raises a RuntimeError of its own
        raise NamingError(f"importing timm for 'timm:{name}' failed: {failed(error)}") from error
    return _call(lambda **given: timm.create_model(name, **given), f"timm:{name}", options)


def _find(module: ModuleType, where: str, what: str) -> Any:
    found: Any = module
    for part in what.split("."):
        try:
            found = getattr(found, part)
        except AttributeError:
            near = meant(part, [name for name in dir(found) if not name.startswith("_")])
            raise NamingError(f"'{where}' has no '{what}'{f': {near[0].lower()}{near[1:]}?' if near else ''}") from None
    return found


def _import_module(where: str) -> ModuleType:
    if "" not in sys.path:
        sys.path.insert(0, "")  # an installed command does not look into the current directory by itself
    try:
        return importlib.import_module(where)
    except (Exception, SystemExit) as error:  # whatever the user's own code raises
        raise NamingError(f"cannot import '{where}': {failed(error)}") from error


def _import_file(path: Path) -> ModuleType:
    if not path.is_file():
        raise NamingError(f"there is no file '{path}'")
    name = path.stem if path.stem not in sys.modules else f"{path.stem}_file"  # a torch.py must not replace torch
    spec = importlib.util.spec_from_file_location(name, path)
    if spec is None or spec.loader is None:
        raise NamingError(f"'{path}' is not a Python file")
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module  # before execution, so that its classes can be pickled
    sys.path.insert(0, str(path.parent.resolve()))  # its neighbours are imported as if it were run
    try:
        spec.loader.exec_module(module)
    except (Exception, SystemExit) as error:  # whatever the user's own code raises
        del sys.modules[name]
        raise NamingError(f"'{path}' cannot be run: {failed(error)}") from error
    return module


def _call(factory: Any, name: str, options: dict[str, Any]) -> nn.Module:
    if isinstance(factory, nn.Module):
        return factory
    if not callable(factory):
        raise NamingError(f"'{name}' is a {type(factory).__name__}, not a model or a function that returns one")
    try:
        model = factory(**options)
    except (Exception, SystemExit) as error:  # whatever the user's own code raises
        raise NamingError(f"'{name}' failed: {failed(error)}") from error
    if not isinstance(model, nn.Module):
        raise NamingError(f"'{name}' returned a {type(model).__name__}, not a torch.nn.Module")
    return model
