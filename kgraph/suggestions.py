"""What a misspelled name was meant to be."""

from __future__ import annotations

from collections.abc import Iterable
from difflib import get_close_matches

from kgraph.errors import InputError

_SHOWN = 8


def meant(word: object, known: Iterable[str], otherwise: str = "") -> str:
    """``Did you mean 'tat'`` for "tta"; ``otherwise`` where nothing known is like ``word``."""
    lowered = {name.lower(): name for name in known}
    near = get_close_matches(word.lower(), lowered, n=3) if isinstance(word, str) else []
    return f"Did you mean {' or '.join(repr(lowered[name]) for name in near)}" if near else otherwise


def no_node(name: object, known: Iterable[str]) -> InputError:
    """The error for a node that is not there, with the names nearest to it, or else with the first ones."""
    names = list(known)
    rest = f" and {len(names) - _SHOWN} more" if len(names) > _SHOWN else ""
    first = ", ".join(names[:_SHOWN])
    return InputError(f"no node is called {name!r}", hint=meant(name, names, f"Known: {first}{rest}"))


__all__ = ["meant", "no_node"]
