"""The Python API: saving and display of speech, warnings, async streams, and closing a TTS."""

from __future__ import annotations

import asyncio
import base64
import gc
import inspect
import io
import logging
import pickle
import re
import threading
import weakref
from collections.abc import Mapping
from contextlib import aclosing
from dataclasses import fields, is_dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import soundfile

import fishrt
from fakes import FakeEngine, fake_bundle, fake_engines
from fishrt import TTS, AudioChunk, Bundle, FishrtError, Sampling, Speech, Voice
from fishrt.bundle.features import Reads
from fishrt.errors import ArgumentError, AudioError, GraphError, OutputError, PromptError, UnfinishedError
from fishrt.speaking.warnings import piece_warnings
from fishrt.speech import PieceInfo, Progress, SpeechInfo, Timings
from helpers_text import language_model, manifest, voice

LM = language_model()
CODEC = manifest().codec
TEXT = "The first sentence is about a fox. The second sentence is about a dog. The third one is about both of them, and ends."


def speaker(folder: Path, frames: int = 25) -> TTS:
    bundle = fake_bundle(folder / "bundle", voices=[voice("anna"), voice("ben")])
    return TTS(bundle, fake_engines(LM, CODEC, [LM.semantic_begin_id + n % 160 for n in range(frames)]))


@pytest.fixture
def tts(tmp_path: Path) -> TTS:
    return speaker(tmp_path)


@pytest.fixture
def speech(tts: TTS) -> Speech:
    return tts.speak("Hello!", seed=7)


# --- speech --------------------------------------------------------------------------------------------------------------------


def test_speech_is_short_to_print(tts: TTS, speech: Speech) -> None:
    assert repr(speech) == "<Speech 1.00 s, 16 kHz, voice anna, seed 7>"
    assert repr(tts.speak("Hello!", seed=8, voice=["ben", "anna"])) == "<Speech 1.00 s, 16 kHz, voices ben, anna, seed 8>"
    assert repr(tts.speak("Hello!", seed=8, voice=[])) == "<Speech 1.00 s, 16 kHz, no voice, seed 8>"
    first, *_, last = tts.stream("Hello!")
    assert repr(first) == "<AudioChunk 0.16 s, 16 kHz, piece 0>"
    assert repr(last) == "<AudioChunk 0.04 s, 16 kHz, piece 0, end>"
    odd = replace(first, sample_rate=44100, pcm=np.zeros(44100, np.float32))
    assert repr(odd) == "<AudioChunk 1.00 s, 44.1 kHz, piece 0>"


def test_length_and_duration(speech: Speech, tts: TTS) -> None:
    assert (len(speech), speech.duration_s) == (len(speech.pcm), 1.0)
    assert sum(map(len, tts.stream("Hello!"))) == 16000


@pytest.mark.parametrize(
    ("name", "format", "found"),
    [
        ("a.wav", None, "WAV"),
        ("a.FLAC", None, "FLAC"),
        ("a.ogg", None, "OGG"),
        ("a.mp3", None, "MP3"),
        ("take 1", "flac", "FLAC"),
    ],
)
def test_speech_is_saved(speech: Speech, tmp_path: Path, name: str, format: str | None, found: str) -> None:
    for path in (tmp_path / name, str(tmp_path / name)):
        speech.save(path, format)
        told = soundfile.info(tmp_path / name)
        assert (told.format, told.samplerate, told.channels) == (found, 16000, 1)
    if found != "MP3":  # which begins with some silence of its own
        pcm, _ = soundfile.read(tmp_path / name, dtype="float32")
        assert len(pcm) == len(speech)
    if found in ("WAV", "FLAC"):
        np.testing.assert_allclose(pcm, speech.pcm, atol=1 / 32768)


def test_speech_that_cannot_be_saved(speech: Speech, tmp_path: Path) -> None:
    with pytest.raises(AudioError, match="unknown format"):
        speech.save(tmp_path / "a.docx")
    with pytest.raises(AudioError, match="unknown format 'docx'"):
        speech.save(tmp_path / "a.wav", format="docx")
    with pytest.raises(OutputError, match="no folder"):
        speech.save(tmp_path / "missing/a.wav")
    assert [path.name for path in tmp_path.iterdir()] == ["bundle"]


def test_a_notebook_shows_a_player(speech: Speech) -> None:
    found = re.fullmatch(r'<audio controls src="data:audio/wav;base64,([^"]+)"></audio>', speech._repr_html_())
    assert found
    pcm, rate = soundfile.read(io.BytesIO(base64.b64decode(found[1])), dtype="float32")
    assert rate == speech.sample_rate
    np.testing.assert_allclose(pcm, speech.pcm, atol=1 / 32768)


# --- warnings ------------------------------------------------------------------------------------------------------------------


TOLD = "there are warnings about the speech: see its info.warnings"
"""The log has no word of a text."""


def logged(caplog: pytest.LogCaptureFixture) -> list[str]:
    return [record.getMessage() for record in caplog.records if record.levelno >= logging.WARNING]


def test_pieces_that_are_cut_off_are_one_warning(tts: TTS, caplog: pytest.LogCaptureFixture) -> None:
    speech = tts.speak(f"{TEXT} {TEXT}", max_frames=2)
    count = len(speech.info.pieces)
    first = "The first sentence is about a fox. The second sentence is …"
    says = f'the speech of {count} of {count} pieces was cut off by the limit of its length; the first is piece 1: "{first}"'
    assert speech.info.warnings == (says,)
    assert logged(caplog) == [TOLD]
    assert tts.speak("Hello!").info.warnings == ()


def test_warnings_of_each_kind() -> None:
    def warned(*pieces: tuple[int, Any], text: str = "Some words.") -> list[str]:
        return piece_warnings([PieceInfo(text, frames, reason) for frames, reason in pieces], len(pieces))

    assert warned((3, "end"), (4, "end")) == []
    assert warned((3, "max_seq_len")) == [
        'the speech was cut off at the end of the model\'s context (max_seq_len): "Some words."'
    ]
    assert warned((3, "end"), (0, "end"), (2, "max_frames")) == [
        'the speech of piece 3 of 3 was cut off by the limit of its length: "Some words."',
        'piece 2 of 3 was not spoken: the model ended at once: "Some words."',
    ]
    assert warned((0, "max_frames"), (0, "max_frames"), (9, "end")) == [
        '2 of 3 pieces were not spoken: the limit leaves no frame; the first is piece 1: "Some words."'
    ]
    (says,) = warned((0, "end"), text="一二三四五六七八九十" * 9)
    assert "一二三四五六七八九十" * 5 in says, "text without spaces is shown, too"
    assert len(says) < 120


def test_voices_that_no_speaker_tag_asks_for_are_a_warning(tts: TTS) -> None:
    (says,) = tts.speak("Hello!", voice=["anna", "ben"]).info.warnings
    assert says.startswith("there are 2 voices, but the text has no speaker tags")
    assert tts.speak("<|speaker:0|>Hello! <|speaker:1|>Hi!", voice=["anna", "ben"]).info.warnings == ()
    assert tts.speak("<|speaker:1|>Hi!").info.warnings == ()
    assert tts.speak("Hello!", voice="ben").info.warnings == ()


def test_what_the_model_does_not_read_well_is_a_warning_from_the_start(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    lm = language_model(reads=Reads(("en",), None, ()))
    tts = TTS(fake_bundle(tmp_path / "bundle", model=lm), fake_engines(lm, CODEC, [LM.semantic_begin_id]))
    stream = tts.stream(f"{TEXT} Привет. {TEXT}", max_frames=1)
    says = "test does not read well: letters П, р, и, в, е, т"
    assert (stream.warnings, logged(caplog)) == ((says,), [TOLD])
    for _ in stream:
        pass
    assert [warning == says for warning in stream.info.warnings] == [True, False]
    assert logged(caplog) == [TOLD, TOLD]


def test_a_stream_that_is_closed_early_warns_of_nothing(tts: TTS, caplog: pytest.LogCaptureFixture) -> None:
    stream = tts.stream(TEXT, max_frames=2)
    next(stream)
    stream.close()
    assert list(stream) == []
    assert logged(caplog) == []


def test_only_where_nothing_was_said_it_is_an_error(tmp_path: Path) -> None:
    tts = speaker(tmp_path, frames=0)
    with pytest.raises(FishrtError, match='ended before it said "Hello!"'):
        tts.speak("Hello!")
    with pytest.raises(FishrtError, match="ended before it said anything"):
        tts.speak(TEXT)
    with pytest.raises(FishrtError, match='the limit leaves no frame for "Hello!"'):
        speaker(tmp_path / "2").speak("Hello!", max_frames=1, upstream_compat=True)


def test_speech_before_an_error_is_not_lost(tts: TTS) -> None:
    """The slow AR fails with NaN in the second piece."""
    whole = tts.speak(TEXT, seed=1)
    slow = tts.engines["slow_ar"]
    assert isinstance(slow, FakeEngine)
    function = slow._function

    def broken(feeds: Mapping[str, Any], state: Any) -> Any:
        results = function(feeds, state)
        if len([call for call in slow.calls if call["prompt"].shape[2] > 1]) > 1:
            results["logits"][:] = np.nan
        return results

    slow._function = broken
    slow.calls.clear()
    with pytest.raises(UnfinishedError, match="not numbers") as caught:
        tts.speak(TEXT, seed=1)
    assert isinstance(caught.value.__cause__, GraphError)
    speech = caught.value.speech
    np.testing.assert_array_equal(speech.pcm, whole.pcm[: len(speech)])
    assert [piece.frames for piece in speech.info.pieces] == [25]
    assert len(speech) == 25 * CODEC.hop
    copy = pickle.loads(pickle.dumps(caught.value))  # as process pools and Ray do
    assert (str(copy), copy.hint) == (str(caught.value), caught.value.hint)
    np.testing.assert_array_equal(copy.speech.pcm, speech.pcm)
    with pytest.raises(GraphError):  # where nothing was said, there is nothing to keep
        tts.speak(TEXT, seed=1)


def test_the_log_tells_what_is_done(tts: TTS, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.DEBUG, logger="fishrt"):
        tts.speak("Hello!", seed=1)
        tts.speak("Hello!", seed=1)
    told = [(record.name, record.getMessage()) for record in caplog.records]
    assert [name for name, _ in told] == ["fishrt.language_model.context", "fishrt.speaking.stream"] * 2
    assert [text.rpartition(" ")[2] for name, text in told if name == "fishrt.language_model.context"] == ["read", "known"]
    assert told[1][1].startswith("spoke 1 pieces: 1.00 s of speech in ")


# --- a TTS that closes ---------------------------------------------------------------------------------------------------------


def test_a_tts_tells_what_it_is_and_opens_nothing_for_it(tmp_path: Path) -> None:
    tts = TTS.load(fake_bundle(tmp_path / "bundle"), provider="cpu")
    assert repr(tts) == "TTS(bundle='test', provider='cpu', 16 kHz)"
    assert re.fullmatch(r"<Bundle test \(.+\), [\d.]+ MB, in .+>", repr(tts.bundle))
    assert repr(tts.bundle.manifest).startswith("<Manifest of test (")
    assert tts.provider == "cpu"
    with pytest.raises(GraphError):  # the files are no graphs
        tts.engines["slow_ar"]
    tts.close()
    assert repr(tts) == "TTS(bundle='test', closed, 16 kHz)"


def test_a_tts_releases_its_graphs(tts: TTS) -> None:
    slow = weakref.ref(tts.engines["slow_ar"])
    with tts as entered:
        assert entered is tts
        running = tts.stream(TEXT)
        next(running)
    assert sum(map(len, running)) > 0, "what runs ends normally"
    assert running.info.provider == "fake"
    del running
    gc.collect()
    assert slow() is None
    tts.close()


@pytest.mark.parametrize(
    "use",
    [
        lambda tts: tts.speak("Hello!"),
        lambda tts: tts.stream("Hello!"),
        lambda tts: asyncio.run(anext(tts.astream("Hello!"))),
        lambda tts: tts.encode(np.zeros(16000, np.float32), 16000),
        lambda tts: tts.decode(np.zeros((4, 3), np.int64)),
        lambda tts: tts.prepare("anna"),
        lambda tts: tts.engines,
        lambda tts: tts.provider,
    ],
    ids="speak stream astream encode decode prepare engines provider".split(),
)
def test_a_closed_tts_says_so(tts: TTS, use: Any) -> None:
    tts.close()
    with pytest.raises(FishrtError, match="closed") as caught:
        use(tts)
    assert "TTS.load" in str(caught.value.hint)


# --- async ---------------------------------------------------------------------------------------------------------------------


def test_an_async_stream_says_what_a_stream_says(tts: TTS) -> None:
    async def collect() -> tuple[list[AudioChunk], SpeechInfo | None, SpeechInfo | None]:
        stream = tts.astream(TEXT, seed=1)
        before = stream.info
        return [chunk async for chunk in stream], before, stream.info

    chunks, before, after = asyncio.run(collect())
    expected = list(tts.stream(TEXT, seed=1))
    np.testing.assert_array_equal(np.concatenate([c.pcm for c in chunks]), np.concatenate([c.pcm for c in expected]))
    assert [c.stop_reason for c in chunks] == [c.stop_reason for c in expected]
    assert before is None
    assert after is not None
    assert after.stop_reasons == ("end", "end")


def held(tts: TTS, at: int) -> tuple[threading.Event, threading.Event, list[int]]:
    """Block the slow AR in its call `at`. Return the event of its waiting, the event that releases it, and all calls."""
    slow = tts.engines["slow_ar"]
    assert isinstance(slow, FakeEngine)
    waits, goes_on, calls, function = threading.Event(), threading.Event(), [], slow._function

    def waiting(feeds: Mapping[str, Any], state: Any) -> Any:
        calls.append(len(calls))
        if len(calls) == at:
            waits.set()
            goes_on.wait()
        return function(feeds, state)

    slow._function = waiting
    return waits, goes_on, calls


def test_the_event_loop_goes_on_while_a_chunk_is_computed(tts: TTS) -> None:
    waits, goes_on, _ = held(tts, at=3)

    async def both() -> int:
        chunk = asyncio.ensure_future(anext(tts.astream(TEXT)))
        while not waits.is_set():
            await asyncio.sleep(0.001)
        assert not chunk.done()  # it is being computed, and this line runs
        goes_on.set()
        return len(await chunk)

    assert asyncio.run(both()) > 0


@pytest.mark.parametrize("way", ["cancel", "aclose"])
def test_a_closed_async_stream_stops_at_the_next_frame(tts: TTS, way: str) -> None:
    waits, goes_on, calls = held(tts, at=3)

    async def interrupted() -> list[AudioChunk]:
        stream = tts.astream(TEXT)
        chunk = asyncio.ensure_future(anext(stream, None))
        while not waits.is_set():
            await asyncio.sleep(0.001)
        if way == "cancel":
            chunk.cancel()
            with pytest.raises(asyncio.CancelledError):
                await chunk
            goes_on.set()
        else:
            await stream.aclose()
            goes_on.set()
            assert await chunk is None
        return [chunk async for chunk in stream]

    assert asyncio.run(interrupted()) == []
    assert len(calls) == 3


def test_an_async_stream_that_nobody_reads_on_computes_nothing(tts: TTS) -> None:
    _, goes_on, calls = held(tts, at=-1)
    goes_on.set()

    async def first() -> int:
        async with aclosing(tts.astream(TEXT)) as stream:
            async for _chunk in stream:
                break
        await asyncio.sleep(0.01)
        return len(calls)

    made = asyncio.run(first())
    assert len(calls) == made
    next(tts.stream(TEXT))
    assert len(calls) == 2 * made - 1  # the voice is known by then


def test_what_fails_in_an_async_stream_reaches_the_caller(tts: TTS) -> None:
    async def chunks(**request: Any) -> list[AudioChunk]:
        return [chunk async for chunk in tts.astream(**request)]

    with pytest.raises(PromptError, match="nothing to speak"):
        asyncio.run(chunks(text="..."))

    def told(progress: Progress) -> None:
        if progress.frames == 6:
            raise RuntimeError("the listener went home")

    with pytest.raises(RuntimeError, match="the listener went home"):
        asyncio.run(chunks(text=TEXT, progress=told))


def test_a_stream_is_closed_from_its_own_progress(tts: TTS) -> None:
    stream = tts.stream(TEXT, progress=lambda progress: stream.close() if progress.frames == 6 else None)
    assert [chunk.codes.shape[1] for chunk in stream] == [4]


# --- arguments -----------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("given", "says"),
    [
        ({"text": None}, "text is None; a str"),
        ({"text": b"hi"}, "text is of type bytes; a str"),
        ({"voice": 3}, "voice is of type int; the name of a voice"),
        ({"voice": ["anna", None]}, "voice is None; the name of a voice"),
        ({"voice": Path("anna.wav")}, "voice is of type PosixPath|WindowsPath"),
        ({"sampling": {"temperature": 0.5}}, r"sampling is of type dict; .*Sampling\(temperature=0\.5\)"),
        ({"system": 1}, "system is of type int; a str"),
        ({"progress": 1}, "progress is of type int; a function"),
    ],
)
@pytest.mark.parametrize("call", ["speak", "stream"])
def test_arguments_of_another_type_are_named(tts: TTS, call: str, given: dict[str, Any], says: str) -> None:
    with pytest.raises(ArgumentError, match=says) as caught:
        getattr(tts, call)(**{"text": "Hello!", **given})
    assert isinstance(caught.value, TypeError)
    assert isinstance(caught.value, FishrtError)


@pytest.mark.parametrize(
    ("given", "says"),
    [
        ({"threads": 0}, "threads is 0"),
        ({"threads": 1.5}, r"threads is 1\.5"),
        ({"threads": "2"}, "threads is '2'"),
        ({"provider": None}, "provider is None"),
        ({"bundle": 3}, "bundle is of type int"),
        ({"voices": 3}, "voices is of type int"),
    ],
)
def test_arguments_of_another_type_are_named_when_a_bundle_is_loaded(tmp_path: Path, given: dict[str, Any], says: str) -> None:
    with pytest.raises(ArgumentError, match=says):
        TTS.load(**{"bundle": fake_bundle(tmp_path / "bundle"), **given})


@pytest.mark.parametrize("call", ["speak", "stream", "astream"])
def test_a_setting_of_sampling_given_by_itself_is_told_where_it_goes(tts: TTS, call: str) -> None:
    with pytest.raises(ArgumentError, match="no option temperature") as caught:
        getattr(tts, call)("Hello!", temperature=0.5, top_k=3)
    assert caught.value.hint == "sampling=Sampling(temperature=0.5, top_k=3)"
    with pytest.raises(TypeError, match="loudness"):
        getattr(tts, call)("Hello!", loudness=3)
    with pytest.raises(ArgumentError, match="no option max_seconds") as caught:
        tts.stream("Hello.", max_seconds=1)  # type: ignore[call-arg]
    assert str(caught.value.hint).startswith("its options are voice, sampling, seed, max_frames")


def test_a_request_says_what_its_options_say(tts: TTS) -> None:
    request = fishrt.Request("Hello!", voice="ben", seed=5, max_frames=9)
    expected = tts.speak("Hello!", voice="ben", seed=5, max_frames=9)
    np.testing.assert_array_equal(tts.speak(request).codes, expected.codes)
    np.testing.assert_array_equal(np.concatenate([c.codes for c in tts.stream(request)], axis=1), expected.codes)
    assert tts.speak(request, seed=6).info.seed == 6
    assert (tts.speak(request).info.voices, request.seed) == (("ben",), 5)
    with pytest.raises(ArgumentError, match="text is None"):
        fishrt.Request(None)  # type: ignore[arg-type]


# --- help ----------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "kind",
    [Speech, AudioChunk, SpeechInfo, PieceInfo, Timings, Progress, Sampling, Voice, Bundle, fishrt.Request],
    ids=lambda k: k.__name__,
)
def test_help_tells_of_every_attribute(kind: Any) -> None:
    assert is_dataclass(kind)
    told = re.findall(r"^ {4}(\w+): ", (inspect.getdoc(kind) or "").split("Attributes:")[1], re.MULTILINE)
    assert told == [field.name for field in fields(kind)]


def test_help_of_speak_names_every_option_with_its_default() -> None:
    told = inspect.getdoc(TTS.speak) or ""
    for field in fields(fishrt.Request)[1:]:
        assert re.search(rf"^ +{field.name}: \w.*; default {field.default}\b", told, re.MULTILINE), field.name


def test_completion_offers_the_public_names_and_no_others() -> None:
    assert dir(fishrt) == sorted(fishrt.__all__)
