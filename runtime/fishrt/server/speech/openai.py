"""OpenAI's routes: speech, and the list of models."""

from __future__ import annotations

import asyncio
import base64
import secrets
from typing import Any

from fastapi import APIRouter, Request
from starlette.responses import Response

from ...bundle.diffusion import Diffusion
from ...bundle.features import LanguageModel
from ...diffusion.denoising import PRESETS, Denoising
from ...errors import FishrtError
from ...language_model.prompt import DIALECTS
from ..bodies import json_object
from ..diffusion.fields import asked
from ..docs import AUDIO, body
from ..problems import Problem, problem
from ..service import Service
from ..words import ignored_header
from .fields import speak_of, speech_schema
from .streams import reply, unless_gone, whole

MOST_ITEMS = 32
"""Most texts of a batch."""
MOST_BATCH = 256 << 20
"""Most bytes of audio of a batch."""


def routes(service: Service) -> APIRouter:
    """Return the routes."""
    router = APIRouter(tags=["OpenAI"])
    schema = speech_schema(service.tts.bundle.manifest.model)

    @router.post(
        "/v1/audio/speech",
        summary="Speak a text",
        response_class=Response,
        responses=AUDIO,
        openapi_extra=body(schema),
    )
    async def speech(request: Request) -> Response:
        """Answer with audio: whole, in chunks while it is made, or as server-sent events."""
        data, accept = await json_object(request), request.headers.get("accept", "")
        return await reply(service, speak_of(service, data, accept=accept), request.receive)

    @router.post("/v1/audio/speech/batch", summary="Speak several texts", openapi_extra=body(_batch_schema(schema)))
    async def batch(request: Request, response: Response) -> dict[str, Any]:
        """Answer with the audio of each item, or why there is none. An item without a field has that beside `items`."""
        data = await json_object(request)
        service.check_ready()
        done, ignored = await speak_batch(service, data, request)
        response.headers.update(ignored_header(ignored))
        return done

    @router.get("/v1/models", summary="List the model")
    async def models() -> dict[str, Any]:
        """List the loaded model."""
        return {"object": "list", "data": [_model(service)]}

    @router.get("/v1/audio/models", summary="List the model, for Open WebUI")
    async def audio_models() -> dict[str, Any]:
        """List the loaded model, as Open WebUI reads it."""
        return {"object": "list", "models": [_model(service)], "data": [_model(service)]}

    @router.get("/v1/models/{name:path}", summary="Show the model")
    async def model(name: str) -> dict[str, Any]:
        """Show the loaded model."""
        found = _model(service)
        if name != found["id"]:
            raise Problem(404, f"there is no model {name!r:.80}; {found['id']} is loaded", param="model", code="model_not_found")
        return found

    return router


async def speak_batch(service: Service, data: dict[str, Any], request: Request) -> tuple[dict[str, Any], list[str]]:
    """Return the reply to a batch, and the fields that change nothing. Its items speak at the same time.

    Raises Problem for what is no batch, or if none can wait.
    """
    items = data.get("items")
    if not isinstance(items, list) or not 1 <= len(items) <= MOST_ITEMS or not all(isinstance(item, dict) for item in items):
        raise Problem(400, f"items: a list of 1 to {MOST_ITEMS} objects is expected", param="items")
    shared = {key: value for key, value in data.items() if key != "items"}
    room = MOST_BATCH
    turns = asyncio.Semaphore(service.settings.max_active)
    ignored: list[str] = []

    async def one(index: int, item: dict[str, Any]) -> dict[str, Any] | Problem:
        nonlocal room
        try:
            async with turns:
                speak = await speak_of(service, item, shared)
                ignored.extend(speak.ignored)
                audio, rendering = await whole(service, speak)
            room -= len(audio)
            if room < 0:
                raise Problem(400, f"the batch has more than {MOST_BATCH >> 20} MiB of audio; give fewer items", param="items")
        except (Problem, FishrtError) as error:
            return problem(error)
        return {
            "index": index,
            "status": "success",
            "audio_data": base64.b64encode(audio).decode(),
            "media_type": rendering.content_type,
            "usage": rendering.usage,
            **rendering.doubts,
        }

    done = await unless_gone(asyncio.gather(*(one(index, item) for index, item in enumerate(items))), request.receive)
    faults = [each for each in done if isinstance(each, Problem)]
    if len(faults) == len(done) and all(fault.status_code == 429 for fault in faults):
        raise faults[0]
    results = [
        {"index": n, "status": "error", "error": each.detail} if isinstance(each, Problem) else each
        for n, each in enumerate(done)
    ]
    reply = {
        "id": f"batch_{secrets.token_hex(12)}",
        "results": results,
        "total": len(done),
        "succeeded": len(done) - len(faults),
        "failed": len(faults),
    }
    return reply, ignored


def _model(service: Service) -> dict[str, Any]:
    """Return the model as OpenAI's clients read it, and what is known of it."""
    manifest = service.tts.bundle.manifest
    model = manifest.model
    facts = {"id": manifest.name, "name": manifest.name, "object": "model", "created": service.created, "owned_by": "fishrt"}
    return {
        **facts,
        "family": manifest.family,
        "kind": model.kind,
        "languages": model.reads.languages if model.reads else (),
        "sample_rate": service.tts.sample_rate,
        "voice_seconds": model.voice_seconds,
        **(_diffusion(model) if isinstance(model, Diffusion) else _language_model(model)),
    }


def _language_model(lm: LanguageModel) -> dict[str, Any]:
    sampling, penalty = lm.sampling, lm.sampling.repetition_penalty
    return {
        "speakers": DIALECTS[lm.prompt_dialect].turns,
        "sampling": {
            "temperature": sampling.temperature,
            "top_p": sampling.top_p,
            "top_k": sampling.top_k,
            "repetition_penalty": penalty.penalty if penalty else None,
        },
    }


def _diffusion(model: Diffusion) -> dict[str, Any]:
    usual = Denoising().resolve(model)
    return {"speakers": False, "sampling": {}, "denoising": asked(usual), "presets": list(PRESETS)}


def _batch_schema(schema: dict[str, Any]) -> dict[str, Any]:
    item = {"type": "object", "properties": schema["properties"], "required": ["input"], "additionalProperties": True}
    shared = {name: value for name, value in schema["properties"].items() if name != "input"}
    items = {"type": "array", "items": item, "minItems": 1, "maxItems": MOST_ITEMS}
    return {"type": "object", "properties": {"items": items, **shared}, "required": ["items"], "additionalProperties": True}
