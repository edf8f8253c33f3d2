"""Speech in the words of other servers: `/v1/tts` of Fish Speech and Fish Audio, `/generate` of s2.cpp.

`speak_of` reads their fields; what is here are the rules that differ from OpenAI's route.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from fastapi import APIRouter, Request
from starlette.responses import Response

from ...bundle.features import LanguageModel
from ..bodies import fields_of, is_form, object_of
from ..docs import AUDIO, body
from ..encodings import MSGPACK
from ..problems import Problem
from ..service import Service
from .fields import Speak, speak_of
from .streams import reply

_BYTES = {"type": "string", "format": "binary"}
_REFERENCE = {"type": "object", "required": ["audio", "text"], "properties": {"audio": _BYTES, "text": {"type": "string"}}}
_TTS = {
    "type": "object",
    "required": ["text"],
    "additionalProperties": True,
    "properties": {
        "text": {"type": "string"},
        "format": {"type": ["string", "null"], "enum": ["wav", "mp3", "opus", "pcm", "aac", "flac", None], "default": "wav"},
        "streaming": {"type": ["boolean", "null"], "description": "Send the audio while it is made."},
        "reference_id": {"description": "A voice, or one for each speaker. It goes before `references`."},
        "references": {"type": ["array", "null"], "items": _REFERENCE, "description": "In JSON the audio is base64."},
        "seed": {"type": ["integer", "null"]},
        "temperature": {"type": ["number", "null"], "description": "0 is greedy."},
        "top_p": {"type": ["number", "null"], "description": "0 is greedy."},
        "repetition_penalty": {"type": ["number", "null"]},
        "max_new_tokens": {"type": ["integer", "null"], "description": "0, or above the model's limit: that limit."},
        "sample_rate": {"type": ["integer", "null"]},
        "mp3_bitrate": {"type": ["integer", "null"]},
        "opus_bitrate": {"type": ["integer", "null"]},
        "prosody": {"type": ["object", "null"], "properties": {"speed": {"type": "number"}, "volume": {"type": "number"}}},
    },
}
_GENERATE = {
    "type": "object",
    "required": ["text"],
    "properties": {
        "text": {"type": "string"},
        "reference": {**_BYTES, "description": "A recording. Also: reference_audio, prompt_audio, ref_audio."},
        "reference_text": {"type": "string", "description": "Its words. Also: ref_text, prompt_text."},
        "voice": {"type": "string", "description": "Also: voice_id, voice_profile."},
        "params": {"type": "string", "description": "A JSON object with fields of speech, such as temperature and stream."},
    },
}


def routes(service: Service) -> APIRouter:
    """Return the routes."""
    router = APIRouter(tags=["Speech of other servers"])

    @router.post(
        "/v1/tts",
        summary="Speak a text, as Fish Speech and Fish Audio do",
        response_class=Response,
        responses=AUDIO,
        openapi_extra=body(_TTS, "application/json", MSGPACK, "multipart/form-data"),
    )
    async def tts(request: Request) -> Response:
        """Answer with audio. `?format=msgpack` is the encoding of errors; the field `format` is that of the audio."""
        fields = await fields_of(request)
        return await reply(service, native_speak(service, fields, lax=is_form(request)), request.receive, attached=True)

    @router.post(
        "/generate",
        summary="Speak the text of a form",
        response_class=Response,
        responses=AUDIO,
        openapi_extra=body(_GENERATE, "multipart/form-data"),
    )
    async def generate(request: Request) -> Response:
        """Answer with a wav file, or with raw samples while they are made if `stream` is true."""
        return await reply(service, _generate(service, await fields_of(request)), request.receive)

    return router


async def native_speak(service: Service, fields: Mapping[str, Any], *, lax: bool = False) -> Speak:
    """Return the checked request of the fields of `/v1/tts`; what it cannot honour is listed as ignored. Raises Problem.

    lax: numbers may be text.
    """
    found = {name: value for name, value in fields.items() if value is not None}
    ignored = ["references"] if found.get("reference_id") and found.get("references") else []
    for name in ignored:
        del found[name]
    if isinstance(service.tts.bundle.manifest.model, LanguageModel) and str(found.get("top_p")) in ("0", "0.0"):
        del found["top_p"]
        found["temperature"] = 0
    if not found.get("reference_id"):
        found.pop("reference_id", None)
    speak = await speak_of(service, found, {"format": "wav"}, lax=lax, lenient=True)
    if "streaming" not in found and "stream" not in found:  # a header of these formats has no length, so nothing is lost
        speak = replace(speak, stream=speak.format not in ("wav", "flac"))
    return replace(speak, ignored=(*speak.ignored, *ignored))


async def _generate(service: Service, fields: Mapping[str, Any]) -> Speak:
    """Return the checked request of the fields of `/generate`. Raises Problem."""
    params = fields.get("params") or "{}"
    if not isinstance(params, str):
        raise Problem(400, "params: the text of a JSON object is expected", param="params")
    found = {name: value for name, value in fields.items() if name != "params" and value != ""}
    if "voice_profile" in found:
        found.setdefault("voice", found.pop("voice_profile"))
    return await speak_of(service, found, object_of(params), lax=True, usual="wav")
