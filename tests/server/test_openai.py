"""OpenAI's routes: fields, formats, streams, voices, models."""

from __future__ import annotations

import base64
import io
import json
from typing import Any

import av
import numpy as np
import pytest
import soundfile
from fastapi.testclient import TestClient

from fishrt import TTS, FishrtError
from fishrt.server.speech import openai, streams

SPEECH = "/v1/audio/speech"
WORDS = "The birds sing in the trees, and the sun shines on the sea."


def spoken(client: TestClient, path: str = SPEECH, **fields: Any) -> Any:
    reply = client.post(path, json={"input": "Hi.", "seed": 1, **fields})
    assert reply.status_code == 200, reply.text
    return reply


def decoded(data: bytes) -> tuple[np.ndarray, int]:
    return soundfile.read(io.BytesIO(data))


def refused(client: TestClient, status: int = 400, **fields: Any) -> dict[str, Any]:
    reply = client.post(SPEECH, json={"input": "Hi.", **fields})
    assert reply.status_code == status, reply.text
    error: dict[str, Any] = reply.json()["error"]
    assert set(error) == {"message", "type", "param", "code"}
    return error


def test_without_a_format_the_reply_is_mp3(client: TestClient) -> None:
    reply = spoken(client)
    assert reply.headers["content-type"] == "audio/mpeg"
    assert len(decoded(reply.content)[0]) > 0.3 * 16_000


def test_the_same_seed_gives_the_speech_of_the_library(client: TestClient, tts: Any) -> None:
    wanted = tts.speak("Hi.", seed=1).pcm
    reply = spoken(client, response_format="wav")
    assert reply.headers["x-seed"] == "1"
    pcm, rate = decoded(reply.content)
    assert rate == tts.sample_rate
    np.testing.assert_allclose(pcm, wanted, atol=1 / 32000)


@pytest.mark.parametrize(
    ("fields", "rate"),
    [
        ({}, 16_000),
        ({"model": "echo-tts"}, 16_000),
        ({"model": "tts-1"}, 24_000),
        ({"model": "tts-1-hd"}, 24_000),
        ({"model": "gpt-4o-mini-tts-2025-12-15"}, 24_000),
        ({"model": "tts-1", "sample_rate": 8_000}, 8_000),
        ({"sample_rate": 44_100}, 44_100),
    ],
)
def test_the_rate_of_raw_samples(client: TestClient, fields: dict[str, Any], rate: int) -> None:
    reply = spoken(client, response_format="pcm", **fields)
    assert reply.headers["content-type"] == f"audio/pcm;rate={rate};channels=1"
    assert reply.headers["x-audio-sample-rate"] == str(rate)
    assert (reply.headers["x-audio-channels"], reply.headers["x-audio-encoding"]) == ("1", "pcm_s16le")
    seconds = len(decoded(spoken(client, response_format="wav").content)[0]) / 16_000
    assert len(reply.content) / 2 / rate == pytest.approx(seconds, abs=0.01)


def events(reply: Any) -> list[dict[str, Any]]:
    lines = reply.text.splitlines()
    return [json.loads(line.removeprefix("data: ")) for line in lines if line.startswith("data: ")]


def test_server_sent_events_carry_the_same_audio(client: TestClient) -> None:
    reply = spoken(client, response_format="pcm", stream_format="sse")
    assert reply.headers["content-type"].startswith("text/event-stream")
    *deltas, done = events(reply)
    assert {each["type"] for each in deltas} == {"speech.audio.delta"}
    assert b"".join(base64.b64decode(each["audio"]) for each in deltas) == spoken(client, response_format="pcm").content
    assert done["type"] == "speech.audio.done"
    usage = done["usage"]
    assert usage["total_tokens"] == usage["input_tokens"] + usage["output_tokens"]
    assert usage["output_tokens"] * 640 == sum(len(base64.b64decode(each["audio"])) for each in deltas) / 2


ODD = "Привет, 3 people. <break/>"
READS = "minnow does not read well: letters П, р, и, в, е, т; digits 3; tags <break/>"


def test_a_reply_says_what_the_model_does_not_read_well(client: TestClient, tts: TTS) -> None:
    """In the words of the library and of `fishrt speak`, in ASCII."""
    assert tts.speak(ODD, seed=1, max_frames=2).info.warnings[0] == READS
    replies = [spoken(client, input=ODD, **fields) for fields in ({}, {"stream": True}, {"stream_format": "sse"})]
    replies.append(client.post("/v1/tts", json={"text": ODD}))
    replies.append(client.post("/generate", data={"text": ODD}))
    for reply in replies:
        assert json.loads(reply.headers["x-warnings"]) == [READS]
        assert reply.headers["x-warnings"].isascii()
    assert events(replies[2])[-1]["warnings"] == [READS]
    items = client.post("/v1/audio/speech/batch", json={"items": [{"input": ODD}, {"input": "Hi."}]}).json()["results"]
    assert [item.get("warnings") for item in items] == [[READS], None]
    assert "x-warnings" not in spoken(client).headers


def test_a_whole_reply_says_that_it_was_cut_off(client: TestClient) -> None:
    (warning,) = json.loads(spoken(client, input=WORDS, max_new_tokens=3).headers["x-warnings"])
    assert warning.startswith("the speech was cut off by the limit of its length")
    done = events(spoken(client, input=WORDS, max_new_tokens=3, stream_format="sse"))[-1]
    assert done["warnings"] == [warning]


@pytest.mark.parametrize(
    "text", ["<" + "tag " * 5000 + "> Hi.", "".join(map(chr, range(0x4E00, 0x4F00))), "\U0001f600" * 99 + "Hi."]
)
def test_warnings_in_a_header_are_short(client: TestClient, text: str) -> None:
    found = spoken(client, input=text, max_new_tokens=3, stream=True).headers["x-warnings"]
    assert len(found) <= 1000
    assert json.loads(found)[0].startswith("minnow does not read well: ")


@pytest.mark.parametrize("fields", [{"voice": "nobody"}, {"voice": {"id": "nobody"}}, {"reference_id": "nobody"}])
def test_an_unknown_voice_is_404(client: TestClient, fields: dict[str, Any]) -> None:
    error = refused(client, 404, **fields)
    assert (error["code"], error["param"]) == ("voice_not_found", "voice")


@pytest.mark.parametrize("text", [".", "…", "?!", " - "])
def test_a_text_without_a_letter_is_a_pause(client: TestClient, text: str) -> None:
    pcm, rate = decoded(spoken(client, input=text, response_format="wav", voice="alloy").content)
    assert len(pcm) >= 0.1 * rate
    assert not pcm.any()


def test_models(client: TestClient) -> None:
    listed = client.get("/v1/models").json()
    assert [each["id"] for each in listed["data"]] == ["minnow"]
    assert client.get("/v1/models/minnow").json() == listed["data"][0]
    assert client.get("/v1/models/tts-1").status_code == 404
    assert [each["id"] for each in client.get("/v1/audio/models").json()["models"]] == ["minnow"]


TYPES = {
    "mp3": "audio/mpeg",
    "opus": "audio/ogg",
    "aac": "audio/aac",
    "flac": "audio/flac",
    "wav": "audio/wav",
    "pcm": "audio/pcm;rate=16000;channels=1",
}


def heard(data: bytes, kind: str) -> tuple[np.ndarray, int]:
    """Return the samples of a reply, float [samples], and their rate, as another decoder reads them."""
    if kind == "pcm":
        return np.frombuffer(data, "<i2") / 32768, 16_000
    with av.open(io.BytesIO(data), format={"opus": "ogg"}.get(kind, kind)) as file:
        stream = file.streams.audio[0]
        parts = [frame.to_ndarray() for frame in file.decode(stream)]
        wide = np.concatenate([part.reshape(1, -1) if part.ndim == 1 else part for part in parts], axis=1)[0]
        return (wide / 32768 if wide.dtype.kind == "i" else wide), stream.rate


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("kind", TYPES)
def test_every_format_decodes_to_the_same_speech(client: TestClient, tts: TTS, kind: str, stream: bool) -> None:
    """One container, whether it was sent while it was made or at the end."""
    text = "Good morning. The sun is shining."
    wanted = len(tts.speak(text, seed=1).pcm) / tts.sample_rate
    reply = spoken(client, input=text, response_format=kind, stream=stream)
    assert reply.headers["content-type"] == TYPES[kind]
    assert ("content-length" in reply.headers) == (not stream)
    pcm, rate = heard(reply.content, kind)
    # A decoder plays the start-up of MP3 and AAC, too: a whole number of frames.
    assert len(pcm) / rate == pytest.approx(wanted, abs=0.15 if kind in ("mp3", "aac") else 0.02)
    assert np.sqrt(np.mean(np.square(pcm))) > 0.01
    assert reply.content.count({"wav": b"RIFF", "opus": b"OpusHead", "flac": b"fLaC"}.get(kind, b"\0RIFF")) == (
        1 if kind in ("wav", "opus", "flac") else 0
    )


def test_a_streamed_wav_has_no_length_and_a_whole_one_has_the_right_one(client: TestClient) -> None:
    streamed = spoken(client, response_format="wav", stream=True).content
    complete = spoken(client, response_format="wav").content
    assert streamed[4:8] == streamed[40:44] == b"\xff" * 4
    assert int.from_bytes(complete[40:44], "little") == len(complete) - 44
    assert int.from_bytes(complete[4:8], "little") == len(complete) - 8
    apart = np.frombuffer(streamed[44:], "<i2").astype(int) - np.frombuffer(complete[44:], "<i2")
    assert np.abs(apart).max() <= 2  # the codec rounds otherwise in chunks of other sizes


@pytest.mark.parametrize("speed", [0.25, 0.5, 2, 4, "2"])
@pytest.mark.parametrize("stream", [False, True])
def test_speed_changes_the_length(client: TestClient, tts: TTS, speed: float | str, stream: bool) -> None:
    usual = len(tts.speak("Good morning.", seed=1).pcm)
    reply = spoken(client, input="Good morning.", speed=speed, response_format="pcm", stream=stream)
    assert len(reply.content) / 2 == pytest.approx(usual / float(speed), rel=0.02)


def test_volume_is_in_decibels(client: TestClient) -> None:
    loud, quiet = (heard(spoken(client, response_format="wav", volume_db=gain).content, "wav")[0] for gain in (0, -20))
    np.testing.assert_allclose(quiet, loud / 10, atol=2 / 32768)


def test_replies_say_how_they_were_made(client: TestClient) -> None:
    reply = client.post(SPEECH, json={"input": "Hi."})
    again = client.post(SPEECH, json={"input": "Hi.", "seed": int(reply.headers["x-seed"])})
    assert reply.content == again.content
    assert float(reply.headers["x-queue-time"]) >= 0
    tokens = [int(reply.headers[f"x-vllm-omni-{kind}-tokens"]) for kind in ("input", "output", "total")]
    assert tokens[0] + tokens[1] == tokens[2]
    streamed = spoken(client, stream=True)
    assert streamed.headers["x-accel-buffering"] == "no"
    assert streamed.headers["x-seed"] == "1"


def test_a_batch_answers_for_each_item(client: TestClient) -> None:
    items = [{"input": "Hi."}, {"input": "Hi.", "voice": "nobody"}, {"text": "Hi.", "voice_id": "slt", "response_format": "wav"}]
    reply = client.post(f"{SPEECH}/batch", json={"items": items, "seed": 1, "response_format": "pcm", "voice": "awb"})
    assert reply.status_code == 200
    found = reply.json()
    assert (found["total"], found["succeeded"], found["failed"]) == (3, 2, 1)
    first, second, third = found["results"]
    assert [each["index"] for each in found["results"]] == [0, 1, 2]
    assert base64.b64decode(first["audio_data"]) == spoken(client, voice="awb", response_format="pcm", stream=False).content
    assert first["media_type"] == "audio/pcm;rate=16000;channels=1"
    assert first["usage"]["output_tokens"] > 0
    assert (second["status"], "nobody" in second["error"]) == ("error", True)
    assert base64.b64decode(third["audio_data"]) == spoken(client, voice="slt", response_format="wav").content


@pytest.mark.parametrize("items", [None, [], {}, "x", [1], [{"input": "Hi."}] * 33])
def test_what_is_no_batch(client: TestClient, items: Any) -> None:
    reply = client.post(f"{SPEECH}/batch", json={"items": items})
    assert (reply.status_code, reply.json()["error"]["param"]) == (400, "items")


class Broken:
    """A stream that fails after some chunks of another."""

    def __init__(self, stream: Any, chunks: int, error: Exception) -> None:
        self._stream, self._left, self._error = stream, chunks, error

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)

    def __aiter__(self) -> Any:
        return self

    async def __anext__(self) -> Any:
        if not self._left:
            raise self._error
        self._left -= 1
        return await self._stream.__anext__()


@pytest.fixture
def broken(start: Any, monkeypatch: pytest.MonkeyPatch) -> Any:
    """Return a client of a server whose streams fail after so many chunks."""

    def made(chunks: int, error: Exception) -> TestClient:
        client: TestClient = start()
        service = client.app.state.service  # type: ignore[attr-defined]
        speak = service.speak

        async def failing(*args: Any, **options: Any) -> Any:
            return Broken(await speak(*args, **options), chunks, error)

        monkeypatch.setattr(service, "speak", failing)
        return client

    return made


FAULTS = [FishrtError("the codes have no sound"), RuntimeError("a fault with secrets")]


@pytest.mark.parametrize("error", FAULTS, ids=lambda error: type(error).__name__)
@pytest.mark.parametrize("fields", [{}, {"stream": True}, {"stream_format": "sse"}], ids=str)
def test_a_fault_before_the_first_audio_is_a_status(broken: Any, error: Exception, fields: dict[str, Any]) -> None:
    reply = broken(0, error).post(SPEECH, json={"input": "Hi.", **fields})
    assert reply.status_code == 500
    assert "secrets" not in reply.text
    assert reply.json()["error"]["type"] == "server_error"


@pytest.mark.parametrize("error", FAULTS, ids=lambda error: type(error).__name__)
def test_a_fault_after_the_first_audio_is_an_event(broken: Any, error: Exception) -> None:
    reply = broken(2, error).post(SPEECH, json={"input": "Good morning.", "stream_format": "sse", "response_format": "pcm"})
    *deltas, last = events(reply)
    assert [each["type"] for each in deltas] == ["speech.audio.delta"] * 2
    assert last["type"] == "speech.audio.error"
    assert last["error"]["type"] == "server_error"
    assert "secrets" not in reply.text


def test_a_model_that_says_nothing_is_no_fault_of_the_server(broken: Any) -> None:
    reply = broken(0, StopAsyncIteration()).post(SPEECH, json={"input": "Hi."})
    assert (reply.status_code, reply.json()["error"]["code"]) == (400, "nothing_spoken")


def test_a_whole_reply_that_is_too_long_for_memory_is_sent_while_it_is_made(
    client: TestClient, monkeypatch: pytest.MonkeyPatch
) -> None:
    text = "Good morning. The sun is shining. Good morning."
    wanted = spoken(client, input=text, response_format="wav").content
    monkeypatch.setattr(streams, "MOST_WHOLE", 1000)
    reply = spoken(client, input=text, response_format="wav")
    assert "content-length" not in reply.headers
    assert reply.content[44:] == wanted[44:]
    batch = client.post(f"{SPEECH}/batch", json={"items": [{"input": text}]}).json()
    assert (batch["failed"], "0 MiB" in batch["results"][0]["error"]) == (1, True)


def test_the_audio_of_a_batch_is_bounded(client: TestClient, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(openai, "MOST_BATCH", 30_000)
    items = [{"input": "Hi.", "seed": 1, "response_format": "pcm"}] * 3
    found = client.post(f"{SPEECH}/batch", json={"items": items}).json()
    assert (found["succeeded"], found["failed"]) == (1, 2)
