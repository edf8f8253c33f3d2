"""Streamed speech: sizes of chunks, their sum, and no work ahead of demand."""

from __future__ import annotations

import itertools
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from fakes import FakeEngine, fake_bundle, fake_engines
from fishrt import TTS
from fishrt.bundle.features import DecodeContext
from fishrt.errors import ArgumentError
from fishrt.request import Mode
from fishrt.speaking.stream import chunk_sizes, growing_chunks
from helpers_text import language_model, manifest

LM = language_model()
CODEC = manifest().codec
TEXT = "The first sentence is about a fox. The second sentence is about a dog. The third one is about both of them, and ends."


def talkative(folder: Path, frames: int = 50, **changes: Any) -> TTS:
    """Return a TTS that speaks `frames` frames for every piece of text."""
    content = fake_bundle(folder / "bundle", **changes)
    spoken = [LM.semantic_begin_id + n % 160 for n in range(frames)]
    return TTS(content, fake_engines(content.manifest.model, content.manifest.codec, spoken))


def calls(tts: TTS) -> int:
    engines = [tts.engines[role] for role in ("slow_ar", "fast_ar", "codec_decode")]
    return sum(len(engine.calls) for engine in engines if isinstance(engine, FakeEngine))


def test_chunks_grow_slowly_enough_for_what_was_given_to_last() -> None:
    assert list(itertools.islice(growing_chunks(4, 32), 14)) == [4] * 4 + [8] * 4 + [16] * 4 + [32] * 2
    for rtf, runs_dry in ((0.8, False), (0.85, True)):
        left = 0.0
        dry = []
        for n, frames in enumerate(itertools.islice(growing_chunks(4, 32), 40)):
            left -= frames * rtf if n else 0
            dry.append(left < -1e-9)
            left += frames
        assert any(dry) == runs_dry


def test_a_mode_changes_the_chunks_and_not_the_speech(tmp_path: Path) -> None:
    tts = talkative(tmp_path)
    speech = tts.speak(TEXT, seed=1)
    modes: tuple[Mode, ...] = ("fast", "balanced", "quality")
    for mode, first in zip(modes, (2, 4, 16), strict=True):
        assert next(chunk_sizes(mode)(4, 16)) == first
        chunks = list(tts.stream(TEXT, seed=1, mode=mode))
        assert chunks[0].codes.shape[1] == min(first, chunks[0].codes.shape[1])
        np.testing.assert_array_equal(np.concatenate([c.pcm for c in chunks]), speech.pcm)
    with pytest.raises(ArgumentError, match="mode is 'slow'"):
        tts.stream(TEXT, mode="slow")  # type: ignore[arg-type]


def test_chunks_of_a_stream(tmp_path: Path) -> None:
    """The schedule continues over pieces, and the last chunk of a piece is the remainder."""
    chunks = list(talkative(tmp_path).stream(TEXT, voice=[]))
    assert [(c.piece, c.codes.shape[1]) for c in chunks] == [
        *((0, n) for n in (4, 4, 4, 4, 8, 8, 8, 8, 2)),
        *((1, n) for n in (16, 16, 16, 2)),
    ]
    assert [c.stop_reason for c in chunks] == [None] * 8 + ["end"] + [None] * 3 + ["end"]
    assert all(len(c.pcm) == c.codes.shape[1] * CODEC.hop for c in chunks)


def test_a_limit_that_ends_a_chunk_ends_the_piece(tmp_path: Path) -> None:
    """No empty chunk behind it."""
    chunks = list(talkative(tmp_path).stream("Hello world!", max_frames=8))
    assert [(c.codes.shape[1], c.stop_reason) for c in chunks] == [(4, None), (4, "max_frames")]


@pytest.mark.parametrize("context", [DecodeContext(0, 0), DecodeContext(3, 2)], ids=["frame by frame", "ahead"])
def test_streaming_says_what_speaking_says(tmp_path: Path, context: DecodeContext) -> None:
    tts = talkative(tmp_path, codec=replace(CODEC, context=context))
    stream = tts.stream(TEXT, seed=1)
    chunks, speech = list(stream), tts.speak(TEXT, seed=1)
    np.testing.assert_array_equal(np.concatenate([c.pcm for c in chunks]), speech.pcm)
    np.testing.assert_array_equal(np.concatenate([c.codes for c in chunks], axis=1), speech.codes)
    assert len(chunks[0].pcm) == (4 if context.ahead == 0 else 3) * CODEC.hop
    said = replace(stream.info, timings=speech.info.timings, rtf=speech.info.rtf)
    assert said == speech.info


def test_the_first_sound_comes_after_the_first_frames(tmp_path: Path) -> None:
    tts = talkative(tmp_path)
    stream = tts.stream(TEXT)
    assert calls(tts) == 0
    first = next(stream)
    fast = tts.engines["fast_ar"]
    assert isinstance(fast, FakeEngine)
    assert sum(call["write_index"].tolist() == [0] for call in fast.calls) == 4
    assert first.timings.ttfa_s is not None
    assert first.timings.ttfa_s >= first.timings.compute_s
    assert next(stream).timings.ttfa_s is None
    assert stream.info.timings.ttfa_s == first.timings.ttfa_s


def test_nothing_is_made_before_it_is_asked_for_and_nothing_after_the_end(tmp_path: Path) -> None:
    tts = talkative(tmp_path)
    stream = tts.stream(TEXT)
    next(stream)
    before = calls(tts)
    assert calls(tts) == before
    stream.close()
    assert list(stream) == []
    assert calls(tts) == before


def test_info_of_a_stream_tells_what_was_given_so_far(tmp_path: Path) -> None:
    stream = talkative(tmp_path).stream(TEXT)
    next(stream)
    assert (stream.info.pieces, stream.info.audio_s) == ((), 4 * CODEC.hop / CODEC.sample_rate)
    silent = talkative(tmp_path / "silent", frames=0).stream("Hello!")
    assert [len(c.pcm) for c in silent] == [0]
    assert (silent.info.rtf, silent.info.frames, silent.info.timings.ttfa_s) == (None, 0, None)
