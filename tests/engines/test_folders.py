"""The user's folders, and a user who has none."""

from __future__ import annotations

import os
import sys
from pathlib import Path

import pytest
from click.testing import CliRunner

from fishrt.cli import main
from fishrt.errors import VoiceError
from fishrt.voices.store import VoiceStore, user_folder
from fishrt_engines import FishrtError
from fishrt_engines.folders import cache_folder, data_folder
from fishrt_engines.ort import session as ort_session
from fishrt_engines.trt.plans import plan_folder

VARIABLES = ("HOME", "USERPROFILE", "XDG_CACHE_HOME", "XDG_DATA_HOME", "LOCALAPPDATA", "FISHRT_CACHE", "FISHRT_VOICE_DIR")


@pytest.fixture
def nobody(monkeypatch: pytest.MonkeyPatch) -> None:
    """A user id without an entry in /etc/passwd, and no HOME: containers with --user 12345, services with a numeric user."""
    for name in VARIABLES:
        monkeypatch.delenv(name, raising=False)
    if sys.platform != "win32":
        import pwd

        def unknown(uid: int) -> None:
            raise KeyError(f"getpwuid(): uid not found: {uid}")

        monkeypatch.setattr(pwd, "getpwuid", unknown)
    with pytest.raises(RuntimeError):
        Path.home()


@pytest.mark.skipif(sys.platform in ("darwin", "win32"), reason="those systems have their own folder for caches")
def test_where_they_lie(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    for name in VARIABLES:
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("HOME", str(tmp_path))
    for ignored in ("", "relative"):
        monkeypatch.setenv("XDG_CACHE_HOME", ignored)
        monkeypatch.setenv("XDG_DATA_HOME", ignored)
        assert cache_folder() == tmp_path / ".cache/fishrt/graphs"
        assert data_folder() == tmp_path / ".local/share/fishrt"
        assert user_folder() == tmp_path / ".local/share/fishrt/voices"
    monkeypatch.setenv("XDG_CACHE_HOME", "/c")
    monkeypatch.setenv("XDG_DATA_HOME", "/d")
    assert (cache_folder(), data_folder()) == (Path("/c/fishrt/graphs"), Path("/d/fishrt"))
    monkeypatch.setenv("FISHRT_CACHE", "own")
    monkeypatch.setenv("FISHRT_VOICE_DIR", "mine")
    assert (cache_folder(), user_folder()) == (Path("own"), Path("mine"))


def test_without_a_home_there_are_none(nobody: None, monkeypatch: pytest.MonkeyPatch) -> None:
    assert (cache_folder(), data_folder(), user_folder()) == (None, None, None)
    assert VoiceStore(None).list() == []
    for command in ("load", "check_free", "remove"):
        with pytest.raises(VoiceError, match="this user has no home") as caught:
            getattr(VoiceStore(None), command)("anna")
        assert "FISHRT_VOICE_DIR" in (caught.value.hint or "")
    with pytest.raises(FishrtError, match="no folder for TensorRT plans") as failed:
        plan_folder()
    assert failed.value.hint == "set FISHRT_CACHE to a folder"
    monkeypatch.setenv("FISHRT_CACHE", os.devnull)
    assert cache_folder() == Path(os.devnull)


@pytest.mark.parametrize(
    ("command", "says"),
    [
        (["speak", "Good morning.", "--max-frames", "4", "-o", "{}/a.wav"], ""),
        (["voice", "list"], "rms\tbundle"),
        (["voice", "show", "rms"], "transcript"),
        (["doctor"], "cache: no folder: this user has no home"),
    ],
    ids=lambda value: value[0] if isinstance(value, list) else "",
)
def test_commands_of_a_user_without_a_home(
    nobody: None, command: list[str], says: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(ort_session, "WORTH_KEEPING", 0)
    done = CliRunner().invoke(main, [word.format(tmp_path) for word in command])
    assert done.exit_code == 0, done.output
    assert says in done.stdout


def test_a_voice_that_is_not_there_is_named_without_a_home(nobody: None) -> None:
    done = CliRunner().invoke(main, ["voice", "show", "anna"])
    assert done.exit_code == 2
    assert "there is no voice 'anna'; yours in no folder: none; the bundle's: awb, rms, slt" in done.stderr
