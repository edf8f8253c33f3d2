"""Text to speech: wires a bundle's graphs, prompt, loop and codec together.

    text ─► pieces ─► for each: prompt ─► frames of codes ─► pcm ─► AudioChunk          (a voice gives its codes to the prompt)
                        ▲                    │
                        └── what was said ◄──┘

`stream()` yields one chunk for each piece of text; `speak()` drains it, so that the two cannot drift apart.
"""

from __future__ import annotations

import hashlib
import secrets
import textwrap
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import cached_property
from numbers import Integral
from pathlib import Path

import numpy as np
import numpy.typing as npt

from fishrt_engines import Engine, open_engine
from fishrt_engines.providers import resolve_provider

from .audio import Pcm, check_pcm, resample
from .bundle import Bundle, embedded_bundle
from .codec import CodecDecoder, CodecEncoder, clamp_codes
from .errors import FishrtError, SamplingError, VoiceError
from .generate import DualAR, generate_frames
from .prompt import Conversation, PromptBuilder
from .sampling import Ints, Sampling, SeededNoise
from .speech import AudioChunk, PieceInfo, Progress, Speech, SpeechInfo, Timings
from .text import check_speakers, speaker_turns
from .tokenizer import Tokenizer
from .voices import Voice, VoiceStore

VERIFIED_BYTES = 64_000_000
"""Bundles up to this size are hashed whenever they are loaded: a fraction of a second. That covers the embedded voice. A bundle
of gigabytes would take longer to hash than to open: `fishrt inspect --verify` is there for it."""

VoiceLike = Voice | str
"""A voice, or the name of one that the bundle brings."""


@dataclass(frozen=True, slots=True)
class _Request:
    pieces: list[str]
    voices: tuple[str, ...]
    conversation: Conversation
    sampling: Sampling
    seed: int
    max_frames: int
    upstream_compat: bool


class TTS:
    """A bundle, ready to speak. May be used by several threads; each request has its own state."""

    def __init__(self, bundle: Bundle, engines: Mapping[str, Engine]) -> None:
        """engines: by the roles of the manifest's graphs. `TTS.load` is the usual way."""
        self.bundle = bundle
        self._engines = engines

    @classmethod
    def load(cls, bundle: str | Path | Bundle | None = None, *, provider: str = "auto", threads: int | None = None) -> TTS:
        """Opens a bundle; None means the embedded one. Its graphs are opened when they are first needed.

        provider: "auto", or one of `fishrt doctor`'s. threads: for each graph; None means the physical cores.
        The files of a bundle up to VERIFIED_BYTES are compared with the hashes of its manifest.
        Raises BundleError and ProviderError here, GraphError from the call that first needs a damaged graph.
        """
        if not isinstance(bundle, Bundle):
            bundle = Bundle.load(embedded_bundle() if bundle is None else bundle)
        if bundle.manifest.total_bytes <= VERIFIED_BYTES:
            bundle.verify()
        return cls(bundle, _Graphs(bundle, resolve_provider(provider), threads))

    @property
    def sample_rate(self) -> int:
        """Of all speech, in Hz."""
        return self.bundle.manifest.codec.sample_rate

    def speak(
        self,
        text: str,
        *,
        voice: VoiceLike | Sequence[VoiceLike] | None = None,
        sampling: Sampling | None = None,
        seed: int | None = None,
        max_frames: int | None = None,
        system: str | None = None,
        upstream_compat: bool = False,
        progress: Callable[[Progress], None] | None = None,
    ) -> Speech:
        """Speaks a text.

        voice: one or several; the i-th speaks `<|speaker:i|>`, or, where the model knows no turns of speakers, all are of one
        speaker. None: the bundle's default voice, or all of its voices, the default first, where the text has speaker tags. An
        empty list: none at all.
        sampling: None means the bundle's defaults. seed: at least 0; None draws one, which `info` tells. The same seed and
        request give the same codes. max_frames: limit for each piece of text, at most the codec's; None means what context and
        codec allow. `info` tells which pieces were cut off by it.
        system: takes the place of the model's usual instruction. upstream_compat: upstream's behaviour to the letter.

        Raises PromptError for text that cannot be spoken or is too long with its references, or a system text that the model does
        not take; VoiceError for a voice that is unknown or not this bundle's; SamplingError for a bad limit or seed (also for one
        that is no whole number), or a repetition penalty that the model does not have; FishrtError if the model says nothing for
        a piece of the text, or draws what has no sound, or memory does not suffice.
        """
        request = self._request(text, voice, sampling, seed, max_frames, system, upstream_compat)
        chunks = []
        for chunk in self._chunks(request, progress):
            if not chunk.codes.shape[1]:
                said = textwrap.shorten(chunk.text, 60, placeholder=" …")
                if chunk.stop_reason != "end":
                    raise FishrtError(f'the limit leaves no frame for "{said}"', hint="allow more frames")
                raise FishrtError(f'the model ended before it said "{said}"', hint="try another seed, voice or text")
            chunks.append(chunk)
        codes = np.concatenate([c.codes for c in chunks], axis=1)
        pcm = np.concatenate([c.pcm for c in chunks])
        audio_s = len(pcm) / self.sample_rate
        timings = Timings(
            sum(c.timings.load_s for c in chunks),
            sum(c.timings.language_model_s for c in chunks),
            sum(c.timings.codec_s for c in chunks),
        )
        manifest = self.bundle.manifest
        info = SpeechInfo(
            seed=request.seed,
            sampling=request.sampling,
            voices=request.voices,
            pieces=tuple(PieceInfo(c.text, c.codes.shape[1], c.stop_reason) for c in chunks),
            frames=codes.shape[1],
            audio_s=audio_s,
            timings=timings,
            rtf=timings.compute_s / audio_s,
            provider=self._engines["slow_ar"].provider,
            bundle=manifest.name,
            bundle_sha256=hashlib.sha256(manifest.to_json().encode()).hexdigest(),
        )
        return Speech(pcm, self.sample_rate, codes, info)

    def stream(
        self,
        text: str,
        *,
        voice: VoiceLike | Sequence[VoiceLike] | None = None,
        sampling: Sampling | None = None,
        seed: int | None = None,
        max_frames: int | None = None,
        system: str | None = None,
        upstream_compat: bool = False,
        progress: Callable[[Progress], None] | None = None,
    ) -> Iterator[AudioChunk]:
        """As `speak`, one chunk for each piece of text; one for which the model said nothing is empty.

        What is wrong with the request is raised here, not at the first chunk.
        """
        return self._chunks(self._request(text, voice, sampling, seed, max_frames, system, upstream_compat), progress)

    def encode(self, pcm: Pcm, rate: int) -> Ints:
        """pcm: float [samples], mono, −1..1, at `rate` Hz → codes int64 [K, frames]. Raises AudioError."""
        check_pcm(pcm, rate)
        codec = self.bundle.manifest.codec
        with _memory_errors():
            resampled = resample(pcm.astype(np.float32, copy=False), rate, codec.sample_rate)
            return CodecEncoder(self._engines["codec_encode"], codec).encode(resampled)

    def decode(self, codes: npt.NDArray[np.integer], *, upstream_compat: bool = False) -> Pcm:
        """Codes of any integer type, [k, frames] or [1, k, frames] → pcm float32 [samples] at `sample_rate`.

        With fewer rows than codebooks the sound is coarser. Raises VoiceError for codes that are not this codec's.
        """
        with _memory_errors():
            return self._decoder().decode(codes, upstream_compat=upstream_compat)

    def voice(self, name: str) -> Voice:
        """A voice that the bundle brings. Raises VoiceError for an unknown name."""
        voices = self.bundle.manifest.voices
        names = voices.names if voices else ()
        if name not in names:
            raise VoiceError(f"the bundle has no voice {name!r}; it has: {', '.join(names) or 'none'}", hint="fishrt voice list")
        return VoiceStore(self.bundle.path / "voices").load(name)

    @cached_property
    def _prompts(self) -> PromptBuilder:
        manifest = self.bundle.manifest
        return PromptBuilder(Tokenizer.load(self.bundle.file(manifest.tokenizer)), manifest.language_model)

    def _decoder(self) -> CodecDecoder:
        return CodecDecoder(self._engines["codec_decode"], self.bundle.manifest.codec)

    def _request(
        self,
        text: str,
        voice: VoiceLike | Sequence[VoiceLike] | None,
        sampling: Sampling | None,
        seed: int | None,
        max_frames: int | None,
        system: str | None,
        upstream_compat: bool,
    ) -> _Request:
        """Everything of a request that can be checked before the graphs run."""
        manifest = self.bundle.manifest
        if seed is not None and (not isinstance(seed, Integral) or seed < 0):
            raise SamplingError(f"the seed is {seed!r}", hint="it must be a whole number of at least 0")
        most = manifest.codec.max_frames
        if max_frames is not None and (not isinstance(max_frames, Integral) or not 1 <= max_frames <= most):
            raise SamplingError(
                f"max_frames is {max_frames!r}", hint=f"it must be a whole number from 1 to {most:,}, the codec's limit"
            )
        pieces = self._prompts.split(text, upstream_compat=upstream_compat)
        voices = self._voices(voice, text)
        if voices and not upstream_compat:
            check_speakers(text, [v.transcript for v in voices])
        conversation = self._prompts.start(voices, system, upstream_compat=upstream_compat)
        for piece in pieces:
            conversation.user(piece)  # raises what would else be raised when it is its turn
        return _Request(
            pieces=pieces,
            voices=tuple(v.name for v in voices),
            conversation=conversation,
            sampling=(Sampling() if sampling is None else sampling).resolve(manifest.language_model.sampling),
            seed=secrets.randbits(32) if seed is None else int(seed),
            max_frames=most if max_frames is None else int(max_frames),
            upstream_compat=upstream_compat,
        )

    def _voices(self, voice: VoiceLike | Sequence[VoiceLike] | None, text: str) -> list[Voice]:
        manifest = self.bundle.manifest
        if voice is None:
            voice = () if manifest.voices is None else manifest.voices.ordered if speaker_turns(text) else manifest.voices.default
        given = [voice] if isinstance(voice, (Voice, str)) else voice
        voices = [self.voice(v) if isinstance(v, str) else v for v in given]
        for v in voices:
            v.check(manifest)
        # The codec may have more codebooks than the model.
        return [replace(v, codes=v.codes[: manifest.language_model.num_codebooks]) for v in voices]

    def _chunks(self, request: _Request, progress: Callable[[Progress], None] | None) -> Iterator[AudioChunk]:
        codec, lm = self.bundle.manifest.codec, self.bundle.manifest.language_model
        begun = time.perf_counter()
        with _memory_errors():
            model = DualAR(self._engines["slow_ar"], self._engines["fast_ar"], lm)
            decoder = self._decoder()
        load_s = time.perf_counter() - begun
        noise = SeededNoise(request.seed)
        said = 0
        begun = time.perf_counter()
        for n, text in enumerate(request.pieces):
            started = time.perf_counter()
            with _memory_errors():
                generation = generate_frames(
                    model,
                    request.conversation.user(text),
                    request.sampling,
                    noise,
                    max_frames=request.max_frames,
                    upstream_compat=request.upstream_compat,
                )
                frames = []
                for frame in generation:
                    frames.append(frame)
                    if progress is not None:
                        total = said + len(frames)
                        elapsed = time.perf_counter() - begun
                        progress(Progress(n, len(request.pieces), total, total / codec.frame_rate, elapsed))
                # The model is reminded of exactly what it drew; the codec and the caller get codes that the codec has.
                request.conversation.assistant(generation.drawn)
                drawn = np.stack(frames, axis=1) if frames else np.zeros((lm.num_codebooks, 0), np.int64)
                spoken = time.perf_counter()
                codes = clamp_codes(drawn, codec)
                pcm = decoder.decode(codes) if frames else np.zeros(0, np.float32)
            timings = Timings(load_s, spoken - started, time.perf_counter() - spoken)
            reason = generation.stop_reason
            assert reason is not None
            yield AudioChunk(pcm, codec.sample_rate, codes, n, text, reason, request.seed, timings)
            said += len(frames)
            load_s = 0.0


class _Graphs(Mapping[str, Engine]):
    """The graphs of a bundle by role, each opened when it is first asked for: decoding needs no language model."""

    def __init__(self, bundle: Bundle, provider: str, threads: int | None) -> None:
        self._bundle, self._provider, self._threads = bundle, provider, threads
        self._open: dict[str, Engine] = {}
        self._lock = threading.Lock()

    def __getitem__(self, role: str) -> Engine:
        with self._lock:
            if role not in self._open:
                spec = self._bundle.manifest.graphs[role]
                path = self._bundle.file(spec.file)
                self._open[role] = open_engine(path, spec, provider=self._provider, threads=self._threads)
            return self._open[role]

    def __iter__(self) -> Iterator[str]:
        return iter(self._bundle.manifest.graphs)

    def __len__(self) -> int:
        return len(self._bundle.manifest.graphs)


@contextmanager
def _memory_errors() -> Iterator[None]:
    try:
        yield
    except MemoryError as error:
        raise FishrtError(f"not enough memory: {error}", hint="use shorter text or references, or fewer frames") from None
