"""`fishrt render --ray`: rows in processes of Ray, some of which are killed."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from importlib.util import find_spec
from pathlib import Path

import numpy as np
import pytest
import soundfile

from fake_render import files, lines, rendered, rows_of
from fishrt.errors import FishrtError
from fishrt.scale.actors import on_ray
from ray_worker import broken, bug, fatal

pytestmark = [pytest.mark.ray, pytest.mark.skipif(find_spec("ray") is None, reason="needs Ray: `make ray`")]
HERE = Path(__file__).parent
TEXTS = ("Good morning.", "The sun is shining.", "It is a fine day.", "Hello, my friend.")


@pytest.fixture(autouse=True)
def _workers_find_the_fake_voice(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PYTHONPATH", str(HERE.parent / "support"))


def ray_processes() -> list[int]:
    """Processes, this one apart, that have a file of a Ray of ours open."""
    found = []
    for process in Path("/proc").glob("[0-9]*/fd"):
        try:
            if int(process.parent.name) != os.getpid() and any(
                "/fishrt-ray-" in str(file.readlink()) for file in process.iterdir()
            ):
                found.append(int(process.parent.name))
        except OSError:
            pass
    return found


def assert_ray_is_gone() -> None:
    until = time.monotonic() + 30
    while ray_processes() or list(Path("/tmp").glob("fishrt-ray-*")):
        assert time.monotonic() < until, ray_processes()
        time.sleep(0.1)


def test_every_row_once_though_one_kills_its_worker(tmp_path: Path) -> None:
    rows = [*rows_of(20), {"id": "poison", "text": "kill"}, {"id": "bad", "text": "fail"}]
    report = rendered(rows, tmp_path, work=on_ray(fatal, 2))
    assert (report.made, report.errors, report.left) == (20, 2, 0)
    assert [(entry["id"], entry["error"].split(";")[0]) for entry in lines(tmp_path / "errors.jsonl")] == [
        ("poison", "its worker died 3 times"),
        ("bad", "the model ended before it said anything"),
    ]
    assert files(tmp_path) == sorted(["errors.jsonl", "manifest.jsonl", *(f"audio/r{n}.wav" for n in range(20))])
    assert_ray_is_gone()
    before = (tmp_path / "audio/r0.wav").stat()
    again = rendered(rows_of(20), tmp_path)
    assert (again.made, again.skipped) == (0, 20), "rows are those of a run without Ray"
    assert (tmp_path / "audio/r0.wav").stat() == before


def test_rows_of_a_worker_that_died_once_are_made(tmp_path: Path) -> None:
    report = rendered([*rows_of(6), {"id": "once", "text": f"once {tmp_path / 'died'}"}], tmp_path / "out", work=on_ray(fatal, 1))
    assert (report.made, report.errors) == (7, 0)
    assert (tmp_path / "died").exists()


def test_a_fault_of_every_row_ends_the_run_and_a_stop_keeps_what_is_done(tmp_path: Path) -> None:
    with pytest.raises(FishrtError, match="there is no bundle here"):
        rendered(rows_of(3), tmp_path, work=on_ray(broken, 1))
    with pytest.raises(FishrtError, match="a worker cannot start"):
        rendered(rows_of(3), tmp_path, work=on_ray(bug, 1))
    assert files(tmp_path) == ["errors.jsonl", "manifest.jsonl"]
    told: list[object] = []
    report = rendered(
        rows_of(40), tmp_path, work=on_ray(fatal, 1), tell=lambda *what: told.append(what), stop=lambda: len(told) > 45
    )
    assert report.interrupted
    assert report.made + report.left == 40
    assert len(lines(tmp_path / "manifest.jsonl")) == report.made == len(list((tmp_path / "audio").glob("*.wav")))
    assert_ray_is_gone()


def test_a_driver_that_is_killed_leaves_no_process_and_whole_files(tmp_path: Path) -> None:
    code = f"""
import sys; sys.path[:0] = {[str(HERE.parent / "support")]!r}
from pathlib import Path
from fake_render import rendered, rows_of
from fishrt.scale.actors import on_ray
from ray_worker import fatal
rendered(rows_of(400), Path({str(tmp_path)!r}), work=on_ray(fatal, 2))
"""
    driver = subprocess.Popen([sys.executable, "-c", code])
    while len(list((tmp_path / "audio").glob("*.wav"))) < 5:
        assert driver.poll() is None
        time.sleep(0.05)
    driver.send_signal(signal.SIGKILL)
    driver.wait()
    assert_ray_is_gone()
    report = rendered(rows_of(400), tmp_path)
    assert report.skipped >= 5
    assert report.made + report.skipped == 400
    assert len(files(tmp_path)) == 402


def test_the_command_says_what_it_says_without_ray(tmp_path: Path) -> None:
    job = tmp_path / "job.jsonl"
    job.write_text("".join(json.dumps({"id": str(n), "text": text, "max_frames": 12}) + "\n" for n, text in enumerate(TEXTS)))
    here, there = tmp_path / "here", tmp_path / "there"
    usual = [sys.executable, "-m", "fishrt", "render", str(job)]
    subprocess.run([*usual, str(here), "--threads", "1"], check=True)
    on_two = ["--ray", "--workers", "2", "--threads", "1", "--json"]
    done = subprocess.run([*usual, str(there), *on_two], check=True, stdout=subprocess.PIPE)
    assert json.loads(done.stdout)["made"] == len(TEXTS)
    for n in range(len(TEXTS)):
        sounds = [soundfile.read(folder / f"audio/{n}.wav", dtype="int16")[0].astype(int) for folder in (here, there)]
        assert np.abs(sounds[0] - sounds[1]).max() <= 3
    home = Path.home() / ".ray"
    assert not home.exists()


def test_workers_without_ray_are_refused(tmp_path: Path) -> None:
    (tmp_path / "job.txt").write_text("Hello.")
    usual = [sys.executable, "-m", "fishrt", "render", str(tmp_path / "job.txt"), str(tmp_path / "out")]
    done = subprocess.run([*usual, "--workers", "2"], check=False, stderr=subprocess.PIPE, text=True)
    assert done.returncode == 2
    assert "add --ray" in done.stderr
