"""TTS over fake engines: prompts, results, reports and errors."""

from __future__ import annotations

import json
import time
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from fakes import FakeEngine, expected_codes, fake_bundle, fake_engines
from fishrt import TTS, FishrtError, Sampling, Voice
from fishrt.bundle.features import RepetitionPenalty
from fishrt.bundle.folder import embedded_bundle
from fishrt.errors import AudioError, BundleError, GraphError, PromptError, ProviderError, SamplingError, VoiceError
from fishrt.language_model.context import ContextStore
from fishrt.language_model.sampling import audio_ids
from fishrt.speech import PieceInfo, Progress
from helpers_text import language_model, manifest, voice

LM = language_model()
CODEC = manifest().codec
SPOKEN = [LM.semantic_begin_id + n for n in (3, 159, 0, 7)]
LONG = "The first sentence is about a fox. The second sentence is about a dog. The third one is about both of them, and ends."


def fake_tts(folder: Path, main_tokens: list[int] | None = SPOKEN, **changes: Any) -> TTS:
    bundle = fake_bundle(folder / "bundle", voices=[voice("anna"), voice("ben", "Five boxing wizards.", frames=9)], **changes)
    content = bundle.manifest
    return TTS(bundle, fake_engines(content.model, content.codec, main_tokens))


@pytest.fixture
def tts(tmp_path: Path) -> TTS:
    return fake_tts(tmp_path)


def prompts(tts: TTS) -> list[np.ndarray]:
    """Return whole prompts, each with its cached head: a voice alone, or an earlier piece."""
    engine = tts._engines["slow_ar"]
    assert isinstance(engine, FakeEngine)
    read, found, end = np.zeros((1 + LM.num_codebooks, 0), np.int64), [], -1
    for call in engine.calls:
        start, columns = int(call["write_index"][0]), call["prompt"][0]
        if columns.shape[1] > 1:
            if found and start == end:
                found.pop()  # it was the voice, and this follows it
            read = np.concatenate([read[:, :start], columns], axis=1)
            found.append(read)
            end = read.shape[1]
        else:
            read, end = np.concatenate([read[:, :start], columns], axis=1), -1
    return found


def codes_in(prompt: np.ndarray) -> np.ndarray:
    semantic = (prompt[0] >= LM.semantic_begin_id) & (prompt[0] <= LM.semantic_end_id)
    return prompt[1:, semantic]


def test_speech_is_what_the_model_says(tts: TTS) -> None:
    speech = tts.speak("Hello world!", seed=5)
    expected = np.array([expected_codes(LM, main) for main in SPOKEN]).T
    np.testing.assert_array_equal(speech.codes, expected)
    np.testing.assert_allclose(speech.pcm, np.repeat(expected.sum(axis=0) / 1000, CODEC.hop), atol=1e-6)
    assert (speech.codes.dtype, speech.pcm.dtype, speech.sample_rate) == (np.int64, np.float32, CODEC.sample_rate)


def test_info_tells_what_was_used(tts: TTS) -> None:
    info = tts.speak("Hello world!", seed=5, sampling=Sampling(0.5, 0.8, 10)).info
    assert (info.seed, info.sampling, info.stop_reasons, info.frames) == (5, Sampling(0.5, 0.8, 10), ("end",), 4)
    assert info.pieces == (PieceInfo("Hello world!", 4, "end"),)
    assert info.voices == ("anna",)
    assert info.audio_s == 4 * CODEC.hop / CODEC.sample_rate
    assert info.rtf == info.timings.compute_s / info.audio_s > 0
    assert (info.provider, info.bundle, len(info.bundle_sha256)) == ("fake", "test", 64)
    json.dumps(asdict(info))


def test_defaults_are_the_bundles(tts: TTS) -> None:
    info = tts.speak("Hello world!").info
    assert info.sampling == Sampling().resolve(LM.sampling)
    assert tts.speak("Hello world!").info.seed != info.seed  # equal once in 4 billion


def test_the_same_seed_gives_the_same_codes(tmp_path: Path) -> None:
    tts = fake_tts(tmp_path, None)

    def drawn(seed: int | None) -> tuple[np.ndarray, int]:
        stream = tts.stream("Hello world!", seed=seed, sampling=Sampling(1, 1, None), max_frames=9)
        return np.concatenate([chunk.codes for chunk in stream], axis=1), stream.info.seed

    (one, _), (again, _), (other, _) = drawn(1), drawn(1), drawn(2)
    np.testing.assert_array_equal(one, again)
    assert not np.array_equal(one, other)
    codes, seed = drawn(None)
    np.testing.assert_array_equal(codes, drawn(seed)[0])


def test_long_text_is_spoken_in_pieces_that_know_what_was_said(tts: TTS) -> None:
    chunks = list(tts.stream(LONG, voice=[]))
    ends = [c for c in chunks if c.stop_reason is not None]
    assert len(ends) > 1
    assert [c.piece for c in ends] == list(range(len(ends)))
    assert " ".join(c.text for c in ends) == LONG
    for n, prompt in enumerate(prompts(tts)):
        said = [c.codes for c in chunks if c.piece < n]
        np.testing.assert_array_equal(codes_in(prompt), np.concatenate(said, axis=1) if said else np.zeros((4, 0)))


def test_speak_drains_stream(tts: TTS) -> None:
    chunks, speech = list(tts.stream(LONG, seed=1)), tts.speak(LONG, seed=1)
    np.testing.assert_array_equal(speech.pcm, np.concatenate([c.pcm for c in chunks]))
    assert speech.info.stop_reasons == tuple(c.stop_reason for c in chunks if c.stop_reason is not None)
    assert {c.seed for c in chunks} == {1}


@pytest.mark.parametrize(
    ("asked", "names"),
    [(None, ["anna"]), ("ben", ["ben"]), (["ben", "anna"], ["ben", "anna"]), ([], []), (voice("own", frames=3), ["own"])],
    ids=["default", "name", "several", "none", "voice"],
)
def test_voices_go_into_the_prompt(tts: TTS, asked: Any, names: list[str]) -> None:
    tts.speak("Hello world!", voice=asked)
    known = {"anna": tts.voice("anna"), "ben": tts.voice("ben"), "own": voice("own", frames=3)}
    expected = [known[name].codes for name in names]
    np.testing.assert_array_equal(codes_in(prompts(tts)[0]), np.concatenate(expected, axis=1) if expected else np.zeros((4, 0)))


def test_a_bundle_without_voices_speaks_without_one(tmp_path: Path) -> None:
    bundle = fake_bundle(tmp_path / "bundle")
    tts = TTS(bundle, fake_engines(LM, CODEC, SPOKEN))
    assert codes_in(prompts_after(tts, "Hello!")).shape == (4, 0)
    with pytest.raises(VoiceError, match="the bundle's: none"):
        tts.voice("anna")


def prompts_after(tts: TTS, text: str, **options: Any) -> np.ndarray:
    tts.speak(text, **options)
    return prompts(tts)[-1]


def test_system_text_changes_the_prompt(tts: TTS) -> None:
    assert not np.array_equal(prompts_after(tts, "Hello!"), prompts_after(tts, "Hello!", system="Speak slowly."))


def test_a_limit_is_reported_for_each_piece(tts: TTS) -> None:
    chunks = list(tts.stream(LONG, max_frames=2))
    assert len(chunks) > 1
    assert {c.stop_reason for c in chunks} == {"max_frames"}
    assert {c.codes.shape[1] for c in chunks} == {2}


def test_speech_is_never_longer_than_the_codec_takes(tmp_path: Path) -> None:
    codec = replace(CODEC, max_frames=3)
    speech = fake_tts(tmp_path, codec=codec).speak("Hello world!", voice=[])
    assert (speech.codes.shape[1], speech.info.stop_reasons) == (3, ("max_frames",))


def test_progress_is_told_after_every_frame(tts: TTS) -> None:
    told: list[Progress] = []
    chunks = list(tts.stream(LONG, progress=told.append))
    pieces = chunks[-1].piece + 1
    assert [p.frames for p in told] == list(range(1, 1 + 4 * pieces))
    assert told[-1].piece == pieces - 1
    assert {p.pieces for p in told} == {pieces}
    assert told[-1].audio_s == told[-1].frames * CODEC.hop / CODEC.sample_rate


def test_codes_that_the_codec_lacks_become_its_last_but_the_history_keeps_them(tmp_path: Path) -> None:
    codec = replace(CODEC, codebook_sizes=(160, 5, 5, 5))
    tts = fake_tts(tmp_path, codec=codec)
    chunks = list(tts.stream(LONG, voice=[]))
    drawn = np.array([expected_codes(LM, main) for main in SPOKEN]).T
    assert drawn[1:].max() >= 5
    np.testing.assert_array_equal(chunks[0].codes, np.minimum(drawn, [[159], [4], [4], [4]]))
    np.testing.assert_array_equal(codes_in(prompts(tts)[1]), drawn)
    tts.decode(chunks[0].codes)


def test_upstream_compat_drops_the_last_column_even_at_a_limit(tts: TTS) -> None:
    speech = tts.speak("Hello world!", upstream_compat=True, max_frames=3)
    assert (speech.codes.shape[1], speech.info.stop_reasons) == (2, ("max_frames",))


def test_a_model_that_says_nothing_is_an_error(tmp_path: Path) -> None:
    tts = fake_tts(tmp_path, [])
    with pytest.raises(FishrtError, match='ended before it said "Hello world!"') as caught:
        tts.speak("Hello world!")
    assert "seed" in str(caught.value.hint)
    (chunk,) = tts.stream("Hello world!")
    assert (chunk.codes.shape, chunk.pcm.shape, chunk.stop_reason) == ((4, 0), (0,), "end")


def test_a_piece_that_is_not_spoken_is_a_warning(tmp_path: Path) -> None:
    """The second piece ends at once: the first is spoken, and a warning names the text of the second."""
    tts = fake_tts(tmp_path)
    slow = tts._engines["slow_ar"]
    assert isinstance(slow, FakeEngine)
    speak, width = slow._function, 2 + LM.semantic_end_id - LM.semantic_begin_id

    def function(feeds: Any, state: Any) -> dict[str, np.ndarray]:
        results = speak(feeds, state)
        lengths = [call["prompt"].shape[2] for call in slow.calls]
        if 1 in lengths and lengths[-1] > 1:  # after a step comes the prompt of the next piece
            results["logits"] = np.zeros((1, width), np.float32)
            results["logits"][0, np.searchsorted(audio_ids(LM), LM.end_id)] = 50
        return results

    slow._function = function
    speech = tts.speak(LONG)
    (warning,) = speech.info.warnings
    assert warning.startswith('piece 2 of 2 was not spoken: the model ended at once: "The third one')
    assert [(piece.frames, piece.stop_reason) for piece in speech.info.pieces] == [(4, "end"), (0, "end")]
    assert (speech.codes.shape, len(speech.pcm)) == ((4, 4), 4 * CODEC.hop)
    slow.calls.clear()
    chunks = list(tts.stream(LONG))
    assert [(c.piece, c.codes.shape[1], c.stop_reason) for c in chunks] == [(0, 4, None), (0, 0, "end"), (1, 0, "end")]


def test_a_voice_also_answers_to_the_tags_in_its_transcript(tts: TTS) -> None:
    both = voice("both", "<|speaker:3|>One. <|speaker:4|>Two.")
    tts.speak("<|speaker:4|>Hello. <|speaker:0|>Hi.", voice=both)
    tts.speak("<|speaker:7|>Hello.", voice="ben", upstream_compat=True)
    tts.speak("<|speaker:7|>Hello.", voice=[])


def test_some_sampling_leaves_the_rest_to_the_bundle(tts: TTS) -> None:
    assert tts.speak("Hello!", sampling=Sampling(temperature=0.6)).info.sampling == Sampling(0.6, 0.9, 30)
    assert tts.speak("Hello!", sampling=Sampling()).info.sampling == Sampling(1.0, 0.9, 30)


def test_arguments_of_other_types(tts: TTS) -> None:
    with pytest.raises(VoiceError, match="a list"):
        tts.decode([[1, 2]])  # type: ignore[arg-type]
    with pytest.raises(AudioError, match="a list"):
        tts.encode([0.1, 0.2], 16000)  # type: ignore[arg-type]
    with pytest.raises(AudioError, match="rate is 0"):
        tts.encode(np.zeros(9), 0)


BAD: dict[str, tuple[dict[str, Any], type[FishrtError], str]] = {
    "no text": ({"text": ""}, PromptError, "empty"),
    "nothing to speak": ({"text": "..."}, PromptError, "nothing to speak"),
    "unknown voice": ({"voice": "carl"}, VoiceError, "no voice 'carl'; .* the bundle's: anna, ben"),
    "another codec's voice": ({"voice": voice(fingerprint="0" * 64)}, VoiceError, "made with the codec 000000"),
    "codes out of range": ({"voice": voice(codes=np.full((4, 3), 160))}, VoiceError, "160"),
    "too few codebooks": ({"voice": voice(codes=np.zeros((3, 3), np.int64))}, VoiceError, r"\[3, 3\]"),
    "seed": ({"seed": -1}, SamplingError, "seed is -1"),
    "seed as text": ({"seed": "1"}, SamplingError, "seed is '1'"),
    "max_frames": ({"max_frames": 0}, SamplingError, "max_frames is 0"),
    "half a frame": ({"max_frames": 2.5}, SamplingError, r"max_frames is 2\.5"),
    "more frames than the codec takes": ({"max_frames": CODEC.max_frames + 1}, SamplingError, "max_frames is 501"),
    "float codes": ({"voice": voice(codes=np.zeros((4, 3)))}, VoiceError, "float64"),
    "a list of codes": ({"voice": voice(codes=[[1], [1], [1], [1]])}, VoiceError, "a list"),
    "no transcript": ({"voice": voice(transcript=" ")}, VoiceError, "no transcript"),
    "speaker without a voice": ({"text": "<|speaker:0|>Hi. <|speaker:2|>Oh."}, PromptError, r"<\|speaker:2\|>.* 2 voices"),
    "speaker 1 of one": ({"text": "<|speaker:1|>Hi.", "voice": "ben"}, PromptError, r"<\|speaker:1\|>.*is 1 voice"),
    "references too long": ({"voice": [voice(frames=40)] * 20}, PromptError, "too long"),
    "system": ({"system": " "}, PromptError, "system"),
}


@pytest.mark.parametrize("case", BAD)
@pytest.mark.parametrize("call", ["speak", "stream"])
def test_what_is_wrong_with_a_request_is_told_before_anything_runs(tts: TTS, case: str, call: str) -> None:
    options, error, says = BAD[case]
    with pytest.raises(error, match=says):
        getattr(tts, call)(**{"text": "Hello world!", **options})
    assert not prompts(tts)


def test_memory_that_does_not_suffice_is_an_error_for_users(tts: TTS, monkeypatch: pytest.MonkeyPatch) -> None:
    def no_memory(*_: Any) -> Any:
        raise MemoryError("Unable to allocate")

    for role in ("slow_ar", "codec_encode", "codec_decode"):
        monkeypatch.setattr(tts._engines[role], "_function", no_memory)
    with pytest.raises(FishrtError, match="not enough memory"):
        tts.speak("Hello world!")
    with pytest.raises(FishrtError, match="not enough memory"):
        tts.encode(np.zeros(1000, np.float32), 16000)
    with pytest.raises(FishrtError, match="not enough memory"):
        tts.decode(np.zeros((4, 2), int))


def test_encode_resamples(tts: TTS) -> None:
    assert tts.encode(np.zeros(44100), 44100).shape == (4, 25)
    fed = tts._engines["codec_encode"].calls[0]["audio"]  # type: ignore[attr-defined]
    assert fed.shape == (1, 1, 16000)
    with pytest.raises(AudioError, match=r"\[2, 9\]"):
        tts.encode(np.zeros((2, 9)), 44100)
    with pytest.raises(AudioError, match="int16"):
        tts.encode(np.zeros(9, np.int16), 44100)


def test_a_voice_is_made_from_audio(tts: TTS) -> None:
    own = Voice.from_audio(tts, (np.sin(np.arange(32000) / 20).astype(np.float32), 32000), "La la la.", name="own")
    assert (own.codes.shape, own.fingerprint) == ((4, 25), CODEC.fingerprint)
    np.testing.assert_array_equal(codes_in(prompts_after(tts, "Hello!", voice=own)), own.codes)


def test_graphs_are_opened_when_they_are_needed(tmp_path: Path) -> None:
    tts = TTS.load(fake_bundle(tmp_path / "bundle"), provider="cpu")
    with pytest.raises(GraphError, match=r"codec_decode\.onnx"):
        tts.decode(np.zeros((4, 2), int))
    with pytest.raises(GraphError, match=r"(slow_ar|codec_decode)\.onnx"):  # opened at the same time: either fails first
        tts.speak("Hello!")


def test_altered_weights_of_a_small_bundle_are_not_spoken(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    bundle = fake_bundle(tmp_path / "bundle")
    bundle.file("slow_ar.onnx").write_bytes(b"not a grape")
    for given in (bundle, bundle.path):
        with pytest.raises(BundleError, match=r"slow_ar\.onnx was altered"):
            TTS.load(given)
    monkeypatch.setattr("fishrt.tts.SMALL_BYTES", bundle.manifest.total_bytes - 1)
    TTS.load(bundle)


def test_a_provider_is_refused_when_the_bundle_is_loaded(tmp_path: Path) -> None:
    with pytest.raises(ProviderError, match="'gpu'"):
        TTS.load(fake_bundle(tmp_path / "bundle").path, provider="gpu")


def test_a_folder_that_is_no_bundle_is_refused(tmp_path: Path) -> None:
    with pytest.raises(BundleError, match="not a bundle"):
        TTS.load(tmp_path)


def test_the_embedded_bundle_is_found_or_its_absence_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("fishrt.bundle.folder.__file__", str(tmp_path / "bundle" / "folder.py"))
    with pytest.raises(BundleError, match="no embedded voice"):
        embedded_bundle()
    (tmp_path / "minnow").mkdir()
    assert embedded_bundle() == tmp_path / "minnow"


def test_codes_are_raw_and_the_history_holds_them_as_they_are_drawn(tmp_path: Path) -> None:
    """The model has one token for every frame and codes of the fast AR + 1; the history holds pieces in the form of voices."""
    lm = language_model(
        prompt_dialect="segments", code_zero="fast", code_offset=1, semantic_end_id=LM.semantic_begin_id, chunk_bytes=60
    )
    tts = fake_tts(tmp_path, [lm.semantic_begin_id] * 3, model=lm)
    chunks = list(tts.stream(LONG))
    assert len(chunks) > 1
    for n, prompt in enumerate(prompts(tts)):
        frames = prompt[1:, prompt[0] == lm.semantic_begin_id]
        said = [tts.voice("anna").codes, *(chunk.codes for chunk in chunks[:n])]
        np.testing.assert_array_equal(frames, 1 + np.concatenate(said, axis=1))
    assert chunks[0].codes.T.tolist() == [expected_codes(lm, lm.semantic_begin_id)] * 3
    tts.decode(chunks[0].codes)


def test_long_text_of_any_dialect_is_spoken_with_what_was_said(tmp_path: Path) -> None:
    tts = fake_tts(tmp_path, model=language_model(prompt_dialect="interleaved"))
    (*_, last) = tts.stream(LONG, voice=[])
    assert [codes_in(prompt).shape[1] for prompt in prompts(tts)] == [4 * n for n in range(last.piece + 1)]
    (whole,) = {c.piece: c for c in tts.stream(LONG, voice=[], upstream_compat=True)}.values()
    assert whole.text == LONG


def test_a_model_without_turns_takes_no_tags_and_no_system_text(tmp_path: Path) -> None:
    tts = fake_tts(tmp_path, model=language_model(prompt_dialect="instruction"))
    with pytest.raises(PromptError, match="no turns"):
        tts.speak("<|speaker:0|>Hello!")
    with pytest.raises(PromptError, match="no system text"):
        tts.speak("Hello!", system="Be kind.")
    both = codes_in(prompts_after(tts, "Hello!", voice=["anna", "ben"]))
    np.testing.assert_array_equal(both, np.concatenate([tts.voice("anna").codes, tts.voice("ben").codes], axis=1))


def test_a_repetition_penalty_is_the_bundles_or_the_requests(tts: TTS, tmp_path: Path) -> None:
    with pytest.raises(SamplingError, match="no repetition penalty"):
        tts.speak("Hello!", sampling=Sampling(repetition_penalty=1.2))
    rules = replace(LM.sampling, repetition_penalty=RepetitionPenalty(penalty=1.3, window=16, main="row"))
    own = fake_tts(tmp_path / "own", model=replace(LM, sampling=rules))
    assert own.speak("Hello!").info.sampling.repetition_penalty == 1.3
    assert own.speak("Hello!", sampling=Sampling(repetition_penalty=1.1)).info.sampling.repetition_penalty == 1.1


def test_reading_a_voice_counts_as_work_of_the_language_model(tts: TTS, monkeypatch: pytest.MonkeyPatch) -> None:
    read = ContextStore.restore

    def slow(store: ContextStore, *args: Any) -> Any:
        time.sleep(0.05)
        return read(store, *args)

    monkeypatch.setattr(ContextStore, "restore", slow)
    assert tts.speak("Hi.", seed=1).info.timings.model_s > 0.05
