"""Rendering of a task: frames of codes for one piece of text after the other, decoded into audio chunks as they come."""

from __future__ import annotations

import itertools
import threading
import time
from collections.abc import Callable, Generator, Iterator, Sequence
from dataclasses import dataclass

import numpy as np

from .arrays import Ints
from .bundle.features import Codec, LanguageModel
from .bundle.memory import memory_errors
from .codec import CodecDecoder, clamp_codes
from .errors import FishrtError
from .language_model.batch import Batch, DualAR, Row
from .language_model.context import ContextStore
from .language_model.generate import generate
from .language_model.sampling import SeededNoise
from .request import Task
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


def render(
    task: Task,
    open_models: Callable[[], Models],
    sizes: Callable[[int, int], Iterator[int]],
    progress: Callable[[Progress], None] | None,
    stop: threading.Event,
    accepted: float,
) -> Generator[AudioChunk]:
    """Yield the audio chunks of a task; each piece of text begins with a fresh state of the codec.

    open_models: called for the first chunk. sizes: least and most frames of a useful chunk → frames of each chunk. accepted: time
    of the request, in seconds of `time.perf_counter`.
    Raises Stopped at the first frame after `stop` is set.
    """
    begun = time.perf_counter()
    with memory_errors():
        models = open_models()
    load_s, heard, clipped = time.perf_counter() - begun, False, 0
    lm, decoder, codec, head = models.language_model.language_model, models.decoder, models.codec, task.conversation.head
    stream, lengths = decoder.stream(task.quirks), sizes(*decoder.chunk_frames)
    noise, frames, begun = SeededNoise(task.seed), 0, time.perf_counter()
    started = begun  # reading the voices counts as drawing of the first chunk
    with memory_errors():
        batch = Batch(models.language_model, 1, models.contexts)
    for piece, text in enumerate(task.pieces):
        prompt = task.conversation.user(text)
        row = Row(lm, prompt, task.sampling, noise, head=head.shape[1], max_columns=task.max_frames, quirks=task.quirks)
        columns = generate(batch, row, slot=0 if piece else None)
        while row.stop_reason is None:
            drawn = []
            with memory_errors():
                for column in itertools.islice(columns, next(lengths)):
                    if stop.is_set():
                        raise Stopped
                    frames += 1
                    if progress is not None:
                        audio_s, elapsed_s = frames / codec.frame_rate, time.perf_counter() - begun
                        progress(Progress(piece, len(task.pieces), frames, audio_s, elapsed_s))
                    drawn.append(column)
                # Later prompts have the columns as drawn; the codec and the caller get codes that the codec has.
                if row.stop_reason is not None:
                    task.conversation.assistant(row.drawn)
                codes = spoken_codes(drawn, lm, codec)
            decoding = time.perf_counter()
            with memory_errors():
                pcm = stream.push(codes, last=row.stop_reason is not None) if drawn else stream.flush()
                if models.gain != 1:
                    pcm = pcm * np.float32(models.gain)
                    clipped += int((np.abs(pcm) > 1).sum())
                    pcm = np.clip(pcm, -1, 1)
            now = time.perf_counter()
            first = len(pcm) > 0 and not heard
            timings = Timings(load_s, decoding - started, now - decoding, now - accepted if first else None)
            heard, load_s = heard or first, 0.0
            yield AudioChunk(pcm, codec.sample_rate, codes, piece, text, row.stop_reason, task.seed, timings)
            started = time.perf_counter()
    if clipped:
        task.warnings.append(f"{clipped:,} samples are clipped: use a smaller volume than {task.volume:g}")


def spoken_codes(columns: Sequence[Ints], lm: LanguageModel, codec: Codec) -> Ints:
    """Return the codes int64 [C, frames] of columns int64 [1 + C], as the codec has them. Raises FishrtError for padding."""
    codes = np.stack(columns, axis=1)[1:] - lm.code_offset if columns else np.zeros((lm.num_codebooks, 0), np.int64)
    if (codes < 0).any():
        raise FishrtError("the model drew padding instead of a code, which has no sound", hint="try another seed")
    return clamp_codes(codes, codec)
