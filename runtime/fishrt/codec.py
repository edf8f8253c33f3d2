"""Waveform ↔ codes through the two codec graphs, with every length and value checked at the door.

Codes are int64 [K, frames], row 0 the semantic codebook, values 0-based within each codebook. Waveforms are float32 [samples],
mono, −1..1, at the codec's sample rate.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

from fishrt_engines import Engine

from .errors import AudioError, GraphError, VoiceError
from .features import Codec

Ints = npt.NDArray[np.int64]
Pcm = npt.NDArray[np.float32]
_ABSENT = -1
"""Fed to the decode graph for a codebook that contributes nothing."""


class CodecEncoder:
    """Waveform → codes."""

    def __init__(self, engine: Engine, codec: Codec) -> None:
        self._engine = engine
        self._codec = codec

    def encode(self, pcm: Pcm) -> Ints:
        """pcm: float32 [samples] at the codec's rate → int64 [K, frames].

        Silence fills it up to what the codec takes. Raises AudioError for samples that are not numbers, too few, or too many.
        """
        codec = self._codec
        if pcm.ndim != 1 or pcm.dtype != np.float32:
            raise AudioError(f"audio is {pcm.dtype} {list(pcm.shape)}; the codec takes float32 [samples], mono")
        if len(pcm) == 0:
            raise AudioError("the audio is empty")
        if not np.isfinite(pcm).all():
            raise AudioError("the audio has samples that are not numbers", hint="record or convert it again")
        if len(pcm) < codec.min_samples:
            raise AudioError(
                f"the audio has {len(pcm)} samples; the codec takes at least {codec.min_samples}", hint="record more"
            )
        if len(pcm) > codec.max_frames * codec.hop:
            seconds, most = len(pcm) / codec.sample_rate, codec.max_frames / codec.frame_rate
            raise AudioError(
                f"the audio is {seconds:.1f} s long; the codec takes at most {most:.1f} s", hint="cut it into shorter parts"
            )
        padded = np.pad(pcm, (0, -len(pcm) % codec.sample_multiple))
        codes: Ints = self._engine.run({"audio": padded[None, None]})["codes"][0].astype(np.int64)
        return codes


class CodecDecoder:
    """Codes → waveform."""

    def __init__(self, engine: Engine, codec: Codec) -> None:
        self._engine = engine
        self._codec = codec

    def decode(self, codes: npt.NDArray[np.integer], *, upstream_compat: bool = False) -> Pcm:
        """codes as `check_codes` takes them → pcm float32 [frames · hop].

        Fewer rows than the codec has codebooks are a coarser description of the sound: the missing ones add nothing.
        Raises VoiceError as `check_codes` does, GraphError if the graph gives no numbers.
        """
        checked = check_codes(codes, self._codec, upstream_compat=upstream_compat)
        return _run(self._engine, _with_absent(checked, self._codec))


class CodecStream:
    """Codes → waveform while they come, for codecs whose frames depend on a few others only.

    Every call decodes the frames before those that are due once more, and frames are held back until those ahead of them are
    there. What `push` and `flush` give, put together, is what the decoder gives for all codes at once, but for rounding.
    """

    def __init__(self, engine: Engine, codec: Codec) -> None:
        """Raises ValueError for a codec that can only decode from the beginning."""
        if codec.context is None:
            raise ValueError("this codec has no decode context: every earlier frame counts")
        self._engine = engine
        self._codec = codec
        self._context = codec.context
        self._restart()

    def _restart(self) -> None:
        # The frames that are still needed: first those whose sound was given already, then those that are due.
        self._frames: Ints = np.empty((len(self._codec.codebook_sizes), 0), np.int64)
        self._given = 0

    def push(self, codes: npt.NDArray[np.integer]) -> Pcm:
        """codes as `check_codes` takes them, the next frames → pcm float32 [frames that are ready · hop], maybe none.

        Raises as `CodecDecoder.decode` does, also for too many frames at once; the stream is then as before.
        """
        checked = _with_absent(check_codes(codes, self._codec), self._codec)
        if checked.shape[1] > (most := self._codec.max_frames - self._frames.shape[1]):
            raise VoiceError(f"there are {checked.shape[1]} frames of codes; the stream takes at most {most} at once now")
        return self._advance(np.concatenate([self._frames, checked], axis=1), self._context.ahead)

    def flush(self) -> Pcm:
        """The rest, pcm float32 [frames held back · hop]: no more codes come. The stream can then begin anew."""
        pcm = self._advance(self._frames, 0)
        self._restart()
        return pcm

    def _advance(self, frames: Ints, held: int) -> Pcm:
        """Gives the sound of all `frames` not given yet but for the last `held`, and keeps those that are needed again."""
        hop, end = self._codec.hop, frames.shape[1] - held
        pcm = np.empty(0, np.float32)
        if end > self._given:
            pcm = _run(self._engine, frames)[self._given * hop : end * hop]
            start = max(end - self._context.left, 0)
            frames, self._given = frames[:, start:], end - start
        self._frames = frames
        return pcm


def _run(engine: Engine, codes: Ints) -> Pcm:
    """codes int64 [K, frames] → pcm float32 [frames · hop]."""
    pcm: Pcm = engine.run({"codes": codes[None]})["audio"][0, 0].astype(np.float32, copy=False)
    if not np.isfinite(pcm).all():
        raise GraphError("the codec gave samples that are not numbers", hint="the bundle is damaged: export it again")
    return pcm


def _with_absent(codes: Ints, codec: Codec) -> Ints:
    """Codes [k, frames] with rows of _ABSENT for the codebooks that they leave out."""
    return np.pad(codes, ((0, len(codec.codebook_sizes) - len(codes)), (0, 0)), constant_values=_ABSENT)


def check_codes(codes: npt.NDArray[np.integer], codec: Codec, *, upstream_compat: bool = False) -> Ints:
    """Codes of any integer type, [k, frames] or [1, k, frames] with 1 <= k <= K, as int64 [k, frames].

    Raises VoiceError for another shape or type, no frames or too many, and values outside a codebook. `upstream_compat` takes
    values that are too large for the last entry of their codebook, as upstream does; negative ones are errors there too.
    """
    sizes = codec.codebook_sizes
    check_integers(codes, "the codes")
    plain = codes[0] if codes.ndim == 3 and len(codes) == 1 else codes
    if plain.ndim != 2 or not 1 <= len(plain) <= len(sizes):
        raise VoiceError(f"the codes have shape {list(codes.shape)}; the codec takes [{len(sizes)} codebooks or fewer, frames]")
    frames = plain.shape[1]
    if not 1 <= frames <= codec.max_frames:
        raise VoiceError(f"there are {frames} frames of codes; the codec takes 1 to {codec.max_frames}")
    check_entries(np.minimum(plain, 0) if upstream_compat else plain, sizes[: len(plain)], "the codes")
    return clamp_codes(plain.astype(np.int64), codec)


def check_integers(codes: npt.NDArray[np.integer], what: str) -> None:
    """Raises VoiceError for anything but an array of integers; floats would be truncated."""
    if not isinstance(codes, np.ndarray) or not np.issubdtype(codes.dtype, np.integer):
        found = codes.dtype if isinstance(codes, np.ndarray) else f"a {type(codes).__name__}"
        raise VoiceError(f"{what}: the codes are {found}; an array of integers is expected")


def check_entries(codes: npt.NDArray[np.integer], sizes: Sequence[int], what: str) -> None:
    """Raises VoiceError naming the first row of `codes` [k, at least 1 frame] with a value outside 0 … its size − 1."""
    for row, (values, size) in enumerate(zip(codes, sizes, strict=True)):
        low, high = int(values.min()), int(values.max())
        if low < 0 or high >= size:
            raise VoiceError(
                f"{what} hold {low if low < 0 else high} in codebook {row}, which has the entries 0 to {size - 1}",
                hint="were they made with this bundle's codec? add the voice again",
            )


def clamp_codes(codes: Ints, codec: Codec) -> Ints:
    """Codes int64 [k, frames] with every value above its codebook's last entry replaced by that entry.

    A language model's table may be wider than a codebook, so that it can draw a code that the codec does not have.
    """
    last = np.array(codec.codebook_sizes[: len(codes)], np.int64)[:, None] - 1
    return np.minimum(codes, last)
