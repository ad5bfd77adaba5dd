"""The command line's terminal: what errors look like there, which code they exit with, and signs that work goes on."""

from __future__ import annotations

import errno
import io
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import typer
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from rich.text import Text
from typer.core import TyperGroup

from kgraph.errors import KGraphError

SHOWN_AFTER = 1.0  # seconds
_UNPRINTED = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EIO)


class Group(TyperGroup):
    """Wrong usage exits with 1 (click's own choice is 2), what kgraph refuses with 2 and one red line."""

    def make_context(self, *args: Any, **kwargs: Any) -> Any:
        with _exit_codes():
            return super().make_context(*args, **kwargs)

    def invoke(self, ctx: Any) -> Any:
        with _exit_codes():
            result = super().invoke(ctx)
            sys.stdout.flush()  # a full disk behind it is ours to report, not the interpreter's at its end
            return result


@contextmanager
def _exit_codes() -> Iterator[None]:
    usage_error: Any = typer.BadParameter.__bases__[0]
    try:
        yield
    except KGraphError as error:
        errors().print(Text(f"error: {error}", style="bold red"), soft_wrap=True)
        raise typer.Exit(2) from error
    except usage_error as error:
        error.exit_code = 1
        raise
    except BrokenPipeError:
        raise  # the reader has gone: typer ends quietly
    except OSError as error:
        if error.errno not in _UNPRINTED:
            raise
        sys.stdout = io.StringIO()  # what is left in the buffer would fail again at the interpreter's end
        errors().print(Text(f"error: cannot print: {error.strerror}", style="bold red"), soft_wrap=True)
        raise typer.Exit(2) from error


@contextmanager
def spinner(text: str, console: Console | None = None) -> Iterator[None]:
    """Something that turns, beside ``text``, once it has lasted a second."""
    console = console or errors()
    if not console.is_terminal:
        yield
        return
    status = console.status(Text(text))
    with _later(status.start, status.stop):
        yield


@contextmanager
def bar(text: str, console: Console | None = None) -> Iterator[Callable[[int, int], None] | None]:
    """A bar that the caller moves with (done, total), once it has lasted a second; None without a terminal."""
    console = console or errors()
    if not console.is_terminal:
        yield None
        return
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    progress = Progress(*columns, console=console, transient=True)
    task = progress.add_task(text, total=None)
    with _later(progress.start, progress.stop):
        yield lambda done, total: progress.update(task, completed=done, total=total)


@contextmanager
def _later(start: Callable[[], None], stop: Callable[[], None]) -> Iterator[None]:
    timer = threading.Timer(SHOWN_AFTER, start)
    timer.daemon = True
    timer.start()
    try:
        yield
    finally:
        timer.cancel()
        timer.join()  # it may be starting the display this very moment
        stop()


def console() -> Console:
    """Standard output; of plain width where it is no terminal."""
    from kgraph.report.table import PLAIN_WIDTH  # here, for a quick --help: reports import torch

    own = Console(file=sys.stdout, highlight=False)
    return own if own.is_terminal else Console(file=sys.stdout, width=PLAIN_WIDTH, highlight=False)


def errors() -> Console:
    """Standard error."""
    return Console(stderr=True, highlight=False)


__all__ = ["Group", "bar", "console", "errors", "spinner"]
