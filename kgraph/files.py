"""Every file that kgraph writes: made beside its place, moved there when it is whole.

A full disk, a refusal or an interruption leaves what stood at the path as it was, and nothing beside it.
"""

from __future__ import annotations

import errno
import os
import shutil
import stat
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from kgraph.errors import FileError, InputError

_FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
_KINDS = (
    (stat.S_ISDIR, "a folder"),
    (stat.S_ISCHR, "a device"),
    (stat.S_ISBLK, "a device"),
    (stat.S_ISFIFO, "a pipe"),
    (stat.S_ISSOCK, "a socket"),
)


def destination(path: object) -> Path:
    """The plain file that ``path`` stands for, there already or not; symbolic links are followed.

    Raises:
        InputError: no path at all (a number, None, bytes, an empty text, a NUL in it).
        FileError: a folder, device, pipe or socket; this process's own output; no folder to put it in.
    """
    name = named(path)
    try:
        found = os.stat(name)
    except FileNotFoundError:
        found = None
    except OSError as error:
        raise FileError(path, error.strerror or error) from error
    if found is not None and not stat.S_ISREG(found.st_mode):
        kind = next((word for test, word in _KINDS if test(found.st_mode)), "no plain file")
        raise FileError(path, f"it is {kind}", hint="Pass the path of a plain file")
    if found is not None and not os.access(name, os.W_OK):
        raise FileError(path, "it is write-protected")
    if found is not None and any(_is_descriptor(found, number) for number in range(3)):
        raise FileError(path, "it is what this process prints to", hint="Pass the path of another file")
    target = Path(os.path.realpath(name))
    if not target.parent.is_dir():
        raise FileError(path, f"there is no folder '{target.parent}'", hint="Pass a path in a folder that exists")
    return target


@contextmanager
def placed(path: object) -> Iterator[Path]:
    """A fresh path of the same name to write to; what was written is moved to ``path`` when the block has ended.

    Further files that the block leaves beside that path are moved too, before the one that refers to them. Of a file
    that was there the mode is kept, and the owner where the system allows it.

    Raises:
        InputError, FileError: see `destination`; FileError for whatever the system refuses inside the block.
    """
    target = destination(path)
    try:
        with tempfile.TemporaryDirectory(prefix=".kgraph-", dir=target.parent) as folder:
            made = Path(folder) / target.name
            yield made
            _publish(sorted(made.parent.iterdir(), key=lambda file: file == made), target)
    except FileError:
        raise
    except OSError as error:
        raise FileError(path, error.strerror or error, hint=_hint(error)) from error


def write_text(text: str, path: object) -> str:
    """Write ``text`` as UTF-8 unless ``path`` is None; return it either way.

    Raises:
        InputError, FileError: see `placed`.
    """
    if path is not None:
        with placed(path) as made:
            made.write_text(text, encoding="utf-8")
    return text


def save_figure(figure: Any, path: object, **options: Any) -> None:
    """Write a matplotlib figure; the end of the name is the format, PNG where it has none.

    Raises:
        InputError: a format that matplotlib does not write; FileError: see `placed`.
    """
    target = Path(named(path))
    known = figure.canvas.get_supported_filetypes()
    if target.suffix and target.suffix[1:].lower() not in known:
        raise InputError(
            f"{target} is no image file by its name", hint=f"End it with one of {', '.join(sorted(known))}"
        )
    destination(target)  # a device has no suffix, and is not to get a neighbour with one
    with placed(target if target.suffix else target.with_name(f"{target.name}.png")) as made:
        figure.savefig(made, **options)


def folder(path: object) -> Path:
    """The folder ``path``, made with its parents where there is none.

    Raises:
        InputError: no path at all; FileError: it cannot be made.
    """
    found = Path(named(path))
    try:
        found.mkdir(parents=True, exist_ok=True)
    except FileExistsError as error:
        raise FileError(path, "it is no folder", hint="Pass the path of a folder") from error
    except OSError as error:
        raise FileError(path, error.strerror or error) from error
    return found


def named(path: object) -> str:
    """The text of a path.

    Raises:
        InputError: no path at all.
    """
    name = os.fspath(path) if isinstance(path, str | os.PathLike) else None
    if not isinstance(name, str):
        raise InputError(f"path is {path!r}", hint="Pass a text or a pathlib.Path")
    try:
        usable = bool(name) and b"\0" not in os.fsencode(name)
    except UnicodeEncodeError:
        usable = False
    if not usable:
        raise InputError(f"{name!r} is no path", hint="Pass the path of a file")
    return name


def _is_descriptor(found: os.stat_result, number: int) -> bool:
    """Whether the file is the one behind a standard stream: renaming over it would lose what is printed."""
    try:
        own = os.fstat(number)
    except OSError:  # closed
        return False
    return os.path.samestat(found, own)


def _publish(made: list[Path], target: Path) -> None:
    """Move files into place: all are on the disk, with their modes, before the first replaces another."""
    places = [destination(target.parent / file.name) for file in made]
    for file, place in zip(made, places, strict=True):
        _settle(file, place)
    with _restoring(made[0].parent, places[:-1]):
        for file, place in zip(made, places, strict=True):
            os.replace(file, place)


def _settle(file: Path, place: Path) -> None:
    with file.open("rb+") as handle:
        os.fsync(handle.fileno())  # some file systems report a full disk only here
    if place.is_file():
        before = place.stat()
        shutil.copymode(place, file)
        made = file.stat()
        if sys.platform != "win32" and (before.st_uid, before.st_gid) != (made.st_uid, made.st_gid):
            with suppress(PermissionError):  # only the superuser may give a file away
                os.chown(file, before.st_uid, before.st_gid)


@contextmanager
def _restoring(scratch: Path, places: list[Path]) -> Iterator[None]:
    """Put companions back where a later move fails: an old main file with new weights beside it would be neither."""
    kept = {place: scratch / f"before-{i}" for i, place in enumerate(places)}
    for place, copy in kept.items():
        if place.exists():
            try:
                os.link(place, copy)
            except OSError:  # a file system without hard links
                os.replace(place, copy)
    try:
        yield
    except BaseException:
        for place, copy in kept.items():
            if copy.exists():
                os.replace(copy, place)
            else:
                place.unlink(missing_ok=True)
        raise


def _hint(error: OSError) -> str:
    return "Free some space: what stood there is untouched" if error.errno in _FULL else "Pass a path you may write to"


__all__ = ["destination", "folder", "named", "placed", "save_figure", "write_text"]
