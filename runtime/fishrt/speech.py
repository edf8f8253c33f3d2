"""What a request gives: chunks of audio while it runs, the whole speech at the end, and what it took."""

from __future__ import annotations

import asyncio
import base64
import itertools
import logging
import threading
from collections.abc import AsyncIterator, Callable, Generator, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from .audio import Pcm
from .encode import encode_audio, write_audio
from .errors import FishrtError
from .generate import StopReason
from .sampling import Ints, Sampling
from .text import excerpt

log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class Progress:
    """How far a request is; passed to the `progress` function after every frame.

    Attributes:
        piece: number of the piece of text that is being spoken, 0-based.
        pieces: how many pieces of text there are.
        frames: of all pieces so far.
        audio_s: seconds of speech in these frames.
        elapsed_s: seconds since the first piece was begun.
    """

    piece: int
    pieces: int
    frames: int
    audio_s: float
    elapsed_s: float


@dataclass(frozen=True, slots=True)
class Timings:
    """Seconds spent on a chunk, or their sums over a request.

    Attributes:
        load_s: opening graphs that this request was the first to need. Not counted in the RTF.
        language_model_s: prompt, prefill, and drawing all frames.
        codec_s: codes to waveform.
        ttfa_s: request accepted → first chunk with sound; None for any other chunk.
    """

    load_s: float
    language_model_s: float
    codec_s: float
    ttfa_s: float | None

    @property
    def compute_s(self) -> float:
        """Return the seconds of all but the loading."""
        return self.language_model_s + self.codec_s


@dataclass(frozen=True, slots=True, eq=False)
class AudioChunk:
    """A part of the speech of one piece of text; its length is the number of samples. Chunks follow each other without a gap.

    Attributes:
        pcm: float32 [samples], mono, −1..1; maybe empty.
        sample_rate: Hz.
        codes: int64 [K, frames], those drawn since the chunk before. Where the codec looks ahead, the end of their sound comes
            later.
        piece: number of the piece of text, 0-based.
        text: the piece.
        stop_reason: None but for the last chunk of a piece: "end" when the model had finished; anything else says that it was
            cut off.
        seed: of the whole request.
        timings: of this chunk.
    """

    pcm: Pcm
    sample_rate: int
    codes: Ints
    piece: int
    text: str
    stop_reason: StopReason | None
    seed: int
    timings: Timings

    @property
    def duration_s(self) -> float:
        """Return the seconds of sound."""
        return len(self.pcm) / self.sample_rate

    def __len__(self) -> int:
        return len(self.pcm)

    def __repr__(self) -> str:
        ends = "" if self.stop_reason is None else f", {self.stop_reason}"
        return f"<AudioChunk {self.duration_s:.2f} s, {_khz(self.sample_rate)}, piece {self.piece}{ends}>"


@dataclass(frozen=True, slots=True)
class PieceInfo:
    """How one piece of text ended.

    Attributes:
        text: the piece.
        frames: how many were drawn for it; 0 where the model said nothing.
        stop_reason: "end" when the model had finished; anything else says that it was cut off.
    """

    text: str
    frames: int
    stop_reason: StopReason


@dataclass(frozen=True, slots=True)
class SpeechInfo:
    """What was used, and what it took: enough to repeat a request.

    Attributes:
        seed: of all draws.
        sampling: with the bundle's defaults for settings that were not given.
        voices: names of those that spoke; the bundle's own where none was asked for.
        pieces: how each piece of text ended.
        frames: of all pieces.
        audio_s: seconds of speech.
        timings: sums over the request.
        rtf: compute seconds ÷ audio seconds; below 1 is faster than real time. None: nothing was said.
        provider: execution provider that ran the graphs.
        bundle: its name.
        bundle_sha256: of its manifest, which holds the hashes of its files.
        warnings: what may be wrong with the speech, each once: pieces that were cut off or not spoken, text that the model does
            not read reliably.
    """

    seed: int
    sampling: Sampling
    voices: tuple[str, ...]
    pieces: tuple[PieceInfo, ...]
    frames: int
    audio_s: float
    timings: Timings
    rtf: float | None
    provider: str
    bundle: str
    bundle_sha256: str
    warnings: tuple[str, ...] = ()

    @property
    def stop_reasons(self) -> tuple[StopReason, ...]:
        """Return one for each piece of text."""
        return tuple(piece.stop_reason for piece in self.pieces)

    def check_spoken(self) -> None:
        """Raise FishrtError if the model said nothing at all."""
        if self.frames or not self.pieces:
            return
        said = f'"{excerpt(self.pieces[0].text)}"' if len(self.pieces) == 1 else "anything"
        if self.pieces[0].stop_reason != "end":
            raise FishrtError(f"the limit leaves no frame for {said}", hint="allow more frames")
        raise FishrtError(f"the model ended before it said {said}", hint="try another seed, voice or text")


@dataclass(frozen=True, slots=True, eq=False)
class Speech:
    """A whole text, spoken; its length is the number of samples. A notebook shows it as an audio player.

    Attributes:
        pcm: float32 [samples], mono, −1..1.
        sample_rate: Hz.
        codes: int64 [K, frames].
        info: what was used, what it took, and warnings.
    """

    pcm: Pcm
    sample_rate: int
    codes: Ints
    info: SpeechInfo

    @property
    def duration_s(self) -> float:
        """Return the seconds of sound."""
        return len(self.pcm) / self.sample_rate

    def save(self, path: str | Path, format: str | None = None) -> None:
        """Write the speech to a file, which is replaced if it exists: wav, flac, ogg, opus, mp3, …

        format: name of the format; None means the one that the ending of the path names.
        Raises AudioError for an unknown format, OutputError where the file cannot be written.
        """
        write_audio(path, self.pcm, self.sample_rate, format)

    def __len__(self) -> int:
        return len(self.pcm)

    def __repr__(self) -> str:
        voices = self.info.voices
        voice = f"voice{'s' if voices[1:] else ''} {', '.join(voices)}" if voices else "no voice"
        return f"<Speech {self.duration_s:.2f} s, {_khz(self.sample_rate)}, {voice}, seed {self.info.seed}>"

    def _repr_html_(self) -> str:
        data = base64.b64encode(encode_audio(self.pcm, self.sample_rate, "wav")).decode()
        return f'<audio controls src="data:audio/wav;base64,{data}"></audio>'


class Stopped(Exception):  # noqa: N818
    """A stream was closed while its next chunk was computed."""


class SpeechStream(Iterator[AudioChunk]):
    """The chunks of a request. Each is computed when it is asked for, so that a slow consumer costs no memory."""

    def __init__(
        self,
        chunks: Generator[AudioChunk],
        describe: Callable[[tuple[PieceInfo, ...], int, Timings], SpeechInfo],
        stop: threading.Event,
        warnings: Sequence[str] = (),
    ) -> None:
        """chunks: raise Stopped soon after `stop` is set. describe: pieces, samples given and sums of the timings → `info`.

        warnings: those of `info` that are known from the start.
        """
        self._chunks, self._describe, self._stop = chunks, describe, stop
        self._running = threading.Lock()
        self._pieces: list[PieceInfo] = []
        self._frames = self._samples = 0
        self._timings = Timings(0.0, 0.0, 0.0, None)
        self._warned = set(warnings)
        for warning in warnings:
            log.warning(warning)

    def __next__(self) -> AudioChunk:
        with self._running:
            try:
                chunk = next(self._chunks)
            except StopIteration:
                self._log_end()
                raise
            except Stopped:
                raise StopIteration from None
            self._count(chunk)
            return chunk

    def _count(self, chunk: AudioChunk) -> None:
        spent, sums = chunk.timings, self._timings
        self._timings = Timings(
            sums.load_s + spent.load_s,
            sums.language_model_s + spent.language_model_s,
            sums.codec_s + spent.codec_s,
            spent.ttfa_s if sums.ttfa_s is None else sums.ttfa_s,
        )
        self._samples += len(chunk.pcm)
        self._frames += chunk.codes.shape[1]
        if chunk.stop_reason is not None:
            self._pieces.append(PieceInfo(chunk.text, self._frames, chunk.stop_reason))
            self._frames = 0

    def _log_end(self) -> None:
        """Log how long the request took, and what came to light while the text was spoken."""
        if self._stop.is_set():
            return
        self._stop.set()
        info = self.info
        spent = info.timings
        log.info(
            "spoke %d pieces: %.2f s of speech in %.2f s (language model %.2f s, codec %.2f s); graphs were opened in %.2f s",
            *(len(info.pieces), info.audio_s, spent.compute_s, spent.language_model_s, spent.codec_s, spent.load_s),
        )
        for warning in info.warnings:
            if warning not in self._warned:
                log.warning(warning)

    def close(self) -> None:
        """End the request. Another thread that waits for a chunk gets none: the frame that is being drawn is the last."""
        self._stop.set()
        if self._running.acquire(blocking=False):
            try:
                self._chunks.close()
            finally:
                self._running.release()

    @property
    def info(self) -> SpeechInfo:
        """Describe the chunks given so far; a piece counts when its last chunk was given."""
        return self._describe(tuple(self._pieces), self._samples, self._timings)


class AsyncSpeechStream(AsyncIterator[AudioChunk]):
    """The chunks of a request, for an event loop: each is computed in a thread when it is awaited.

    A stream that is closed, or whose wait for a chunk is cancelled, stops at once: the frame that is being drawn is the last.
    """

    def __init__(self, begin: Callable[[], SpeechStream]) -> None:
        """begin: starts the request; called in a thread when the first chunk is awaited."""
        self._begin = begin
        self._stream: SpeechStream | None = None
        self._closed = False

    async def __anext__(self) -> AudioChunk:
        try:
            chunk = await asyncio.to_thread(self._next)
        except asyncio.CancelledError:
            self._close()
            raise
        if chunk is None:
            raise StopAsyncIteration
        return chunk

    async def aclose(self) -> None:
        """End the request."""
        self._close()

    @property
    def info(self) -> SpeechInfo | None:
        """Describe the chunks given so far; None before the first was awaited."""
        return None if self._stream is None else self._stream.info

    def _next(self) -> AudioChunk | None:
        if self._stream is None and not self._closed:
            self._stream = self._begin()
        if self._stream is None:
            return None
        if self._closed:  # while the request was begun
            self._stream.close()
        return next(self._stream, None)

    def _close(self) -> None:
        self._closed = True
        if self._stream is not None:
            self._stream.close()


def piece_warnings(pieces: Sequence[PieceInfo], of: int) -> list[str]:
    """Return a warning for each way in which pieces ended early, with the number of pieces and the first of them.

    of: how many pieces of text there are.
    """
    ways = {
        "cut off by the limit of frames (max_frames)": [p.frames > 0 and p.stop_reason == "max_frames" for p in pieces],
        "cut off at the end of the model's context (max_seq_len)": [
            p.frames > 0 and p.stop_reason == "max_seq_len" for p in pieces
        ],
        "not spoken: the model ended at once": [p.frames == 0 and p.stop_reason == "end" for p in pieces],
        "not spoken: the limit leaves no frame": [p.frames == 0 and p.stop_reason != "end" for p in pieces],
    }
    warnings = []
    for way, concerned in ways.items():
        if count := sum(concerned):
            first = concerned.index(True)
            who = (
                f"{count:,} of {of:,} pieces were"
                if count > 1
                else f"piece {first + 1:,} of {of:,} was"
                if of > 1
                else "the text was"
            )
            which = f"; the first is piece {first + 1:,}" if count > 1 else ""
            warnings.append(f'{who} {way}{which}: "{excerpt(pieces[first].text)}"')
    return warnings


def growing_chunks(least: int, most: int) -> Iterator[int]:
    """Frames of each chunk of a stream: four of each size, then twice as many, up to `most`.

    When a chunk is ready, the sound given before must still last. After four chunks of n frames, at a compute time of r for each
    second of sound, at least n + 3n(1 − r) frames of sound are left; the next chunk of 2n takes 2nr. So a stream that is played
    while it is made does not run dry up to r = 0.8.
    """
    size = least
    while size < most:
        yield from itertools.repeat(size, 4)
        size *= 2
    yield from itertools.repeat(most)


def _khz(rate: int) -> str:
    return f"{rate / 1000:g} kHz"
