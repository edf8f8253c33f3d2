"""Text to speech with a bundle: its graphs, its voices, its codec, and the model of its kind.

    Request ─► Model.job ─► Job: pieces of text ─► turns: frames ─► the codec: pcm ─► AudioChunk
                            kinds/                                                    speaking/

`stream()` yields chunks while frames are drawn; `speak()` drains the same generator, so that the two cannot drift apart.
"""

from __future__ import annotations

import hashlib
import logging
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from functools import cached_property
from numbers import Integral
from pathlib import Path
from typing import TYPE_CHECKING, Any, Unpack

import numpy as np

from fishrt_engines import Array, Engine
from fishrt_engines.providers import resolve_provider

from .arrays import Pcm, Sound
from .audio.resample import resample
from .bundle.codec_start import read_codec_start
from .bundle.features import USUAL, Quirks
from .bundle.folder import Bundle, embedded_bundle
from .bundle.graphs import SMALL_BYTES, BundleGraphs
from .bundle.memory import check_memory, estimate, memory_errors
from .codec import CodecDecoder, CodecEncoder, NoSound
from .errors import ArgumentError, FishrtError
from .kinds.model import Model
from .request import Options, Request, VoiceLike, check_type
from .speaking.job import ChunkSizes, Job, Task
from .speaking.stream import AsyncSpeechStream, SpeechStream, chunk_sizes, whole_chunks
from .speaking.turns import MakeTurns, Turns
from .speech import Progress, Speech
from .voices.known import KnownVoices
from .voices.loudness import Loudness, voice_loudness
from .voices.store import VoiceStore, user_folder
from .voices.voice import Voice

if TYPE_CHECKING:
    from .speaking.scheduler import ScheduledStream, Scheduler

log = logging.getLogger(__name__)

_KEPT_LEVELS = 64


def _kind(name: str) -> type[Model]:
    """Return the kind of model of this name. What the other kind needs is not imported: a start takes notice of it."""
    if name == "dual_ar":
        from .kinds.dual_ar import DualARModel

        return DualARModel
    from .kinds.diffusion import DiffusionModel

    return DiffusionModel


class TTS:
    """A bundle, ready to speak.

    Several threads may use it; each request has its own state. Requests at the same time give the same codes as one after the
    other, and share the processor: they end together, not sooner. In a `with` block, its graphs are released at the end.
    """

    def __init__(self, bundle: Bundle, engines: Mapping[str, Engine], voices: Path | str | VoiceStore | None = None) -> None:
        """Make a TTS from open engines, by the role of their graph; `load` is the usual way. voices: see `load`."""
        self.bundle = bundle
        self.store = voices if isinstance(voices, VoiceStore) else VoiceStore(user_folder() if voices is None else voices)
        """The user's own voices."""
        self._known = KnownVoices(self.store, self)
        self._model = _kind(bundle.manifest.model.kind)(self, self._known)
        self._levels: dict[bytes, Loudness | None] = {}
        self._engines: Mapping[str, Engine] | None = engines
        self._making = threading.Lock()
        self._scheduler: Scheduler | None = None

    @classmethod
    def load(
        cls,
        bundle: str | Path | Bundle | None = None,
        *,
        provider: str = "auto",
        threads: int | None = None,
        voices: Path | str | VoiceStore | None = None,
    ) -> TTS:
        """Open a bundle; None means the embedded one. Its graphs are opened when they are first needed.

        provider: "auto", or a provider that `fishrt doctor` lists. threads: CPU threads for each graph; None means the physical
        cores. voices: the folder of the user's own voices, where `fishrt voice add` keeps them; None means the default folder.
        The files of a bundle of up to SMALL_BYTES are compared with the hashes in its manifest; `fishrt inspect --verify` does
        this with any.
        Raises BundleError and ProviderError; ArgumentError for an argument of another type; FishrtError if there is too little
        memory. The call that first needs a damaged graph raises GraphError.
        """
        check_type("bundle", bundle, (str, Path, Bundle, type(None)), "the path of a bundle's folder")
        check_type("provider", provider, str, 'a name such as "cpu"')
        check_type("voices", voices, (str, Path, VoiceStore, type(None)), "a folder of voices")
        if threads is not None and (not isinstance(threads, Integral) or threads < 1):
            raise ArgumentError(f"threads is {threads!r}", hint="it must be a whole number of at least 1, or None")
        if not isinstance(bundle, Bundle):
            bundle = Bundle.load(embedded_bundle() if bundle is None else bundle)
        if bundle.manifest.total_bytes <= SMALL_BYTES:
            bundle.verify()
        name = resolve_provider(provider)
        if name == "tensorrt":
            from .bundle.graphs import within_plans

            bundle = within_plans(bundle)
        else:
            check_memory(estimate(bundle.manifest).speaking, f"speaking with {bundle.manifest.name}")
        log.info("%s from %s, provider %s", bundle.manifest.name, bundle.path, name)
        return cls(bundle, BundleGraphs(bundle, name, threads), voices)

    def close(self) -> None:
        """Release the graphs and the cached voices. Running requests end normally; new ones raise FishrtError."""
        with self._making:
            if self._scheduler is not None:
                self._scheduler.close(None)
            self._engines = self._scheduler = None
        self._model.forget()

    def __enter__(self) -> TTS:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def __repr__(self) -> str:
        runs = f"provider={self.provider!r}" if self._engines else "closed"
        return f"TTS(bundle={self.bundle.manifest.name!r}, {runs}, {self.sample_rate / 1000:g} kHz)"

    @property
    def engines(self) -> Mapping[str, Engine]:
        """The graphs by role; each is opened when it is first accessed. Raises FishrtError after `close`."""
        if self._engines is None:
            raise FishrtError("this TTS is closed", hint="load the bundle again with TTS.load")
        return self._engines

    @property
    def provider(self) -> str:
        """The execution provider that runs the graphs. Raises FishrtError after `close`."""
        return self.engines.provider if isinstance(self.engines, BundleGraphs) else next(iter(self.engines.values())).provider

    @property
    def bundle_sha256(self) -> str:
        """SHA-256 of the bundle's manifest, which holds the hashes of its files."""
        return self._model.bundle_sha256

    @property
    def sample_rate(self) -> int:
        """Sample rate of all speech, in Hz."""
        return self.bundle.manifest.codec.sample_rate

    def speak(
        self, text: str | Request, *, progress: Callable[[Progress], None] | None = None, **options: Unpack[Options]
    ) -> Speech:
        """Speak a text, or a `Request`, in which the options then replace fields.

        progress: called after every frame, or every step of a diffusion model.
        options: fields of `Request`, which says more of each:
            voice: Voice, str, or a list of them; default None, the bundle's default voice.
            sampling: Sampling; default None, the bundle's settings.
            seed: int of at least 0; default None, which draws one.
            max_frames: int, frames of each piece of the text; default None, as many as context and codec allow.
            system: str; default None, the model's usual instruction.
            volume: float, a factor on all samples from 0.01 to 10; default 1.0.
            speed: float, a factor on the speaking rate from 0.25 to 4; default 1.0.
            mode: str, "fast", "balanced" or "quality", the chunks of a stream; default balanced.
            upstream_compat: bool, the behaviour of the original to the letter; default False.
            denoising: Denoising, for a diffusion model; default None, the bundle's settings.

        A piece that the model left silent, or that a limit cut off, is a warning in `info`; the log says that there are some.
        Raises PromptError for text that cannot be spoken or is too long with its references, and for a system text that the model
        does not take; VoiceError for a voice that is unknown or not this bundle's; SamplingError for a limit, seed, volume or
        speed outside its range, and for settings that the model does not have; ArgumentError for an argument of another type or
        kind of model; AudioError for a speed without PyAV; FishrtError if the model says nothing at all, draws codes that have no
        sound, or there is too little memory. Such an error in a later piece is an UnfinishedError with the `speech` before it.
        """
        return self._stream(Request.of(text, options), progress, whole_chunks).whole()

    def stream(
        self, text: str | Request, *, progress: Callable[[Progress], None] | None = None, **options: Unpack[Options]
    ) -> SpeechStream:
        """Speak as `speak` does, with its options, in chunks while frames are drawn: short ones first, see `chunk_sizes`.

        Without settings of blocks, a diffusion model streams in blocks, which `speak` does not: see `Denoising.blocks`.
        A piece for which the model said nothing has one empty chunk. The errors of a bad request are raised here, not at the
        first chunk.
        """
        request = Request.of(text, options)
        return self._stream(request, progress, chunk_sizes(request.mode))

    def draw(
        self, text: str | Request, *, progress: Callable[[Progress], None] | None = None, **options: Unpack[Options]
    ) -> Speech:
        """Speak as `speak` does, without the codec: the speech has its codes or latents, and no samples.

        `decode` makes sound of them; that of one voice then has the level of its codes, not the common loudness.
        """
        return self._stream(Request.of(text, {**options, "speed": 1.0}), progress, whole_chunks, sound=False).whole()

    def astream(
        self, text: str | Request, *, progress: Callable[[Progress], None] | None = None, **options: Unpack[Options]
    ) -> AsyncSpeechStream:
        """Speak as `stream` does, with its options, for `async for`: a thread computes the chunks, and the event loop goes on.

        Errors of a request that does not fit the bundle come with the first chunk. `progress` is called in that thread.
        """
        request = Request.of(text, options)
        return AsyncSpeechStream(lambda: self.stream(request, progress=progress))

    def submit(
        self,
        text: str | Request,
        *,
        priority: int = 0,
        timeout_s: float | None = None,
        progress: Callable[[Progress], None] | None = None,
        **options: Unpack[Options],
    ) -> ScheduledStream:
        """Queue a text, or a `Request`, that is spoken together with others; its chunks are for `for` and for `async for`.

        A thread computes the chunks, up to some seconds of sound ahead of the reader. With the same seed the codes are those of
        `speak`, except for the rounding of larger batches. See `Scheduler.submit` and, for the options, `speak`.
        """
        return self.scheduler.submit(Request.of(text, options), priority=priority, timeout_s=timeout_s, progress=progress)

    def speak_many(self, texts: Iterable[str | Request], **options: Unpack[Options]) -> Iterator[Speech]:
        """Speak many texts together, with the options of `speak`, and yield their speeches in order.

        Only as many are begun ahead as are spoken together, so that `texts` may be endless. Raises what `speak` or `texts` raises
        when its turn comes; the speeches before it have been yielded.
        """
        return self.scheduler.speak_many(Request.of(text, options) for text in texts)

    @property
    def scheduler(self) -> Scheduler:
        """What speaks for `submit` and `speak_many`. Raises FishrtError after `close`."""
        with self._making:
            if self._scheduler is None:
                from .speaking.scheduler import Scheduler  # imports asyncio

                _ = self.engines
                self._scheduler = Scheduler(self)
            return self._scheduler

    def encode(self, pcm: Pcm, rate: int) -> Sound:
        """Encode pcm float [samples], mono, −1..1, at `rate` Hz, to codes int64 [K, frames]. Raises AudioError.

        For a diffusion model, return the latents of a voice, float32 [frames, channels].
        """
        from .audio.files import check_pcm

        check_pcm(pcm, rate)
        manifest = self.bundle.manifest
        with memory_errors():
            resampled = resample(pcm.astype(np.float32, copy=False), rate, manifest.codec.sample_rate)
            return self._model.encode(resampled, CodecEncoder(self.engines["codec_encode"], manifest.codec))

    def decode(self, codes: Sound, *, upstream_compat: bool = False) -> Pcm:
        """Decode codes of any integer type, [k, frames] or [1, k, frames], to pcm float32 [samples] at `sample_rate`.

        A codec of latents takes these, float32 [frames, channels]. With fewer rows than codebooks the sound is coarser. Raises
        VoiceError for codes that are not this codec's.
        """
        with memory_errors():
            quirks = Quirks.of(self.bundle.manifest.language_model) if upstream_compat else USUAL
            return self.decoder().decode(codes, quirks=quirks)

    @property
    def voices(self) -> tuple[str, ...]:
        """Names of the user's voices, then of the bundle's. Raises VoiceError if the user's cannot be read."""
        return self._known.names

    @property
    def default_voice(self) -> str | None:
        """The bundle's voice that speaks if a request names none; None: the model chooses a voice by itself."""
        return self.bundle.manifest.voices.default if self.bundle.manifest.voices else None

    def voice(self, name: str) -> Voice:
        """Return a voice of the user, else of the bundle. Raises VoiceError for an unknown name or damaged files.

        A recording is encoded when it is first used with this codec.
        """
        return self._known.voice(name)

    def loudness(self, sound: Sound) -> Loudness | None:
        """Return the loudness of a voice, codes int64 [k, frames] or latents, as the codec speaks it; None for silence."""
        key = hashlib.sha256(sound.tobytes()).digest()
        if key not in self._levels:
            with memory_errors():
                if len(self._levels) >= _KEPT_LEVELS:
                    self._levels.clear()
                self._levels[key] = voice_loudness(self.decoder(), sound, self.bundle.manifest.codec)
        return self._levels[key]

    def check_transcript(self, text: str, what: str) -> None:
        """Check that the model can read a transcript; `what` names it. Raises PromptError."""
        self._model.check_transcript(text, what)

    def count_tokens(self, text: str) -> int:
        """Return the number of tokens of a text as the model reads it, without those around it."""
        return self._model.count_tokens(text)

    def prepared_path(self, folder: Path) -> Path:
        """Return the path of the file that `prepare` writes into the folder of a voice, for this bundle."""
        return self._model.prepared_path(folder)

    def prepare(self, voice: VoiceLike, folder: Path | None = None) -> None:
        """Prefill the slow AR with a voice, so that requests with this voice alone and no system text start at their text.

        The first request with a voice does the same, and the last few voices stay cached. folder: read the keys and values of the
        voice from its file there, or write the file if there is none; see `language_model/context.py`.
        Raises VoiceError for a voice that is unknown or not this bundle's; OutputError if the file cannot be written.
        """
        self._model.prepare(voice, folder)

    @cached_property
    def _codec_start(self) -> Mapping[str, Array]:
        return read_codec_start(self.bundle)

    def decoder(self) -> CodecDecoder:
        """Return the codec's decoder. Raises FishrtError after `close`."""
        return CodecDecoder(self.engines["codec_decode"], self.bundle.manifest.codec, self._codec_start)

    def _stream(
        self, request: Request, progress: Callable[[Progress], None] | None, sizes: ChunkSizes, *, sound: bool = True
    ) -> SpeechStream:
        """Return the stream of a request, whose chunks the reader's thread computes. sound: whether they have samples."""
        job = self.job(request, progress, sizes)
        turns: Turns[Any] | None = None

        def turn() -> None:
            nonlocal turns
            if turns is None:
                begun = time.perf_counter()
                with memory_errors():
                    if sound:
                        make_turns, gain = self.opened(), self.gain(job.task)
                    else:
                        make_turns, gain = self._model.opened(NoSound(self.bundle.manifest.codec)), 1.0
                turns = make_turns(1)
                turns.add(job, gain, time.perf_counter() - begun)
            list(turns.turn())

        return SpeechStream(job, turn)

    def job(self, request: Request, progress: Callable[[Progress], None] | None, sizes: ChunkSizes) -> Job:
        """Return the job of a request after all checks that need no graph."""
        return self._model.job(request, progress, sizes)

    def opened(self) -> MakeTurns:
        """Open the graphs that speaking needs. Return what makes turns for its jobs."""
        if isinstance(self.engines, BundleGraphs):
            self.engines.begin("codec_decode")
        return self._model.opened(self.decoder())

    def gain(self, task: Task) -> float:
        """Return the factor on all samples of a task. It measures the loudness of a voice for which it is unknown."""
        voice = task.levelled
        loudness = voice and (voice.loudness or self.loudness(voice.sound))
        return task.volume * (loudness.gain if loudness else 1.0)
