"""LiveKit's plugin for Fish Audio."""

from __future__ import annotations

from typing import Any

import aiohttp
from livekit.plugins import fishaudio
from livekit_sound import ONCE, interrupted, keep, refused
from report import KEYED_URL, LONG, TEXT, URL, run, scenario


@scenario
async def formats() -> dict[str, Any]:
    seen = {}
    async with aiohttp.ClientSession() as session:
        for form in ("wav", "mp3", "opus", "pcm"):
            tts = fishaudio.TTS(
                base_url=URL, api_key="any", voice_id="awb", output_format=form, temperature=0.5, http_session=session
            )
            seen[form] = await keep(tts.synthesize(TEXT, conn_options=ONCE), f"fish.{form}")
            await tts.aclose()
    return seen


@scenario
async def prosody() -> list[float]:
    async with aiohttp.ClientSession() as session:
        lengths = []
        for speed in (1.0, 2.0):
            tts = fishaudio.TTS(
                base_url=URL,
                api_key="any",
                voice_id="awb",
                speed=speed,
                volume=-3.0,
                normalize_loudness=True,
                temperature=0.0,
                max_new_tokens=1024,
                min_chunk_length=50,
                http_session=session,
            )
            lengths.append((await keep(tts.synthesize("Good morning.", conn_options=ONCE), "prosody"))["seconds"])
            await tts.aclose()
    return lengths


@scenario
async def unknown_voice() -> list[int]:
    """The plugin's own default is a voice of Fish Audio's."""
    async with aiohttp.ClientSession() as session:
        tts = fishaudio.TTS(base_url=URL, api_key="any", http_session=session)
        by_http = await refused(tts.synthesize("Hi.", conn_options=ONCE))
        stream = tts.stream(conn_options=ONCE)
        stream.push_text("Hi.")
        stream.end_input()
        by_socket = await refused(stream)
        await tts.aclose()
    return [by_http, by_socket]


@scenario
async def socket() -> dict[str, Any]:
    """Three texts on one pooled socket, one in each format that the plugin can stream."""
    seen = {}
    async with aiohttp.ClientSession() as session:
        for form in ("wav", "mp3", "opus", "pcm"):
            tts = fishaudio.TTS(
                base_url=URL, api_key="any", voice_id="awb", output_format=form, temperature=0.5, http_session=session
            )
            tts.prewarm()
            for nth in range(3 if form == "wav" else 1):
                stream = tts.stream(conn_options=ONCE)
                for word in TEXT.split(" "):
                    stream.push_text(f"{word} ")
                stream.end_input()
                name = f"socket.{form}{nth or ''}"
                seen[name] = await keep(stream, name)
            await tts.aclose()
    return seen


@scenario
async def an_interruption() -> list[float]:
    async with aiohttp.ClientSession() as session:
        tts = fishaudio.TTS(base_url=KEYED_URL, api_key="secret", voice_id="awb", http_session=session)
        stream = tts.stream(conn_options=ONCE)
        stream.push_text(LONG)
        stream.end_input()
        await interrupted(stream)
        again = tts.stream(conn_options=ONCE)
        again.push_text("Good morning.")
        again.end_input()
        seconds = [(await keep(again, "again"))["seconds"]]
        seconds.append((await keep(tts.synthesize("Good morning.", conn_options=ONCE), "then"))["seconds"])
        await tts.aclose()
    return seconds


run()
