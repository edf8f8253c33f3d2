"""Routes of voices: lists in the shapes that clients read, new voices of recordings, and codes for fish-speech.rs' clients."""

from __future__ import annotations

import asyncio
from collections.abc import Mapping, Sequence
from typing import Any

from fastapi import APIRouter, Request
from starlette.responses import Response

from ...audio.encode import encode_audio
from ...codec import frames_of
from ...voices.files import canonical
from ...voices.voice import npy_bytes
from ..bodies import fields_of
from ..docs import body
from ..problems import Problem, about
from ..service import Service
from ..words import ignored_header
from .library import Entry, NewVoice
from .references import encoded_bytes

_NAME = ("name", "id")
_AUDIO = ("audio_sample", "audio", "file", "ref_audio")
_TEXT = ("ref_text", "text", "transcript")
_UPLOAD = {
    "type": "object",
    "required": ["name", "audio_sample", "ref_text"],
    "properties": {
        "name": {"type": "string"},
        "audio_sample": {"type": "string", "format": "binary", "description": "The recording. Also: audio, file, ref_audio."},
        "ref_text": {"type": "string", "description": "The words of the recording. Also: text, transcript."},
        "consent": {"type": "string", "description": "Not kept: X-Ignored-Parameters of the reply names it."},
        "type": {"type": "string", "enum": ["audio_sample"]},
    },
}
_FORM = "multipart/form-data"
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
            "default_voice": service.tts.default_voice,
            "has_more": False,
        }

    @router.post("/v1/audio/voices", summary="Store a voice", openapi_extra=body(_UPLOAD, _FORM))
    @router.post("/v1/voices", summary="Store a voice", openapi_extra=body(_UPLOAD, _FORM))
    async def add(request: Request, response: Response) -> Any:
        """Store a recording with its transcript as a voice, which is on disk before the reply.

        `warnings` says why the recording may make a poor voice.
        """
        fields = await fields_of(request)
        if (kind := fields.get("type") or "audio_sample") != "audio_sample":
            raise Problem(400, f"type {kind!r:.40}: voices are made of recordings; audio_sample is expected", param="type")
        entry = await library.create(await new_voice(fields, _NAME, _AUDIO, _TEXT))
        response.headers.update(ignored_header(fields.keys() - {"type", *_NAME, *_AUDIO, *_TEXT}))
        described = _described(entry)
        return {**described, "object": "audio.voice", "success": True, "voice": described, "warnings": entry.warnings}

    @router.get("/v1/audio/voices/{name}", summary="Show a voice")
    @router.get("/v1/voices/{name}", summary="Show a voice")
    async def show(name: str) -> Any:
        """Show a voice with its transcript."""
        entry = await asyncio.to_thread(library.entry, name)
        voice = await encoder.run(lambda: library.load(name))
        seconds = frames_of(voice.sound) / service.tts.bundle.manifest.codec.frame_rate
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

    @router.post(
        "/v1/audio/encoding", summary="Encode a recording", response_class=Response, openapi_extra=body(_RECORDING, _FORM)
    )
    async def encoding(request: Request, id: str = "", prompt: str = "", persist: bool = False) -> Response:
        """Send the codes of a recording, the first part of the form, as an .npy file: int64 [codebooks, frames], or latents.

        With `id` and `prompt`, the transcript, it is also a voice until shutdown; with `persist=true`, for ever.
        """
        if bool(id) != bool(prompt) or (persist and not id):
            raise Problem(400, "a voice needs both id and prompt, its transcript", param="prompt" if id else "id")
        fields = await fields_of(request)
        field, audio = await recording_of(fields, tuple(fields) or ("audio",))
        if not id:
            with about(field):
                sound = await encoder.sound(audio)
        else:
            await library.create(NewVoice(id, "id", [audio], field, prompt, "prompt"), keep=persist)
            sound = library.load(id).sound
        return Response(npy_bytes(sound), media_type="application/x-npy")

    return router


async def new_voice(
    fields: Mapping[str, Any], names: Sequence[str], recordings: Sequence[str], transcripts: Sequence[str]
) -> NewVoice:
    """Return the voice that the fields of a request describe, each part in one of several spellings. Raises Problem 400."""
    field, audio = await recording_of(fields, recordings)
    (name_field, name), (text_field, text) = text_of(fields, names), text_of(fields, transcripts)
    return NewVoice(name, name_field, [audio], field, text, text_field)


async def recording_of(fields: Mapping[str, Any], names: Sequence[str]) -> tuple[str, bytes]:
    """Return which field has the recording, and it: a file of the form, or base64. Raises Problem 400 if there is none."""
    for name in names:
        if (data := await bytes_of(fields.get(name), name)) is not None:
            return name, data
    raise Problem(400, f"the recording is missing; send it as the file {names[0]}", param=names[0])


async def bytes_of(value: Any, field: str) -> bytes | None:
    """Return the bytes of a file, or of base64; None for anything else. Raises Problem 400 for text that is no base64."""
    if isinstance(value, str) and value:
        with about(field):
            return await asyncio.to_thread(encoded_bytes, value)
    return value if isinstance(value, bytes) else None


def text_of(fields: Mapping[str, Any], names: Sequence[str]) -> tuple[str, str]:
    """Return which of these fields is given, and its text; the first and "" if none is. Raises Problem 400 for no text."""
    field = next((name for name in names if fields.get(name)), names[0])
    found = fields.get(field) or ""
    if not isinstance(found, str):
        raise Problem(400, f"{field}: a text is expected", param=field)
    return field, found


def _described(entry: Entry) -> dict[str, Any]:
    """Return a voice as the lists have it. Clients take `id` or `voice_id`, and `name`."""
    ids = {"id": entry.name, "voice_id": entry.name, "name": entry.name}
    return {"object": "voice", **ids, "origin": entry.origin, "created_at": entry.created, "type": "audio_sample"}
