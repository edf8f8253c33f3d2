"""The voices of a server by name: the user's, those of clients until shutdown, the bundle's, and names that mean another one."""

from __future__ import annotations

import asyncio
import hashlib
import threading
import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path, PurePath

from ...errors import KeptVoiceError, TakenVoiceError, UnknownVoiceError, VoiceError
from ...request import VoiceLike
from ...tts import TTS
from ...voices.files import AUDIO_SUFFIXES, canonical, check_name
from ...voices.recordings import doubts
from ...voices.store import bundle_store, bundle_voices
from ...voices.voice import Voice, check_words
from ..problems import about
from .encoding import VoiceEncoder

OPENAI_VOICES = frozenset("alloy ash ballad coral echo fable onyx nova sage shimmer verse marin cedar".split())
"""OpenAI's names: each speaks in a local voice, always the same one, unless a voice has the name."""
DEFAULT, NO_VOICE = "default", "unconditioned"
"""Names with a meaning: the server's default voice, and speech without a voice."""
_MOST_UNTIL_SHUTDOWN = 1000
_MOST_NAMED = 20


@dataclass(frozen=True, slots=True)
class Entry:
    """A voice in the list of all."""

    name: str
    origin: str
    """user: stored here; session: until shutdown; bundle."""
    created: int
    """Seconds since 1970."""
    warnings: tuple[str, ...] = ()
    """Why a recording that was just added may make a poor voice."""


@dataclass(frozen=True, slots=True)
class NewVoice:
    """A voice that a client adds, and the fields of its request that have the parts."""

    name: str
    name_field: str
    recordings: Sequence[bytes]
    recordings_field: str
    transcript: str
    transcript_field: str


class VoiceLibrary:
    """The voices of a TTS. Several threads may use it. Its methods read and write files: an event loop calls them in a thread."""

    def __init__(self, tts: TTS, encoder: VoiceEncoder, *, strict: bool = False) -> None:
        """Make the library. strict: OpenAI's names mean no other voice."""
        self._tts, self._encoder, self._strict = tts, encoder, strict
        self._session: dict[str, tuple[Voice, int]] = {}
        self._changing = threading.Lock()

    def list(self) -> list[Entry]:
        """Return all voices, by name. Raises VoiceError if the voice folder cannot be read."""
        own, built_in = self._tts.store, bundle_store(self._tts.bundle)
        found = {name: Entry(name, "bundle", _time(built_in.place(name))) for name in self._built_in}
        found |= {name: Entry(name, "user", _time(own.place(name))) for name in self._own}
        found |= {name: Entry(name, "session", created) for name, (_, created) in dict(self._session).items()}
        return [found[name] for name in sorted(found)]

    def entry(self, name: str) -> Entry:
        """Return a voice as `list` has it. Raises UnknownVoiceError."""
        name = canonical(name)
        if kept := self._session.get(name):
            return Entry(name, "session", kept[1])
        if self._tts.store.holds(name):
            return Entry(name, "user", _time(self._tts.store.place(name)))
        if name in self._built_in:
            return Entry(name, "bundle", _time(bundle_store(self._tts.bundle).place(name)))
        raise self._unknown(name)

    def resolve(self, name: str | None) -> VoiceLike | Sequence[VoiceLike] | None:
        """Return what a request's name of a voice means, as `Request.voice` takes it. Raises UnknownVoiceError.

        No name and "" mean the default voice, the bundle's, as for `TTS`. The name of a voice means that voice. Otherwise
        "default" means the default voice, too; "unconditioned" means no voice; OpenAI's names mean one of the bundle's voices, or
        of the user's if it has none; and a file name means its stem.
        """
        if not name:
            return None
        name = canonical(name)
        if self._has(name):
            return self._voice(name)
        if name == DEFAULT:
            return None
        if name == NO_VOICE:
            return []
        if name in OPENAI_VOICES and not self._strict:
            return self._local(name)
        stem, suffix = PurePath(name).stem, PurePath(name).suffix.lower()
        if suffix in AUDIO_SUFFIXES and self._has(stem):
            return self._voice(stem)
        raise self._unknown(name)

    def load(self, name: str) -> Voice:
        """Return a voice by its own name. Raises UnknownVoiceError; VoiceError for damaged files."""
        voice = self._voice(self.entry(name).name)
        return self._tts.voice(voice) if isinstance(voice, str) else voice

    def check_free(self, name: str) -> None:
        """Check that a new voice can have a name. Raises VoiceError: Kept… for the bundle's names, Taken… for others."""
        check_name(name)
        name = canonical(name)
        if name in (DEFAULT, NO_VOICE):
            raise VoiceError(f"{name!r} has another meaning and cannot be the name of a new voice", hint="choose another name")
        if name in self._built_in:
            raise KeptVoiceError(f"the voice {name!r} belongs to the bundle and cannot be replaced", hint="choose another name")
        if name in self._session or self._tts.store.holds(name):
            raise TakenVoiceError(f"there is already a voice {name!r}", hint="choose another name, or delete that voice first")
        self._tts.store.check_free(name)

    async def create(self, new: NewVoice, *, keep: bool = True) -> Entry:
        """Add recordings as a voice. keep: in the voice folder, whole on disk at the end; otherwise until shutdown.

        Raises Problem for what `check_free` and `VoiceEncoder.voice` refuse; OutputError if it cannot be written.
        """
        with about(new.name_field):
            await asyncio.to_thread(self.check_free, new.name)
        with about(new.transcript_field):
            await asyncio.to_thread(check_words, self._tts, new.transcript, new.name)
        with about(new.recordings_field):
            voice = await self._encoder.voice(new.recordings, new.transcript, new.name)
        with about(new.name_field):
            return await asyncio.to_thread(self._add, voice, keep=keep)

    def _add(self, voice: Voice, *, keep: bool) -> Entry:
        with self._changing:
            self.check_free(voice.name)
            if keep:
                self._tts.store.add(voice)
            elif len(self._session) < _MOST_UNTIL_SHUTDOWN:
                self._session[canonical(voice.name)] = replace(voice, recording=None), int(time.time())
            else:
                raise VoiceError(f"there are already {_MOST_UNTIL_SHUTDOWN:,} voices until shutdown", hint="delete some")
        assert voice.recording is not None
        poor = doubts(*voice.recording, voice.transcript, self._tts.bundle.manifest.model)
        return replace(self.entry(voice.name), warnings=tuple(f"the recording {each}" for each in poor))

    def rename(self, old: str, new: str) -> None:
        """Give a voice another name. Raises UnknownVoiceError, KeptVoiceError, and as `check_free`."""
        with self._changing:
            entry = self.changeable(old)
            self.check_free(new)
            if entry.origin == "user":
                self._tts.store.rename(entry.name, new)
            else:
                voice, created = self._session.pop(entry.name)
                self._session[canonical(new)] = voice, created

    def remove(self, name: str) -> None:
        """Delete a voice. Raises UnknownVoiceError, KeptVoiceError."""
        with self._changing:
            entry = self.changeable(name)
            if entry.origin == "user":
                self._tts.store.remove(entry.name)
            else:
                del self._session[entry.name]

    def changeable(self, name: str) -> Entry:
        """Return a voice that clients may rename and delete. Raises UnknownVoiceError, KeptVoiceError."""
        entry = self.entry(name)
        if entry.origin == "bundle":
            raise KeptVoiceError(f"the voice {entry.name!r} belongs to the bundle and stays as it is")
        if entry.origin == "user" and not self._tts.store.made_here(entry.name):
            raise KeptVoiceError(f"the voice {entry.name!r} was not made by fishrt and is left alone")
        return entry

    @property
    def _own(self) -> Sequence[str]:
        return self._tts.store.list(transcripts=self._tts.bundle.manifest.codec.channels is None)

    @property
    def _built_in(self) -> Sequence[str]:
        return bundle_voices(self._tts.bundle)

    def _has(self, name: str) -> bool:
        return name in self._session or name in self._built_in or self._tts.store.holds(name)

    def _voice(self, name: str) -> VoiceLike:
        kept = self._session.get(name)
        return kept[0] if kept else name

    def _local(self, name: str) -> VoiceLike | None:
        """Return the voice for a name of OpenAI's: the largest hash, so that a new voice leaves most names where they are."""
        local = self._built_in or self._own
        return max(local, key=lambda voice: hashlib.sha256(f"{name}\0{voice}".encode()).digest(), default=None)

    def _unknown(self, name: str) -> UnknownVoiceError:
        names = [entry.name for entry in self.list()]
        known = ", ".join(names[:_MOST_NAMED]) + (", …" if names[_MOST_NAMED:] else "")
        return UnknownVoiceError(f"there is no voice {name[:80]!r}; there are: {known or 'none'}")


def _time(path: Path) -> int:
    """Return when a folder was last changed, in seconds since 1970; 0 if it has just gone."""
    try:
        return int(path.stat().st_mtime)
    except OSError:
        return 0
