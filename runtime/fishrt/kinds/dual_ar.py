"""Language models: the checks of a request, its voices, and the graphs that speak it."""

from __future__ import annotations

import secrets
import time
from collections.abc import Callable
from dataclasses import replace
from functools import cached_property, partial
from pathlib import Path

from ..bundle.features import USUAL, Quirks
from ..bundle.memory import memory_errors
from ..codec import CodecDecoder
from ..diffusion.denoising import Denoising
from ..language_model.batch import DualAR
from ..language_model.context import ContextStore, prepare
from ..language_model.prompt import PromptBuilder
from ..language_model.sampling import Sampling
from ..request import Request, VoiceLike
from ..speaking.job import ChunkSizes
from ..speaking.turns import MakeTurns
from ..speaking.warnings import text_warnings
from ..speech import Progress
from ..text.split import check_speakers, speaker_turns
from ..text.tokenizer import Tokenizer
from ..voices.prepared import prepared_path
from ..voices.voice import Voice
from .columns import ColumnJob, ColumnTask, ColumnTurns
from .model import Model, refuse


class DualARModel(Model):
    """A language model of a slow and a fast AR."""

    def forget(self) -> None:
        """See `Model.forget`."""
        self._contexts = ContextStore()
        self._graphs: DualAR | None = None

    @cached_property
    def _prompts(self) -> PromptBuilder:
        bundle = self._host.bundle
        return PromptBuilder(Tokenizer.load(bundle.tokenizer), bundle.manifest.language_model)

    def count_tokens(self, text: str) -> int:
        """See `Model.count_tokens`."""
        return self._prompts.count_tokens(text)

    def check_transcript(self, text: str, what: str) -> None:
        """See `Model.check_transcript`."""
        self._prompts.check_transcript(text, what)

    def job(self, request: Request, progress: Callable[[Progress], None] | None, sizes: ChunkSizes) -> ColumnJob:
        """See `Model.job`."""
        accepted = time.perf_counter()
        return ColumnJob(self._task(request), self._host.bundle.manifest, sizes, accepted, progress)

    def _task(self, request: Request) -> ColumnTask:
        manifest, provider, prompts = self._host.bundle.manifest, self._host.provider, self._prompts
        refuse({"denoising": request.denoising not in (None, Denoising())}, "diffusion models", self._host.bundle)
        max_frames = request.limit(manifest.codec.max_frames, "the codec's")
        quirks = Quirks.of(manifest.language_model) if request.upstream_compat else USUAL
        pieces = prompts.split(request.text, quirks=quirks)
        voices = self._voices_of(request)
        if voices and not quirks.text:
            check_speakers(request.text, [v.transcript for v in voices])
        conversation = prompts.start(voices, request.system, quirks=quirks)
        for piece in pieces:
            conversation.user(piece)  # raises now for a piece that is too long, not after earlier pieces are spoken
        return ColumnTask(
            pieces=pieces,
            voices=tuple(v.name for v in voices),
            denoising=None,
            sampling=(request.sampling or Sampling()).resolve(manifest.language_model.sampling),
            seed=secrets.randbits(32) if request.seed is None else int(request.seed),
            max_frames=max_frames,
            quirks=quirks,
            volume=float(request.volume),
            speed=float(request.speed),
            levelled=voices[0] if len(voices) == 1 and not quirks.sound else None,
            provider=provider,
            bundle_sha256=self.bundle_sha256,
            warnings=[*text_warnings(request.text, len(voices), manifest)],
            conversation=conversation,
        )

    def _voices_of(self, request: Request) -> list[Voice]:
        manifest = self._host.bundle.manifest
        built_in = manifest.voices
        usual = () if built_in is None else built_in.ordered if speaker_turns(request.text) else (built_in.default,)
        # The codec may have more codebooks than the model.
        books = manifest.language_model.num_codebooks
        return [replace(v, codes=v.codes[:books]) for v in self._find_voices(request, usual)]

    def prepare(self, voice: VoiceLike, folder: Path | None) -> None:
        """Prefill the slow AR with a voice; see `Model.prepare`."""
        head = self._prompts.start(self._voices_of(Request("", voice))).head
        path = None if folder is None else self.prepared_path(folder)
        with memory_errors():
            prepare(self._host.engines["slow_ar"], head, self._contexts, path)

    def prepared_path(self, folder: Path) -> Path:
        """See `Model.prepared_path`."""
        return prepared_path(folder, self._host.bundle.manifest.specs["slow_ar"].identity)

    def opened(self, decoder: CodecDecoder) -> MakeTurns:
        """See `Model.opened`."""
        engines, model = self._host.engines, self._host.bundle.manifest.language_model
        self._graphs = self._graphs or DualAR(engines["slow_ar"], engines["fast_ar"], model)
        return partial(ColumnTurns, self._graphs, decoder, self._contexts)
