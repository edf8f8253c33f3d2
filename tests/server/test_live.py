"""WebSockets: /v1/tts/live in MessagePack, /v1/audio/speech/stream in JSON."""

from __future__ import annotations

import io
import json
import signal
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import av
import msgpack
import numpy as np
import pytest
import soundfile
from fastapi.testclient import TestClient
from websockets.exceptions import ConnectionClosed, InvalidStatus
from websockets.sync.client import ClientConnection, connect

from fishrt import TTS
from serving import LONG, Server, serving

LIVE, STREAM = "/v1/tts/live", "/v1/audio/speech/stream"
WORDS = "The birds sing in the trees, and the sun shines on the sea."


class Live:
    """A client of LIVE."""

    def __init__(self, socket: Any) -> None:
        self._socket = socket

    def send(self, event: str, **fields: Any) -> None:
        self._socket.send_bytes(msgpack.packb({"event": event, **fields}))

    def start(self, **fields: Any) -> None:
        self.send("start", request={"text": "", "format": "pcm", "seed": 1, **fields})

    def next(self) -> dict[str, Any]:
        return dict(msgpack.unpackb(self._socket.receive_bytes()))

    def heard(self) -> bytes:
        """Return all audio until a finish without an error."""
        audio = b""
        while (event := self.next())["event"] == "audio":
            assert 0 < len(event["audio"]) < 65_000
            audio += event["audio"]
        assert event == {"event": "finish", "reason": "stop"}
        return audio


@pytest.fixture
def live(client: TestClient) -> Iterator[Live]:
    with client.websocket_connect(LIVE) as socket:
        yield Live(socket)


def samples(pcm: bytes) -> np.ndarray:
    return np.frombuffer(pcm, "<i2") / 32768


def same(pcm: np.ndarray, wanted: np.ndarray) -> None:
    """Check that a speech is the same but for the rounding of a codec that runs in chunks of other sizes."""
    assert len(pcm) == len(wanted)
    np.testing.assert_allclose(pcm, wanted, atol=4 / 32768)


def test_fragments_are_one_text(live: Live, tts: TTS) -> None:
    live.start()
    for fragment in (WORDS[:7], WORDS[7:20], WORDS[20:]):
        live.send("text", text=fragment)
    live.send("stop")
    same(samples(live.heard()), tts.speak(WORDS, seed=1).pcm)


def test_the_nulls_and_defaults_of_the_sdk_are_taken(live: Live, tts: TTS) -> None:
    nulls = {"sample_rate": None, "reference_id": None, "prosody": None, "references": [], "mp3_bitrate": 128, "opus_bitrate": 32}
    live.start(latency="balanced", normalize=True, chunk_length=200, **nulls)
    live.send("text", text="Hi.")
    live.send("stop")
    same(samples(live.heard()), tts.speak("Hi.", seed=1).pcm)


def test_misspelt_fields_are_named_in_the_log_once(client: TestClient, caplog: pytest.LogCaptureFixture) -> None:
    """No event of these protocols has a place for them. Those that count here are none."""
    caplog.set_level("INFO", "fishrt.server.speech")
    with client.websocket_connect(LIVE) as socket:
        live = Live(socket)
        for _ in range(2):
            live.start(chunk_length=100, sead=1, **{"my secret words": 1})
            live.send("stop")
            live.next()
    with client.websocket_connect(STREAM) as socket:
        socket.send_json({"type": "session.config", "stream_audio": False, "voise": "slt"})
        socket.send_json({"type": "input.done"})
        assert socket.receive_json()["type"] == "session.done"
    said = [record.getMessage() for record in caplog.records if "change nothing" in record.getMessage()]
    assert [each.rpartition(": ")[2] for each in said] == ["sead, ?", "voise"]


def test_the_last_event_says_what_the_model_does_not_read_well(client: TestClient) -> None:
    said = ["minnow does not read well: digits 7"]
    with client.websocket_connect(LIVE) as socket:
        live = Live(socket)
        live.start(text="Hi 7.")
        live.send("stop")
        while (event := live.next())["event"] == "audio":
            pass
        assert event == {"event": "finish", "reason": "stop", "warnings": said}
    with client.websocket_connect(STREAM) as socket:
        for sent in ({"type": "session.config"}, {"type": "input.text", "text": "Hi 7."}, {"type": "input.done"}):
            socket.send_json(sent)
        assert socket.receive_json()["type"] == "audio.start"
        socket.receive_bytes()
        assert socket.receive_json()["warnings"] == said


def test_several_starts_on_one_socket_and_unknown_events(live: Live, tts: TTS) -> None:
    for voice in ("awb", "slt"):
        live.start(reference_id=voice)
        live.send("dance", step=1)
        live.send("text", text="Hi.", more=1)
        live.send("stop")
        same(samples(live.heard()), tts.speak("Hi.", seed=1, voice=voice).pcm)


def test_a_flush_speaks_before_the_stop(live: Live, tts: TTS) -> None:
    """And the audio of all parts is one stream."""
    live.start(format="wav")
    live.send("text", text="Hi. ")
    live.send("flush")
    audio = live.next()["audio"]
    wanted = np.concatenate([tts.speak(text, seed=1).pcm for text in ("Hi.", WORDS)])
    live.send("text", text=WORDS)
    live.send("flush")
    live.send("flush")
    live.send("stop")
    audio += live.heard()
    assert (audio[:4], audio.count(b"RIFF")) == (b"RIFF", 1)
    same(samples(audio[44:]), wanted)


def test_long_text_is_spoken_without_a_flush(live: Live, tts: TTS) -> None:
    live.start(chunk_length=100)
    sentences = (
        "The birds sing in the trees.",
        "The sun shines on the sea.",
        "And the wind is in the grass, the whole day long.",
    )
    live.send("text", text=" ".join(sentences) + " And")
    assert live.next()["event"] == "audio"
    live.send("text", text=" so.")
    live.send("stop")
    live.heard()


@pytest.mark.parametrize("format", ["mp3", "opus"])
def test_compressed_audio_is_one_stream(live: Live, tts: TTS, format: str) -> None:
    live.start(format=format)
    for text in ("Hi.", WORDS):
        live.send("text", text=text)
        live.send("flush")
    live.send("stop")
    audio = live.heard()
    seconds = sum(len(tts.speak(text, seed=1).pcm) for text in ("Hi.", WORDS)) / tts.sample_rate
    assert audio.count(b"OpusHead") == (format == "opus")
    with av.open(io.BytesIO(audio)) as file:
        found = sum(frame.samples for frame in file.decode(audio=0)) / file.streams.audio[0].rate
    assert found == pytest.approx(seconds, abs=0.12)


def test_a_text_of_nothing_finishes(live: Live) -> None:
    for text in ("", " "):
        live.start(text=text)
        live.send("stop")
        assert live.heard() == b""


@pytest.mark.parametrize(
    ("fields", "code"),
    [
        ({"reference_id": "nobody"}, "voice_not_found"),
        ({"temperature": 9}, None),
        ({"references": [{"audio": b"x", "text": "x"}]}, "invalid_reference"),
    ],
)
def test_a_start_that_cannot_be_spoken(live: Live, fields: dict[str, Any], code: str | None) -> None:
    """It is told at once; what belongs to it is dropped, and the socket stays open."""
    live.start(**fields)
    event = live.next()
    assert (event["event"], event["reason"], event["error"]["code"]) == ("finish", "error", code)
    assert event["message"]
    live.send("text", text="Hi.")
    live.send("flush")
    live.send("stop")
    live.start()
    live.send("text", text="Hi.")
    live.send("stop")
    assert live.heard()


@pytest.mark.parametrize(
    "frame",
    [
        b"",
        b"\xc1",
        msgpack.packb([]),
        msgpack.packb({"event": "text", "text": "Hi."}),
        msgpack.packb({"event": "start", "request": 5}),
    ],
)
def test_frames_that_are_no_events(live: Live, frame: bytes) -> None:
    live._socket.send_bytes(frame)
    event = live.next()
    assert (event["event"], event["reason"]) == ("finish", "error")
    live._socket.send_text("x")
    assert live.next()["reason"] == "error"
    live.start(text="Hi.")
    live.send("stop")
    assert live.heard()


def test_waiting_text_is_bounded(start: Callable[..., TestClient]) -> None:
    with start(max_text_length=100).websocket_connect(LIVE) as socket:
        live = Live(socket)
        live.start()
        live.send("text", text="a" * 101)
        event = live.next()
        assert (event["reason"], event["error"]["code"]) == ("error", "text_too_long")


def test_waiting_texts_are_bounded(client: TestClient) -> None:
    with client.websocket_connect(LIVE) as socket:
        live = Live(socket)
        for _ in range(20):
            live.start(text=LONG)
        message = {"type": "websocket.send"}
        while message["type"] == "websocket.send":
            message = socket.receive()
        assert (message["type"], message["code"]) == ("websocket.close", 1008)


def test_a_client_that_goes_away_ends_its_speech(client: TestClient) -> None:
    scheduler = client.app.state.service.scheduler  # type: ignore[attr-defined]
    with client.websocket_connect(LIVE) as socket:
        live = Live(socket)
        live.start(text=LONG * 10)
        live.send("flush")
        assert live.next()["event"] == "audio"
        assert scheduler.stats.active == 1
    until = time.monotonic() + 60
    while scheduler.stats.active:
        assert time.monotonic() < until
        time.sleep(0.01)
    assert not client.app.state.service.at_end  # type: ignore[attr-defined]


class Stream:
    """A client of STREAM."""

    def __init__(self, socket: Any) -> None:
        self._socket = socket

    def send(self, kind: str, **fields: Any) -> None:
        self._socket.send_text(json.dumps({"type": kind, **fields}))

    def next(self) -> Any:
        """Return the next event, or the bytes of a frame."""
        message = self._socket.receive()
        return json.loads(message["text"]) if message.get("text") is not None else message["bytes"]

    def sentence(self) -> tuple[dict[str, Any], list[bytes]]:
        """Return the start of a sentence and its frames."""
        start = self.next()
        assert start["type"] == "audio.start", start
        frames = []
        while isinstance(frame := self.next(), bytes):
            frames.append(frame)
        assert frame["type"] == "audio.done"
        assert (frame["sentence_index"], frame["total_bytes"]) == (start["sentence_index"], sum(map(len, frames)))
        return start, frames


@pytest.fixture
def stream(client: TestClient) -> Iterator[Stream]:
    with client.websocket_connect(STREAM) as socket:
        yield Stream(socket)


def test_sentences_come_one_by_one(stream: Stream, tts: TTS) -> None:
    """Each as a whole wav file, and the first before the text is at its end."""
    stream.send("session.config", voice="awb", seed=1, model="x")
    stream.send("input.text", text="Hi. ")
    start, frames = stream.sentence()
    assert (start["sentence_index"], start["sentence_text"], start["format"], start["sample_rate"]) == (0, "Hi.", "wav", 16_000)
    same(soundfile.read(io.BytesIO(frames[0]))[0], tts.speak("Hi.", seed=1, voice="awb").pcm)
    stream.send("input.unknown")
    stream.send("input.text", text=WORDS[:9])
    stream.send("input.text", text=WORDS[9:])
    stream.send("input.done")
    start, frames = stream.sentence()
    assert (start["sentence_index"], start["sentence_text"], len(frames)) == (1, WORDS, 1)
    assert stream.next() == {"type": "session.done", "total_sentences": 2}


def test_samples_come_while_they_are_made(stream: Stream, tts: TTS) -> None:
    for fields in ({"response_format": "pcm"}, {"response_format": "pcm", "stream_audio": True}):
        stream.send("session.config", seed=1, **fields)
        stream.send("input.text", text=WORDS)
        stream.send("input.done")
        _, frames = stream.sentence()
        assert len(frames) > 2
        same(samples(b"".join(frames)), tts.speak(WORDS, seed=1).pcm)
        assert stream.next()["type"] == "session.done"


@pytest.mark.parametrize(("fields", "param"), [({"voice": "nobody"}, "voice"), ({"speed": 9}, "speed")])
def test_errors_of_a_session(stream: Stream, fields: dict[str, Any], param: str) -> None:
    stream.send("session.config", **fields)
    event = stream.next()
    assert (event["type"], event["error"]["param"]) == ("error", param)
    assert stream.next()["type"] == "session.done"
    stream.send("input.text", text="Hi.")
    stream.send("session.config")
    stream.send("input.text", text="Hi.")
    stream.send("input.done")
    stream.sentence()
    assert stream.next()["total_sentences"] == 1


def test_the_client_ends_the_session(stream: Stream) -> None:
    stream.send("input.text", text="Hi.")
    assert stream.next()["type"] == "error"
    assert stream.next()["type"] == "session.done"
    stream.send("session.close")
    assert stream._socket.receive()["type"] == "websocket.close"


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    with serving(tmp_path_factory.mktemp("live"), FISHRT_API_KEY="sesame") as found:
        yield found


def opened(server: Server, query: str = "", **headers: str) -> ClientConnection:
    return connect(f"ws://127.0.0.1:{server.port}{LIVE}{query}", additional_headers=headers, compression=None)


def event(kind: str, **fields: Any) -> bytes:
    return bytes(msgpack.packb({"event": kind, **fields}))


@pytest.mark.parametrize(
    ("query", "headers"),
    [("", {"Authorization": "Bearer sesame"}), ("", {"X-Api-Key": "sesame"}), ("?api_key=sesame", {})],
)
def test_the_key_of_a_real_server(server: Server, query: str, headers: dict[str, str]) -> None:
    with opened(server, query, **headers) as socket:
        socket.send(event("start", request={"text": "Hi.", "format": "pcm"}))
        socket.send(event("stop"))
        assert msgpack.unpackb(socket.recv())["event"] == "audio"


@pytest.mark.parametrize("query", ["", "?api_key=other"])
def test_without_the_key_there_is_no_socket(server: Server, query: str) -> None:
    with pytest.raises(InvalidStatus) as caught:
        opened(server, query)
    assert caught.value.response.status_code == 401


def test_pings_are_answered_while_it_speaks(server: Server) -> None:
    with opened(server, "?api_key=sesame") as socket:
        socket.send(event("start", request={"text": LONG, "format": "pcm"}))
        socket.send(event("stop"))
        heard = threading.Event()
        kinds: list[str] = []

        def listen() -> None:
            for message in socket:
                kinds.append(msgpack.unpackb(message)["event"])
                heard.set()
                if kinds[-1] == "finish":
                    return

        listening = threading.Thread(target=listen)
        listening.start()
        assert heard.wait(60)
        for _ in range(3):
            assert socket.ping().wait(60)
        assert "finish" not in kinds
        listening.join(60)
        assert kinds[-1] == "finish"


def test_a_server_that_ends_speaks_what_it_has_begun(tmp_path: Path) -> None:
    with serving(tmp_path) as server, opened(server) as idle, opened(server) as busy:
        busy.send(event("start", request={"text": LONG[:240], "format": "pcm", "seed": 1}))
        busy.send(event("stop"))
        assert msgpack.unpackb(busy.recv())["event"] == "audio"
        server.process.send_signal(signal.SIGTERM)
        last: dict[str, Any] = {}
        for socket in (idle, busy):
            with pytest.raises(ConnectionClosed) as caught:  # noqa: PT012
                while True:
                    last = msgpack.unpackb(socket.recv(60))
            assert caught.value.rcvd is not None
            assert caught.value.rcvd.code == 1012
        assert last == {"event": "finish", "reason": "stop"}
        assert server.process.wait(60) == 0


def test_waiting_answers_to_bad_events_are_bounded(client: TestClient, caplog: pytest.LogCaptureFixture) -> None:
    with client.websocket_connect(LIVE) as socket:
        live = Live(socket)
        live.start(text=LONG)
        for _ in range(20):
            socket.send_bytes(b"\xc1")
        message = {"type": "websocket.send"}
        while message["type"] == "websocket.send":
            message = socket.receive()
        assert (message["type"], message["code"]) == ("websocket.close", 1008)
    assert not [record for record in caplog.records if record.levelname == "ERROR"]
