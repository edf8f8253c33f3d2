"""Diffusion models: the checks of a request, its voices, and the graphs that speak it."""

from __future__ import annotations

import secrets
import time
from collections.abc import Callable
from pathlib import Path

from ..arrays import Floats, Pcm, Sound
from ..bundle.features import USUAL
from ..bundle.memory import memory_errors
from ..codec import CodecDecoder, CodecEncoder, joined
from ..diffusion.denoising import Denoising
from ..diffusion.generate import Denoiser
from ..diffusion.latents import voice_latents
from ..diffusion.text import FIRST, SECOND, split, tokens
from ..diffusion.voices import VoiceKeys
from ..errors import PromptError, VoiceError
from ..language_model.sampling import Sampling
from ..request import Request, VoiceLike
from ..speaking.job import ChunkSizes
from ..speaking.stream import whole_chunks
from ..speaking.turns import MakeTurns
from ..speaking.warnings import text_warnings
from ..speech import Progress
from ..text.split import SPEAKER
from ..voices.prepared import prepared_path
from ..voices.voice import Voice
from .blocks import BlockJob, BlockTask, BlockTurns
from .model import Model, refuse


class DiffusionModel(Model):
    """A denoiser of latents."""

    def forget(self) -> None:
        """See `Model.forget`."""
        self._made: VoiceKeys | None = None

    @property
    def _keys(self) -> VoiceKeys:
        """The keys and values of voices, and the graphs. Raises FishrtError if the TTS is closed."""
        self._made = self._made or VoiceKeys(Denoiser(self._host.engines, self._host.bundle.manifest.diffusion))
        return self._made

    def encode(self, pcm: Pcm, encoder: CodecEncoder) -> Sound:
        """See `Model.encode`."""
        manifest = self._host.bundle.manifest
        return voice_latents(pcm, encoder.encode, manifest.diffusion, manifest.codec)

    def count_tokens(self, text: str) -> int:
        """See `Model.count_tokens`."""
        return len(tokens(text)) - 1

    def check_transcript(self, text: str, what: str) -> None:
        """See `Model.check_transcript`: it reads none."""

    def job(self, request: Request, progress: Callable[[Progress], None] | None, sizes: ChunkSizes) -> BlockJob:
        """See `Model.job`."""
        accepted = time.perf_counter()
        task = self._task(request, streamed=sizes is not whole_chunks)
        return BlockJob(task, self._host.bundle.manifest, sizes, accepted, progress)

    def _task(self, request: Request, *, streamed: bool) -> BlockTask:
        bundle, provider = self._host.bundle, self._host.provider
        manifest, model = bundle.manifest, bundle.manifest.diffusion
        given = {
            "sampling": request.sampling not in (None, Sampling()),
            "system": request.system is not None,
            "upstream_compat": request.upstream_compat,
        }
        refuse(given, "language models", bundle)
        max_frames = request.limit(model.max_frames, "the model's")
        settings = request.denoising or Denoising()
        denoising = (settings.streamed(model) if streamed else settings).resolve(model)
        assert denoising.frames is not None
        if tag := SPEAKER.search(request.text):
            hint = f"write [{FIRST}], [{SECOND}], … in front of the words"
            raise PromptError(f"the text has {tag[0]}, but this model knows no such turns of speakers", hint=hint)
        window_s = denoising.frames / manifest.codec.frame_rate
        pieces = split(request.text, window_s, model.max_tokens, denoising.pace, denoising.variant or "official")
        voices = self._voices_of(request)
        return BlockTask(
            pieces=pieces,
            voices=tuple(v.name for v in voices),
            sampling=None,
            seed=secrets.randbits(32) if request.seed is None else int(request.seed),
            max_frames=max_frames,
            quirks=USUAL,
            volume=float(request.volume),
            speed=float(request.speed),
            levelled=voices[0] if len(voices) == 1 else None,
            provider=provider,
            bundle_sha256=self.bundle_sha256,
            warnings=[*text_warnings(request.text, len(voices), manifest)],
            denoising=denoising.first(max_frames),
            voice=self._latents(voices),
        )

    def _voices_of(self, request: Request) -> list[Voice]:
        built_in = self._host.bundle.manifest.voices
        return self._find_voices(request, () if built_in is None else (built_in.default,))

    def _latents(self, voices: list[Voice]) -> Floats | None:
        """Return the latents of voices, which are one speaker, whole patches; None without any. Raises VoiceError if too many."""
        if not voices:
            return None
        model = self._host.bundle.manifest.diffusion
        latents: Floats = joined([v.sound[: len(v.sound) - len(v.sound) % model.patch] for v in voices])
        if not 1 <= len(latents) <= model.max_voice_frames:
            raise VoiceError(
                f"the voices have {len(latents):,} frames; the model takes {model.patch} to {model.max_voice_frames:,}",
                hint="use fewer or shorter recordings" if len(latents) else "record more",
            )
        return latents

    def prepare(self, voice: VoiceLike, folder: Path | None) -> None:
        """Compute the keys and values of a voice; see `Model.prepare`."""
        latents = self._latents(self._voices_of(Request("", voice)))
        assert latents is not None
        with memory_errors():
            self._keys.prepare(latents, None if folder is None else self.prepared_path(folder))

    def prepared_path(self, folder: Path) -> Path:
        """See `Model.prepared_path`."""
        return prepared_path(folder, self._host.bundle.manifest.specs["speaker_cond"].identity)

    def opened(self, decoder: CodecDecoder) -> MakeTurns:
        """See `Model.opened`. The graphs that not every text needs are opened when they are first used."""
        keys = self._keys
        for role in ("text_cond", "schedule", "denoise"):
            _ = self._host.engines[role]
        return lambda slots: BlockTurns(keys, decoder)
