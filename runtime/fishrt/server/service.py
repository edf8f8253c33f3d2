"""What all routes share: the TTS and its voices, the settings, and whether requests can be served."""

from __future__ import annotations

import logging
from functools import cached_property

from ..bundle.manifest import MANIFEST
from ..errors import FishrtError
from ..request import Request
from ..stream import AsyncSpeechStream
from ..tts import TTS
from .encoding import VoiceEncoder
from .fetch import Fetcher
from .library import VoiceLibrary
from .metrics import Metrics
from .problems import Problem
from .references import ReferenceReader
from .settings import Settings

log = logging.getLogger(__name__)

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
        self.encoder = VoiceEncoder(tts)
        self.library = VoiceLibrary(tts, self.encoder, strict=settings.strict_voices)
        fetcher = Fetcher() if settings.allow_url_refs else None
        self.references = ReferenceReader(tts, self.encoder, media_dir=settings.media_dir, fetcher=fetcher)

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
