"""Pipecat's service for OpenAI, in a pipeline."""

from __future__ import annotations

import wave
from typing import Any

from pipecat.frames.frames import ErrorFrame, TTSAudioRawFrame, TTSSpeakFrame
from pipecat.pipeline.worker import PipelineParams
from pipecat.services.openai.tts import OpenAITTSService
from pipecat.tests.utils import run_test
from report import FOLDER, TEXT, URL, run, scenario

RATE = 24_000


async def spoken(name: str, **settings: Any) -> dict[str, Any]:
    service = OpenAITTSService(
        api_key="any",
        base_url=f"{URL}/v1",
        settings=OpenAITTSService.Settings(**settings),
    )
    down, up = await run_test(
        service,
        frames_to_send=[TTSSpeakFrame(TEXT)],
        pipeline_params=PipelineParams(audio_out_sample_rate=RATE),
        start_timeout=60,
    )
    sound = [frame for frame in down if isinstance(frame, TTSAudioRawFrame)]
    with wave.open(str(FOLDER / f"{name}.wav"), "wb") as file:
        file.setparams((1, 2, RATE, 0, "NONE", ""))
        file.writeframes(b"".join(frame.audio for frame in sound))
    return {"rates": sorted({frame.sample_rate for frame in sound}), "errors": [f.error for f in up if isinstance(f, ErrorFrame)]}


@scenario
async def usual() -> dict[str, Any]:
    return await spoken("usual")


@scenario
async def chosen() -> dict[str, Any]:
    return await spoken("chosen", voice="onyx", model="tts-1", instructions="Calm.", speed=1.25)


@scenario
async def mistake() -> dict[str, Any]:
    return await spoken("mistake", speed=9.0)


run()
