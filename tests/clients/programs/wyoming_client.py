"""Wyoming's own client, with the events that Home Assistant sends."""

from __future__ import annotations

import wave
from typing import Any

from report import FOLDER, TEXT, WYOMING_URL, run, scenario
from wyoming.audio import AudioChunk, AudioStart, AudioStop
from wyoming.client import AsyncClient
from wyoming.error import Error
from wyoming.event import Eventable
from wyoming.info import Describe, Info
from wyoming.tts import (
    Synthesize,
    SynthesizeChunk,
    SynthesizeStart,
    SynthesizeStop,
    SynthesizeStopped,
    SynthesizeVoice,
)


async def answered(name: str, *asked: Eventable, last: type[Any]) -> list[Any]:
    """Send events; write the sound that comes back; return the types of the events up to `last`, and what errors say."""
    seen: list[Any] = []
    async with AsyncClient.from_uri(WYOMING_URL) as client:
        for event in asked:
            await client.write_event(event.event())
        with wave.open(str(FOLDER / f"{name}.wav"), "wb") as file:
            file.setparams((1, 2, 16_000, 0, "NONE", ""))
            while event := await client.read_event():
                if AudioStart.is_type(event.type):
                    start = AudioStart.from_event(event)
                    assert (start.rate, start.width, start.channels) == (16_000, 2, 1)
                if AudioChunk.is_type(event.type):
                    file.writeframes(AudioChunk.from_event(event).audio)
                else:
                    seen.append(event.type)
                if Error.is_type(event.type):
                    error = Error.from_event(event)
                    seen.append([error.text, error.code])
                if last.is_type(event.type):
                    return seen
    raise AssertionError(f"the server went away after {seen}")


@scenario
async def described() -> dict[str, Any]:
    async with AsyncClient.from_uri(WYOMING_URL) as client:
        await client.write_event(Describe().event())
        event = await client.read_event()
    (program,) = Info.from_event(event).tts
    return {
        "streaming": program.supports_synthesize_streaming,
        "installed": program.installed,
        "voices": {voice.name: voice.languages for voice in program.voices},
    }


@scenario
async def whole() -> list[Any]:
    return await answered("whole", Synthesize(text=TEXT, voice=SynthesizeVoice(name="rms")), last=AudioStop)


@scenario
async def by_language() -> list[Any]:
    return await answered("by_language", Synthesize(text=TEXT, voice=SynthesizeVoice(language="en")), last=AudioStop)


@scenario
async def streamed() -> list[Any]:
    """The text comes word by word, and once more as a whole, which is for servers that cannot stream."""
    voice = SynthesizeVoice(name="awb")
    words = [SynthesizeChunk(text=f"{word} ") for word in TEXT.split(" ")]
    asked = [SynthesizeStart(voice=voice), *words, Synthesize(text=TEXT, voice=voice), SynthesizeStop()]
    return await answered("streamed", *asked, last=SynthesizeStopped)


@scenario
async def unknown() -> list[Any]:
    return await answered("unknown", Synthesize(text="Hi.", voice=SynthesizeVoice(name="nobody")), last=Error)


run()
