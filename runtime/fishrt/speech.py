"""What a request gives: chunks of audio while it runs, the whole speech at the end, and what it took."""

from __future__ import annotations

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

    @property
    def compute_s(self) -> float:
        """All but the loading."""
        return self.language_model_s + self.codec_s


@dataclass(frozen=True, slots=True, eq=False)
class AudioChunk:
    """The speech of one piece of text. Chunks follow each other without a gap."""

    pcm: Pcm
    """float32 [samples], mono, −1..1; empty if the model ended at once."""
    sample_rate: int
    """Hz."""
    codes: Ints
    """int64 [K, frames]."""
    piece: int
    """0-based."""
    text: str
    """The piece."""
    stop_reason: StopReason
    """"end" when the model had finished; anything else says that it was cut off."""
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
    rtf: float
    """Compute seconds ÷ audio seconds; below 1 is faster than real time."""
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
