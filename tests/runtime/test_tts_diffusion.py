"""A TTS of a diffusion model: speech whole and in chunks, pieces, voices, settings of the other kind, many requests."""

from __future__ import annotations

import asyncio
import re
import threading
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from fake_diffusion import CODEC, diffusion_tts, known_latents, known_tts
from fakes import fake_engines
from fishrt import TTS, Denoising, Request, Sampling, Speech, Voice
from fishrt.bundle.diffusion import DenoisingDefaults
from fishrt.diffusion import voices as diffusion_voices
from fishrt.diffusion.text import Pace, tokens
from fishrt.errors import ArgumentError, FishrtError, PromptError, SamplingError, VoiceError
from fishrt.speaking.scheduler import Scheduler
from fishrt.speech import AudioChunk, Progress
from helpers_text import bundle_folder, language_model, manifest

TEXT = "Hello to all of you."
WHOLE, BLOCKS = Denoising(steps=3, frames=24), Denoising(steps=3, blocks=(4, 8, 12))
WINDOW = Denoising(steps=3, blocks=(200,))
LONG = " ".join(f"This is the sentence of number {n}, which is spoken to its end." for n in range(4))


@pytest.fixture
def tts(tmp_path: Path) -> TTS:
    """One that never ends before its window does."""
    return diffusion_tts(tmp_path / "bundle", denoising=DenoisingDefaults(steps=3))


@pytest.fixture
def known(tmp_path: Path) -> TTS:
    """One whose speech is known, and ends."""
    return known_tts(tmp_path / "known")


def voice(frames: int = 12, level: float = 1.0, name: str = "anna") -> Voice:
    latents = np.random.default_rng(1).standard_normal((frames, 8), np.float32) * np.float32(level)
    return Voice.of(name, latents, "", CODEC.fingerprint)


def calls(tts: TTS, role: str) -> int:
    return len(tts.engines[role].calls)  # type: ignore[attr-defined]


def together(chunks: list[AudioChunk]) -> tuple[np.ndarray, np.ndarray]:
    latents = [chunk.latents for chunk in chunks if chunk.latents is not None]
    assert len(latents) == len(chunks)
    return np.concatenate([chunk.pcm for chunk in chunks]), np.concatenate(latents)


def same(found: Speech | list[AudioChunk], expected: Speech) -> None:
    pcm, latents = together(found) if isinstance(found, list) else (found.pcm, found.latents)
    np.testing.assert_array_equal(latents, expected.latents)
    np.testing.assert_allclose(pcm, expected.pcm, atol=1e-5)


def test_speech_has_latents_and_its_settings(tts: TTS) -> None:
    speech = tts.speak(TEXT, seed=7, denoising=WHOLE)
    assert speech.latents is not None
    assert (speech.latents.dtype, speech.latents.shape, speech.codes.shape) == (np.float32, (24, 8), (0, 24))
    assert (speech.codes.dtype, len(speech.pcm), speech.sample_rate) == (np.int64, 24 * CODEC.hop, 800)
    info = speech.info
    assert (info.sampling, info.seed, info.frames, info.voices) == (None, 7, 24, ())
    assert info.denoising == WHOLE.resolve(tts.bundle.manifest.diffusion)
    assert info.pieces[0].text == f"[S1] {TEXT}"
    assert info.stop_reasons == ("max_frames",)
    assert info.timings.model_s > 0
    assert "cut off by the limit" in info.warnings[0]


def test_speech_ends_where_the_silence_begins(known: TTS) -> None:
    speech = known.speak(TEXT, voice=voice())
    said = tokens(f"[S1] {TEXT}")
    patches = voice().sound.reshape(-1, 32).mean(axis=1)
    wanted = known_latents(said, patches, known.bundle.manifest.diffusion)[: len(said)]
    assert speech.latents is not None
    np.testing.assert_allclose(speech.latents, wanted, atol=1e-4)
    assert (speech.info.stop_reasons, speech.info.warnings, speech.info.voices) == (("end",), (), ("anna",))


@pytest.mark.parametrize("denoising", [WHOLE, BLOCKS, Denoising(steps=(1, 2, 3), blocks=(5, 6, 13), variant="streaming")])
@pytest.mark.parametrize("mode", ["fast", "quality"])
def test_a_stream_is_the_whole(tts: TTS, denoising: Denoising, mode: Any) -> None:
    expected = tts.speak(TEXT, seed=3, denoising=denoising)
    stream = tts.stream(TEXT, seed=3, denoising=denoising, mode=mode)
    chunks = list(stream)
    same(chunks, expected)
    assert len(chunks) > 1
    assert [chunk.stop_reason for chunk in chunks if chunk.stop_reason] == ["max_frames"]
    assert stream.info.frames == 24


def test_a_stream_without_settings_of_blocks_is_in_the_usual_ones(tmp_path: Path) -> None:
    """What nobody hears before its end is not."""
    tts = diffusion_tts(tmp_path / "bundle", denoising=DenoisingDefaults(steps=3), max_frames=180)
    wanted = tts.speak(TEXT, seed=3, denoising=Denoising((8, 15, 20), blocks=(32, 128, 20)))
    stream, before = tts.stream(TEXT, seed=3), calls(tts, "denoise")
    first = next(stream)
    assert calls(tts, "denoise") - before == 8, "the first sound comes after the steps of the first block"
    same([first, *stream], wanted)
    assert stream.info.denoising == wanted.info.denoising
    same(list(tts.submit(TEXT, seed=3)), wanted)
    (whole,) = tts.speak_many([TEXT], seed=3)
    same(tts.speak(TEXT, seed=3), whole)
    assert whole.info.denoising == Denoising().resolve(tts.bundle.manifest.diffusion)


def test_later_pieces_may_have_other_settings(tts: TTS) -> None:
    later = Denoising(steps=1, frames=24)
    speech = tts.speak(LONG, seed=5, denoising=Denoising(steps=(2, 1), blocks=(8, 192), later=later))
    pieces = [piece.text for piece in speech.info.pieces]
    assert [piece.frames for piece in speech.info.pieces] == [200] + [24] * (len(pieces) - 1)
    first = tts.speak(pieces[0], seed=5, denoising=Denoising(steps=(2, 1), blocks=(8, 192)))
    second = tts.speak(pieces[1], seed=6, denoising=replace(later, pace=Pace(max_s=99)))
    np.testing.assert_array_equal(speech.latents[:224], np.concatenate([first.latents, second.latents]))  # type: ignore[index, list-item]


def test_a_stream_ends_with_the_whole(known: TTS) -> None:
    expected = known.speak(TEXT)
    chunks = list(known.stream(TEXT, denoising=Denoising(steps=2, blocks=(8, 8, 8, 16))))
    np.testing.assert_allclose(together(chunks)[1], expected.latents, atol=1e-4)
    assert chunks[-1].stop_reason == "end"


def test_one_block_is_the_whole(tts: TTS) -> None:
    same(tts.speak(TEXT, seed=1, denoising=Denoising(steps=3, blocks=(24,))), tts.speak(TEXT, seed=1, denoising=WHOLE))


def test_a_seed_can_be_repeated(tts: TTS) -> None:
    first = tts.speak(TEXT, denoising=WHOLE)
    same(tts.speak(TEXT, seed=first.info.seed, denoising=WHOLE), first)
    other = tts.speak(TEXT, seed=first.info.seed + 1, denoising=WHOLE)
    assert not np.allclose(other.latents, first.latents)  # type: ignore[arg-type]


def test_pieces_have_seeds_in_a_row(tts: TTS) -> None:
    speech = tts.speak(LONG, seed=5, denoising=Denoising(steps=2, frames=200))
    pieces = [piece.text for piece in speech.info.pieces]
    assert len(pieces) > 1
    for n, text in enumerate(pieces):
        alone = tts.speak(text, seed=5 + n, denoising=Denoising(steps=2, frames=200))
        np.testing.assert_array_equal(speech.latents[200 * n : 200 * (n + 1)], alone.latents)  # type: ignore[index]


def test_a_block_is_heard_while_the_next_is_made(tts: TTS) -> None:
    stream = tts.stream(TEXT, denoising=Denoising(steps=(2, 50), blocks=(8, 16)))
    first = next(stream)
    assert calls(tts, "denoise") == 2
    assert len(first.pcm)
    chunks = [first]
    while sum(len(chunk.pcm) for chunk in chunks) < 8 * CODEC.hop:
        chunks.append(next(stream))
    assert calls(tts, "denoise") < 52


def test_chunks_that_are_needed_come_before_steps(tts: TTS) -> None:
    """Steps take much longer than the sound of a block: all of a block is given out before the next step."""
    run = tts.engines["denoise"].run

    def slow(*args: Any) -> Any:
        time.sleep(1.2)
        return run(*args)

    tts.engines["denoise"].run = slow  # type: ignore[method-assign]
    stream = tts.stream(TEXT, denoising=Denoising(steps=1, blocks=(8, 16)), mode="fast")
    heard = 0
    while heard < 8 * CODEC.hop:
        heard += len(next(stream).pcm)
        assert calls(tts, "denoise") == 1


def test_progress_after_every_step(tts: TTS) -> None:
    told: list[Progress] = []
    tts.speak(TEXT, denoising=BLOCKS, progress=told.append)
    assert [(p.step, p.steps, p.frames) for p in told] == [(n, 9, 4 * (n > 2) + 8 * (n > 5) + 12 * (n > 8)) for n in range(1, 10)]
    expected = told[0].expected_s
    assert expected == Pace().estimate(f"[S1] {TEXT}")
    assert {p.expected_s for p in told} == {expected}
    assert told[-1].audio_s == pytest.approx(24 / 8)


def test_a_stream_that_is_closed_takes_no_more_steps(tts: TTS) -> None:
    def close(progress: Progress) -> None:
        if progress.step == 4:
            stream.close()

    stream = tts.stream(TEXT, denoising=BLOCKS, progress=close)
    assert sum(len(chunk) for chunk in stream) <= 4 * CODEC.hop
    assert calls(tts, "denoise") == 4


@pytest.mark.parametrize("error", [ValueError("mine"), KeyboardInterrupt()], ids=repr)
def test_an_error_of_the_caller_ends_the_request(tts: TTS, error: BaseException) -> None:
    def fail(_: Progress) -> None:
        raise error

    with pytest.raises(type(error)):
        tts.speak(TEXT, denoising=WHOLE, progress=fail)
    assert calls(tts, "denoise") == 1


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"sampling": Sampling(temperature=0.5)}, "sampling is for language models; test is a diffusion model"),
        ({"system": "Speak."}, "system is for language models"),
        ({"upstream_compat": True}, "upstream_compat is for language models"),
    ],
)
def test_options_of_language_models_are_refused_by_name(tts: TTS, options: Any, message: str) -> None:
    for speak in (tts.speak, tts.stream, tts.submit):
        with pytest.raises(ArgumentError, match=message):
            speak(TEXT, **options)
    assert not calls(tts, "denoise")


def test_settings_that_say_nothing_are_not_refused(tts: TTS) -> None:
    assert tts.speak(TEXT, sampling=Sampling(), denoising=WHOLE).info.sampling is None


def test_a_language_model_refuses_denoising(tmp_path: Path) -> None:
    lm = language_model()
    other = TTS(bundle_folder(tmp_path / "b"), fake_engines(lm, manifest().codec, [lm.semantic_begin_id] * 3), tmp_path)
    with pytest.raises(ArgumentError, match="denoising is for diffusion models; test is a language model"):
        other.speak(TEXT, denoising=Denoising(steps=3))
    assert other.speak(TEXT, denoising=Denoising()).info.denoising is None


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"denoising": Denoising(blocks=(600, 41))}, SamplingError, "641 frames are wanted"),
        ({"max_frames": 641}, SamplingError, "it must be a whole number from 1 to 640, the model's limit"),
        ({"text": "..."}, PromptError, "nothing to speak"),
        ({"text": "<|speaker:0|>Hi."}, PromptError, r"has <\|speaker:0\|>"),
        ({"voice": Voice.of("ben", np.zeros((4, 9), np.float32), "", CODEC.fingerprint)}, VoiceError, r"shape \[4, 9\]"),
        ({"voice": [voice(6000), voice(401)]}, VoiceError, "6,400 frames; the model takes 4 to 6,000"),
        ({"voice": voice(3)}, VoiceError, "0 frames"),
        ({"denoising": 3}, ArgumentError, "denoising is of type int"),
        ({"steps": 3}, ArgumentError, "no option steps"),
    ],
)
def test_what_cannot_work_is_refused_before_anything_runs(
    tmp_path: Path, options: dict[str, Any], error: type[FishrtError], message: str
) -> None:
    tts = diffusion_tts(tmp_path / "b", max_voice_frames=6000)
    with pytest.raises(error) as caught:
        tts.stream(options.pop("text", TEXT), **options)
    assert re.search(message, f"{caught.value}; {caught.value.hint}")
    assert not any(calls(tts, role) for role in tts.engines)


def test_a_limit_of_frames_cuts_off(tts: TTS) -> None:
    whole = tts.speak(TEXT, seed=2, denoising=BLOCKS)
    for most, made in ((24, 24), (23, 23), (12, 12), (5, 5), (3, 3)):
        speech = tts.speak(TEXT, seed=2, denoising=BLOCKS, max_frames=most)
        assert speech.latents is not None
        assert len(speech.latents) == made
        assert speech.info.stop_reasons == ("max_frames",)
        if most == 12:  # whole blocks are the same
            np.testing.assert_array_equal(speech.latents, whole.latents[:12])  # type: ignore[index]


def test_speech_after_a_long_pause_is_a_warning(known: TTS) -> None:
    engine, said = known.engines["denoise"], len(tokens(f"[S1] {TEXT}"))
    function = engine._function  # type: ignore[attr-defined]

    def resumes(feeds: Any, state: Any) -> Any:
        found = function(feeds, state)
        later = feeds["position_ids"][0] >= said + 40
        t = feeds["modulation"][0, 0, 0, 0]
        found["velocity"][:, :, later] = ((feeds["latents"] - np.sin(feeds["position_ids"][0])[:, None]) / t)[:, None, later]
        return found

    engine._function = resumes  # type: ignore[attr-defined]
    for speak in (known.speak, lambda *a, **o: known.submit(*a, **o).whole(), lambda *a, **o: known.submit(*a, **o).whole()):
        speech = speak(TEXT, seed=1, denoising=WINDOW)
        while known.scheduler.stats.active:
            time.sleep(0.01)
        assert speech.info.stop_reasons == ("pause",)
        assert speech.info.warnings == (f'the speech was cut off at a pause, after which there is more: "[S1] {TEXT}"',)
    assert calls(known, "denoise") == 6, "the last one was known, and has the warning of the first"


def test_several_voices_are_one_after_the_other(known: TTS) -> None:
    one, two = voice(8), voice(13, 0.5, "ben")
    joined = Voice.of("both", np.concatenate([one.sound, two.sound[:12]]), "", CODEC.fingerprint)
    both = known.speak(TEXT, seed=1, voice=[one, two])
    np.testing.assert_array_equal(both.latents, known.speak(TEXT, seed=1, voice=joined).latents)
    assert both.info.voices == ("anna", "ben")


def test_a_voice_is_read_once(tts: TTS, monkeypatch: pytest.MonkeyPatch) -> None:
    for seed in (1, 2):
        tts.speak(LONG, seed=seed, voice=voice(), denoising=Denoising(steps=1, frames=200))
    assert calls(tts, "speaker_cond") == 1
    monkeypatch.setattr(diffusion_voices, "KEPT_BYTES", 1)
    for name in ("anna", "ben", "anna"):
        tts.speak(TEXT, voice=voice(level=len(name), name=name), denoising=WHOLE)
    assert calls(tts, "speaker_cond") == 4, "only the last one is kept"


def test_a_prepared_voice_is_not_read_again(tts: TTS, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    own = tmp_path / "voices"
    folder = TTS(tts.bundle, tts.engines, own).store.add(voice())
    first, path = TTS(tts.bundle, tts.engines, own), tts.prepared_path(folder)
    expected = first.speak(TEXT, voice="anna", seed=1, denoising=WHOLE)
    first.prepare("anna", folder)
    assert path.is_file()
    assert calls(tts, "speaker_cond") == 1
    same(TTS(tts.bundle, tts.engines, own).speak(TEXT, voice="anna", seed=1, denoising=WHOLE), expected)
    assert calls(tts, "speaker_cond") == 1
    path.write_bytes(b"damaged")
    same(TTS(tts.bundle, tts.engines, own).speak(TEXT, voice="anna", seed=1, denoising=WHOLE), expected)
    assert "is read again" in caplog.text
    assert calls(tts, "speaker_cond") == 2


def test_recordings_become_voices(tts: TTS, tmp_path: Path) -> None:
    n = np.arange(1610)
    recording = (np.sin(n * 0.4) * np.sin(n * 0.003) * 0.5).astype(np.float32)
    own = TTS(tts.bundle, tts.engines, tmp_path / "voices")
    made = Voice.from_audio(own, (recording, 800), name="anna")
    assert made.sound.shape == (16, 8)
    assert made.loudness is not None
    own.store.add(made)
    same(own.speak(TEXT, voice="anna", seed=1, denoising=WHOLE), own.speak(TEXT, voice=made, seed=1, denoising=WHOLE))
    np.testing.assert_array_equal(own.encode(recording, 800), made.sound)
    assert len(own.decode(made.sound)) == 16 * CODEC.hop


REQUESTS = (
    Request(TEXT, seed=1, denoising=WHOLE),
    Request(LONG, seed=2, denoising=BLOCKS),
    Request("Hi.", seed=3, voice=voice(), denoising=WHOLE),
)


@given(
    schedule=st.lists(
        st.one_of(
            st.tuples(st.just("submit"), st.integers(0, 2)),
            st.tuples(st.just("turns"), st.integers(1, 9)),
            st.tuples(st.just("close"), st.integers(0, 2)),
        ),
        max_size=12,
    )
)
@settings(max_examples=20, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_any_schedule_gives_what_single_requests_give(tts: TTS, schedule: list[tuple[str, int]]) -> None:
    from fishrt.speaking.stream import SpeechStream, growing_chunks

    turns, made, going = tts.opened()(3), list[tuple[int, SpeechStream]](), list[SpeechStream]()
    for verb, what in schedule:
        if verb == "submit" and len(turns.jobs) < 3:
            job = tts.job(REQUESTS[what], None, growing_chunks)
            turns.add(job, tts.gain(job.task))
            going.append(SpeechStream(job, lambda: list(turns.turn())))
            made.append((what, going[-1]))
        elif verb == "turns":
            for _ in range(what):
                list(turns.turn())
        elif verb == "close" and what < len(going):
            going.pop(what).close()
    for what, stream in made:
        if stream in going:
            same(list(stream), tts.speak(REQUESTS[what]))
    assert not turns.jobs or any(stream._job.closed.is_set() for _, stream in made)


def test_jobs_take_their_steps_in_turn(tts: TTS) -> None:
    order: list[int] = []
    turns = tts.opened()(3)
    for n in range(3):
        job = tts.job(Request(TEXT, seed=n, denoising=WHOLE), lambda _, n=n: order.append(n), lambda *_: iter([99] * 99))  # type: ignore[misc]
        turns.add(job, 1.0)
    while turns.jobs:
        list(turns.turn())
    assert order == [0, 1, 2] * 3


def test_many_requests_at_once(tts: TTS) -> None:
    for request, speech in zip(REQUESTS, tts.speak_many(REQUESTS), strict=True):
        same(speech, tts.speak(request))

    async def listen() -> list[AudioChunk]:
        return [chunk async for chunk in tts.submit(REQUESTS[1])]

    same(asyncio.run(listen()), tts.speak(REQUESTS[1]))


def test_a_request_that_comes_again_runs_the_codec_only(tts: TTS) -> None:
    first, steps = tts.submit(REQUESTS[1]).whole(), calls(tts, "denoise")
    same(tts.submit(REQUESTS[1]).whole(), first)
    assert calls(tts, "denoise") == steps
    tts.submit(REQUESTS[1].text, seed=2, denoising=WHOLE).whole()
    assert calls(tts, "denoise") > steps


def test_a_job_that_nobody_reads_gives_up_its_slot_and_goes_on_later(tts: TTS) -> None:
    scheduler = Scheduler(tts, max_active=1, known_bytes=0)
    unread = scheduler.submit(REQUESTS[1], most_buffered_s=0.05)
    deadline = time.monotonic() + 10
    while not unread._job.paused:
        assert time.monotonic() < deadline
        time.sleep(0.01)
    same(scheduler.submit(REQUESTS[0]).whole(), tts.speak(REQUESTS[0]))
    same(unread.whole(), tts.speak(REQUESTS[1]))
    scheduler.close()


def test_numbers_that_are_none_end_their_request_and_no_other(tts: TTS) -> None:
    bad = threading.Event()
    engine = tts.engines["denoise"]
    run = engine.run

    def spoilt(feeds: Any) -> Any:
        found = run(feeds)
        if feeds["text_keys"].shape[3] == len(tokens("[S1] Spoilt.")):
            bad.set()
            found["velocity"][:] = np.nan
        return found

    engine.run = spoilt  # type: ignore[method-assign,assignment]
    good, spoilt_stream = tts.submit(REQUESTS[0]), tts.submit("Spoilt.", denoising=WHOLE)
    with pytest.raises(FishrtError, match="not numbers"):
        spoilt_stream.whole()
    assert bad.is_set()
    same(good.whole(), tts.speak(REQUESTS[0]))


def test_a_closed_tts_speaks_no_more(tts: TTS) -> None:
    tts.speak(TEXT, denoising=WHOLE)
    tts.close()
    with pytest.raises(FishrtError, match="closed"):
        tts.speak(TEXT)
