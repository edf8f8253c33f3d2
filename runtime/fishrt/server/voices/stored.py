"""Voices and codes in the words of Fish Speech's server and of Fish Audio's SDK."""

from __future__ import annotations

import asyncio
import datetime
from collections.abc import Sequence
from functools import partial
from typing import Any

from fastapi import APIRouter, Query, Request
from starlette.responses import Response

from ...voices.files import canonical
from ..bodies import fields_of
from ..docs import body
from ..encodings import MSGPACK, answer
from ..problems import Problem, about
from ..service import Service
from ..words import ignored_header
from .library import Entry, NewVoice
from .references import codes_of
from .routes import bytes_of, new_voice, text_of

_MOST = 16
"""Most recordings, and most arrays of codes, of one request."""
_TEXT = {"type": "string"}
_AUDIO = {"type": "string", "format": "binary"}


def routes(service: Service) -> APIRouter:
    """Return the routes."""
    router = APIRouter(tags=["Voices of other servers"])
    library = service.library

    @router.post("/v1/references/add", summary="Store a voice", openapi_extra=_body(id=_TEXT, audio=_AUDIO, text=_TEXT))
    async def add(request: Request) -> Response:
        """Store a recording with its transcript. Answers in MessagePack unless JSON is asked for."""
        fields = await fields_of(request)
        _name(fields, "id")
        entry = await library.create(await new_voice(fields, ("id",), ("audio",), ("text",)))
        done = _done(request, f"stored the voice {entry.name!r}", reference_id=entry.name)
        done.headers.update(ignored_header(fields.keys() - {"id", "audio", "text"}))
        return done

    @router.get("/v1/references/list", summary="List the voices")
    async def listed(request: Request) -> Response:
        """List the names of the voices. Answers in MessagePack unless JSON is asked for."""
        entries = await asyncio.to_thread(library.list)
        return _done(request, f"{len(entries)} voices", reference_ids=[entry.name for entry in entries])

    @router.delete("/v1/references/delete", summary="Delete a voice", openapi_extra=_body(reference_id=_TEXT))
    async def delete(request: Request) -> Response:
        """Delete a voice that was stored here. Answers in MessagePack unless JSON is asked for."""
        name = _name(
            dict(request.query_params) if "reference_id" in request.query_params else await fields_of(request), "reference_id"
        )
        with about("reference_id"):
            await asyncio.to_thread(library.remove, name)
        return _done(request, f"deleted the voice {canonical(name)!r}", reference_id=canonical(name))

    @router.post(
        "/v1/references/update", summary="Rename a voice", openapi_extra=_body(old_reference_id=_TEXT, new_reference_id=_TEXT)
    )
    async def update(request: Request) -> Response:
        """Give a voice that was stored here another name. Answers in MessagePack unless JSON is asked for."""
        fields = await fields_of(request)
        old, new = _name(fields, "old_reference_id"), _name(fields, "new_reference_id")
        with about("old_reference_id"):
            await asyncio.to_thread(library.changeable, old)
        with about("new_reference_id"):
            await asyncio.to_thread(library.rename, old, new)
        names = {"old_reference_id": canonical(old), "new_reference_id": canonical(new)}
        return _done(request, f"renamed the voice {canonical(old)!r} to {canonical(new)!r}", **names)

    @router.post("/v1/vqgan/encode", summary="Encode recordings", openapi_extra=_body(audios={"type": "array", "items": _AUDIO}))
    async def encode(request: Request) -> Response:
        """Return `tokens`: for each of `audios` its codes, [codebooks, frames]. In MessagePack unless JSON is asked for."""
        if service.tts.bundle.manifest.codec.channels is not None:
            what = "the codec of the loaded model has no codes; /v1/audio/encoding gives its latents"
            raise Problem(400, what, param="audios")
        tokens = []
        for nth, audio in enumerate(_list(await fields_of(request), "audios")):
            data = await bytes_of(audio, field := f"audios[{nth}]")
            if data is None:
                raise Problem(400, f"{field}: bytes or base64 are expected", param=field)
            with about(field):
                tokens.append((await service.encoder.sound(data)).tolist())
        return answer({"tokens": tokens}, request.scope, packed=True)

    @router.post(
        "/v1/vqgan/decode", summary="Decode codes", openapi_extra=_body(tokens={"type": "array", "items": {"type": "array"}})
    )
    async def decode(request: Request) -> Response:
        """Return `audios`: for each of `tokens` its samples, float16 little-endian mono at the model's rate, -1 to 1.

        In MessagePack unless JSON is asked for; in JSON the samples are base64.
        """
        audios = []
        for nth, tokens in enumerate(_list(await fields_of(request), "tokens")):
            with about(f"tokens[{nth}]"):
                pcm = await service.encoder.run(partial(service.tts.decode, codes_of(tokens)))
            audios.append(pcm.astype("<f2").tobytes())
        headers = {"X-Audio-Sample-Rate": str(service.tts.sample_rate)}
        return answer({"audios": audios}, request.scope, headers=headers, packed=True)

    @router.get("/model", summary="List the voices, as Fish Audio's SDK reads them")
    async def models(
        page_size: int = Query(10, ge=1, le=1000),
        page_number: int = Query(1, ge=1, le=1_000_000),
        title: str = "",
        own: bool = Query(False, alias="self"),
    ) -> Any:
        """List the voices page by page. title: a part of the name. self: only voices that were stored here."""
        entries = await asyncio.to_thread(library.list)
        found = [each for each in entries if title.lower() in each.name.lower() and not (own and each.origin == "bundle")]
        first = (page_number - 1) * page_size
        return {"total": len(found), "items": [_item(service, entry) for entry in found[first : first + page_size]]}

    @router.post(
        "/model",
        summary="Store a voice, as Fish Audio's SDK does",
        openapi_extra=_body(title=_TEXT, voices={"type": "array", "items": _AUDIO}, texts={"type": "array", "items": _TEXT}),
    )
    async def create(request: Request, response: Response) -> Any:
        """Store `voices`, one recording or several of one speaker, with `texts`, the words of each, as the voice `title`."""
        fields = await fields_of(request)
        name, recordings, texts = _name(fields, "title"), [], _list(fields, "texts")
        for nth, audio in enumerate(_list(fields, "voices")):
            data = await bytes_of(audio, field := f"voices[{nth}]")
            if data is None:
                raise Problem(400, f"{field}: a file, or base64, is expected", param=field)
            recordings.append(data)
        if len(texts) != len(recordings) or not all(isinstance(text, str) for text in texts):
            raise Problem(400, f"texts: the words of each recording are expected, {len(recordings)} texts", param="texts")
        made = await library.create(NewVoice(name, "title", recordings, "voices", "\n".join(texts), "texts"))
        response.headers.update(ignored_header(fields.keys() - {"title", "voices", "texts"}))
        return _item(service, made)

    @router.get("/model/{name}", summary="Show a voice, as Fish Audio's SDK reads it")
    async def model(name: str) -> Any:
        """Show a voice."""
        return _item(service, await asyncio.to_thread(library.entry, name))

    @router.delete("/model/{name}", summary="Delete a voice, as Fish Audio's SDK does")
    async def remove(name: str) -> Any:
        """Delete a voice that was stored here."""
        await asyncio.to_thread(library.remove, name)
        return {"success": True, "_id": canonical(name)}

    return router


def _done(request: Request, message: str, **facts: Any) -> Response:
    return answer({"success": True, "message": message, **facts}, request.scope, packed=True)


def _name(fields: dict[str, Any], field: str) -> str:
    """Return the name of a voice. Raises Problem 400 if it is missing."""
    _, name = text_of(fields, (field,))
    if not name:
        raise Problem(400, f"{field} is missing; give the name of a voice", param=field)
    return name


def _list(fields: dict[str, Any], name: str) -> Sequence[Any]:
    values = fields.get(name)
    if isinstance(values, bytes | str):  # one file of a form
        values = [values]
    if not isinstance(values, list) or not 1 <= len(values) <= _MOST:
        raise Problem(400, f"{name}: a list of 1 to {_MOST} is expected", param=name)
    return values


def _item(service: Service, entry: Entry) -> dict[str, Any]:
    """Return a voice with all fields that Fish Audio's SDK needs."""
    reads = service.tts.bundle.manifest.model.reads
    time = datetime.datetime.fromtimestamp(entry.created, datetime.UTC).isoformat()
    return {
        "_id": entry.name,
        "type": "tts",
        "title": entry.name,
        "description": "",
        "cover_image": "",
        "train_mode": "fast",
        "state": "trained",
        "tags": [],
        "samples": [],
        "created_at": time,
        "updated_at": time,
        "languages": list(reads.languages) if reads else [],
        "visibility": "public" if entry.origin == "bundle" else "private",
        "lock_visibility": True,
        **dict.fromkeys(("like_count", "mark_count", "shared_count", "task_count"), 0),
        "liked": False,
        "marked": False,
        "author": {"_id": entry.origin, "nickname": entry.origin, "avatar": ""},
    }


def _body(**fields: dict[str, Any]) -> dict[str, Any]:
    schema = {"type": "object", "properties": fields, "required": list(fields)}
    return body(schema, MSGPACK, "application/json", "multipart/form-data")
