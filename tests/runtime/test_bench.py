"""`fishrt bench` on the embedded voice. No test asserts a time, which a busy machine would change."""

from __future__ import annotations

import json
import math
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from fishrt.bench import BenchRequest, bench
from fishrt.bench.child import run_child
from fishrt.bench.setup import bytes_read, describe_machine, made_up_voice, open_timed, read_bandwidth
from fishrt.bundle.folder import Bundle, embedded_bundle
from fishrt.errors import FishrtError, PromptError, SamplingError
from helpers_cli import refused, run

ENTRIES = {
    "bundle": {"name", "precision", "bytes", "codebooks", "frame_rate"},
    "request": {"provider", "threads", "text", "frames", "batch", "prefill_columns", "repeats", "warm_up"},
    "machine": {"cpu", "cores", "threads_by_default", "memory_bytes", "system", "python", "versions", "read_gb_s"},
    "load": {"cold_s", "cached_s"},
    "memory": {"cold_load_peak_bytes", "cached_load_peak_bytes", "speaking_peak_bytes"},
    "frame": {"median_ms", "p95_ms", "count"},
    "slow_step": {"median_ms", "p95_ms", "count"},
    "fast_step": {"median_ms", "p95_ms", "count"},
    "loop": {"median_ms", "p95_ms", "count", "share"},
    "prefill": {"median_ms", "p95_ms", "count", "columns", "tokens_per_s"},
    "codec": {"audio_s", "decode", "encode"},
    "speak": {"median_ms", "p95_ms", "count", "audio_s", "frames", "rtf"},
    "ttfa": {"known_voice", "new_voice"},
    "weights": {"slow_bytes", "fast_bytes", "frame_bytes", "slow_gb_s", "frame_gb_s", "slow_share", "frame_share"},
}


@pytest.fixture(scope="module")
def measured() -> dict[str, Any]:
    """The JSON result of the command."""
    result = run("bench", "--json", "--frames", "3", "--batch", "1,3", "--threads", "1")
    assert result.exit_code == 0, result.output
    return json.loads(result.stdout)


def numbers(value: Any) -> Iterator[float]:
    if isinstance(value, dict):
        value = list(value.values())
    if isinstance(value, list):
        for item in value:
            yield from numbers(item)
    elif isinstance(value, (int, float)):
        yield value


@pytest.mark.slow
def test_every_measure_is_there_and_finite(measured):
    assert {name: set(measured[name]) for name in ENTRIES} == ENTRIES
    assert set(measured) - set(ENTRIES) == {
        "ok",
        "warnings",
        "command",
        "contexts",
        "batches",
        "frames_per_s",
        "fast_steps_per_frame",
        "prompt_columns",
    }
    page = (Path(__file__).parents[2] / "docs/json.md").read_text(encoding="utf-8")
    assert not [name for name in measured if f"`{name}`" not in page]
    assert all(math.isfinite(number) for number in numbers(measured))
    assert all(
        number > 0 for name in ("frame", "slow_step", "fast_step", "prefill", "codec") for number in numbers(measured[name])
    )
    assert [row["context"] for row in measured["contexts"]] == [128, 256, 512, 1024]
    assert [(row["rows"], row["count"]) for row in measured["batches"]] == [(1, 3), (3, 3)]
    assert all(row["frames_per_s"] > 0 for row in measured["batches"])


@pytest.mark.slow
def test_counts_are_those_of_the_model(measured):
    manifest = Bundle.load(embedded_bundle()).manifest
    assert measured["fast_steps_per_frame"] == manifest.model.num_codebooks - 1
    assert measured["frame"]["count"] >= 3
    assert measured["fast_step"]["count"] == measured["frame"]["count"] * measured["fast_steps_per_frame"]
    weights = measured["weights"]
    assert weights["frame_bytes"] == weights["slow_bytes"] + measured["fast_steps_per_frame"] * weights["fast_bytes"]
    assert 0 < measured["loop"]["share"] < 1


@pytest.mark.slow
def test_no_names_of_folders_or_hosts(measured):
    text = json.dumps(measured)
    assert str(Path.home()) not in text
    assert os.uname().nodename not in json.dumps(measured["machine"])
    assert str(embedded_bundle().parent) not in text


@pytest.mark.slow
def test_the_table_has_units(measured, monkeypatch):
    monkeypatch.setattr("fishrt.bench.bench", lambda *_: measured)
    result = run("bench", "-q")
    assert result.exit_code == 0, result.output
    assert result.stderr == ""
    for words in ("tokens/s", "GB/s", "RTF", "ms", "frames/s", "MB", "of the machine's"):
        assert words in result.stdout


def test_tables_are_not_read_whole():
    """Only some rows of embedding tables count as read. The file stores weights in 16 bits; products read 32 bits."""
    bundle = Bundle.load(embedded_bundle())
    graph = bundle.file(bundle.manifest.specs["slow_ar"].file)
    assert 0 < bytes_read(graph) < 2 * graph.with_name(f"{graph.name}.data").stat().st_size


def test_engines_note_each_call():
    tts, engines = open_timed(None, provider="cpu", threads=1)
    codes = np.zeros((len(tts.bundle.manifest.codec.codebook_sizes), 5), np.int64)
    tts.decode(codes)
    calls = engines["codec_decode"].take()
    assert sum(call.length for call in calls) == 5
    assert all(call.seconds > 0 for call in calls)
    assert engines["codec_decode"].take() == []


def test_made_up_voices_fit_their_bundle_and_differ():
    manifest = Bundle.load(embedded_bundle()).manifest
    voices = [made_up_voice(manifest, seed) for seed in (1, 1, 2)]
    for voice in voices:
        voice.check(manifest)
    assert np.array_equal(voices[0].codes, voices[1].codes)
    assert not np.array_equal(voices[0].codes[:, 0], voices[2].codes[:, 0])


def test_a_machine_is_described():
    assert read_bandwidth(2, size=1 << 20) > 0
    assert describe_machine()["versions"]["numpy"] == np.__version__


def test_two_frames_at_least():
    with pytest.raises(SamplingError, match="1 frames"):
        BenchRequest(frames=1)
    refused(run("bench", "--frames", "1"), "--frames")


@pytest.mark.parametrize("sizes", ["0", "2,", "a", "1,-2"])
def test_sizes_of_batches_are_whole_numbers(sizes):
    refused(run("bench", "--batch", sizes), "whole numbers")


def test_a_bundle_that_is_none_is_refused(tmp_path):
    refused(run("bench", tmp_path), "manifest.json")


def test_text_without_words_is_refused():
    bundle = Bundle.load(embedded_bundle())
    with pytest.raises(PromptError):
        bench(bundle, BenchRequest(text="…", frames=2, threads=1))


def test_a_child_that_fails_says_why(tmp_path):
    with pytest.raises(FishrtError, match="manifest"):
        run_child(tmp_path, provider="cpu", threads=1, cache=tmp_path / "cache")
