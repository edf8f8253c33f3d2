"""The job engine: plan, resume, commits, errors, locks and shards, with a voice that takes no time."""

from __future__ import annotations

import errno
import json
import os
import pickle
import subprocess
import sys
from pathlib import Path

import pytest
import soundfile

import fake_render
from fake_render import FakeVoice, files, lines, rendered, rows_of
from fishrt.bulk.render import RenderJob
from fishrt.errors import ArgumentError, GraphError, OutputError
from fishrt.jobs.folder import Commit, Folder, Shard
from fishrt.jobs.threads import outcome
from fishrt.request import Request


def state(out: Path) -> dict[str, tuple[int, int]]:
    return {name: ((out / name).stat().st_ino, (out / name).stat().st_mtime_ns) for name in files(out)}


def timeless(entries: list[dict]) -> list[dict]:
    return [{name: value for name, value in entry.items() if name != "mtime_ns"} for entry in entries]


def test_every_row_becomes_a_file_with_its_digest(tmp_path):
    report = rendered([*rows_of(2), {"text": "No id."}], tmp_path / "out")
    assert (report.rows, report.made, report.skipped, report.errors, report.left) == (3, 3, 0, 0, 0)
    entries = lines(tmp_path / "out/manifest.jsonl")
    assert [(entry["id"], entry["line"], entry["audio"]) for entry in entries[:2]] == [
        ("r0", 1, "audio/r0.wav"),
        ("r1", 2, "audio/r1.wav"),
    ]
    assert len(entries[2]["id"]) == 16
    assert sorted(entries[0]) == sorted(("id", "line", "audio", "seed", "seconds", "stop", "digest", "bytes", "mtime_ns"))
    for entry in entries:
        assert soundfile.SoundFile(tmp_path / "out" / entry["audio"]).comment.split()[1] == entry["digest"]
    assert (tmp_path / "out/errors.jsonl").read_bytes() == b""


def test_a_second_run_does_nothing(tmp_path):
    rendered(rows_of(5), tmp_path)
    before, worker = state(tmp_path), FakeVoice()
    report = rendered(rows_of(5), tmp_path, worker)
    assert (report.made, report.skipped, worker.said) == (0, 5, [])
    assert state(tmp_path) == before, "no file was written again"


def test_what_changed_is_made_again_and_what_left_stays_as_a_file(tmp_path):
    rendered(rows_of(4), tmp_path)
    before, worker = state(tmp_path), FakeVoice()
    (tmp_path / "audio/r2.wav").unlink()
    rows = [{"text": "Inserted.", "id": "new"}, {"id": "r0", "text": "Line 0."}, {"id": "r1", "text": "Other."}, *rows_of(4)[2:3]]
    report = rendered(rows, tmp_path, worker)
    assert sorted(worker.said) == ["Inserted.", "Line 2.", "Other."]
    assert (report.made, report.skipped) == (3, 1)
    assert [entry["id"] for entry in lines(tmp_path / "manifest.jsonl")] == ["new", "r0", "r1", "r2"]
    after = state(tmp_path)
    assert [name for name in before if name.startswith("audio") and before[name] == after[name]] == [
        "audio/r0.wav",
        "audio/r3.wav",
    ]


def test_a_lost_or_torn_manifest_is_made_of_the_files(tmp_path):
    rendered(rows_of(4), tmp_path)
    manifest = tmp_path / "manifest.jsonl"
    whole, before = manifest.read_bytes(), state(tmp_path)
    for left in (b"", whole[: len(whole) // 2], whole[:-7], b"\xff{\n" + whole, whole * 2):
        manifest.write_bytes(left)
        assert rendered(rows_of(4), tmp_path, worker := FakeVoice()).skipped == 4
        assert (manifest.read_bytes(), worker.said) == (whole, [])
    assert {**state(tmp_path), "manifest.jsonl": 0} == {**before, "manifest.jsonl": 0}


def test_a_manifest_that_is_older_than_its_file_is_not_believed(tmp_path):
    """A run was killed between the rename and the log, and the text was changed back."""
    rendered(rows_of(1), tmp_path)
    old = (tmp_path / "manifest.jsonl").read_bytes()
    rendered(rows_of(1, "Other"), tmp_path)
    (tmp_path / "manifest.jsonl").write_bytes(old)
    rendered(rows_of(1), tmp_path, worker := FakeVoice())
    assert worker.said == ["Line 0."]
    assert (tmp_path / "manifest.jsonl").read_bytes() != old


def test_a_file_of_another_program_is_never_replaced(tmp_path):
    (tmp_path / "audio/r1.wav").parent.mkdir()
    (tmp_path / "audio/r1.wav").write_bytes(b"mine")
    report = rendered(rows_of(3), tmp_path)
    assert (report.made, report.errors) == (2, 1)
    (error,) = lines(tmp_path / "errors.jsonl")
    assert (error["id"], error["line"]) == ("r1", 2)
    assert "audio/r1.wav, which this command did not write" in error["error"]
    assert (tmp_path / "audio/r1.wav").read_bytes() == b"mine"


def test_bad_rows_stop_no_other_and_are_tried_again(tmp_path):
    rows = [{"id": "a", "text": "Yes."}, {"id": "b", "text": "fail"}, {"id": "c", "text": "..."}, {"id": "d", "txt": 1}]
    report = rendered(rows, tmp_path)
    assert (report.made, report.errors, report.interrupted) == (1, 3, False)
    assert [(each["id"], each["line"]) for each in lines(tmp_path / "errors.jsonl")] == [("b", 2), ("c", 3), (None, 4)]
    assert lines(tmp_path / "errors.jsonl")[0]["error"] == "the model ended before it said anything; try another seed"
    rendered(rows, tmp_path, worker := FakeVoice())
    assert worker.said == ["fail"], "what can be told before any work is not computed"


def test_repetitions_are_made_once_and_other_content_of_an_id_is_an_error(tmp_path):
    same = {"text": "Twice."}
    report = rendered(
        [same, same, {"id": "a", "text": "One."}, {"id": "a", "text": "Two."}, {"id": "a", "text": "One."}], tmp_path
    )
    assert (report.rows, report.made, report.errors) == (3, 2, 1)
    assert [entry["line"] for entry in lines(tmp_path / "manifest.jsonl")] == [1, 3]
    (error,) = lines(tmp_path / "errors.jsonl")
    assert error["line"] == 4
    assert "line 3 has the id 'a' with other content" in error["error"]


def test_a_full_disk_ends_the_run_and_loses_nothing(tmp_path, monkeypatch):
    write, written = Commit.__call__, []

    def commit(self, target, digest, made):
        if len(written) == 2:
            raise OSError(errno.ENOSPC, "No space left on device")
        written.append(target)
        return write(self, target, digest, made)

    monkeypatch.setattr(Commit, "__call__", commit)
    with pytest.raises(OutputError, match="No space left") as raised:
        rendered(rows_of(6), tmp_path)
    assert "the same command goes on" in raised.value.hint
    monkeypatch.undo()
    assert files(tmp_path) == [*sorted(written), "errors.jsonl", "manifest.jsonl"]
    assert rendered(rows_of(6), tmp_path).skipped == 2


def test_an_unfinished_file_is_removed_when_writing_fails(tmp_path, monkeypatch):
    monkeypatch.setattr(os, "fsync", lambda _: (_ for _ in ()).throw(OSError(errno.ENOSPC, "No space left on device")))
    with pytest.raises(OutputError):
        rendered(rows_of(1), tmp_path)
    assert [name for name in files(tmp_path) if name.endswith(".tmp")] == []


def test_what_hits_every_row_ends_the_run(tmp_path):
    class Broken(FakeVoice):
        def compute(self, payload):
            if self.said:
                raise GraphError("a graph gave logits that are not numbers")
            return super().compute(payload)

    with pytest.raises(GraphError):
        rendered(rows_of(3), tmp_path, Broken())
    assert rendered(rows_of(3), tmp_path).skipped == 1


def test_a_limit_and_a_stop_leave_rows_for_later(tmp_path):
    report = rendered(rows_of(5), tmp_path, limit=2)
    assert (report.made, report.left, report.interrupted) == (2, 3, False)
    report = rendered(rows_of(5), tmp_path, worker := FakeVoice(), stop=lambda: bool(worker.said))
    assert report.interrupted
    assert report.left == 3 - report.made > 0
    assert len(lines(tmp_path / "manifest.jsonl")) == report.done == 5 - report.left
    report = rendered(rows_of(5), tmp_path)
    assert (report.done, report.left) == (5, 0)


def test_one_run_at_a_time(tmp_path):
    with Folder.locked(tmp_path, None):
        for shard in (None, Shard(1, 2)):
            with pytest.raises(OutputError, match=rf"locked: process {os.getpid()} on \S+ writes") as raised:
                rendered(rows_of(1), tmp_path, shard=shard)
            assert raised.value.hint
    with Folder.locked(tmp_path, Shard(1, 2)), Folder.locked(tmp_path, Shard(2, 2)):
        for shard in (None, Shard(1, 2), Shard(2, 2)):
            with pytest.raises(OutputError, match="locked"):
                rendered(rows_of(1), tmp_path, shard=shard)
    assert rendered(rows_of(1), tmp_path).made == 1


def test_shards_make_a_part_each_and_a_whole_run_joins_them(tmp_path):
    rows = [*rows_of(7), {"id": "bad", "text": "..."}]
    reports = [rendered(rows, tmp_path, shard=Shard(n, 3)) for n in (1, 2, 3)]
    assert ([report.rows for report in reports], sum(report.made for report in reports)) == ([3, 3, 2], 7)
    assert {name for name in files(tmp_path) if "/" not in name} == {
        f"{log}-{n}-of-3.jsonl" for log in ("manifest", "errors") for n in (1, 2, 3)
    }
    again = rendered(rows, tmp_path, worker := FakeVoice(), shard=Shard(1, 2))
    assert (again.made, worker.said) == (0, []), "rows of other shards are known"
    report = rendered(rows, tmp_path, worker)
    assert (report.skipped, report.errors, worker.said) == (7, 1, [])
    assert {name for name in files(tmp_path) if "/" not in name} == {"manifest.jsonl", "errors.jsonl"}
    rendered(rows, tmp_path.parent / "whole")
    assert timeless(lines(tmp_path / "manifest.jsonl")) == timeless(lines(tmp_path.parent / "whole/manifest.jsonl"))


def test_a_shard_removes_its_own_unfinished_files_only(tmp_path):
    (tmp_path / "audio").mkdir()
    names = [f".{n:016x}{mark}.tmp" for n, mark in enumerate(("", ".1-of-2", ".2-of-2"))]
    for name in (*names, ".mine.tmp"):
        (tmp_path / "audio" / name).touch()
    rendered([], tmp_path, shard=Shard(1, 2))
    assert [name for name in names if (tmp_path / "audio" / name).exists()] == [names[0], names[2]]
    rendered([], tmp_path)
    assert sorted(path.name for path in (tmp_path / "audio").iterdir()) == [".mine.tmp"]


@pytest.mark.parametrize("text", ["0/2", "3/2", "1", "1/0", "a/b", "-1/2", "1/2/3"])
def test_a_shard_is_one_of_some(text):
    with pytest.raises(ArgumentError, match="the shard is"):
        Shard.of(text)
    assert Shard.of("2/3") == Shard(2, 3)


def test_a_result_that_another_process_made_is_kept(tmp_path):
    rendered(rows_of(1), tmp_path / "first")
    (entry,) = lines(tmp_path / "first/manifest.jsonl")

    class Slow(FakeVoice):
        def compute(self, payload):
            made = super().compute(payload)
            other = tmp_path / "second/audio/r0.wav"
            other.parent.mkdir()
            other.write_bytes((tmp_path / "first/audio/r0.wav").read_bytes())
            self.kept = other.stat().st_ino
            return made

    worker = Slow()
    rendered(rows_of(1), tmp_path / "second", worker)
    assert (tmp_path / "second/audio/r0.wav").stat().st_ino == worker.kept
    assert timeless(lines(tmp_path / "second/manifest.jsonl")) == timeless([entry])


def test_rows_of_like_size_are_computed_together_in_a_batch(tmp_path):
    rows = [{"text": "a" * n} for n in (3, 9, 1, 7, 5)]
    rendered(rows, tmp_path / "one", one := FakeVoice())
    rendered(rows, tmp_path / "two", two := FakeVoice(batch=2))
    assert sorted(map(len, one.said)) == sorted(map(len, two.said))
    assert max(two.said, key=len) in two.said[:3]
    assert [entry["line"] for entry in lines(tmp_path / "two/manifest.jsonl")] == [1, 2, 3, 4, 5]


def kill(out: Path, kills: int, seed: int) -> None:
    """Kill runs at random instants, and check what is left after each few, and at the end."""
    done = subprocess.run([sys.executable, fake_render.__file__, str(out), str(kills), str(seed)], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    whole = {path: soundfile.SoundFile(path).comment.split()[1] for path in (out / "audio").glob("*.wav")}
    assert whole, "no run came as far as a row"
    for path, digest in whole.items():
        assert path.read_bytes() == fake_render.said(digest, "wav"), "a file is not whole"
    rows = [*rows_of(12, f"Take {(kills - 1) // 8}"), {"id": "bad", "text": "fail"}]
    before = state(out)
    report = rendered(rows, out, worker := FakeVoice())
    assert (report.done, report.errors) == (12, 1)
    assert len(worker.said) == report.made + 1
    after = state(out)
    kept = [name for name in before if name.startswith("audio/") and not name.endswith(".tmp") and after[name] == before[name]]
    assert len(kept) == report.skipped, "a file that was done keeps its time and inode"
    rendered(rows, out.parent / "undisturbed")
    for name in ("manifest.jsonl", "errors.jsonl"):
        assert timeless(lines(out / name)) == timeless(lines(out.parent / "undisturbed" / name))
    assert files(out) == files(out.parent / "undisturbed")


def test_killed_runs_make_every_row_once(tmp_path):
    kill(tmp_path / "out", 40, seed=1)


@pytest.mark.thorough
def test_a_thousand_killed_runs_make_every_row_once(tmp_path):
    kill(tmp_path / "out", 1000, seed=2)


def test_a_manifest_is_read_whatever_its_lines_hold(tmp_path):
    (tmp_path / "manifest.jsonl").write_text("\n".join(["null", "[]", '{"id": 3}', '{"id": "r0"}', json.dumps({"id": "x"})]))
    assert rendered(rows_of(1), tmp_path).made == 1


def test_rows_and_commits_can_be_sent_to_another_process(tmp_path):
    settings = {"base": tmp_path, "defaults": Request(""), "format": "wav", "batch": 1}
    job = RenderJob(fake_render.fake_tts(), b'{"text": "One."}', "jsonl", tmp_path, **settings)
    (row,) = job.rows({})
    with Folder.locked(tmp_path, Shard(1, 2)) as folder:
        sent, commit = pickle.loads(pickle.dumps((row, folder.commit(job.digest_of))))
        made = outcome(FakeVoice(), sent, commit)
    assert (sent, made.row.target) == (row, row.target)
    assert job.digest_of(tmp_path / row.target) == row.digest
