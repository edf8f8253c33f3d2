"""Routes of voices: lists in the shapes that clients read, new voices of recordings, and codes for fish-speech.rs' clients."""

from __future__ import annotations

import asyncio
from collections.abc import Mapping, Sequence
from typing import Any

from fastapi import APIRouter, Request
from starlette.responses import Response

from ...audio.encode import encode_audio
from ...voices.files import canonical
from ...voices.voice import npy_bytes
from ..bodies import fields_of
from ..problems import Problem
from ..service import Service
from .library import Entry
from .references import encoded_bytes

_AUDIO = ("audio_sample", "audio", "file", "ref_audio")
_TEXT = ("ref_text", "text", "transcript")
_UPLOAD = {
    "type": "object",
    "required": ["name", "audio_sample", "ref_text"],
    "properties": {
        "name": {"type": "string"},
        "audio_sample": {"type": "string", "format": "binary", "description": "The recording. Also: audio, file, ref_audio."},
        "ref_text": {"type": "string", "description": "The words of the recording. Also: text, transcript."},
        "consent": {"type": "string", "description": "Taken, and not kept."},
        "type": {"type": "string", "enum": ["audio_sample"]},
    },
}
_RECORDING = {"type": "object", "required": ["audio"], "properties": {"audio": {"type": "string", "format": "binary"}}}


def routes(service: Service) -> APIRouter:
    """Return the routes. Those below /v1/voices are the same as those below /v1/audio/voices."""
    router = APIRouter(tags=["Voices"])
    library, encoder = service.library, service.encoder

    @router.get("/v1/audio/voices", summary="List the voices")
    @router.get("/v1/voices", summary="List the voices")
    async def voices(format: str = "") -> Any:
        """List the voices. `voices`, `items` and `data` are one list; `?format=names` gives an array of names."""
        entries = await asyncio.to_thread(library.list)
        if format == "names":
            return [entry.name for entry in entries]
        found = [_described(entry) for entry in entries]
        uploaded = [each for each, entry in zip(found, entries, strict=True) if entry.origin != "bundle"]
        return {
            "object": "list",
            "voices": found,
            "items": found,
            "data": found,
            "uploaded_voices": uploaded,
            "default_voice": library.default,
            "has_more": False,
        }

    @router.post("/v1/audio/voices", summary="Store a voice", openapi_extra=_form(_UPLOAD))
    @router.post("/v1/voices", summary="Store a voice", openapi_extra=_form(_UPLOAD))
    async def add(request: Request) -> Any:
        """Store a recording with its transcript as a voice, which is on disk before the reply.

        `warnings` says why the recording may make a poor voice.
        """
        fields = await fields_of(request)
        if (kind := fields.get("type") or "audio_sample") != "audio_sample":
            raise Problem(400, f"type {kind!r:.40}: voices are made of recordings; audio_sample is expected", param="type")
        name, transcript = text_of(fields, ("name", "id")), text_of(fields, _TEXT)
        entry = await library.create(name, await recording_of(fields, _AUDIO), transcript)
        described = _described(entry)
        return {**described, "object": "audio.voice", "success": True, "voice": described, "warnings": entry.warnings}

    @router.get("/v1/audio/voices/{name}", summary="Show a voice")
    @router.get("/v1/voices/{name}", summary="Show a voice")
    async def show(name: str) -> Any:
        """Show a voice with its transcript."""
        entry = await asyncio.to_thread(library.entry, name)
        voice = await encoder.run(lambda: library.load(name))
        seconds = voice.codes.shape[1] / service.tts.bundle.manifest.codec.frame_rate
        return {**_described(entry), "transcript": voice.transcript, "ref_text": voice.transcript, "seconds": round(seconds, 2)}

    @router.get("/v1/audio/voices/{name}/sample", summary="Hear a voice", response_class=Response)
    @router.get("/v1/voices/{name}/sample", summary="Hear a voice", response_class=Response)
    async def sample(name: str) -> Response:
        """Send the first seconds of a voice's recording, as the codec speaks it, as a wav file."""
        pcm = await encoder.sample(await encoder.run(lambda: library.load(name)))
        data = await asyncio.to_thread(encode_audio, pcm, service.tts.sample_rate, "wav")
        return Response(data, media_type="audio/wav", headers={"Cache-Control": "no-cache"})

    @router.delete("/v1/audio/voices/{name}", summary="Delete a voice")
    @router.delete("/v1/voices/{name}", summary="Delete a voice")
    async def delete(name: str) -> Any:
        """Delete a voice that was stored here, or that lasts until shutdown."""
        await asyncio.to_thread(library.remove, name)
        name = canonical(name)
        said = {"success": True, "message": f"Deleted the voice {name!r}"}
        return {"id": name, "name": name, "object": "audio.voice.deleted", "deleted": True, **said}

    @router.post("/v1/audio/encoding", summary="Encode a recording", response_class=Response, openapi_extra=_form(_RECORDING))
    async def encoding(request: Request, id: str = "", prompt: str = "", persist: bool = False) -> Response:
        """Send the codes of a recording, the first part of the form, as an .npy file: int64 [codebooks, frames].

        With `id` and `prompt`, the transcript, it is also a voice until shutdown; with `persist=true`, for ever.
        """
        if bool(id) != bool(prompt) or (persist and not id):
            raise Problem(400, "a voice needs both id and prompt, its transcript", param="prompt" if id else "id")
        fields = await fields_of(request)
        audio = await recording_of(fields, tuple(fields))
        if not id:
            codes = await encoder.codes(audio)
        else:
            await library.create(id, audio, prompt, keep=persist)
            codes = library.load(id).codes
        return Response(npy_bytes(codes), media_type="application/x-npy")

    return router


async def recording_of(fields: Mapping[str, Any], names: Sequence[str]) -> bytes:
    """Return the recording: a file of the form, or bytes in base64. Raises Problem 400 if there is none."""
    for name in names:
        match fields.get(name):
            case bytes() as data:
                return data
            case str() as text if text:
                return await asyncio.to_thread(encoded_bytes, text)
    raise Problem(
        400, f"the recording is missing; send it as the file {names[0] if names else 'audio'}", param=names[0] if names else None
    )


def text_of(fields: Mapping[str, Any], names: Sequence[str]) -> str:
    """Return the first of these fields that is given, else ""."""
    found = next((fields[name] for name in names if fields.get(name)), "")
    if not isinstance(found, str):
        raise Problem(400, f"{names[0]} is no text", param=names[0])
    return found


def _described(entry: Entry) -> dict[str, Any]:
    """Return a voice as the lists have it. Clients take `id` or `voice_id`, and `name`."""
    ids = {"id": entry.name, "voice_id": entry.name, "name": entry.name}
    return {"object": "voice", **ids, "origin": entry.origin, "created_at": entry.created, "type": "audio_sample"}


def _form(schema: dict[str, Any]) -> dict[str, Any]:
    return {"requestBody": {"required": True, "content": {"multipart/form-data": {"schema": schema}}}}
