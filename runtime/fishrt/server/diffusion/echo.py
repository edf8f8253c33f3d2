"""Speech in the words of the streaming server of Echo-TTS, for clients that take /echo for its address.

`speak_of` reads their fields; what is here are the rules that differ from OpenAI's route: a stream unless `stream` is false, and
blocks, text rules and formats of that server.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from fastapi import APIRouter, Request
from starlette.responses import Response

from ...bundle.diffusion import Diffusion
from ...diffusion.denoising import PRESETS, Denoising
from ..bodies import json_object
from ..docs import AUDIO, body
from ..problems import Problem
from ..service import Service
from ..speech.fields import Speak, flatten, speak_of, speech_schema
from ..speech.streams import reply
from .fields import PER_BLOCK

SPEECH = "/echo/v1/audio/speech"
_FORMATS = ("pcm", "wav", "mp3")
_WHOLE_STEPS = 20
"""Steps of a window that is one block."""


def routes(service: Service) -> APIRouter:
    """Return the route."""
    router = APIRouter(tags=["Speech of other servers"])
    schema = speech_schema(service.tts.bundle.manifest.model)

    @router.post(
        SPEECH,
        summary="Speak a text, as the streaming server of Echo-TTS does",
        response_class=Response,
        responses=AUDIO,
        openapi_extra=body(schema),
    )
    async def speech(request: Request) -> Response:
        """Answer with raw samples while they are made; with mp3, wav or pcm, whole, if `stream` is false."""
        answer = await reply(service, speak_of_echo(service, await json_object(request)), request.receive)
        if answer.headers["Content-Type"].startswith("audio/pcm"):
            answer.headers["Content-Type"] = "application/octet-stream"
        return answer

    return router


async def speak_of_echo(service: Service, data: Mapping[str, Any]) -> Speak:
    """Return the checked request for a JSON object; what it cannot honour is listed as ignored. Raises Problem."""
    model = service.tts.bundle.manifest.model
    found, _, ignored = flatten(model, data, lenient=True)
    if found.get("seed") == -1:  # a new one
        del found["seed"]
    else:
        found.setdefault("seed", 0)
    stream = found.setdefault("stream", True) is not False
    kind = str(found.setdefault("response_format", "pcm" if stream else "mp3")).lower()
    if kind not in (("pcm",) if stream else _FORMATS):
        what = (
            "a stream is pcm; give stream: false for wav or mp3, or use /v1/audio/speech"
            if stream
            else "pcm, wav or mp3 is expected"
        )
        raise Problem(400, f"response_format: {what}", param="response_format")
    first, later = usual(model, found, stream=stream) if isinstance(model, Diffusion) else (None, None)
    speak = await speak_of(service, found, base=first)
    speak = replace(speak, ignored=tuple(dict.fromkeys((*ignored, *speak.ignored))))
    settings = speak.request.denoising
    if settings is None or later is None:
        return speak
    pieces = replace(settings, steps=later.steps, blocks=later.blocks)
    settings = replace(settings, later=pieces if settings.frames is None else pieces.first(settings.frames))
    return replace(speak, request=replace(speak.request, denoising=settings))


def usual(model: Diffusion, found: Mapping[str, Any], *, stream: bool) -> tuple[Denoising, Denoising | None]:
    """Return the settings behind those of a request's fields, and those of the later pieces of its text if they are others."""
    force = 0.0 if "speaker_kv_scale" in found else None
    whole = Denoising((_WHOLE_STEPS,), blocks=(model.max_frames,), variant="streaming", force_min_t=force)
    blocks = PRESETS["default"].over(replace(whole, steps=None, blocks=None))
    if not stream or not model.blockwise or sum(blocks.blocks or ()) > model.max_frames:
        return whole, None
    chosen = found.keys() & {"block_sizes", "num_steps", "preset"} or any(isinstance(found.get(name), list) for name in PER_BLOCK)
    return blocks, None if chosen else whole
