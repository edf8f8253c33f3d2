"""Results are written completely or not at all, and never replace a device, a pipe or a link."""

from __future__ import annotations

import io
import os
import sys
from pathlib import Path

import pytest

from fishrt.audio.output import check_folder, check_place, make_folder, write_whole
from fishrt.errors import OutputError


def test_a_file_is_written_and_nothing_else(tmp_path: Path) -> None:
    for data in (b"first", b"second"):
        write_whole(tmp_path / "a", data)
        assert [(p.name, p.read_bytes()) for p in tmp_path.iterdir()] == [("a", data)]


def test_a_failed_write_leaves_the_old_file_and_nothing_else(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "a"
    path.write_bytes(b"old")

    class Full(io.BytesIO):
        def flush(self) -> None:
            raise OSError(28, "No space left on device")

    def full(self: Path, _: str) -> Full:
        self.touch()
        return Full()

    with monkeypatch.context() as patched:
        patched.setattr(Path, "open", full)
        with pytest.raises(OutputError, match="No space left"):
            write_whole(path, b"newer")
    assert [(p.name, p.read_bytes()) for p in tmp_path.iterdir()] == [("a", b"old")]


def test_a_link_stays_a_link(tmp_path: Path) -> None:
    (tmp_path / "real").mkdir()
    (tmp_path / "a").symlink_to(tmp_path / "real" / "b")
    write_whole(tmp_path / "a", b"new")
    assert (tmp_path / "a").is_symlink()
    assert (tmp_path / "real" / "b").read_bytes() == b"new"


@pytest.mark.parametrize("linked", [False, True])
def test_a_pipe_stays_a_pipe_and_gets_the_data(tmp_path: Path, linked: bool) -> None:
    pipe = given = tmp_path / "pipe"
    os.mkfifo(pipe)
    if linked:
        given = tmp_path / "link"
        given.symlink_to(pipe)
    # Open at both ends from here on, so that a write that goes elsewhere makes the test fail, not wait.
    reader = os.open(pipe, os.O_RDWR | os.O_NONBLOCK)
    try:
        check_place(given)
        write_whole(given, b"sound")
        assert pipe.is_fifo()
        assert os.read(reader, 100) == b"sound"
    finally:
        os.close(reader)


def test_a_place_that_cannot_be_written_is_told_before_the_work(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(OutputError, match="no folder"):
        check_place(tmp_path / "missing" / "a")
    with pytest.raises(OutputError, match="is a folder"):
        check_place(tmp_path)
    os.mkfifo(tmp_path / "pipe")
    monkeypatch.setattr(os, "access", lambda *_: False)  # the tests may run as root, who may write everywhere
    for name in ("a", "pipe"):
        with pytest.raises(OutputError, match="cannot be written"):
            check_place(tmp_path / name)


def test_a_name_that_is_too_long() -> None:
    for check in (check_place, lambda path: check_folder(Path(path)), lambda path: write_whole(path, b"")):
        with pytest.raises(OutputError, match="File name too long"):
            check("x" * 300)


def test_a_standard_output_that_is_closed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "stdout", None)
    for refused in (lambda: write_whole("-", b"data"), lambda: check_place("-")):
        with pytest.raises(OutputError, match="standard output: it is closed"):
            refused()


def test_nothing_binary_goes_to_a_terminal(monkeypatch: pytest.MonkeyPatch) -> None:
    controller, terminal = os.openpty()
    try:
        with os.fdopen(terminal, "w") as stream:
            monkeypatch.setattr(sys, "stdout", stream)
            with pytest.raises(OutputError, match="is a terminal") as caught:
                check_place("-")
    finally:
        os.close(controller)
    assert "> FILE" in (caught.value.hint or "")


def test_a_folder_for_results(tmp_path: Path) -> None:
    for path in (tmp_path, tmp_path / "new"):
        check_folder(path)
        make_folder(path)
        assert path.is_dir()
    (tmp_path / "file").touch()
    for path, says in ((tmp_path / "file", "not a folder"), (tmp_path / "no/new", "no folder")):
        with pytest.raises(OutputError, match=says):
            check_folder(path)
        with pytest.raises(OutputError):
            make_folder(path)
