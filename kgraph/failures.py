"""What went wrong in somebody else's code, in one line."""

from __future__ import annotations

import site
import sysconfig
import traceback
from pathlib import Path

_PACKAGE = Path(__file__).resolve().parent
_STANDARD = Path(sysconfig.get_path("stdlib")).resolve()
_INSTALLED = tuple(Path(one).resolve() for one in (*site.getsitepackages(), sysconfig.get_path("purelib")))


def failed(error: BaseException) -> str:
    """``ValueError: text (file.py:12)``: the last line of the user's own that the error passed through."""
    first = (str(error).strip().splitlines() or ["no message"])[0]
    if isinstance(error, SyntaxError):
        place = f"{Path(error.filename).name}:{error.lineno}" if error.filename else ""
        first = error.msg
    else:
        frames = [frame for frame in traceback.extract_tb(error.__traceback__) if _is_users(frame.filename)]
        place = f"{Path(frames[-1].filename).name}:{frames[-1].lineno}" if frames else ""
    return f"{type(error).__name__}: {first}{f' ({place})' if place else ''}"


def _is_users(file: str) -> bool:
    path = Path(file)
    if not path.is_file():  # <frozen importlib>, <string>
        return False
    path = path.resolve()
    inside = [folder for folder in (_PACKAGE, *_INSTALLED) if folder in path.parents]
    return not inside and not (_STANDARD in path.parents and "site-packages" not in path.parts)


__all__ = ["failed"]
