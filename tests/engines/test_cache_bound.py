"""The cache of graphs is bounded: what nobody uses is removed, whole, and what a process uses stays."""

from __future__ import annotations

import gc
import os
import shutil
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path

import pytest
from test_graph_cache import SPEC, write_graph

from fishrt_engines import FishrtError, cache, open_engine
from fishrt_engines.aside import remove_folder
from fishrt_engines.doctor import examine
from fishrt_engines.folders import cache_limit
from fishrt_engines.ort import session

DAY = 24 * 3600


def keep(folder: Path, name: str, *, size: int = 1000, used_s: float = 3600) -> Path:
    """An entry of `size` bytes and a description, last used `used_s` seconds ago."""
    entry = cache.keep(folder, [name], lambda aside: (aside / "data").write_bytes(bytes(size)))
    set_used(entry.folder, used_s)
    return entry.folder


def set_used(entry: Path, seconds_ago: float) -> None:
    then = time.time() - seconds_ago
    os.utime(entry / cache.ENTRY, (then, then))


def names(folder: Path) -> set[str]:
    return {cache.read(entry).key[0] for entry in cache.entries(folder)}


def test_the_least_recently_used_goes_first(tmp_path: Path) -> None:
    for name, hours in (("old", 4), ("older", 5), ("oldest", 6), ("new", 1)):
        keep(tmp_path, name, used_s=3600 * hours)
    assert cache.find(tmp_path, ["oldest"])
    cache.trim(tmp_path, 3800)
    assert names(tmp_path) == {"old", "oldest", "new"}
    cache.trim(tmp_path, 2600)
    assert names(tmp_path) == {"oldest", "new"}
    cache.trim(tmp_path, 2600)
    assert names(tmp_path) == {"oldest", "new"}


def test_what_nobody_used_for_a_month_goes_however_small(tmp_path: Path) -> None:
    keep(tmp_path, "forgotten", used_s=31 * DAY)
    keep(tmp_path, "kept", used_s=29 * DAY)
    cache.trim(tmp_path, 10**9)
    assert names(tmp_path) == {"kept"}


def test_what_was_just_made_or_found_stays(tmp_path: Path) -> None:
    keep(tmp_path, "made", used_s=0)
    keep(tmp_path, "found")
    assert cache.find(tmp_path, ["found"])
    cache.trim(tmp_path, 0)
    assert names(tmp_path) == {"made", "found"}


def test_only_entries_are_removed(tmp_path: Path) -> None:
    """FISHRT_CACHE may name any folder. Plans lie in a folder of their own."""
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / cache.ENTRY).write_text("{}")
    set_used(tmp_path / "mine", 100 * DAY)
    plan = keep(tmp_path / "plans", "plan", used_s=100 * DAY)
    running = tmp_path / ".fishrt-0123456789abcdef"
    shutil.copytree(plan, running)
    cache.trim(tmp_path, 0)
    assert sorted(path.name for path in tmp_path.iterdir()) == [running.name, "mine", "plans"]
    assert plan.is_dir()


def start(program: str, *arguments: object) -> subprocess.Popen[str]:
    """Start a process that prints a line when it is done, and ends when its input does."""
    code = (
        f"import sys\nfrom pathlib import Path\nfrom fishrt_engines import cache\n{program}\nprint(flush=True)\nsys.stdin.read()"
    )
    command = [sys.executable, "-c", code, *map(str, arguments)]
    return subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)


def test_what_another_process_holds_stays_until_it_ends(tmp_path: Path) -> None:
    entry = keep(tmp_path, "held", used_s=40 * DAY)
    keep(tmp_path, "free", used_s=40 * DAY)
    with start("held = cache.read(Path(sys.argv[1])).hold()", entry) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == "\n"
        cache.trim(tmp_path, 0)
        assert names(tmp_path) == {"held"}
        assert cache.read(entry).fault() is None
    cache.trim(tmp_path, 0)
    assert names(tmp_path) == set()


def test_what_was_used_meanwhile_stays(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    entry = keep(tmp_path, "entry")
    removed = cache._removed

    def used_first(place: Path, used_ns: int) -> bool:
        assert cache.find(tmp_path, ["entry"])
        return removed(place, used_ns)

    monkeypatch.setattr(cache, "_removed", used_first)
    cache.trim(tmp_path, 0)
    assert entry.is_dir()


def test_an_entry_that_is_removed_meanwhile_is_no_damage(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    entry = cache.read(keep(tmp_path, "entry"))
    cache.trim(tmp_path, 0)
    with pytest.raises(FileNotFoundError):
        entry.hold()
    assert cache.find(tmp_path, ["entry"]) is None
    assert not caplog.text


def test_who_waits_for_a_removal_does_not_get_the_entry(tmp_path: Path) -> None:
    fcntl = pytest.importorskip("fcntl", reason="Windows has no such locks")
    entry = cache.read(keep(tmp_path, "entry"))
    with ThreadPoolExecutor() as pool:
        with (entry.folder / cache.ENTRY).open("r+b") as description:
            fcntl.flock(description, fcntl.LOCK_EX)
            waiting = pool.submit(entry.hold)
            time.sleep(0.1)
            assert not waiting.done()
            remove_folder(entry.folder)
        with pytest.raises(FileNotFoundError):
            waiting.result()


def test_processes_that_keep_and_trim_together(tmp_path: Path) -> None:
    """Both keep the same entries in another order, and remove those of the other, with no grace for fresh ones."""
    program = """
cache._FRESH_S = 0
folder, step = Path(sys.argv[1]), int(sys.argv[2])
for n in [*range(40)][::step]:
    entry = cache.find(folder, [n]) or cache.keep(folder, [n], lambda aside: (aside / 'data').write_bytes(bytes(1000)))
    cache.trim(folder, 4000)
"""
    processes = [start(program, tmp_path, step) for step in (1, -1)]
    assert [process.communicate()[0] for process in processes] == ["\n", "\n"]
    assert 1 <= len(cache.entries(tmp_path)) <= 4
    assert all(cache.read(entry).fault() is None for entry in cache.entries(tmp_path))
    assert not [path for path in tmp_path.iterdir() if path.name.startswith(".")]


def test_an_interrupted_removal_leaves_nothing_that_loads(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its rest is removed a day after the entry was made, as all that killed processes leave."""
    entry = keep(tmp_path, "entry", used_s=2 * DAY)
    with monkeypatch.context() as patch:
        patch.setattr(shutil, "rmtree", interrupted)
        with pytest.raises(KeyboardInterrupt):
            cache.trim(tmp_path, 0)
    assert not entry.exists()
    (left,) = tmp_path.iterdir()
    assert names(tmp_path) == set()
    assert cache.find(tmp_path, ["entry"]) is None
    os.utime(left, (0, 0))
    keep(tmp_path, "entry")
    assert [path.name for path in tmp_path.iterdir()] == [entry.name]


def interrupted(folder: Path, **_: object) -> None:
    (folder / "data").unlink()
    raise KeyboardInterrupt


def test_a_graph_stays_while_its_session_lives(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = tmp_path / "cache"
    monkeypatch.setenv("FISHRT_CACHE", str(folder))
    monkeypatch.setattr(session, "WORTH_KEEPING", 0)
    monkeypatch.setenv("FISHRT_CACHE_GB", "1e-6")
    graph = write_graph(tmp_path)

    def opened(identity: str) -> object:
        engine = open_engine(graph, replace(SPEC, identity=identity), provider="cpu", threads=1)
        for entry in cache.entries(folder):
            set_used(entry, 3600)
        return engine

    first = opened("first")
    second = opened("second")
    assert len(cache.entries(folder)) == 2
    del first
    gc.collect()
    third = opened("third")
    assert {cache.read(entry).key[0] for entry in cache.entries(folder)} == {"second", "third"}
    del second, third


@pytest.mark.parametrize("entries", [0, 1])
def test_a_limit_of_0_keeps_no_more_graphs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, entries: int) -> None:
    monkeypatch.setenv("FISHRT_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(session, "WORTH_KEEPING", 0)
    graph, spec = write_graph(tmp_path), replace(SPEC, identity="graph")
    for limit in [""] * entries + ["0"]:
        monkeypatch.setenv("FISHRT_CACHE_GB", limit)
        open_engine(graph, spec, provider="cpu", threads=1)
    assert len(cache.entries(tmp_path / "cache")) == entries


@pytest.mark.parametrize(("given", "size"), [("", 20 * 10**9), ("1.5", 1_500_000_000), ("0", 0)])
def test_the_limit_is_that_of_the_environment(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, given: str, size: int) -> None:
    monkeypatch.setenv("FISHRT_CACHE", str(tmp_path))
    monkeypatch.setenv("FISHRT_CACHE_GB", given)
    assert cache_limit() == examine().cache.limit_bytes == size
    assert f"{tmp_path} can be written to; it holds 0 MB, of graphs {size / 1e9:g} GB at most" in "\n".join(examine().lines())


@pytest.mark.parametrize("given", ["much", "-1", "nan", "inf"])
def test_a_limit_that_is_no_size_is_an_error(monkeypatch: pytest.MonkeyPatch, given: str) -> None:
    monkeypatch.setenv("FISHRT_CACHE_GB", given)
    with pytest.raises(FishrtError, match=f"FISHRT_CACHE_GB is '{given}'"):
        cache_limit()
