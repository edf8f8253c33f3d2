"""Clients that cannot be installed here: the requests that they send, and what they do with the replies.

The product of each section is named first. What is known of it is in its public source.
"""

from __future__ import annotations

import io
import json
import re
import wave
from pathlib import Path
from typing import Any

import msgpack
import pytest

SENTENCES = ("Good morning!", "The sun is shining, and the birds are singing in the trees.")
"""The text of the fixture `text`, as an assistant sends it."""
VOICE = "ash"
"""OpenAI's name for awb, which is understood in every take: these clients send no seed."""


def got(server: Any, path: str, **headers: str) -> Any:
    reply = server.ask("GET", path, **headers)
    assert reply.status == 200, path
    return json.loads(reply.read())


# Open WebUI: lists without the key; no response_format; what is no MP3 is transcoded by its type; shows error.message


@pytest.mark.parametrize("base", ["", "/v1"])
def test_open_webui_lists_without_a_key(keyed_server: Any, base: str) -> None:
    assert [model["id"] for model in got(keyed_server, f"{base}/audio/models")["models"]] == ["minnow"]
    assert [model["id"] for model in got(keyed_server, f"{base}/models")["data"]] == ["minnow"]
    voices = got(keyed_server, f"{base}/audio/voices")["voices"]
    assert [(voice["id"], voice["name"]) for voice in voices] == [(name, name) for name in ("awb", "rms", "slt")]


@pytest.mark.parametrize("base", ["", "/v1"])
def test_open_webui_speaks(keyed_server: Any, hear: Any, share_understood: Any, text: str, tmp_path: Path, base: str) -> None:
    body = {"input": text, "voice": VOICE, "model": "tts-1"}
    reply = keyed_server.ask("POST", f"{base}/audio/speech", body, Authorization="Bearer secret")
    assert (reply.status, reply.getheader("Content-Type")) == (200, "audio/mpeg")
    (tmp_path / "speech.mp3").write_bytes(reply.read())
    assert share_understood(hear(tmp_path / "speech.mp3")) > 0.5


def test_open_webui_shows_an_error(keyed_server: Any) -> None:
    reply = keyed_server.ask("POST", "/v1/audio/speech", {"input": "Hi."}, Authorization="Bearer ")
    assert reply.status == 401
    assert "key" in json.loads(reply.read())["error"]["message"]


def test_open_webui_reads_the_rate_of_samples(server: Any) -> None:
    reply = server.ask("POST", "/v1/audio/speech", {"input": "Hi.", "response_format": "pcm"})
    kind, *parameters = reply.getheader("Content-Type").split(";")
    assert kind == "audio/pcm"
    assert dict(each.split("=") for each in parameters) == {"rate": "16000", "channels": "1"}


# Home Assistant, openai_tts: probes the key with a full stop and "alloy"; joins the sentences of wav, mp3 and pcm


@pytest.mark.parametrize(("key", "status"), [("secret", 200), ("wrong", 401)])
def test_home_assistant_probes_the_key(keyed_server: Any, key: str, status: int) -> None:
    body = {"model": "tts-1", "input": ".", "voice": "alloy", "response_format": "mp3"}
    reply = keyed_server.ask("POST", "/v1/audio/speech", body, Authorization=f"Bearer {key}")
    assert reply.status == status
    assert reply.read()


def test_home_assistant_lists_voices(server: Any) -> None:
    assert {"awb", "rms", "slt"} <= {each["id"] for each in got(server, "/v1/audio/voices?limit=100")["items"]}


def unwrapped_wav(data: bytes) -> tuple[bytes, int]:
    """Return the samples of a wav file, and their rate."""
    with wave.open(io.BytesIO(data)) as file:
        assert (file.getnchannels(), file.getsampwidth()) == (1, 2)
        return file.readframes(1 << 30), file.getframerate()


@pytest.mark.parametrize("stream", [False, True], ids=["whole", "stream"])
@pytest.mark.parametrize("form", ["wav", "mp3", "pcm"])
def test_home_assistant_joins_sentences(
    server: Any, hear: Any, share_understood: Any, tmp_path: Path, form: str, stream: bool
) -> None:
    joined, rate = b"", 24_000
    for sentence in SENTENCES:
        body = {"model": "tts-1", "input": sentence, "voice": VOICE, "response_format": form, "speed": 1.0}
        reply = server.ask("POST", "/v1/audio/speech", {**body, "stream": True} if stream else body)
        assert reply.status == 200
        data = reply.read()
        if form == "mp3":
            assert re.match(rb"\xff[\xe2-\xff]", data), "a frame comes first, without ID3"
            if stream:
                assert not re.search(rb"Xing|Info", data[:200])
        if form == "wav":
            data, rate = unwrapped_wav(data)
        joined += data
    sound = tmp_path / f"joined.{'mp3' if form == 'mp3' else 'pcm'}"
    sound.write_bytes(joined)
    assert share_understood(hear(sound, pcm_rate=0 if form == "mp3" else rate)) > 0.5


# SillyTavern: a key that is empty; serves every reply as an MP3


def test_sillytavern(server: Any, hear: Any, share_understood: Any, text: str, tmp_path: Path) -> None:
    body = {"input": text, "response_format": "mp3", "voice": VOICE, "speed": 1, "model": "tts-1"}
    reply = server.ask("POST", "/v1/audio/speech", body, Authorization="Bearer ")
    assert reply.status == 200
    (tmp_path / "speech.mp3").write_bytes(reply.read())
    assert share_understood(hear(tmp_path / "speech.mp3")) > 0.5


# Fish Speech's api_client: MessagePack; the query's `format` is the encoding of errors


def asked(server: Any, **fields: Any) -> Any:
    body = {
        "references": [],
        "reference_id": None,
        "format": "wav",
        "max_new_tokens": 1024,
        "chunk_length": 300,
        "top_p": 0.8,
        "repetition_penalty": 1.1,
        "temperature": 0.8,
        "streaming": False,
        "use_memory_cache": "off",
        "seed": None,
        **fields,
    }
    connection = server.connect()
    headers = {"Authorization": "Bearer YOUR_API_KEY", "Content-Type": "application/msgpack"}
    connection.request("POST", "/v1/tts?format=msgpack", msgpack.packb(body), headers)
    return connection.getresponse()


def test_api_client_speaks(
    server: Any, hear: Any, share_understood: Any, voice_of: Any, text: str, sample: Path, tmp_path: Path
) -> None:
    reference = {"audio": sample.read_bytes(), "text": "May you live in interesting times."}
    for voice, fields in {
        "awb": {},
        "rms": {"reference_id": "rms", "format": "mp3", "seed": 1},
        "slt": {"references": [reference], "seed": 1},
    }.items():
        reply = asked(server, text=text, **fields)
        assert reply.status == 200
        (tmp_path / voice).write_bytes(reply.read())
        sound = hear(tmp_path / voice)
        assert share_understood(sound) > 0.5
        assert voice_of(sound) == voice


def test_api_client_streams(server: Any, hear: Any, share_understood: Any, text: str, tmp_path: Path) -> None:
    reply = asked(server, text=text, streaming=True)
    assert reply.getheader("Transfer-Encoding") == "chunked"
    (tmp_path / "stream.wav").write_bytes(reply.read())
    assert share_understood(hear(tmp_path / "stream.wav")) > 0.5


def test_api_client_is_told_of_a_mistake(server: Any) -> None:
    reply = asked(server, text="Hi.", reference_id="nobody")
    assert (reply.status, reply.getheader("Content-Type")) == (404, "application/msgpack")
    error = msgpack.unpackb(reply.read())
    assert error["statusCode"] == 404
    assert error["message"] == error["detail"] == error["error"]["message"]
    assert "nobody" in error["message"]
