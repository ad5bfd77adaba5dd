"""The errors kgraph raises.

Every message says, in one sentence each: what is wrong, at which node and source line, and what to do.
"""

from __future__ import annotations


class KGraphError(Exception):
    """Base of every error kgraph raises on purpose.

    Args:
        what: the problem, in one sentence.
        node: name of the graph node or module it concerns.
        source: ``file:line`` in the user's code, when known.
        hint: what to do about it.
    """

    def __init__(
        self, what: str, *, node: str | None = None, source: str | None = None, hint: str | None = None
    ) -> None:
        self.what, self.node, self.source, self.hint = what, node, source, hint
        where = [f"node '{node}'" if node else "", source or ""]
        place = ", ".join(part for part in where if part)
        message = what.rstrip(".") + (f" (at {place})." if place else ".")
        super().__init__(message + (f" {hint.rstrip('.')}." if hint else ""))


class ModelError(KGraphError):
    """The object handed over is not a model that can be compiled (not a module, already wrapped)."""


class InputError(KGraphError):
    """An argument is outside its domain, or the example inputs do not fit the model."""


class FileError(InputError, OSError):
    """A file cannot be written."""

    def __init__(self, path: object, reason: object, *, hint: str = "Pass a path you may write to") -> None:
        super().__init__(f"cannot write {path}: {reason}", hint=hint)


class CaptureError(KGraphError):
    """The model's forward could not be captured as a graph."""


class RuleError(KGraphError):
    """A kernel rule was asked for something it cannot do truthfully."""


class TargetError(KGraphError):
    """A shaping target cannot be met; the message names what binds."""


class PassError(KGraphError):
    """A rewrite pass could not keep its promise."""


class ExportError(KGraphError):
    """The model could not be exported or the export does not reproduce it."""
