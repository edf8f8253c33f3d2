"""Results of a request: audio chunks while it runs, the whole speech at the end, its progress, settings and timings."""

from __future__ import annotations

import base64
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from .arrays import Floats, Ints, Pcm
from .diffusion.denoising import Denoising
from .errors import FishrtError
from .language_model.sampling import Sampling
from .text.split import excerpt

StopReason = Literal["end", "pause", "max_frames", "max_seq_len"]
"""Why a piece of text ended: the model finished; silence in the middle was taken for its end; the limit of frames; no position
left in the model's context."""


@dataclass(frozen=True, slots=True)
class Progress:
    """Progress of a request; passed to the `progress` function after every frame, or every step of a diffusion model.

    Attributes:
        piece: number of the current piece of text, 0-based.
        pieces: number of all pieces of text.
        frames: number of frames made so far, over all pieces.
        audio_s: seconds of speech in these frames.
        elapsed_s: seconds since the first piece began.
        step: steps that were taken for the piece; 0 with a language model.
        steps: all steps of the piece, some of which may not be needed.
        expected_s: estimated seconds of speech of all pieces; None with a language model.
    """

    piece: int
    pieces: int
    frames: int
    audio_s: float
    elapsed_s: float
    step: int = 0
    steps: int = 0
    expected_s: float | None = None


@dataclass(frozen=True, slots=True)
class Timings:
    """Seconds spent on a chunk, or their sums over a request.

    Attributes:
        load_s: opening of graphs, in the first request that needs them. Not counted in the RTF.
        model_s: prompt, prefill, and drawing of frames; or the reading of text and voice, and the steps.
        codec_s: decoding of codes or latents to waveform.
        ttfa_s: from the request to its first chunk with sound; None for any other chunk.
    """

    load_s: float
    model_s: float
    codec_s: float
    ttfa_s: float | None

    @property
    def compute_s(self) -> float:
        """Return all seconds except those of loading."""
        return self.model_s + self.codec_s


@dataclass(frozen=True, slots=True, eq=False)
class AudioChunk:
    """A part of the speech of one piece of text; its length is the number of samples. Chunks follow each other without a gap.

    Attributes:
        pcm: float32 [samples], mono, −1..1; may be empty.
        sample_rate: Hz.
        codes: int64 [K, frames], drawn since the chunk before. A codec that looks ahead delivers the end of their sound later.
            Of no codebooks, [0, frames], with a diffusion model.
        piece: number of the piece of text, 0-based.
        text: the piece.
        stop_reason: None except for the last chunk of a piece: "end" if the model finished, any other value if it was cut off.
        seed: seed of the whole request.
        timings: timings of this chunk.
        latents: float32 [frames, channels] of a diffusion model, in place of codes; None with a language model.
    """

    pcm: Pcm
    sample_rate: int
    codes: Ints
    piece: int
    text: str
    stop_reason: StopReason | None
    seed: int
    timings: Timings
    latents: Floats | None = None

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
        frames: number of frames made for it; 0 if the model said nothing.
        stop_reason: "end" if the model finished, any other value if it was cut off.
    """

    text: str
    frames: int
    stop_reason: StopReason


@dataclass(frozen=True, slots=True)
class SpeechInfo:
    """Settings and measurements of a request: enough to repeat it.

    Attributes:
        seed: seed of all draws; a diffusion model adds the number of the piece.
        sampling: settings, with the bundle's defaults for those that were not given; None with a diffusion model.
        voices: names of the voices that spoke; the bundle's own if the request named none.
        pieces: how each piece of text ended.
        frames: number of frames over all pieces.
        audio_s: seconds of speech.
        timings: sums over the request.
        rtf: compute seconds ÷ audio seconds; below 1 is faster than real time. None: nothing was said.
        provider: execution provider that ran the graphs.
        bundle: name of the bundle.
        bundle_sha256: SHA-256 of the bundle's manifest, which holds the hashes of its files.
        warnings: possible faults of the speech, each once: pieces that were cut off or not spoken, text that the model does not
            read reliably.
        denoising: settings of a diffusion model, as `sampling`; None with a language model.
    """

    seed: int
    sampling: Sampling | None
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
    denoising: Denoising | None = None

    @property
    def stop_reasons(self) -> tuple[StopReason, ...]:
        """Return the stop reason of each piece of text."""
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
        codes: int64 [K, frames]; of no codebooks with a diffusion model.
        info: settings, measurements and warnings.
        latents: float32 [frames, channels] of a diffusion model; None with a language model.
    """

    pcm: Pcm
    sample_rate: int
    codes: Ints
    info: SpeechInfo
    latents: Floats | None = None

    @property
    def duration_s(self) -> float:
        """Return the seconds of sound."""
        return len(self.pcm) / self.sample_rate

    def save(self, path: str | Path, format: str | None = None) -> None:
        """Write the speech to an audio file, which is replaced if it exists: wav, flac, ogg, opus, mp3, …

        format: name of the format; None takes it from the ending of the path.
        Raises AudioError for an unknown format, OutputError if the file cannot be written.
        """
        from .audio.encode import write_audio

        write_audio(path, self.pcm, self.sample_rate, format)

    def __len__(self) -> int:
        return len(self.pcm)

    def __repr__(self) -> str:
        voices = self.info.voices
        voice = f"voice{'s' if voices[1:] else ''} {', '.join(voices)}" if voices else "no voice"
        return f"<Speech {self.duration_s:.2f} s, {_khz(self.sample_rate)}, {voice}, seed {self.info.seed}>"

    def _repr_html_(self) -> str:
        from .audio.encode import encode_audio

        data = base64.b64encode(encode_audio(self.pcm, self.sample_rate, "wav")).decode()
        return f'<audio controls src="data:audio/wav;base64,{data}"></audio>'


def _khz(rate: int) -> str:
    return f"{rate / 1000:g} kHz"
