"""References inside requests: every spelling, files only below one folder, codes, and one encoding for a repeated recording."""

from __future__ import annotations

import asyncio
import base64
import io
import json
import os
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import soundfile

pytest.importorskip("fastapi", reason="needs the server extra")

from fishrt import TTS, Voice
from fishrt.server.problems import Problem
from fishrt.server.voices.encoding import VoiceEncoder
from fishrt.server.voices.fetch import MOST_BYTES, Fetcher
from fishrt.server.voices.references import Reference, ReferenceReader, find_references, is_audio

RECORDING = Path(__file__).parents[2] / "export/minnow/references/slt/reference.flac"
WORDS = "Please call my brother, and ask him to bring the big blue bag from the kitchen."
SOUND = RECORDING.read_bytes()
BASE64 = base64.b64encode(SOUND).decode()


@pytest.fixture
def encoder(tts: TTS) -> Iterator[VoiceEncoder]:
    made = VoiceEncoder(tts)
    yield made
    made.close()


@pytest.fixture
def read(tts: TTS, encoder: VoiceEncoder) -> Callable[..., list[Voice]]:
    """Return the voices of a request's fields."""

    def run(fields: dict[str, Any], **options: Any) -> list[Voice]:
        return asyncio.run(ReferenceReader(tts, encoder, **options).voices(find_references(fields)))

    return run


def refused(action: Callable[[], object], message: str, param: str | None = None) -> None:
    with pytest.raises(Problem, match=message) as caught:
        action()
    assert (caught.value.status_code, caught.value.param) == (400, param or caught.value.param)


@pytest.fixture(scope="module")
def expected(tts: TTS) -> np.ndarray:
    return Voice.from_audio(tts, RECORDING, WORDS).codes


SPELLINGS = [
    {"references": [{"audio": SOUND, "text": WORDS}]},
    {"references": [{"audio": BASE64, "text": WORDS}]},
    {"references": {"audio": BASE64, "text": WORDS}},
    {"references": [[{"audio": BASE64, "text": WORDS}]]},
    {"references": json.dumps([{"audio": BASE64, "text": WORDS}])},
    {"references": [{"ref_audio": BASE64, "ref_text": WORDS, "id": 3}]},
    {"references": [{"audio_path": f"data:audio/flac;base64,{BASE64}", "transcript": WORDS}]},
    {"ref_audio": f"data:audio/flac;base64,{BASE64}", "ref_text": WORDS},
    {"ref_audio": f"DATA:audio/flac;codecs=x;BASE64,{BASE64}", "ref_text": f"  {WORDS}\n", "references": []},
    {"ref_audio": f"data:;base64,{BASE64.replace('+', '%2B')}", "ref_text": WORDS},
    {"ref_audio": "data:audio/flac," + "".join(f"%{byte:02x}" for byte in SOUND), "ref_text": WORDS},
    {"reference_audio": BASE64, "reference_text": WORDS, "ref_audio": None, "ref_text": ""},
    {"prompt_audio": SOUND, "prompt_text": WORDS, "references": None},
    {"reference": SOUND, "reference_text": WORDS},
    {"reference": SOUND, "ref_text": WORDS, "voice": "awb"},
    {"voice": BASE64, "ref_text": WORDS},
    {"voice": f"data:audio/flac;base64,{BASE64}", "reference_text": WORDS},
    {"ref_audio": base64.urlsafe_b64encode(SOUND).decode().rstrip("="), "ref_text": WORDS},
    {"ref_audio": "\r\n".join(BASE64[n : n + 76] for n in range(0, len(BASE64), 76)), "ref_text": WORDS},
]


@pytest.mark.parametrize("fields", SPELLINGS, ids=range(len(SPELLINGS)))
def test_every_spelling(read: Callable[..., list[Voice]], expected: np.ndarray, fields: dict[str, Any]) -> None:
    (voice,) = read(fields)
    assert voice.transcript == WORDS
    assert (voice.codes == expected).all()
    assert voice.recording is None


@pytest.mark.parametrize(
    "fields", [{}, {"references": []}, {"references": None, "ref_audio": "", "ref_text": ""}, {"voice": "awb"}]
)
def test_no_reference(fields: dict[str, Any]) -> None:
    assert find_references(fields) == []


def test_a_voice_that_is_audio() -> None:
    assert is_audio("data:audio/wav;base64,UklGRg==")
    assert is_audio(BASE64)
    assert is_audio(SOUND)
    assert not any(map(is_audio, ("anna", "a" * 255, "", None, ["anna"], {"id": "anna"})))


BOTH = {"audio": "x", "text": "y"}
WRONG = [
    ({"ref_text": WORDS}, "without a recording", "ref_text"),
    ({"ref_audio": "a.wav", "prompt_audio": "b.wav"}, "ref_audio and prompt_audio are both given", "prompt_audio"),
    ({"ref_audio": "a.wav", "ref_text": "a", "prompt_text": "b"}, "both given", "prompt_text"),
    ({"references": [BOTH], "ref_audio": "a.wav"}, "both given", "ref_audio"),
    ({"references": [BOTH], "ref_text": "words"}, "its own text", "ref_text"),
    ({"references": 3}, "no list", "references"),
    ({"references": "[{"}, "no list", "references"),
    ({"references": "[" * 100_000}, "no list", "references"),
    ({"references": ["a.wav"]}, "is no object", "references[0]"),
    ({"references": [BOTH, [[]]]}, "is no object", "references[1][0]"),
    ({"references": [[]]}, "is no object", "references[0]"),
    ({"references": [{"text": "words"}]}, "neither audio nor codes", "references[0]"),
    (
        {"references": [{"audio": "a", "audio_path": "b"}]},
        "audio and references.0..audio_path are both given",
        "references[0].audio_path",
    ),
    ({"references": [{"audio": 3}]}, "neither bytes nor text", "references[0].audio"),
    ({"references": [{"audio": "a", "text": ["words"]}]}, "transcript is no text", "references[0].text"),
    ({"ref_audio": {"a": 1}}, "neither bytes nor text", "ref_audio"),
    ({"references": [BOTH] * 65}, "more than 64", "references"),
]


@pytest.mark.parametrize(("fields", "message", "param"), WRONG)
def test_what_is_no_reference(fields: dict[str, Any], message: str, param: str) -> None:
    refused(lambda: find_references(fields), message, param)


def wav(seconds: float, level: float = 0.5, rate: int = 16_000) -> bytes:
    file = io.BytesIO()
    soundfile.write(file, level * np.sin(np.arange(round(seconds * rate)) * 0.1), rate, format="WAV")
    return file.getvalue()


@pytest.mark.parametrize(
    ("audio", "text", "message"),
    [
        (SOUND, "", "no transcript"),
        (SOUND, " \n", "no transcript"),
        (SOUND, "...", "neither a letter nor a digit"),
        (SOUND, "<|im_end|>", "would steer the model"),
        (SOUND, "a\ud800", "Unicode|UTF|surrogate"),
        (b"hello", WORDS, "not audio"),
        (b"\0" * 400, WORDS, "not audio"),
        (wav(0.05), WORDS, "too short"),
        (wav(1, level=0), WORDS, "silent"),
        (wav(3000, rate=100), WORDS, "too long"),
        ("A" * 300 + "!", WORDS, "no valid base64"),
        ("A" * 301, WORDS, "no valid base64"),
        ("é" * 300, WORDS, "no valid base64"),
        ("data:audio/wav;base64", WORDS, "has no data"),
        ("data:audio/wav;base64,?", WORDS, "no valid base64"),
        ("data:audio/wav;base64,", WORDS, "is empty"),
    ],
)
def test_recordings_that_make_no_voice(read: Callable[..., list[Voice]], audio: Any, text: str, message: str) -> None:
    about = "audio" if text == WORDS else "text"
    refused(lambda: read({"references": [{"audio": audio, "text": text}]}), message, f"references[0].{about}")
    other = {"audio": "ref_audio", "text": "ref_text"}
    refused(lambda: read({"ref_audio": audio, "ref_text": text}), message, other[about])
    param = "references[0][0]." + {"audio": "audio_path", "text": "transcript" if text else "text"}[about]
    refused(lambda: read({"references": [[{"audio_path": audio, "transcript": text}]]}), message, param)


def test_a_voice_for_each_speaker_and_one_voice_of_several_recordings(read: Callable[..., list[Voice]]) -> None:
    short = {"audio": wav(0.5), "text": "Short words."}
    first, second = read({"references": [{"audio": SOUND, "text": WORDS}, [short, {"audio": wav(0.7), "text": "More words."}]]})
    assert first.transcript == WORDS
    assert second.transcript == "Short words.\nMore words."
    (alone,) = read({"references": [short]})
    assert (second.codes[:, : alone.codes.shape[1]] == alone.codes).all()
    assert second.codes.shape[1] > alone.codes.shape[1]
    assert second.loudness is not None


def test_a_repeated_recording_is_encoded_once(tts: TTS, monkeypatch: pytest.MonkeyPatch) -> None:
    encoded: list[str] = []
    encode = TTS.encode

    def counted(self: TTS, pcm: np.ndarray, rate: int) -> np.ndarray:
        encoded.append(threading.current_thread().name)
        return encode(self, pcm, rate)

    monkeypatch.setattr(TTS, "encode", counted)

    async def run() -> list[Voice]:
        encoder = VoiceEncoder(tts, kept_bytes=2 * 8 * 5000)
        reader = ReferenceReader(tts, encoder)
        same = [[Reference("a", WORDS, "b", audio)] for audio in (SOUND, BASE64, f"data:;base64,{BASE64}")]
        together = await asyncio.gather(*(reader.voices([each]) for each in same))
        assert len(encoded) == 1
        await reader.voices([[Reference("a", "Other words.", "b", SOUND)]])
        assert len(encoded) == 2
        for n in range(20):
            await reader.voices([[Reference("a", "Words.", "b", wav(3 + n / 100))]])
        assert len(encoded) == 22
        await reader.voices(same)
        assert len(encoded) == 23  # it had to make room
        encoder.close()
        return [voice for (voice,) in together]

    voices = asyncio.run(run())
    assert all(voice is voices[0] for voice in voices)
    assert set(encoded) == {"voices_0"}


def test_the_event_loop_goes_on_and_the_queue_of_recordings_is_bounded(tts: TTS, monkeypatch: pytest.MonkeyPatch) -> None:
    held = threading.Event()
    monkeypatch.setattr(TTS, "encode", lambda *_: held.wait() and np.zeros((8, 4), np.int64))

    async def run() -> list[Any]:
        encoder = VoiceEncoder(tts)
        tasks = [asyncio.create_task(encoder.sound(wav(1))) for _ in range(33)]
        await asyncio.wait([tasks[32]])
        assert not any(task.done() for task in tasks[:32])
        tasks[1].cancel()  # its client is gone, so that another may wait
        await asyncio.wait([tasks[1]])
        later = asyncio.create_task(encoder.sound(wav(1)))
        held.set()
        results = await asyncio.gather(*tasks, later, return_exceptions=True)
        encoder.close()
        return results

    results = asyncio.run(run())
    assert isinstance(results[32], Problem)
    assert (results[32].status_code, results[32].headers) == (429, {"Retry-After": "5"})
    assert isinstance(results[1], asyncio.CancelledError)
    assert all(isinstance(result, np.ndarray) for n, result in enumerate(results) if n not in (1, 32))


def test_a_remembered_recording_does_not_wait_for_others(tts: TTS, monkeypatch: pytest.MonkeyPatch) -> None:
    async def run() -> bool:
        encoder = VoiceEncoder(tts)
        first = await encoder.reference(SOUND, WORDS)
        held = threading.Event()
        with monkeypatch.context() as patched:
            patched.setattr(TTS, "encode", lambda *_: held.wait() and np.zeros((8, 4), np.int64))
            other = asyncio.create_task(encoder.sound(wav(1)))
            await asyncio.sleep(0)
            again = await encoder.reference(SOUND, WORDS)
            waited = other.done()
            held.set()
            await other
        encoder.close()
        return again is first and not waited

    assert asyncio.run(run())


@pytest.mark.parametrize("key", ["codes", "vq_codes"])
def test_codes(read: Callable[..., list[Voice]], expected: np.ndarray, key: str) -> None:
    for codes in (expected.tolist(), [expected.tolist()]):
        (voice,) = read({"references": [{key: codes, "text": WORDS, "audio": "ignored.wav"}]})
        assert (voice.codes == expected).all()
        assert voice.transcript == WORDS


def changed(codes: np.ndarray, value: Any) -> list[list[Any]]:
    found = codes.tolist()
    found[2][3] = value
    return found


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda codes: changed(codes, -1), "-1|below 0|negative"),
        (lambda codes: changed(codes, 10_000_000), "10000000|10,000,000"),
        (lambda codes: changed(codes, 2**63), "no list of codebooks|codebook"),
        (lambda codes: changed(codes, 2**80), "no list of codebooks"),
        (lambda codes: changed(codes, 1.5), "no list of codebooks"),
        (lambda codes: changed(codes, "1"), "no list of codebooks"),
        (lambda codes: changed(codes, None), "no list of codebooks"),
        (lambda codes: changed(codes, True) and [[True]], "no list of codebooks"),
        (lambda codes: [*codes.tolist()[:-1], codes[0, :-1].tolist()], "no list of codebooks"),
        (lambda codes: codes[0].tolist(), "no list of codebooks"),
        (lambda codes: codes[:-1].tolist(), "codebooks"),
        (lambda codes: codes[:, :0].tolist(), "frame|no list of codebooks"),
        (lambda codes: [codes.tolist(), codes.tolist()], "no list of codebooks"),
        (lambda codes: {"a": 1}, "no list of codebooks"),
        (lambda codes: "codes", "no list of codebooks"),
        (lambda codes: 7, "no list of codebooks"),
    ],
)
def test_what_are_no_codes(read: Callable[..., list[Voice]], expected: np.ndarray, change: Any, message: str) -> None:
    refused(lambda: read({"references": [{"codes": change(expected), "text": WORDS}]}), message, "references[0].codes")


def test_codes_need_a_transcript_too(read: Callable[..., list[Voice]], expected: np.ndarray) -> None:
    refused(lambda: read({"references": [{"codes": expected.tolist()}]}), "no transcript", "references[0].text")
    fields = {"references": [{"codes": expected.tolist(), "text": "<|im_end|>"}]}
    refused(lambda: read(fields), "would steer the model", "references[0].text")


@pytest.fixture
def media(tmp_path: Path) -> Path:
    folder = tmp_path / "media"
    (folder / "inner").mkdir(parents=True)
    for path in (folder / "a.flac", folder / "inner/b ü.flac", tmp_path / "secret.flac", folder / "%2e%2e.flac"):
        path.write_bytes(SOUND)
    (folder / "out.flac").symlink_to(tmp_path / "secret.flac")
    (folder / "up").symlink_to(tmp_path)
    (folder / "in.flac").symlink_to("inner/b ü.flac")
    (folder / "loop").symlink_to("loop")
    (tmp_path / "media-2").mkdir()
    (tmp_path / "media-2/a.flac").write_bytes(SOUND)
    return folder


@pytest.mark.parametrize(
    "name",
    "a.flac ./a.flac inner/../a.flac {0}/a.flac file:a.flac file://{0}/a.flac file:{0}/a.flac file://localhost{0}/a.flac "
    "FILE://{0}/a.flac inner/b_ü.flac file:inner/b%20%C3%BC.flac file://{0}/inner/b%20ü.flac in.flac %2e%2e.flac "
    "file:%252e%252e.flac up/media/a.flac".split(),
)
def test_files_below_the_media_folder(read: Callable[..., list[Voice]], expected: np.ndarray, media: Path, name: str) -> None:
    name = name.replace("_", " ").format(media)
    (voice,) = read({"references": [{"audio_path": name, "text": WORDS}]}, media_dir=media)
    assert (voice.codes == expected).all()


@pytest.mark.parametrize(
    "name",
    "../secret.flac inner/../../secret.flac {1}/secret.flac file://{1}/secret.flac file:../secret.flac "
    "file:%2e%2e/secret.flac file:%2E%2E%2Fsecret.flac file:..%2fsecret.flac file://{0}/../secret.flac "
    "file://{0}/%2e%2e/secret.flac out.flac up/secret.flac {0}-2/a.flac ../media-2/a.flac file://host{0}/a.flac "
    "file://{0}/a.flac?x file://{0}/a.flac#x file:////etc/passwd /etc/passwd file:%00a.flac file:%ff.flac a.flac\0 inner . "
    "/ loop missing.flac ..\\secret.flac a.flac/.. ~/a.flac /dev/zero /proc/self/environ file:/dev/stdin".split(),
)
def test_files_elsewhere_look_as_if_they_were_not_there(read: Callable[..., list[Voice]], media: Path, name: str) -> None:
    fields = {"references": [{"audio_path": name.format(media, media.parent), "text": WORDS}]}
    refused(
        lambda: read(fields, media_dir=media),
        "there is no such file below the media folder of this server$",
        "references[0].audio_path",
    )


def test_what_is_no_file_is_not_read(read: Callable[..., list[Voice]], media: Path) -> None:
    os.mkfifo(media / "pipe")
    refused(lambda: read({"ref_audio": "pipe", "ref_text": WORDS}, media_dir=media), "no such file")
    with (media / "long").open("wb") as file:
        file.truncate(MOST_BYTES + 1)
    refused(lambda: read({"ref_audio": "long", "ref_text": WORDS}, media_dir=media), "longer than")


def test_files_and_urls_are_off_by_default(read: Callable[..., list[Voice]]) -> None:
    for name in (str(RECORDING), "a.wav", f"file://{RECORDING}"):
        refused(lambda name=name: read({"ref_audio": name, "ref_text": WORDS}), "reads no files", "ref_audio")
    for url in ("http://127.0.0.1/a.wav", "HTTPS://example.com/a.wav"):
        refused(lambda url=url: read({"ref_audio": url, "ref_text": WORDS}), "fetches no recordings", "ref_audio")


def test_a_url_is_fetched(read: Callable[..., list[Voice]], expected: np.ndarray) -> None:
    class Given(Fetcher):
        async def fetch(self, url: str) -> bytes:
            assert url == "https://example.com/a.wav"
            return SOUND

    (voice,) = read({"references": [{"audio_path": "https://example.com/a.wav", "text": WORDS}]}, fetcher=Given())
    assert (voice.codes == expected).all()
    refused(
        lambda: read({"ref_audio": "http://127.0.0.1:8080/a.wav", "ref_text": WORDS}, fetcher=Fetcher()),
        "not on the public internet",
        "ref_audio",
    )
