"""What a `TTS` asks of a model, whatever its kind."""

from __future__ import annotations

import hashlib
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import Protocol

from fishrt_engines import Engine

from ..arrays import Pcm, Sound
from ..bundle.features import LanguageModel
from ..bundle.folder import Bundle
from ..codec import CodecDecoder, CodecEncoder
from ..errors import ArgumentError
from ..request import Request, VoiceLike
from ..speaking.job import ChunkSizes, Job
from ..speaking.turns import MakeTurns
from ..speech import Progress
from ..voices.known import KnownVoices
from ..voices.voice import Encoder, Voice


class Host(Encoder, Protocol):
    """What a model has of its `TTS`."""

    @property
    def engines(self) -> Mapping[str, Engine]:
        """The graphs by role, each opened when it is first accessed. Raises FishrtError if the TTS is closed."""
        ...

    @property
    def provider(self) -> str:
        """The execution provider. Raises FishrtError if the TTS is closed."""
        ...


class Model(ABC):
    """How one kind of model speaks."""

    def __init__(self, host: Host, voices: KnownVoices) -> None:
        """Open no graph yet. voices: those that requests can name."""
        self._host, self._voices = host, voices
        self._prepared: dict[str, int] = {}
        self.forget()

    @cached_property
    def bundle_sha256(self) -> str:
        """The SHA-256 of the bundle's manifest, in hex. Its text takes as long as some frames, so that it is made once."""
        return hashlib.sha256(self._host.bundle.manifest.to_json().encode()).hexdigest()

    @abstractmethod
    def job(self, request: Request, progress: Callable[[Progress], None] | None, sizes: ChunkSizes) -> Job:
        """Return the job of a request after all checks that need no graph."""

    @abstractmethod
    def opened(self, decoder: CodecDecoder) -> MakeTurns:
        """Open the model's graphs that speaking needs. Return what makes turns for such jobs, whose sound `decoder` makes."""

    def encode(self, pcm: Pcm, encoder: CodecEncoder) -> Sound:
        """Return what the model reads of a recording, float32 [samples] at the codec's rate. Raises AudioError."""
        return encoder.encode(pcm)

    @abstractmethod
    def count_tokens(self, text: str) -> int:
        """Return the number of tokens of a text as the model reads it, without those around it."""

    @abstractmethod
    def check_transcript(self, text: str, what: str) -> None:
        """Check that the model can read a transcript; `what` names it. Raises PromptError."""

    @abstractmethod
    def prepare(self, voice: VoiceLike, folder: Path | None) -> None:
        """Compute what the model needs of a voice; see `TTS.prepare`."""

    def _find_voices(self, request: Request, usual: Sequence[str]) -> list[Voice]:
        """Return the voices of a request. usual: the bundle's that speak if it names none. Raises VoiceError."""
        given = request.voices
        if given is None:
            voices = [self._voices.voice(name, built_in=True) for name in usual]
        else:
            voices = [self._voices.voice(v) if isinstance(v, str) else v for v in given]
            if len(voices) == 1 and isinstance(given[0], str):
                self._take_prepared(given[0], voices[0])
        for v in voices:
            v.check(self._host.bundle)
        return voices

    def _take_prepared(self, name: str, voice: Voice) -> None:
        """Load what `prepare` wrote next to the voice, if it did."""
        folder = self._voices.prepared_folder(name)
        key = hash((voice.sound.tobytes(), voice.transcript))
        if self._prepared.get(name) != key and folder is not None and self.prepared_path(folder).is_file():
            self._prepared[name] = key
            self.prepare(voice, folder)

    @abstractmethod
    def prepared_path(self, folder: Path) -> Path:
        """Return the path of the file that `prepare` writes into the folder of a voice, for this bundle."""

    @abstractmethod
    def forget(self) -> None:
        """Release the graphs, and what was computed of voices. Called first when it is made."""


def refuse(given: Mapping[str, bool], of: str, bundle: Bundle) -> None:
    """Raise ArgumentError for the first option that is given; `of` names the kind of model that takes them."""
    for name in (name for name, is_given in given.items() if is_given):
        kind = "a language model" if isinstance(bundle.manifest.model, LanguageModel) else "a diffusion model"
        raise ArgumentError(f"{name} is for {of}; {bundle.manifest.name} is {kind}", hint="leave it out")
