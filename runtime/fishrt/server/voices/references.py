"""Recordings inside a request, in every spelling that clients use → voices.

A reference is audio or codes, with the transcript. Audio is bytes, base64 with or without a data URL, an http(s) URL, or a file
below one folder of the server.
"""

from __future__ import annotations

import asyncio
import base64
import os
import re
import stat
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from urllib.parse import unquote, unquote_to_bytes, urlsplit

import numpy as np

from ...arrays import Ints
from ...errors import VoiceError
from ...tts import TTS
from ...voices.voice import Voice, check_words
from ..bodies import json_value
from ..problems import Problem, about
from .encoding import VoiceEncoder
from .fetch import MOST_BYTES, Fetcher

AUDIO = ("ref_audio", "reference_audio", "prompt_audio", "reference")
TEXT = ("ref_text", "reference_text", "prompt_text")
_ITEM_AUDIO = ("audio", "audio_path", *AUDIO)
_ITEM_TEXT = ("text", "transcript", *TEXT)
_ITEM_CODES = ("codes", "vq_codes")
_NO_CODES = "the codes are no list of codebooks, each a list of whole numbers of the same length"
_MOST = 64
"""Most references of one request."""
_CODE = "invalid_reference"
_LONGEST_NAME = 255
"""Longest name of a voice and longest path, in characters: what is longer is audio."""


@dataclass(frozen=True, slots=True)
class Reference:
    """A reference as a request has it, not yet read."""

    param: str
    """Where its audio or its codes are in the request, for errors."""
    text: str
    text_param: str
    audio: bytes | str | None = None
    codes: Any = None


References = Sequence[Sequence[Reference]]
"""The references of a request: for each speaker, those that make one voice together."""


def find_references(fields: Mapping[str, Any]) -> References:
    """Return the references among the fields of a request; an empty sequence for none.

    `voice` counts as a reference if it is audio. Raises Problem for what is no reference, for two ways to give them at once, and
    for a transcript without a recording.
    """
    given = {name: value for name, value in fields.items() if value not in (None, "", [])}
    audio = _one(given, AUDIO, "")
    text = _one(given, TEXT, "")
    found = []
    if "references" in given:
        found = [_speaker(each, f"references[{n}]") for n, each in enumerate(_list(given["references"]))]
    if found and audio:
        raise _bad(audio, f"`references` and {audio} are both given", "give one of them")
    if not found and not audio and is_audio(given.get("voice")):
        audio = "voice"
    if audio:
        found = [[Reference(audio, _text(given, text), text or TEXT[0], _audio(given[audio], audio))]]
    elif text and not found:
        raise _bad(text, f"{text} is given without a recording", "give ref_audio, too")
    elif text:
        raise _bad(text, f"`references` and {text} are both given", "give each reference its own text")
    if sum(map(len, found)) > _MOST:
        raise _bad("references", f"there are more than {_MOST} references", "give fewer")
    return found


def is_audio(voice: object) -> bool:
    """Return whether the `voice` of a request is a recording and not a name."""
    return isinstance(voice, bytes) or (isinstance(voice, str) and (len(voice) > _LONGEST_NAME or voice[:5].lower() == "data:"))


class ReferenceReader:
    """Reads the references of requests. Use it in one event loop only."""

    def __init__(self, tts: TTS, encoder: VoiceEncoder, *, media_dir: Path | None = None, fetcher: Fetcher | None = None) -> None:
        """Make the reader. media_dir: the folder below which files may be named. fetcher: of URLs; None refuses them."""
        self._tts, self._encoder, self._media, self._fetcher = tts, encoder, media_dir, fetcher

    async def voices(self, references: References) -> list[Voice]:
        """Return a voice for each speaker. Raises Problem and FishrtError; the message names the reference."""
        voices = []
        for speaker in references:
            parts = [await self._voice(each) for each in speaker]
            voices.append(parts[0] if len(parts) == 1 else await self._encoder.joined(parts))
        return voices

    async def audio(self, value: bytes | str, param: str) -> bytes:
        """Return the bytes of a recording, however a request gives it. Raises Problem."""
        if isinstance(value, bytes):
            return value
        scheme = value[:8].partition(":")[0].lower()
        with about(param, _CODE):
            if scheme in ("http", "https"):
                return await self._fetch(value)
            file = scheme == "file" or (len(value) <= _LONGEST_NAME and scheme != "data")
            return await asyncio.to_thread(self._file if file else encoded_bytes, value)

    async def _voice(self, reference: Reference) -> Voice:
        with about(reference.text_param, _CODE):
            await asyncio.to_thread(check_words, self._tts, reference.text, "reference")
        with about(reference.param, _CODE):
            if reference.codes is not None:
                return await asyncio.to_thread(self._coded, reference)
            assert reference.audio is not None
            return await self._encoder.reference(await self.audio(reference.audio, reference.param), reference.text)

    def _coded(self, reference: Reference) -> Voice:
        """Return the voice of codes, after all checks."""
        codes = codes_of(reference.codes)
        if codes.ndim == 3 and codes.shape[0] == 1:
            codes = codes[0]
        if codes.ndim != 2:
            raise VoiceError(_NO_CODES)
        voice = Voice("reference", codes, reference.text, None)
        voice.check(self._tts.bundle)
        return voice

    async def _fetch(self, url: str) -> bytes:
        if self._fetcher is None:
            raise VoiceError("this server fetches no recordings by URL", hint="send the recording itself, in base64")
        return await self._fetcher.fetch(url)

    def _file(self, name: str) -> bytes:
        """Return the content of a file below the media folder. What is elsewhere looks like what is not there."""
        if self._media is None:
            raise VoiceError("this server reads no files that a request names", hint="send the recording itself, in base64")
        nothing = VoiceError("there is no such file below the media folder of this server")
        try:
            if name[:5].lower() == "file:":
                parts = urlsplit(name)
                if parts.netloc not in ("", "localhost") or parts.query or parts.fragment:
                    raise nothing
                name = unquote(parts.path, errors="strict")
            folder = self._media.resolve(strict=True)
            path = (folder / name).resolve(strict=True)
            if not path.is_relative_to(folder):
                raise nothing
            with open(path, "rb", opener=_without_links) as file:
                status = os.fstat(file.fileno())
                if not stat.S_ISREG(status.st_mode):
                    raise nothing
                if status.st_size > MOST_BYTES:
                    raise VoiceError(f"the file is longer than {MOST_BYTES:,} bytes")
                return file.read(MOST_BYTES)
        except (OSError, ValueError, RuntimeError):
            raise nothing from None


def _without_links(path: str, flags: int) -> int:
    """Open a file, if it is not a link by now. A pipe without a writer does not hold the thread up."""
    return os.open(path, flags | os.O_NOFOLLOW | os.O_NONBLOCK)


def _list(value: Any) -> list[Any]:
    """Return the references, which a form has as JSON text."""
    if isinstance(value, str):
        try:
            value = json_value(value)
        except (ValueError, RecursionError):
            value = None
    if isinstance(value, Mapping):
        value = [value]
    if not isinstance(value, list):
        raise _bad("references", "`references` is no list", 'give [{"audio": …, "text": …}]')
    return value


def _speaker(value: Any, param: str) -> list[Reference]:
    """Return the references of one speaker: one, or a list of them."""
    if isinstance(value, list) and value:
        return [_reference(each, f"{param}[{n}]") for n, each in enumerate(value)]
    return [_reference(value, param)]


def _reference(value: Any, param: str) -> Reference:
    if not isinstance(value, Mapping):
        raise _bad(param, f"{param} is no object", 'give {"audio": …, "text": …}')
    given = {name: each for name, each in value.items() if each not in (None, "", [])}
    audio, codes = _one(given, _ITEM_AUDIO, param), _one(given, _ITEM_CODES, param)
    words = _one(given, _ITEM_TEXT, param)
    text, text_param = _text(given, words, f"{param}."), f"{param}.{words or _ITEM_TEXT[0]}"
    if codes:  # clients that send codes may send the recording, too
        return Reference(f"{param}.{codes}", text, text_param, codes=given[codes])
    if not audio:
        raise _bad(param, f"{param} has neither audio nor codes", 'give {"audio": …, "text": …}')
    return Reference(f"{param}.{audio}", text, text_param, _audio(given[audio], f"{param}.{audio}"))


def _one(given: Mapping[str, Any], names: Sequence[str], param: str) -> str:
    """Return which of several spellings is given; "" if none is. Raises Problem for two."""
    found = [name for name in names if name in given]
    if len(found) > 1:
        place = param and f"{param}."
        raise _bad(f"{place}{found[1]}", f"{place}{found[0]} and {place}{found[1]} are both given", "give one of them")
    return found[0] if found else ""


def _text(given: Mapping[str, Any], name: str, place: str = "") -> str:
    value = given.get(name, "")
    if not isinstance(value, str):
        raise _bad(f"{place}{name}", f"{place}{name}: the transcript is no text", "give the words of the recording")
    return value


def _audio(value: Any, param: str) -> bytes | str:
    if not isinstance(value, (bytes, str)):
        raise _bad(param, f"{param}: the audio is neither bytes nor text", "give the bytes of the file in base64, or a URL")
    return value


def codes_of(value: Any) -> Ints:
    """Return codes that are lists of numbers as int64 of any shape, which nothing has checked. Raises VoiceError."""
    try:
        codes = np.asarray(value)
    except (ValueError, OverflowError):
        codes = np.empty(0)
    if codes.dtype.kind not in "iu":
        raise VoiceError(_NO_CODES)
    return codes.astype(np.int64)


def encoded_bytes(text: str) -> bytes:
    """Return the bytes of a data URL, or of base64 in either alphabet, with or without line breaks and padding.

    Raises VoiceError.
    """
    if text[:5].lower() == "data:":
        head, comma, text = text.partition(",")
        if not comma:
            raise VoiceError("the data URL has no data", hint="data:audio/wav;base64,…")
        if head.rpartition(";")[2].strip().lower() != "base64":
            return unquote_to_bytes(text)
        text = unquote(text)
    text = re.sub(r"\s+", "", text).rstrip("=").translate(str.maketrans("-_", "+/"))
    try:
        return base64.b64decode(text + "=" * (-len(text) % 4), validate=True)
    except ValueError:
        hint = "give base64 or a data URL; a form may have the file itself: with curl, @ stands before its name"
        raise VoiceError("the audio is no valid base64", hint=hint) from None


def _bad(param: str, message: str, hint: str) -> Problem:
    return Problem(400, f"{message}; {hint}", param=param, code=_CODE)
