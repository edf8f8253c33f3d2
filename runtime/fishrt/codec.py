"""Waveform ↔ codes through the two codec graphs, with every length and value checked at the door.

Codes are int64 [K, frames], row 0 the semantic codebook, values 0-based within each codebook. Waveforms are float32 [samples],
mono, −1..1, at the codec's sample rate.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

from fishrt_engines import Engine

from .bundle import Codec
from .errors import AudioError, GraphError, VoiceError

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
        """pcm: float32 [samples] at the codec's rate → int64 [K, ceil(samples / hop)].

        The last frame is filled up with silence. Raises AudioError for no samples, samples that are not numbers, or too many.
        """
        codec = self._codec
        if pcm.ndim != 1 or pcm.dtype != np.float32:
            raise AudioError(f"audio is {pcm.dtype} {list(pcm.shape)}; the codec takes float32 [samples], mono")
        if len(pcm) == 0:
            raise AudioError("the audio is empty")
        if not np.isfinite(pcm).all():
            raise AudioError("the audio has samples that are not numbers", hint="record or convert it again")
        frames = -(-len(pcm) // codec.hop)
        if frames > codec.max_frames:
            seconds, most = len(pcm) / codec.sample_rate, codec.max_frames / codec.frame_rate
            raise AudioError(
                f"the audio is {seconds:.1f} s long; the codec takes at most {most:.1f} s",
                hint="cut it into shorter parts",
            )
        padded = np.zeros((1, 1, frames * codec.hop), np.float32)
        padded[0, 0, : len(pcm)] = pcm
        codes: Ints = self._engine.run({"audio": padded})["codes"][0].astype(np.int64)
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
        rows, frames = checked.shape
        every = np.full((1, len(self._codec.codebook_sizes), frames), _ABSENT, np.int64)
        every[0, :rows] = checked
        pcm: Pcm = self._engine.run({"codes": every})["audio"][0, 0].astype(np.float32, copy=False)
        if not np.isfinite(pcm).all():
            raise GraphError("the codec gave samples that are not numbers", hint="the bundle is damaged: export it again")
        return pcm


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
