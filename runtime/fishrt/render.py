"""Rendering of a request: frames of codes for one piece of text after the other, decoded into audio chunks as they come."""

from __future__ import annotations

import itertools
import threading
import time
from collections.abc import Callable, Generator, Iterator
from dataclasses import dataclass

import numpy as np

from .arrays import Ints
from .bundle.features import Codec
from .bundle.memory import memory_errors
from .codec import CodecDecoder, clamp_codes
from .language_model.context import ContextStore
from .language_model.generate import DualAR, Generation, StopReason, generate_frames
from .language_model.sampling import SeededNoise
from .request import Request
from .speech import AudioChunk, Progress, Timings
from .stream import Stopped


@dataclass(frozen=True, slots=True)
class Models:
    """Opened models that a request runs on."""

    language_model: DualAR
    decoder: CodecDecoder
    codec: Codec
    contexts: ContextStore
    gain: float
    """Factor on all samples."""


@dataclass(frozen=True, slots=True)
class _Drawn:
    """Frames that are decoded together."""

    piece: int
    codes: Ints
    """int64 [C, frames], as drawn."""
    stop_reason: StopReason | None
    """None: the piece has more frames."""
    seconds: float
    """Time that the language model took."""


def render(
    request: Request,
    open_models: Callable[[], Models],
    sizes: Callable[[int, int], Iterator[int]],
    progress: Callable[[Progress], None] | None,
    stop: threading.Event,
    accepted: float,
) -> Generator[AudioChunk]:
    """Yield the audio chunks of a request; each piece of text begins with a fresh state of the codec.

    open_models: called for the first chunk. sizes: least and most frames of a useful chunk → frames of each chunk. accepted: time
    of the request, in seconds of `time.perf_counter`.
    Raises Stopped at the first frame after `stop` is set.
    """
    begun = time.perf_counter()
    with memory_errors():
        models = open_models()
    load_s, heard, clipped = time.perf_counter() - begun, False, 0
    decoder, codec = models.decoder, models.codec
    stream = decoder.stream(upstream_compat=request.upstream_compat)
    for drawn in _draw(request, models, sizes(*decoder.chunk_frames), progress, stop):
        begun, last = time.perf_counter(), drawn.stop_reason is not None
        with memory_errors():
            codes = clamp_codes(drawn.codes, codec)
            pcm = stream.push(codes, last=last) if codes.shape[1] else stream.flush()
            if models.gain != 1:
                pcm = pcm * np.float32(models.gain)
                clipped += int((np.abs(pcm) > 1).sum())
                pcm = np.clip(pcm, -1, 1)
        now = time.perf_counter()
        first = len(pcm) > 0 and not heard
        timings = Timings(load_s, drawn.seconds, now - begun, now - accepted if first else None)
        heard, load_s = heard or first, 0.0
        yield AudioChunk(
            pcm, codec.sample_rate, codes, drawn.piece, request.pieces[drawn.piece], drawn.stop_reason, request.seed, timings
        )
    if clipped:
        request.warnings.append(f"{clipped:,} samples are clipped: use a smaller volume than {request.volume:g}")


def _draw(
    request: Request,
    models: Models,
    sizes: Iterator[int],
    progress: Callable[[Progress], None] | None,
    stop: threading.Event,
) -> Iterator[_Drawn]:
    """Yield the frames of all pieces, in chunks of `sizes` frames; the last of each piece is shorter, maybe empty."""
    model = models.language_model
    rate, lm, noise = models.codec.frame_rate, model.language_model, SeededNoise(request.seed)
    total, begun = itertools.count(1), time.perf_counter()
    started = begun  # reading the voices counts as drawing of the first chunk
    with memory_errors():
        context = models.contexts.context(model.slow, request.conversation.head)

    def reported(piece: int, generation: Generation) -> Iterator[Ints]:
        for frame in generation:
            if stop.is_set():
                raise Stopped
            if progress is not None:
                frames = next(total)
                progress(Progress(piece, len(request.pieces), frames, frames / rate, time.perf_counter() - begun))
            yield frame

    for piece, text in enumerate(request.pieces):
        with memory_errors():
            generation = generate_frames(
                model,
                request.conversation.user(text),
                request.sampling,
                noise,
                max_frames=request.max_frames,
                upstream_compat=request.upstream_compat,
                context=context,
            )
        frames = reported(piece, generation)
        while generation.stop_reason is None:
            with memory_errors():
                chunk = list(itertools.islice(frames, next(sizes)))
                codes = np.stack(chunk, axis=1) if chunk else np.zeros((lm.num_codebooks, 0), np.int64)
                if (reason := generation.stop_reason) is not None:
                    # Later prompts have the columns as drawn; the codec and the caller get codes that the codec has.
                    request.conversation.assistant(generation.drawn)
            yield _Drawn(piece, codes, reason, time.perf_counter() - started)
            started = time.perf_counter()
