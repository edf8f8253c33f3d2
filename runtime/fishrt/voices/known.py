"""The voices that a `TTS` knows: the user's, then the bundle's."""

from __future__ import annotations

from pathlib import Path

from .store import VoiceStore, bundle_store, bundle_voices, find_voice
from .voice import Encoder, Voice


class KnownVoices:
    """The user's voices and those of the bundle of an encoder."""

    def __init__(self, own: VoiceStore, encoder: Encoder) -> None:
        self._own, self._encoder = own, encoder
        self._built_in = bundle_store(encoder.bundle)

    @property
    def names(self) -> tuple[str, ...]:
        """Names of the user's voices, then of the bundle's. Raises VoiceError if the user's cannot be read."""
        bundle = self._encoder.bundle
        own = self._own.list(transcripts=bundle.manifest.codec.channels is None)
        return tuple(dict.fromkeys((*own, *bundle_voices(bundle))))

    def voice(self, name: str, *, built_in: bool = False) -> Voice:
        """Return a voice of the user, else of the bundle. built_in: only of the bundle. Raises VoiceError as `find_voice`."""
        own = not built_in and find_voice(name, self._own, self._encoder.bundle) is self._own
        return (self._own if own else self._built_in).known(name, self._encoder)

    def prepared_folder(self, name: str) -> Path | None:
        """Return the folder for what `TTS.prepare` writes for a voice; None for one that has no folder."""
        return find_voice(name, self._own, self._encoder.bundle).prepared_folder(name)
