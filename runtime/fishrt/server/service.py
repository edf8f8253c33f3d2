"""What all routes share: the TTS, the settings, whether requests can be served, and which voice a name means."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from functools import cached_property

from ..bundle.manifest import MANIFEST
from ..errors import FishrtError
from ..request import Request, VoiceLike
from ..stream import AsyncSpeechStream
from ..tts import TTS
from .metrics import Metrics
from .problems import Problem
from .settings import Settings

log = logging.getLogger(__name__)

OPENAI_VOICES = "alloy ash ballad coral echo fable onyx nova sage shimmer verse marin cedar".split()
DEFAULT, NO_VOICE = "default", "unconditioned"
"""Names with a meaning: the server's default voice, and speech without a voice."""
_SILENT = 2
"""Frames of the request that opens all graphs before the first client speaks."""


class Service:
    """A TTS that serves requests."""

    def __init__(self, tts: TTS, settings: Settings) -> None:
        self.tts, self.settings = tts, settings
        self.state = "loading"
        """loading, ok, draining or dead."""
        self.reason = "the model is loading"
        self.metrics = Metrics(self.queue)

    async def load(self) -> None:
        """Speak once, so that every graph is open. Until then, requests are refused."""
        try:
            async for _ in self.speak(Request("Hi.", seed=0, max_frames=_SILENT)):
                pass
        except Exception as error:
            if not isinstance(error, FishrtError):
                log.exception("the model cannot be loaded")
            self.state, self.reason = "dead", f"the model cannot speak: {error}"
            log.error("%s", self.reason)
        else:
            if self.state == "loading":
                self.state, self.reason = "ok", ""
                log.info("ready: %s speaks with %s", self.tts.bundle.manifest.name, self.tts.provider)

    def drain(self) -> None:
        """Refuse new requests; those that run may end."""
        self.state, self.reason = "draining", "the server ends"

    def check_ready(self) -> None:
        """Check that requests are served. Raises Problem 503."""
        if self.state != "ok":
            raise Problem(503, self.reason, code=self.state, headers={"Retry-After": "2"} if self.state == "loading" else None)

    def speak(self, request: Request) -> AsyncSpeechStream:
        """Start a request; its chunks come by `async for`, and `aclose` ends it."""
        return self.tts.astream(request)

    def voice(self, name: str | None) -> VoiceLike | Sequence[VoiceLike] | None:
        """Return what a request's name of a voice means, as `Request.voice` takes it. Raises Problem 404 for an unknown name."""
        names = self.tts.voices
        if name in names:
            return name
        if name in (None, "", DEFAULT):
            return DEFAULT if DEFAULT in names else None
        if name == NO_VOICE:
            return []
        if name in OPENAI_VOICES and not self.settings.strict_voices:
            local = self._fixed_voices(names)
            return local[OPENAI_VOICES.index(name) % len(local)] if local else None
        known = ", ".join(names) or "none"
        raise Problem(404, f"there is no voice {name!r:.80}; there are: {known:.500}", param="voice", code="voice_not_found")

    def _fixed_voices(self, names: Sequence[str]) -> Sequence[str]:
        """Return the voices that OpenAI's names are given to. A voice of the user that is added changes nothing, if it can be."""
        built_in = self.tts.bundle.manifest.voices
        return built_in.names if built_in else names

    def count_tokens(self, text: str) -> int:
        """Return the number of tokens that the model reads for a text."""
        return self.tts.count_tokens(text)

    @cached_property
    def created(self) -> int:
        """When the bundle was made, in seconds since 1970."""
        return int((self.tts.bundle.path / MANIFEST).stat().st_mtime)

    @property
    def provider(self) -> str:
        """The execution provider."""
        return self.tts.provider

    def queue(self) -> dict[str, int]:
        """Return the numbers of requests that wait and that speak, and their limits."""
        return {"waiting": 0, "active": 0, "max_queue": self.settings.max_queue, "max_active": self.settings.max_active}
