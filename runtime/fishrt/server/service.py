"""What all routes share: the TTS and its voices, the settings, and whether requests can be served."""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Callable
from functools import cached_property
from typing import Any

from ..bundle.diffusion import Diffusion
from ..bundle.manifest import MANIFEST
from ..diffusion.denoising import Denoising
from ..errors import FishrtError
from ..request import Request
from ..speaking.scheduler import ScheduledStream, Scheduler
from ..speaking.stream import whole_chunks
from ..tts import TTS
from .metrics import Metrics
from .problems import Problem
from .settings import Settings
from .voices.encoding import VoiceEncoder
from .voices.fetch import Fetcher
from .voices.library import VoiceLibrary
from .voices.references import ReferenceReader

log = logging.getLogger(__name__)

DRAIN_S = 15
"""Longest time for running requests at the end."""
_SILENT = 2
"""Frames of the request that opens all graphs before the first client speaks."""


class Service:
    """A TTS that serves requests."""

    def __init__(self, tts: TTS, settings: Settings) -> None:
        self.tts, self.settings = tts, settings
        self.state = "loading"
        """loading, ok, draining or dead."""
        self.reason = "the model is loading"
        self.at_end: set[Callable[[], None]] = set()
        """Called when no new requests are taken any more."""
        self.drained_at = 0.0
        """When that was, by the monotonic clock in seconds."""
        self.scheduler = Scheduler(tts, max_active=settings.max_active, max_queue=settings.max_queue)
        self.metrics = Metrics(lambda: self.scheduler.stats)
        self.encoder = VoiceEncoder(tts)
        self.library = VoiceLibrary(tts, self.encoder, strict=settings.strict_voices)
        fetcher = Fetcher() if settings.allow_url_refs else None
        self.references = ReferenceReader(tts, self.encoder, media_dir=settings.media_dir, fetcher=fetcher)

    async def load(self) -> None:
        """Speak once, so that every graph is open. Until then, requests are refused."""
        try:
            model = self.tts.bundle.manifest.model
            step = Denoising(1, blocks=(1,) * _SILENT if model.blockwise else None) if isinstance(model, Diffusion) else None
            async for _ in await self.speak(Request("Hi.", seed=0, max_frames=_SILENT, denoising=step)):
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
        if self.state == "draining":
            return
        self.state, self.reason, self.drained_at = "draining", "the server ends", time.monotonic()
        for call in tuple(self.at_end):
            call()

    @property
    def fault(self) -> str | None:
        """Why the next request would not be served; None: it would."""
        if self.state != "ok":
            return self.reason
        return None if self.scheduler.fault is None else "the last requests failed: the log has more"

    def close(self) -> None:
        """Cut what still runs, and wait for the frame that is drawn: a process must not end in the middle of one."""
        self.scheduler.close()
        self.encoder.close()

    def check_ready(self) -> None:
        """Check that requests are served. Raises Problem 503."""
        if self.state != "ok":
            raise Problem(503, self.reason, code=self.state, headers={"Retry-After": "2"} if self.state == "loading" else None)

    async def speak(self, request: Request, *, whole: bool = False, goes_on: bool = False) -> ScheduledStream:
        """Queue a request; its chunks come by `async for`, and `aclose` ends it.

        whole: nobody hears it before its end. goes_on: it is a later part of a reply, and waits for any time.
        Raises BusyError if the queue is full, and the errors of a request that does not fit the model. Its first chunk raises
        TimeLimitError after a long wait.
        """
        how: dict[str, Any] = {"sizes": whole_chunks if whole else None, "timeout_s": None if goes_on else self.settings.max_wait}
        queued = asyncio.ensure_future(asyncio.to_thread(self.scheduler.submit, request, **how))
        try:
            return await asyncio.shield(queued)
        except asyncio.CancelledError:
            queued.add_done_callback(_close)
            raise

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
        stats, limits = self.scheduler.stats, self.settings
        return {
            "waiting": stats.waiting,
            "active": stats.active,
            "max_queue": limits.max_queue,
            "max_active": limits.max_active,
        }


def _close(queued: asyncio.Future[ScheduledStream]) -> None:
    """End a request whose client went away while it was queued."""
    if not queued.cancelled() and queued.exception() is None:
        queued.result().close()
