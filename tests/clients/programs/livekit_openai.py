"""LiveKit's plugin for OpenAI."""

from __future__ import annotations

from typing import Any

from livekit.plugins import openai
from livekit_sound import ONCE, interrupted, keep, refused
from report import KEYED_URL, LONG, TEXT, URL, run, scenario


@scenario
async def formats() -> dict[str, Any]:
    """By server-sent events, which is what the plugin asks for unless the model is tts-1."""
    seen = {}
    for form in ("mp3", "opus", "aac", "flac", "wav", "pcm"):
        for model in ("gpt-4o-mini-tts", "tts-1"):
            async with openai.TTS(base_url=f"{URL}/v1", api_key="any", model=model, response_format=form) as tts:
                seen[f"{model}.{form}"] = await keep(tts.synthesize(TEXT, conn_options=ONCE), f"{model}.{form}")
    return seen


@scenario
async def usual() -> dict[str, Any]:
    async with openai.TTS(base_url=f"{URL}/v1", api_key="any") as tts:
        tts.prewarm()
        return await keep(tts.synthesize(TEXT, conn_options=ONCE), "usual")


@scenario
async def unknown_voice() -> int:
    async with openai.TTS(base_url=f"{URL}/v1", api_key="any", voice="nobody") as tts:
        return await refused(tts.synthesize("Hi.", conn_options=ONCE))


@scenario
async def an_interruption() -> float:
    async with openai.TTS(base_url=f"{KEYED_URL}/v1", api_key="secret") as tts:
        await interrupted(tts.synthesize(LONG, conn_options=ONCE))
        return (await keep(tts.synthesize("Good morning.", conn_options=ONCE), "then"))["seconds"]


run()
