"""Files: whole or not at all, whatever goes wrong, in every format that kgraph writes."""

from __future__ import annotations

import os
import resource
import signal
import socket
import stat
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import kgraph
from kgraph import export, saved
from kgraph.errors import FileError, InputError
from kgraph.files import destination, folder, placed, write_text

Write = Callable[[Path], Any]
X = torch.randn(2, 48, generator=torch.Generator().manual_seed(0))


@cache
def parts() -> tuple[nn.Module, Any, kgraph.PhaseDiagram]:
    model = nn.Sequential(nn.Linear(48, 128), nn.Tanh(), nn.Linear(128, 4))
    return model, kgraph.transform(model, "tat", X), kgraph.phase_diagram("tanh", sigma_w=[1, 1.3], sigma_b=[0, 0.2])


def write_external(path: Path) -> None:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(export, "SINGLE_FILE_LIMIT", 0)
        kgraph.export_onnx(parts()[0], path, X)


RECIPE = saved.Recipe("net.py:build", "{}", 0, "", ("tat",), None)
FORMATS: dict[str, Write] = {
    "a.onnx": lambda path: kgraph.export_onnx(parts()[0], path, X),
    "external.onnx": write_external,
    "a.html": lambda path: parts()[1].kgraph.comparison.to_html(path),
    "a.json": lambda path: parts()[1].kgraph.after.to_json(path),
    "a.csv": lambda path: parts()[1].kgraph.after.to_csv(path),
    "a.png": lambda path: parts()[2].plot(path),
    "recipe.pt": lambda path: saved.save(parts()[1], path, RECIPE, X),
    "whole.pt": lambda path: saved.write(parts()[1], path),
}
every_format = pytest.mark.parametrize("name", FORMATS)
every_way = pytest.mark.parametrize("name", [name for name in FORMATS if name != "a.onnx"])  # its way is external's


@pytest.fixture(scope="module", autouse=True)
def _warm(tmp_path_factory: pytest.TempPathFactory) -> None:
    """Fonts and the like are cached in files of their own at the first call."""
    for name in ("a.onnx", "a.png"):
        FORMATS[name](tmp_path_factory.mktemp("warm") / name)


@contextmanager
def at_most(size: int) -> Iterator[None]:
    """The system refuses to make a file larger, as on a full disk (EFBIG for ENOSPC)."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    kept = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
        signal.signal(signal.SIGXFSZ, kept)


def contents(of: Path) -> dict[str, bytes]:
    return {file.name: file.read_bytes() for file in of.iterdir()}


@every_format
def test_a_full_disk_leaves_the_old_file_and_no_stump(name: str, tmp_path: Path) -> None:
    parts()
    (tmp_path / name).write_text("old")
    with at_most(600), pytest.raises(FileError, match=r"cannot write .*File too large\. Free some space"):
        FORMATS[name](tmp_path / name)
    assert contents(tmp_path) == {name: b"old"}
    FORMATS[name](tmp_path / name)  # the control: it was the disk
    assert contents(tmp_path)[name] != b"old"


@every_way
@pytest.mark.parametrize("call", ["fsync", "replace"])
def test_a_refusal_at_the_very_end(name: str, call: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: Any) -> None:
        raise OSError(28, "No space left on device")

    (tmp_path / name).write_text("old")
    monkeypatch.setattr(os, call, refuse)
    with pytest.raises(FileError, match="No space left on device"):
        FORMATS[name](tmp_path / name)
    assert contents(tmp_path) == {name: b"old"}


@every_way
def test_an_interruption_leaves_the_old_file_and_no_stump(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def interrupt(*_: Any) -> None:
        raise KeyboardInterrupt

    (tmp_path / name).write_text("old")
    monkeypatch.setattr(os, "fsync", interrupt)
    with pytest.raises(KeyboardInterrupt):
        FORMATS[name](tmp_path / name)
    assert contents(tmp_path) == {name: b"old"}


def test_an_interruption_inside_torch_save_is_one(tmp_path: Path) -> None:
    class Stops:
        def __reduce__(self) -> Any:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        saved.write([torch.ones(3), Stops()], tmp_path / "a.pt")
    assert not contents(tmp_path)


@every_format
def test_links_are_written_through_and_modes_kept(name: str, tmp_path: Path) -> None:
    there, here = tmp_path / "there", tmp_path / "here"
    there.mkdir()
    here.mkdir()
    real, link = there / f"real-{name}", here / name
    real.write_text("old")
    real.chmod(0o640)
    link.symlink_to(Path("..") / "there" / real.name)
    FORMATS[name](link)
    assert link.is_symlink() and real.read_bytes() != b"old"
    assert stat.S_IMODE(real.stat().st_mode) == 0o640
    assert [file.name for file in here.iterdir()] == [name]


def test_a_link_to_nothing_yet_makes_what_it_points_at(tmp_path: Path) -> None:
    (tmp_path / "link").symlink_to("real")
    write_text("new", tmp_path / "link")
    assert (tmp_path / "link").is_symlink() and (tmp_path / "real").read_text() == "new"


def test_a_new_file_has_the_mode_that_any_program_gives(tmp_path: Path) -> None:
    before = os.umask(0o027)
    try:
        write_text("new", tmp_path / "a")
    finally:
        os.umask(before)
    assert stat.S_IMODE((tmp_path / "a").stat().st_mode) == 0o640


@every_format
def test_what_is_no_plain_file_is_refused_and_left(name: str, tmp_path: Path) -> None:
    pipe, listening, inside = tmp_path / f"pipe-{name}", tmp_path / f"socket-{name}", tmp_path / f"folder-{name}"
    os.mkfifo(pipe)
    inside.mkdir()
    with socket.socket(socket.AF_UNIX) as server:
        server.bind(os.path.relpath(listening))
        loop = tmp_path / f"loop-{name}"
        loop.symlink_to(loop.name)
        cases = [(pipe, "a pipe"), (listening, "a socket"), (inside, "a folder"), (Path("/dev/null"), "a device")]
        for path, what in [*cases, (loop, "symbolic links")]:
            linked = tmp_path / f"link-{name}"
            linked.unlink(missing_ok=True)
            linked.symlink_to(path)
            for one in (path, linked):
                with pytest.raises(FileError, match=what):
                    FORMATS[name](one)
        assert pipe.is_fifo() and listening.is_socket() and inside.is_dir() and Path("/dev/null").is_char_device()


def test_two_files_change_together_or_not_at_all(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Weights beside an ONNX file: the last move fails, and the first is taken back."""
    move: Callable[..., None] = os.replace

    def refuse(source: Path, target: Path) -> None:
        if Path(target).name == "m.onnx":
            raise OSError(5, "Input/output error")
        move(source, target)

    monkeypatch.setattr(os, "replace", refuse)
    with pytest.raises(FileError, match="Input/output"):
        write_external(tmp_path / "m.onnx")
    assert not contents(tmp_path)
    old = {"m.onnx": b"old", "m.onnx.data": b"old weights"}
    for name, text in old.items():
        (tmp_path / name).write_bytes(text)
    with pytest.raises(FileError, match="Input/output"):
        write_external(tmp_path / "m.onnx")
    assert contents(tmp_path) == old


def test_a_companion_that_is_a_pipe_stops_both(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "m.onnx.data")
    with pytest.raises(FileError, match="it is a pipe"):
        write_external(tmp_path / "m.onnx")
    assert [file.name for file in tmp_path.iterdir()] == ["m.onnx.data"]


@pytest.mark.skipif(os.geteuid() == 0, reason="the superuser may write anywhere")
def test_write_protection_is_respected(tmp_path: Path) -> None:
    (tmp_path / "a").write_text("old")
    (tmp_path / "a").chmod(0o440)
    with pytest.raises(FileError, match="write-protected"):
        write_text("new", tmp_path / "a")
    tmp_path.chmod(0o550)
    with pytest.raises(FileError, match="Permission denied"):
        write_text("new", tmp_path / "b")
    tmp_path.chmod(0o750)


@pytest.mark.parametrize("path", [0, 1.5, None, True, b"a", "", "a\0b", "\ud800", ["a"], object()])
def test_what_is_no_path(path: Any) -> None:
    for call in (destination, folder):
        with pytest.raises(InputError, match="path"):
            call(path)
    with pytest.raises(InputError, match="path"), placed(path):
        raise AssertionError("never entered")


def test_a_folder_that_is_a_file_and_a_name_that_is_too_long(tmp_path: Path) -> None:
    (tmp_path / "a").write_text("old")
    for path in (tmp_path / "a", tmp_path / "a" / "b", tmp_path / ("x" * 300)):
        with pytest.raises(FileError, match="cannot write"):
            folder(path)
    for path in (tmp_path / "a" / "b", tmp_path / ("x" * 300), tmp_path / "missing" / "b"):
        with pytest.raises(FileError, match="cannot write"):
            destination(path)


def test_formats_of_figures(tmp_path: Path) -> None:
    diagram = parts()[2]
    with pytest.raises(InputError, match=r"no image file by its name\. End it with one of .*png"):
        diagram.plot(tmp_path / "a.quux")
    diagram.plot(tmp_path / "plain")
    assert [file.name for file in tmp_path.iterdir()] == ["plain.png"]


@pytest.mark.parametrize("name", ["out.txt", "/dev/stdin"])
def test_a_standard_stream_is_not_renamed_over(name: str, tmp_path: Path) -> None:
    """`> out.txt` and a report to out.txt or /dev/stdout: the shell's file would vanish under what is printed."""
    (tmp_path / "out.txt").write_text("printed")
    before = os.dup(0)
    with (tmp_path / "out.txt").open("r+") as stream:
        os.dup2(stream.fileno(), 0)
    try:
        with pytest.raises(FileError, match="it is what this process prints to"):
            write_text("new", tmp_path / name)
    finally:
        os.dup2(before, 0)
        os.close(before)
    assert contents(tmp_path) == {"out.txt": b"printed"}
