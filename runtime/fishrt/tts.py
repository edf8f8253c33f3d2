"""Text to speech: wires a bundle's graphs, prompt, loop and codec together.

    text ─► pieces ─► for each: prompt ─► frames of codes ─► pcm ─► AudioChunk          (a voice gives its codes to the prompt)
                        ▲                    │
                        └── what was said ◄──┘

`stream()` yields chunks while frames are drawn; `speak()` drains the same generator, so that the two cannot drift apart.
"""

from __future__ import annotations

import hashlib
import itertools
import logging
import secrets
import threading
import time
from collections.abc import Callable, Hashable, Iterator, Mapping, Sequence
from dataclasses import replace
from functools import cached_property
from numbers import Integral
from pathlib import Path

import numpy as np
import numpy.typing as npt

from fishrt_engines import Array, Engine
from fishrt_engines.providers import resolve_provider

from .audio import Pcm, check_pcm, resample
from .bundle import Bundle, embedded_bundle
from .codec import CodecDecoder, CodecEncoder
from .codec_start import read_codec_start
from .context import ContextStore
from .errors import ArgumentError, FishrtError, UnfinishedError
from .generate import DualAR
from .graphs import BundleGraphs
from .loudness import Loudness, voice_loudness
from .memory import check_memory, estimate, memory_errors
from .metrics import rtf
from .prepared import prepared_path, read_prepared, write_prepared
from .prompt import PromptBuilder
from .render import Models, render
from .request import Request, check_arguments, check_type, hints_at_sampling
from .sampling import Ints, Sampling
from .speech import AudioChunk, PieceInfo, Progress, Speech, SpeechInfo, Timings
from .speech_warnings import piece_warnings, text_warnings
from .stream import AsyncSpeechStream, SpeechStream, growing_chunks
from .text import check_speakers, speaker_turns
from .tokenizer import Tokenizer
from .voices import Voice, VoiceStore, bundle_store, bundle_voices, find_voice, user_folder

log = logging.getLogger(__name__)

VERIFIED_BYTES = 64_000_000
"""Bundles up to this size are hashed whenever they are loaded: a fraction of a second. That covers the embedded voice. A bundle
of gigabytes would take longer to hash than to open: `fishrt inspect --verify` is there for it."""

_KEPT_LEVELS = 64

VoiceLike = Voice | str
"""A voice, or the name of one: of the user's, else of the bundle's."""


class TTS:
    """A bundle, ready to speak.

    Several threads may use it; each request has its own state. Requests at the same time give the same codes as one after the
    other, and share the processor: they end together, not sooner. In a `with` block, its graphs are released at the end.
    """

    def __init__(self, bundle: Bundle, engines: Mapping[str, Engine], voices: Path | str | VoiceStore | None = None) -> None:
        """engines: by the roles of the manifest's graphs. voices: see `load`, which is the usual way."""
        self.bundle = bundle
        self._own = voices if isinstance(voices, VoiceStore) else VoiceStore(user_folder() if voices is None else voices)
        self._loaded: dict[tuple[str, str], tuple[Hashable, Voice]] = {}
        self._prepared: dict[str, Voice] = {}
        self._levels: dict[bytes, Loudness | None] = {}
        self._engines: Mapping[str, Engine] | None = engines
        self._contexts = ContextStore()

    @classmethod
    def load(
        cls,
        bundle: str | Path | Bundle | None = None,
        *,
        provider: str = "auto",
        threads: int | None = None,
        voices: Path | str | VoiceStore | None = None,
    ) -> TTS:
        """Opens a bundle; None means the embedded one. Its graphs are opened when they are first needed.

        provider: "auto", or one of `fishrt doctor`'s. threads: for each graph; None means the physical cores. voices: the folder
        of the user's own voices, where `fishrt voice add` keeps them; None means the same as for the command.
        The files of a bundle up to VERIFIED_BYTES are compared with the hashes of its manifest.
        Raises BundleError and ProviderError here, ArgumentError for an argument of another type, and FishrtError where the memory
        does not suffice; GraphError from the call that first needs a damaged graph.
        """
        check_type("bundle", bundle, (str, Path, Bundle, type(None)), "the path of a bundle's folder")
        check_type("provider", provider, str, 'a name such as "cpu"')
        check_type("voices", voices, (str, Path, VoiceStore, type(None)), "a folder of voices")
        if threads is not None and (not isinstance(threads, Integral) or threads < 1):
            raise ArgumentError(f"threads is {threads!r}", hint="it must be a whole number of at least 1, or None")
        if not isinstance(bundle, Bundle):
            bundle = Bundle.load(embedded_bundle() if bundle is None else bundle)
        if bundle.manifest.total_bytes <= VERIFIED_BYTES:
            bundle.verify()
        name = resolve_provider(provider)
        if name == "tensorrt":
            from .plans import within_plans

            bundle = within_plans(bundle)
        else:
            check_memory(estimate(bundle.manifest).speaking, f"speaking with {bundle.manifest.name}")
        log.info("%s from %s, provider %s", bundle.manifest.name, bundle.path, name)
        return cls(bundle, BundleGraphs(bundle, name, threads), voices)

    def close(self) -> None:
        """Release the graphs and what was kept of voices. Requests that run end normally; new ones raise FishrtError."""
        self._engines = None
        self._contexts = ContextStore()

    def __enter__(self) -> TTS:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def __repr__(self) -> str:
        provider = "closed" if self._engines is None else f"provider={self.provider!r}"
        return f"TTS(bundle={self.bundle.manifest.name!r}, {provider}, {self.sample_rate / 1000:g} kHz)"

    @property
    def engines(self) -> Mapping[str, Engine]:
        """The graphs by role. One that is asked for is opened, if it is not open yet. Raises FishrtError after `close`."""
        if self._engines is None:
            raise FishrtError("this TTS is closed", hint="load the bundle again with TTS.load")
        return self._engines

    @property
    def provider(self) -> str:
        """The execution provider that runs the graphs. Raises FishrtError after `close`."""
        return self.engines.provider if isinstance(self.engines, BundleGraphs) else self.engines["slow_ar"].provider

    @property
    def sample_rate(self) -> int:
        """Of all speech, in Hz."""
        return self.bundle.manifest.codec.sample_rate

    @hints_at_sampling
    def speak(
        self,
        text: str,
        *,
        voice: VoiceLike | Sequence[VoiceLike] | None = None,
        sampling: Sampling | None = None,
        seed: int | None = None,
        max_frames: int | None = None,
        system: str | None = None,
        volume: float = 1.0,
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
        system: takes the place of the model's usual instruction. volume: a factor on all samples, 0.01 to 10. Where one voice
        speaks, it is brought to the loudness that all voices have. upstream_compat: upstream's behaviour to the letter, without
        that.

        A piece that the model left silent, or that a limit cut off, is a warning in `info`, and in the log.

        Raises PromptError for text that cannot be spoken or is too long with its references, or a system text that the model does
        not take; VoiceError for a voice that is unknown or not this bundle's; SamplingError for a bad limit or seed (also for one
        that is no whole number), or a repetition penalty that the model does not have; ArgumentError for an argument of another
        type; FishrtError if the model says nothing at all, or draws codes that have no sound, or memory does not suffice; such an
        error in a later piece of the text is an UnfinishedError, whose `speech` is the part before it.
        """
        accepted = time.perf_counter()
        request = self._request(text, voice, sampling, seed, max_frames, system, volume, upstream_compat)
        stream = self._stream(request, accepted, progress, lambda _, most: itertools.repeat(most))
        chunks: list[AudioChunk] = []
        try:
            for chunk in stream:
                chunks.append(chunk)
        except FishrtError as error:
            if not sum(map(len, chunks)):
                raise
            raise UnfinishedError(error, self._joined(chunks, stream.info)) from error
        stream.info.check_spoken()
        return self._joined(chunks, stream.info)

    def _joined(self, chunks: Sequence[AudioChunk], info: SpeechInfo) -> Speech:
        codes = np.concatenate([c.codes for c in chunks], axis=1)
        return Speech(np.concatenate([c.pcm for c in chunks]), self.sample_rate, codes, info)

    @hints_at_sampling
    def stream(
        self,
        text: str,
        *,
        voice: VoiceLike | Sequence[VoiceLike] | None = None,
        sampling: Sampling | None = None,
        seed: int | None = None,
        max_frames: int | None = None,
        system: str | None = None,
        volume: float = 1.0,
        upstream_compat: bool = False,
        progress: Callable[[Progress], None] | None = None,
    ) -> SpeechStream:
        """As `speak`, in chunks while frames are drawn: short ones first, see `growing_chunks`.

        A piece for which the model said nothing has one chunk, which is empty. What is wrong with the request is raised here, not
        at the first chunk.
        """
        accepted = time.perf_counter()
        request = self._request(text, voice, sampling, seed, max_frames, system, volume, upstream_compat)
        return self._stream(request, accepted, progress, growing_chunks)

    @hints_at_sampling
    def astream(
        self,
        text: str,
        *,
        voice: VoiceLike | Sequence[VoiceLike] | None = None,
        sampling: Sampling | None = None,
        seed: int | None = None,
        max_frames: int | None = None,
        system: str | None = None,
        volume: float = 1.0,
        upstream_compat: bool = False,
        progress: Callable[[Progress], None] | None = None,
    ) -> AsyncSpeechStream:
        """As `stream`, for `async for`: chunks are computed in a thread, and the event loop goes on.

        What is wrong with the request is raised when the first chunk is awaited. `progress` is called in that thread.
        """
        return AsyncSpeechStream(
            lambda: self.stream(
                text,
                voice=voice,
                sampling=sampling,
                seed=seed,
                max_frames=max_frames,
                system=system,
                volume=volume,
                upstream_compat=upstream_compat,
                progress=progress,
            )
        )

    def encode(self, pcm: Pcm, rate: int) -> Ints:
        """pcm: float [samples], mono, −1..1, at `rate` Hz → codes int64 [K, frames]. Raises AudioError."""
        check_pcm(pcm, rate)
        codec = self.bundle.manifest.codec
        with memory_errors():
            resampled = resample(pcm.astype(np.float32, copy=False), rate, codec.sample_rate)
            return CodecEncoder(self.engines["codec_encode"], codec).encode(resampled)

    def decode(self, codes: npt.NDArray[np.integer], *, upstream_compat: bool = False) -> Pcm:
        """Codes of any integer type, [k, frames] or [1, k, frames] → pcm float32 [samples] at `sample_rate`.

        With fewer rows than codebooks the sound is coarser. Raises VoiceError for codes that are not this codec's.
        """
        with memory_errors():
            return self._decoder().decode(codes, upstream_compat=upstream_compat)

    @property
    def voices(self) -> tuple[str, ...]:
        """Names of the user's voices, then of the bundle's. Raises VoiceError if the user's cannot be read."""
        return tuple(dict.fromkeys((*self._own.list(), *bundle_voices(self.bundle))))

    @property
    def default_voice(self) -> str | None:
        """The bundle's voice that speaks when none is asked for; None: the model's own choice."""
        return self.bundle.manifest.voices.default if self.bundle.manifest.voices else None

    def voice(self, name: str) -> Voice:
        """Return a voice of the user's, else of the bundle's. Raises VoiceError for an unknown name or damaged files.

        A recording is encoded when it is first used with this codec.
        """
        return self._load_voice(find_voice(name, self._own, self.bundle), name)

    def _load_voice(self, store: VoiceStore, name: str) -> Voice:
        """The voice as it was loaded before, unless its files have changed."""
        key = (str(store), name)
        kept = self._loaded.get(key)
        if kept is None or kept[0] != store.stamp(name):
            voice = store.load(name, self)
            kept = self._loaded[key] = (store.stamp(name), voice)  # loading may keep what it computed
        return kept[1]

    def loudness(self, codes: Ints) -> Loudness | None:
        """Return the loudness of a voice, codes int64 [k, frames], as the codec speaks it; None for silence."""
        key = codes.tobytes()
        if key not in self._levels:
            with memory_errors():
                if len(self._levels) >= _KEPT_LEVELS:
                    self._levels.clear()
                self._levels[key] = voice_loudness(self._decoder(), codes, self.bundle.manifest.codec)
        return self._levels[key]

    def check_transcript(self, text: str, what: str) -> None:
        """Check that the model can read a transcript; `what` names it. Raises PromptError."""
        self._prompts.check_transcript(text, what)

    def is_prepared(self, folder: Path) -> bool:
        """Whether `prepare` wrote into the folder of a voice, for this bundle."""
        return prepared_path(folder, self.bundle.manifest.identity("slow_ar")).is_file()

    def prepare(self, voice: VoiceLike, folder: Path | None = None) -> None:
        """Reads a voice, so that requests with it alone, and no system text of their own, start at their text.

        Requests do so by themselves when they meet a voice for the first time, and remember the last few. folder: take what the
        slow AR made of the voice from there, see `prepared.py`; write it there if it is not there yet.
        Raises VoiceError for a voice that is unknown or not this bundle's, OutputError.
        """
        head = self._prompts.start(self._voices(voice, ""), None, upstream_compat=False).head
        graph = self.bundle.manifest.identity("slow_ar")
        with memory_errors():
            slow = self.engines["slow_ar"]
            saved = None if folder is None else read_prepared(folder, graph, head, slow.spec)
            if saved is not None:
                self._contexts.add(head, saved)
                return
            saved = self._contexts.context(slow, head).save()
        if folder is not None:
            write_prepared(folder, graph, head, saved)

    @cached_property
    def _prompts(self) -> PromptBuilder:
        manifest = self.bundle.manifest
        return PromptBuilder(Tokenizer.load(self.bundle.file(manifest.tokenizer)), manifest.language_model)

    @cached_property
    def _codec_start(self) -> Mapping[str, Array]:
        return read_codec_start(self.bundle)

    def _decoder(self) -> CodecDecoder:
        return CodecDecoder(self.engines["codec_decode"], self.bundle.manifest.codec, self._codec_start)

    def _request(
        self,
        text: str,
        voice: VoiceLike | Sequence[VoiceLike] | None,
        sampling: Sampling | None,
        seed: int | None,
        max_frames: int | None,
        system: str | None,
        volume: float,
        upstream_compat: bool,
    ) -> Request:
        """Everything of a request that can be checked before the graphs run."""
        manifest = self.bundle.manifest
        provider = self.provider
        codec = manifest.codec
        check_arguments(text, sampling, seed, max_frames, system, volume, codec)
        pieces = self._prompts.split(text, upstream_compat=upstream_compat)
        voices = self._voices(voice, text)
        if voices and not upstream_compat:
            check_speakers(text, [v.transcript for v in voices])
        conversation = self._prompts.start(voices, system, upstream_compat=upstream_compat)
        for piece in pieces:
            conversation.user(piece)  # raises what would else be raised when it is its turn
        return Request(
            pieces=pieces,
            voices=tuple(v.name for v in voices),
            conversation=conversation,
            sampling=(Sampling() if sampling is None else sampling).resolve(manifest.language_model.sampling),
            seed=secrets.randbits(32) if seed is None else int(seed),
            max_frames=codec.max_frames if max_frames is None else int(max_frames),
            upstream_compat=upstream_compat,
            volume=float(volume),
            levelled=voices[0] if len(voices) == 1 and not upstream_compat else None,
            provider=provider,
            warnings=[*text_warnings(text, len(voices), manifest)],
        )

    def _voices(self, voice: VoiceLike | Sequence[VoiceLike] | None, text: str) -> list[Voice]:
        built_in = self.bundle.manifest.voices
        if voice is None:
            names = () if built_in is None else built_in.ordered if speaker_turns(text) else (built_in.default,)
            voices = [self._load_voice(bundle_store(self.bundle), name) for name in names]
        else:
            given = voice if isinstance(voice, Sequence) and not isinstance(voice, str) else [voice]
            for v in given:
                check_type("voice", v, (str, Voice), "the name of a voice, a Voice, or a list of them")
            voices = [self.voice(v) if isinstance(v, str) else v for v in given]
            if len(voices) == 1 and isinstance(given[0], str):
                self._take_prepared(given[0], voices[0])
        for v in voices:
            v.check(self.bundle)
        # The codec may have more codebooks than the model.
        return [replace(v, codes=v.codes[: self.bundle.manifest.language_model.num_codebooks]) for v in voices]

    def _take_prepared(self, name: str, voice: Voice) -> None:
        """Start at the text, if `prepare` wrote beside the voice what the slow AR makes of it."""
        folder = find_voice(name, self._own, self.bundle).prepared_folder(name)
        if self._prepared.get(name) is not voice and folder is not None and self.is_prepared(folder):
            self._prepared[name] = voice
            self.prepare(voice, folder)

    def _stream(
        self,
        request: Request,
        accepted: float,
        progress: Callable[[Progress], None] | None,
        sizes: Callable[[int, int], Iterator[int]],
    ) -> SpeechStream:
        """sizes: least and most frames of a useful chunk → frames of each chunk."""
        if progress is not None and not callable(progress):
            raise ArgumentError(f"progress is of type {type(progress).__name__}; a function is expected")
        stop = threading.Event()

        def describe(pieces: tuple[PieceInfo, ...], samples: int, timings: Timings) -> SpeechInfo:
            manifest, audio_s = self.bundle.manifest, samples / self.sample_rate
            return SpeechInfo(
                seed=request.seed,
                sampling=request.sampling,
                voices=request.voices,
                pieces=pieces,
                frames=sum(piece.frames for piece in pieces),
                audio_s=audio_s,
                timings=timings,
                rtf=rtf(timings.compute_s, audio_s) if audio_s else None,
                provider=request.provider,
                bundle=manifest.name,
                bundle_sha256=hashlib.sha256(manifest.to_json().encode()).hexdigest(),
                warnings=(*request.warnings, *piece_warnings(pieces, len(request.pieces))),
            )

        chunks = render(request, lambda: self._models(request), sizes, progress, stop, accepted)
        return SpeechStream(chunks, describe, stop, request.warnings)

    def _models(self, request: Request) -> Models:
        """Open the graphs that a request needs, and measure its voice if that was not done yet."""
        voice, manifest = request.levelled, self.bundle.manifest
        model = DualAR(self.engines["slow_ar"], self.engines["fast_ar"], manifest.language_model)
        decoder = self._decoder()
        loudness = voice and (voice.loudness or self.loudness(voice.codes))
        return Models(model, decoder, manifest.codec, self._contexts, request.volume * (loudness.gain if loudness else 1.0))
