"""Files and folders appear complete or not at all."""

from __future__ import annotations

import os
import sys
import time
from pathlib import Path

import pytest

from fishrt_engines.aside import new_file, new_folder, remove_folder


def content(folder: Path) -> dict[str, str]:
    return {path.relative_to(folder).as_posix(): path.read_text() for path in folder.rglob("*") if path.is_file()}


def fill(folder: Path, text: str) -> None:
    folder.mkdir(exist_ok=True)
    (folder / "a").write_text(text)


def break_off(file: Path, error: type[BaseException]) -> None:
    file.write_text("half")
    raise error


@pytest.mark.parametrize("error", [KeyboardInterrupt, OSError])
@pytest.mark.parametrize("old", [{}, {"target": "old"}], ids=["new", "replaced"])
def test_a_file_appears_at_the_end_or_not_at_all(tmp_path: Path, old: dict[str, str], error: type[BaseException]) -> None:
    for name, text in old.items():
        (tmp_path / name).write_text(text)
    with pytest.raises(error), new_file(tmp_path / "target") as aside:
        break_off(aside, error)
    assert content(tmp_path) == old
    with new_file(tmp_path / "target") as aside:
        aside.write_text("new")
        assert content(tmp_path) == {**old, aside.name: "new"}
    assert content(tmp_path) == {"target": "new"}


@pytest.mark.parametrize("error", [KeyboardInterrupt, OSError])
@pytest.mark.parametrize("replace", [False, True])
def test_a_folder_appears_at_the_end_or_not_at_all(tmp_path: Path, replace: bool, error: type[BaseException]) -> None:
    target = tmp_path / "target"
    if replace:
        fill(target, "old")
    before = content(tmp_path)
    with pytest.raises(error), new_folder(target, replace=replace) as aside:
        break_off(aside / "a", error)
    assert content(tmp_path) == before
    with new_folder(target, replace=replace) as aside:
        fill(aside, "new")
        assert content(tmp_path) == {**before, f"{aside.name}/a": "new"}
    assert (content(tmp_path), [path.name for path in tmp_path.iterdir()]) == ({"target/a": "new"}, ["target"])


def test_a_folder_that_is_there_stays_unless_it_is_to_be_replaced(tmp_path: Path) -> None:
    fill(tmp_path / "target", "old")
    with pytest.raises(OSError, match="target"), new_folder(tmp_path / "target") as aside:
        fill(aside, "new")
    assert content(tmp_path) == {"target/a": "old"}


def test_an_old_folder_comes_back_if_the_new_one_cannot_take_its_place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    target, rename = tmp_path / "target", Path.rename
    fill(target, "old")

    def fails(self: Path, to: Path) -> Path:
        if (self / "a").read_text() == "new":
            raise OSError(28, "No space left on device")
        return rename(self, to)

    monkeypatch.setattr(Path, "rename", fails)
    with pytest.raises(OSError, match="No space left"), new_folder(target, replace=True) as aside:
        fill(aside, "new")
    assert (content(tmp_path), [path.name for path in tmp_path.iterdir()]) == ({"target/a": "old"}, ["target"])


def test_a_folder_is_removed(tmp_path: Path) -> None:
    fill(tmp_path / "target", "old")
    remove_folder(tmp_path / "target")
    assert list(tmp_path.iterdir()) == []
    with pytest.raises(FileNotFoundError):
        remove_folder(tmp_path / "target")


def test_what_killed_processes_left_is_removed_a_day_later(tmp_path: Path) -> None:
    yesterday = time.time() - 90_000
    with new_folder(tmp_path / "entry") as running:
        killed = running.with_name(f".fishrt-{0:016x}")
        for folder in (killed, tmp_path / ".fishrt-notes"):
            fill(folder, "left")
            os.utime(folder, (yesterday, yesterday))
        with new_folder(tmp_path / "other"):
            assert running.is_dir()
            assert not killed.exists()
    assert sorted(path.name for path in tmp_path.iterdir()) == [".fishrt-notes", "entry", "other"]


@pytest.mark.skipif(sys.platform == "win32", reason="there is no umask")
def test_a_folder_can_be_read_by_other_users(tmp_path: Path) -> None:
    """A container's image may be built by one user and run by another."""
    before = os.umask(0o022)
    try:
        with new_folder(tmp_path / "entry") as aside:
            assert aside.stat().st_mode & 0o777 == 0o755
    finally:
        os.umask(before)


def test_a_folder_that_was_being_replaced_when_the_process_was_killed_is_not_removed(tmp_path: Path) -> None:
    kept, left = tmp_path / ".fishrt-0123456789abcdef-bundle", tmp_path / ".fishrt-0123456789abcdef-other"
    for folder in (kept, left, tmp_path / "other"):
        folder.mkdir()
        os.utime(folder, (0, 0))
    with new_folder(tmp_path / "new"):
        pass
    assert kept.is_dir()
    assert not left.exists()
