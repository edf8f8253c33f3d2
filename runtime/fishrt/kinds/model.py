"""What a `TTS` asks of a model, whatever its kind."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Protocol

from fishrt_engines import Engine

from ..codec import CodecDecoder
from ..request import Request, VoiceLike
from ..speaking.job import ChunkSizes, Job
from ..speaking.turns import MakeTurns
from ..speech import Progress
from ..voices.known import KnownVoices
from ..voices.voice import Encoder


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

    def decoder(self) -> CodecDecoder:
        """Return the codec's decoder."""
        ...


class Model(ABC):
    """How one kind of model speaks."""

    def __init__(self, host: Host, voices: KnownVoices) -> None:
        """Open no graph yet. voices: those that requests can name."""
        self._host, self._voices = host, voices

    @abstractmethod
    def job(self, request: Request, progress: Callable[[Progress], None] | None, sizes: ChunkSizes) -> Job:
        """Return the job of a request after all checks that need no graph."""

    @abstractmethod
    def opened(self) -> MakeTurns:
        """Open the graphs that speaking needs. Return what makes turns for such jobs."""

    @abstractmethod
    def count_tokens(self, text: str) -> int:
        """Return the number of tokens of a text as the model reads it, without those around it."""

    @abstractmethod
    def check_transcript(self, text: str, what: str) -> None:
        """Check that the model can read a transcript; `what` names it. Raises PromptError."""

    @abstractmethod
    def prepare(self, voice: VoiceLike, folder: Path | None) -> None:
        """Compute what the model needs of a voice; see `TTS.prepare`."""

    @abstractmethod
    def prepared_path(self, folder: Path) -> Path:
        """Return the path of the file that `prepare` writes into the folder of a voice, for this bundle."""

    @abstractmethod
    def forget(self) -> None:
        """Release the graphs, and what was computed of voices."""
