"""OpenAI's routes: speech, and the list of models."""

from __future__ import annotations

from typing import Any

from fastapi import APIRouter, Request
from starlette.responses import Response

from .bodies import json_object
from .fields import SpeechFields, speak_of
from .problems import Problem
from .service import Service
from .streams import reply


def routes(service: Service) -> APIRouter:
    """Return the routes."""
    router = APIRouter(tags=["OpenAI"])

    @router.post("/v1/audio/speech", summary="Speak a text", openapi_extra=_body(SpeechFields.model_json_schema()))
    async def speech(request: Request) -> Response:
        """Answer with audio: whole, in chunks while it is made, or as server-sent events."""
        data = await json_object(request)
        service.check_ready()
        return await reply(service, speak_of(service, data, request.headers.get("accept", "")), request.receive)

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


def _model(service: Service) -> dict[str, Any]:
    name = service.tts.bundle.manifest.name
    return {"id": name, "name": name, "object": "model", "created": service.created, "owned_by": "fishrt"}


def _body(schema: dict[str, Any]) -> dict[str, Any]:
    return {"requestBody": {"required": True, "content": {"application/json": {"schema": schema}}}}
