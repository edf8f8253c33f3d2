"""What the programs of LiveKit's plugins share."""

from __future__ import annotations

import asyncio
import json
import urllib.request
from typing import Any

from livekit import rtc
from livekit.agents import APIConnectOptions, APIStatusError
from report import FOLDER, KEYED_URL

ONCE = APIConnectOptions(max_retry=0)


async def keep(stream: Any, name: str) -> dict[str, Any]:
    """Write the sound of a stream to a file, and return what is known of it."""
    frames = [event.frame async for event in stream]
    whole = rtc.combine_audio_frames(frames)
    (FOLDER / f"{name}.wav").write_bytes(whole.to_wav_bytes())
    return {"frames": len(frames), "rate": whole.sample_rate, "seconds": whole.duration}


async def refused(stream: Any) -> int:
    try:
        async for _ in stream:
            pass
    except APIStatusError as error:
        return error.status_code
    raise AssertionError("no error")


async def interrupted(stream: Any) -> None:
    """Take one frame of a long speech, and leave, as an agent does whose user speaks; return when nothing speaks."""
    await anext(stream)
    await stream.aclose()
    async with asyncio.timeout(60):
        idle = 0
        while idle < 3:  # a text of several sentences is idle for a moment between two
            idle = 0 if (await asyncio.to_thread(_health))["queue"]["active"] else idle + 1
            await asyncio.sleep(0.1)


def _health() -> Any:
    with urllib.request.urlopen(f"{KEYED_URL}/health") as reply:
        return json.load(reply)
