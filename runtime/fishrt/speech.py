"""What a request gives: chunks of audio while it runs, the whole speech at the end, and what it took."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Generator, Iterator
from dataclasses import dataclass

from .audio import Pcm
from .generate import StopReason
from .sampling import Ints, Sampling


@dataclass(frozen=True, slots=True)
class Progress:
    """How far a request is; told after every frame."""

    piece: int
    """0-based."""
    pieces: int
    frames: int
    """Of all pieces so far."""
    audio_s: float
    """Seconds of speech in these frames."""
    elapsed_s: float
    """Since the first piece was begun."""


@dataclass(frozen=True, slots=True)
class Timings:
    """Seconds spent; a chunk's own, or a request's sums."""

    load_s: float
    """Opening graphs that this request was the first to need. Not counted in the RTF."""
    language_model_s: float
    """Prompt, prefill, and drawing all frames."""
    codec_s: float
    """Codes to waveform."""
    ttfa_s: float | None
    """Request accepted → first chunk with sound; None for any other chunk."""

    @property
    def compute_s(self) -> float:
        """All but the loading."""
        return self.language_model_s + self.codec_s


@dataclass(frozen=True, slots=True, eq=False)
class AudioChunk:
    """A part of the speech of one piece of text. Chunks follow each other without a gap."""

    pcm: Pcm
    """float32 [samples], mono, −1..1; maybe empty."""
    sample_rate: int
    """Hz."""
    codes: Ints
    """int64 [K, frames]: those drawn since the chunk before. Where the codec looks ahead, the end of their sound comes later."""
    piece: int
    """0-based."""
    text: str
    """The piece."""
    stop_reason: StopReason | None
    """None but for the last chunk of a piece: "end" when the model had finished; anything else says that it was cut off."""
    seed: int
    """Of the whole request."""
    timings: Timings


@dataclass(frozen=True, slots=True)
class PieceInfo:
    """How one piece of text ended."""

    text: str
    frames: int
    stop_reason: StopReason
    """"end" when the model had finished; anything else says that it was cut off."""


@dataclass(frozen=True, slots=True)
class SpeechInfo:
    """What was used, and what it took: enough to repeat a request."""

    seed: int
    sampling: Sampling
    """With the bundle's defaults in place of what was not given."""
    voices: tuple[str, ...]
    """Names of those that spoke; the bundle's own where none was asked for."""
    pieces: tuple[PieceInfo, ...]
    frames: int
    audio_s: float
    timings: Timings
    rtf: float | None
    """Compute seconds ÷ audio seconds; below 1 is faster than real time. None: nothing was said."""
    provider: str
    bundle: str
    """Its name."""
    bundle_sha256: str
    """Of its manifest, which holds the hashes of its files."""

    @property
    def stop_reasons(self) -> tuple[StopReason, ...]:
        """One for each piece of text."""
        return tuple(piece.stop_reason for piece in self.pieces)


@dataclass(frozen=True, slots=True, eq=False)
class Speech:
    """A whole text, spoken."""

    pcm: Pcm
    """float32 [samples], mono, −1..1."""
    sample_rate: int
    """Hz."""
    codes: Ints
    """int64 [K, frames]."""
    info: SpeechInfo


class SpeechStream(Iterator[AudioChunk]):
    """The chunks of a request. Each is computed when it is asked for, so that a slow consumer costs no memory."""

    def __init__(
        self,
        chunks: Generator[AudioChunk],
        describe: Callable[[tuple[PieceInfo, ...], int, Timings], SpeechInfo],
    ) -> None:
        """describe: pieces, samples given and sums of the timings → what `info` tells."""
        self._chunks, self._describe = chunks, describe
        self._pieces: list[PieceInfo] = []
        self._frames = self._samples = 0
        self._timings = Timings(0.0, 0.0, 0.0, None)

    def __next__(self) -> AudioChunk:
        chunk = next(self._chunks)
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
        return chunk

    def close(self) -> None:
        """Ends the request: nothing more is computed."""
        self._chunks.close()

    @property
    def info(self) -> SpeechInfo:
        """Of the chunks given so far; a piece counts when its last one was."""
        return self._describe(tuple(self._pieces), self._samples, self._timings)


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
