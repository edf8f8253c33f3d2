"""The Wyoming protocol, by Wyoming's own client over TCP."""

from __future__ import annotations

import asyncio
import json
import re
import signal
import socket
import time
from collections.abc import Awaitable, Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from wyoming.audio import AudioChunk, AudioStart
from wyoming.client import AsyncTcpClient
from wyoming.event import Event
from wyoming.info import Describe, Info
from wyoming.ping import Ping
from wyoming.tts import Synthesize, SynthesizeChunk, SynthesizeStart, SynthesizeStop, SynthesizeVoice

from fishrt import TTS
from fishrt.bundle.features import Reads
from fishrt.server import run
from fishrt.server.speech.wyoming import languages_of
from serving import LONG, serving, serving_here, start

WORDS = "The birds sing in the trees, and the sun shines on the sea."


@pytest.fixture(scope="module")
def served(tts: TTS) -> Iterator[tuple[int, Any]]:
    """The port of Wyoming and the service of a server."""
    with serving_here(tts, max_text_length=5000) as here:
        yield here.wyoming, here.service


def talk(port: int, work: Callable[[AsyncTcpClient], Awaitable[Any]]) -> Any:
    """Return what `work` does with a connection."""

    async def talked() -> Any:
        async with AsyncTcpClient("127.0.0.1", port) as client:
            return await work(client)

    return asyncio.run(talked())


def answers(port: int, sent: list[Event], last: str, times: int = 1) -> list[Event]:
    """Return the events that come back, until so many of the type `last`."""

    async def work(client: AsyncTcpClient) -> list[Event]:
        for event in sent:
            await client.write_event(event)
        found: list[Event] = []
        while [event.type for event in found].count(last) < times:
            event = await client.read_event()
            assert event is not None, found
            found.append(event)
        return found

    return list(talk(port, work))


def heard(events: list[Event]) -> tuple[np.ndarray, int]:
    """Return the samples of a start, chunks, and a stop, and their rate."""
    kinds = [event.type for event in events]
    assert kinds == ["audio-start", *["audio-chunk"] * (len(kinds) - 2), "audio-stop"]
    begun = AudioStart.from_event(events[0])
    assert (begun.width, begun.channels) == (2, 1)
    audio = b"".join(AudioChunk.from_event(event).audio for event in events[1:-1])
    return np.frombuffer(audio, "<i2") / 32768, begun.rate


def same(pcm: np.ndarray, wanted: np.ndarray) -> None:
    assert len(pcm) == len(wanted)
    assert np.abs(np.corrcoef(pcm, wanted)[0, 1]) > 0.999


def streamed(text: str, size: int, **voice: str) -> list[Event]:
    """Return what Home Assistant sends: the text in chunks, then the whole of it for older servers."""
    chosen = SynthesizeVoice(**voice) if voice else None
    chunks = [SynthesizeChunk(text[at : at + size]).event() for at in range(0, len(text), size)]
    whole = Synthesize(text, voice=chosen).event()
    return [SynthesizeStart(voice=chosen).event(), *chunks, whole, SynthesizeStop().event()]


def test_it_describes_itself(served: tuple[int, Any], tts: TTS) -> None:
    info = Info.from_event(answers(served[0], [Describe().event()], "info")[0])
    program = info.tts[0]
    assert program.supports_synthesize_streaming
    assert program.voices[0].name == tts.default_voice
    assert {voice.name for voice in program.voices} == set(tts.voices)
    assert all(voice.languages == ["en"] and voice.installed for voice in program.voices)


@pytest.mark.parametrize("voice", [None, SynthesizeVoice(language="en"), SynthesizeVoice(name="default")])
def test_a_text(served: tuple[int, Any], tts: TTS, voice: SynthesizeVoice | None) -> None:
    pcm, rate = heard(answers(served[0], [Synthesize("Hi.", voice=voice).event()], "audio-stop"))
    assert rate == tts.sample_rate
    assert len(pcm) > 0.2 * rate
    assert np.std(pcm) > 0.01


def test_the_speech_is_that_of_the_library(served: tuple[int, Any], tts: TTS, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("secrets.randbits", lambda _: 7)
    pcm, _ = heard(answers(served[0], [Synthesize(WORDS, voice=SynthesizeVoice(name="awb")).event()], "audio-stop"))
    same(pcm, tts.speak(WORDS, seed=7, voice="awb").pcm)
    pcm, _ = heard(answers(served[0], streamed(f"Hi. {WORDS}", 5, name="slt"), "synthesize-stopped")[:-1])
    same(pcm, np.concatenate([tts.speak(text, seed=7, voice="slt").pcm for text in ("Hi.", WORDS)]))


def test_the_first_sentence_is_spoken_before_the_text_ends(served: tuple[int, Any]) -> None:
    async def work(client: AsyncTcpClient) -> list[str]:
        await client.write_event(SynthesizeStart().event())
        await client.write_event(SynthesizeChunk("Hi. And").event())
        kinds = []
        for _ in range(2):
            event = await client.read_event()
            assert event is not None
            kinds.append(event.type)
        await client.write_event(SynthesizeStop().event())
        while kinds[-1] != "synthesize-stopped":
            event = await client.read_event()
            assert event is not None
            kinds.append(event.type)
        return kinds

    kinds = talk(served[0], work)
    assert kinds[:2] == ["audio-start", "audio-chunk"]
    assert kinds[-2:] == ["audio-stop", "synthesize-stopped"]
    assert kinds.count("audio-start") == kinds.count("audio-stop") == 1


def test_a_connection_takes_one_text_after_the_other_and_pings_between(served: tuple[int, Any]) -> None:
    sent = [*streamed("Hi.", 3), Ping("x").event(), Event("unknown"), Synthesize("Hi.").event()]
    events = answers(served[0], sent, "audio-stop", times=2)
    kinds = [event.type for event in events]
    assert kinds.count("audio-start") == 2
    assert events[kinds.index("pong")].data == {"text": "x"}
    assert answers(served[0], streamed("", 1), "synthesize-stopped")[0].type == "synthesize-stopped"


@pytest.mark.parametrize(
    ("event", "code"),
    [
        (Synthesize("Hi.", voice=SynthesizeVoice(name="nobody")).event(), "voice_not_found"),
        (Synthesize(" ").event(), "400"),
        (Synthesize("Hi.", text_format="ssml").event(), "400"),
        (Event("synthesize", {"text": 5}), "400"),
        (Event("synthesize", {"text": "Hi.", "voice": "awb"}), "400"),
        (Synthesize(LONG * 3).event(), "text_too_long"),
    ],
)
def test_errors(served: tuple[int, Any], event: Event, code: str) -> None:
    """The connection stays."""
    events = answers(served[0], [event, Synthesize("Hi.").event()], "audio-stop")
    assert (events[0].type, events[0].data["code"]) == ("error", code)
    assert events[0].data["text"]
    heard(events[1:])


def test_an_error_of_a_stream(served: tuple[int, Any]) -> None:
    events = answers(served[0], streamed("Hi. Hi.", 2, name="nobody"), "synthesize-stopped")
    assert [event.type for event in events] == ["error", "synthesize-stopped"]


@pytest.mark.parametrize(
    "sent",
    [
        b"{}\n",
        b"[]\n",
        b"x\n",
        b"[" * 60_000 + b"\n",
        b'{"type": "describe", "data": []}\n',
        b'{"type": "synthesize", "payload_length": 99999999999}\n',
        b'{"type": "synthesize", "data_length": "x"}\n',
        b"x" * (2 << 20),
    ],
    ids=lambda sent: str(sent[:30]),
)
def test_what_is_no_event_ends_the_connection(served: tuple[int, Any], sent: bytes) -> None:
    with socket.create_connection(("127.0.0.1", served[0]), timeout=60) as sock:
        try:
            sock.sendall(sent)
            assert sock.recv(1) == b""
        except ConnectionError:
            pass
    assert answers(served[0], [Describe().event()], "info")


def test_a_client_that_goes_away_ends_its_speech(served: tuple[int, Any]) -> None:
    port, service = served
    with socket.create_connection(("127.0.0.1", port), timeout=60) as sock:
        sock.sendall(json.dumps({"type": "synthesize", "data": {"text": LONG}}).encode() + b"\n")
        assert sock.recv(1)
        assert service.scheduler.stats.active == 1
    until = time.monotonic() + 60
    while service.scheduler.stats.active:
        assert time.monotonic() < until
        time.sleep(0.01)


def test_a_real_server_tells_its_port_and_speaks_to_the_end(tmp_path: Path) -> None:
    with serving(tmp_path, "--wyoming-port", "0") as server:
        assert server.process.stdout is not None
        server.process.stdout.readline()
        found = re.fullmatch(r"Wyoming: tcp://127\.0\.0\.1:(\d+)\n", server.process.stdout.readline())
        assert found

        async def work(client: AsyncTcpClient) -> list[str]:
            await client.write_event(Synthesize(LONG[:240]).event())
            kinds = []
            while (event := await client.read_event()) is not None:
                kinds.append(event.type)
                if len(kinds) == 2:
                    server.process.send_signal(signal.SIGTERM)
            return kinds

        kinds = talk(int(found[1]), work)
        assert (kinds[0], kinds[-1]) == ("audio-start", "audio-stop")
        assert server.process.wait(60) == 0


def test_a_model_of_unknown_languages_is_offered_for_many() -> None:
    assert {"de", "en", "ja", "zh"} <= set(languages_of(None)) == set(languages_of(Reads((), None, ("[]",))))
    assert languages_of(Reads(("en",), None, ())) == ["en"]


def test_a_key_does_not_guard_wyoming_and_the_log_says_so(tmp_path: Path) -> None:
    with serving(tmp_path, "--wyoming-port", "0", FISHRT_API_KEY="sesame") as server:
        assert "warning: Wyoming has no keys" in server.log
        assert "sesame" not in server.log


def test_a_taken_port_is_named(tmp_path: Path) -> None:
    with run.listen("127.0.0.1", 0) as taken:
        port = taken.getsockname()[1]
        process = start("--wyoming-port", str(port), "--voice-dir", str(tmp_path))
        _, said = process.communicate(timeout=60)
    assert process.returncode == 2
    assert said.startswith("error: ")
    assert str(port) in said
