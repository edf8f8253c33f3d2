"""Waveform ↔ codes or latents through the two codec graphs, after checks of every length and value.

Codes are int64 [K, frames], row 0 the semantic codebook, values 0-based within each codebook. Latents, of a codec with
`channels`, are float32 [frames, channels]. Waveforms are float32 [samples], mono, −1..1, at the codec's sample rate.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Protocol

import numpy as np
import numpy.typing as npt

from fishrt_engines import Array, Engine, GraphSpec, State

from .arrays import Floats, Ints, Pcm, Sound
from .bundle.features import USUAL, Codec, Quirks
from .errors import AudioError, GraphError, VoiceError

_ABSENT = -1
"""Input of the decode graph for a codebook that contributes nothing."""
_LEAST_FRAMES, _MOST_FRAMES = 4, 16
"""Frames of one decode call. With fewer, the weights are read too often; with more, the activations take too much memory."""


class CodecEncoder:
    """Waveform → codes or latents."""

    def __init__(self, engine: Engine, codec: Codec) -> None:
        self._engine = engine
        self._codec = codec

    def encode(self, pcm: Pcm) -> Sound:
        """Encode pcm float32 [samples] at the codec's rate to codes int64 [K, frames] or latents float32 [frames, channels].

        Silence pads it to a multiple of `sample_multiple`. Raises AudioError for samples that are not numbers, too few or too
        many.
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
        results = self._engine.run({"audio": padded[None, None]})
        if codec.channels is None:
            codes: Ints = results["codes"][0].astype(np.int64)
            return codes
        latents: Floats = results["latents"][0].astype(np.float32)
        return latents


class CodecStream(Protocol):
    """Codes or latents → waveform while they come.

    The results of `push` and `flush`, concatenated, equal `CodecDecoder.decode` of all at once, except for rounding.
    """

    def push(self, sound: Sound, *, last: bool = False) -> Pcm:
        """Decode the next frames, as `check_sound` returns them, to pcm float32 [finished frames · hop]; may be empty.

        The values are not checked again. last: no more frames come, as if a `flush` followed.

        Raises VoiceError for more frames in all than the codec takes; the stream is then unchanged.
        Raises GraphError for samples that are not numbers.
        """
        ...

    def flush(self) -> Pcm:
        """Return the sound of the frames that were held back, pcm float32 [frames · hop]. The stream then begins anew."""
        ...


class CodecDecoder:
    """Codes or latents → waveform."""

    def __init__(self, engine: Engine, codec: Codec, start: Mapping[str, Array] | None = None) -> None:
        """Wrap the graph codec_decode. Raises GraphError for a graph that cannot decode piece by piece.

        start: initial values of state tensors, by input name, as `read_codec_start` returns them; all others begin as zeros.
        """
        if not engine.spec.states and codec.context is None:
            raise GraphError(
                f"{engine.spec.file} carries no state, and the manifest does not say which frames a frame depends on",
                hint="export the checkpoint again",
            )
        self._engine = engine
        self._codec = codec
        self._start = start or {}

    @property
    def chunk_frames(self) -> tuple[int, int]:
        """Least and most frames for one push to a stream: fewer cost far more time per frame; more save none."""
        return chunk_frames(self._engine.spec, self._codec)

    def stream(self, quirks: Quirks = USUAL) -> CodecStream:
        """Return a new stream."""
        if not self._engine.spec.states:
            return OverlapStream(self._engine, self._codec)
        return StatefulStream(self._engine, self._codec, {} if quirks.sound else self._start)

    def decode(self, sound: Sound, *, quirks: Quirks = USUAL) -> Pcm:
        """Decode codes or latents, as `check_sound` takes them, to pcm float32 [frames · hop].

        Fewer rows than codebooks describe the sound more coarsely: the missing codebooks add nothing.
        quirks: see `check_codes`.
        Raises VoiceError as `check_sound` does, GraphError for samples that are not numbers.
        """
        return self.stream(quirks).push(check_sound(sound, self._codec, quirks), last=True)


class NoSound(CodecDecoder):
    """A decoder for those who want codes or latents alone: it opens no graph, and gives no samples."""

    def __init__(self, codec: Codec) -> None:
        self._codec = codec

    @property
    def chunk_frames(self) -> tuple[int, int]:
        """See `CodecDecoder.chunk_frames`."""
        return self._codec.max_frames, self._codec.max_frames

    def stream(self, quirks: Quirks = USUAL) -> CodecStream:
        """Return a stream without samples."""
        return _Silence()


class _Silence:
    def push(self, sound: Sound, *, last: bool = False) -> Pcm:
        """See `CodecStream.push`."""
        return np.empty(0, np.float32)

    def flush(self) -> Pcm:
        """See `CodecStream.flush`."""
        return np.empty(0, np.float32)


class StatefulStream:
    """A `CodecStream` of a graph with state; no frames are held back."""

    def __init__(self, engine: Engine, codec: Codec, start: Mapping[str, Array] | None = None) -> None:
        """start: see `CodecDecoder`."""
        self._engine, self._codec, self._start = engine, codec, start or {}
        self._counts_positions = any(tensor.name == "position_ids" for tensor in engine.spec.feeds)
        _, self._most = chunk_frames(engine.spec, codec)
        self._begin()

    def _begin(self) -> None:
        self._state: State | None = None
        self._position = 0

    def push(self, sound: Sound, *, last: bool = False) -> Pcm:
        """See `CodecStream.push`."""
        whole = _with_absent(sound, self._codec)
        frames, room = frames_of(whole), self._codec.max_frames - self._position
        if frames > room:
            more = f"there are {frames} frames of {_kind(whole)} more"
            raise VoiceError(f"{more}; the codec takes {self._codec.max_frames} in one stream")
        if self._state is None:
            self._state = self._engine.new_state(batch=1)
            for name, array in self._start.items():
                self._state.write(name, array)
        parts = []
        for start in range(0, frames, self._most):
            chunk = part(whole, start, start + self._most)
            feeds, end = _feeds(chunk), self._position + frames_of(chunk)
            if self._counts_positions:
                feeds["position_ids"] = np.arange(self._position, end, dtype=np.int64)[None]
            parts.append(_pcm(self._engine.run(feeds, self._state)))
            self._position = end
        if last:
            self._begin()
        return np.concatenate(parts)

    def flush(self) -> Pcm:
        """See `CodecStream.flush`."""
        self._begin()
        return np.empty(0, np.float32)


class OverlapStream:
    """A `CodecStream` of a codec without state, whose frames depend on only a few frames around them.

    Every call decodes the frames of the left context again, and a frame is held back until those ahead of it have come.
    """

    def __init__(self, engine: Engine, codec: Codec) -> None:
        assert codec.context is not None
        self._engine, self._codec, self._context = engine, codec, codec.context
        _, self._most = chunk_frames(engine.spec, codec)
        self._begin()

    def _begin(self) -> None:
        # Frames that are still needed: first those of the left context, whose sound was returned, then those held back.
        self._frames = no_frames(self._codec)
        self._given = 0

    def push(self, sound: Sound, *, last: bool = False) -> Pcm:
        """See `CodecStream.push`. The number of all frames together has no limit."""
        whole = _with_absent(sound, self._codec)
        parts, frames = [], frames_of(whole)
        for start in range(0, frames, self._most):
            ends = last and start + self._most >= frames
            parts.append(self._advance(part(whole, start, start + self._most), 0 if ends else self._context.ahead))
        if last:
            self._begin()
        return np.concatenate(parts)

    def flush(self) -> Pcm:
        """See `CodecStream.flush`."""
        pcm = self._advance(no_frames(self._codec), 0)
        self._begin()
        return pcm

    def _advance(self, more: Sound, held: int) -> Pcm:
        """Return the sound of all new frames except the last `held`, and keep the frames that are needed again."""
        frames = joined([self._frames, more])
        hop, end = self._codec.hop, frames_of(frames) - held
        pcm = np.empty(0, np.float32)
        if end > self._given:
            pcm = _pcm(self._engine.run(_feeds(frames)))[self._given * hop : end * hop]
            start = max(end - self._context.left, 0)
            frames, self._given = part(frames, start), end - start
        self._frames = frames
        return pcm


def chunk_frames(spec: GraphSpec, codec: Codec) -> tuple[int, int]:
    """Return the least and most frames for one call, see `CodecDecoder.chunk_frames`. spec: the decode graph's.

    Overlapping chunks are at least as long as the context that is decoded again with each.
    """
    if spec.states:
        return _LEAST_FRAMES, min(_MOST_FRAMES, codec.max_frames)
    assert codec.context is not None
    again = codec.context.left + codec.context.ahead
    return max(_LEAST_FRAMES, again), min(max(_MOST_FRAMES, 8 * again), codec.max_frames - again)


def frames_of(sound: Sound) -> int:
    """Return the number of frames of codes [k, frames], or of latents [frames, channels]."""
    return int(sound.shape[_axis(sound)])


def part(sound: Sound, start: int, stop: int | None = None) -> Sound:
    """Return the frames from `start` to `stop`."""
    return sound[start:stop] if _axis(sound) == 0 else sound[:, start:stop]


def joined(parts: Sequence[Sound]) -> Sound:
    """Return the frames of several, at least one."""
    return np.concatenate(parts, axis=_axis(parts[0]))


def apart(sound: Sound) -> tuple[Ints, Floats | None]:
    """Return codes and None, or codes int64 [0, frames] and latents."""
    if _kind(sound) == "codes":
        return sound.astype(np.int64, copy=False), None
    return np.empty((0, len(sound)), np.int64), sound


def no_frames(codec: Codec) -> Sound:
    """Return codes int64 [K, 0], or latents float32 [0, channels]."""
    if codec.channels is None:
        return np.empty((len(codec.codebook_sizes), 0), np.int64)
    return np.empty((0, codec.channels), np.float32)


def _kind(sound: Sound) -> str:
    return "latents" if sound.dtype == np.float32 else "codes"


def _axis(sound: Sound) -> int:
    return {"latents": 0, "codes": 1}[_kind(sound)]


def _feeds(sound: Sound) -> dict[str, Array]:
    """Return the feeds of the decode graph."""
    return {_kind(sound): np.ascontiguousarray(sound)[None]}


def _pcm(results: Mapping[str, Array]) -> Pcm:
    """Return the decode graph's audio as pcm float32 [frames · hop], a copy that no later call overwrites."""
    pcm: Pcm = results["audio"][0, 0].astype(np.float32)
    if not np.isfinite(pcm).all():
        raise GraphError("the codec gave samples that are not numbers", hint="the bundle is damaged: export it again")
    return pcm


def _with_absent(codes: Sound, codec: Codec) -> Sound:
    """Return codes [k, frames] with a row of _ABSENT for each missing codebook: [K, frames]; and latents as they are."""
    if codec.channels is not None:
        return codes
    return np.pad(codes, ((0, len(codec.codebook_sizes) - len(codes)), (0, 0)), constant_values=_ABSENT)


def check_sound(sound: Sound, codec: Codec, quirks: Quirks = USUAL) -> Sound:
    """Return codes as `check_codes` does, or latents as `check_latents`, whichever the codec has."""
    if codec.channels is None:
        return check_codes(sound, codec, quirks)
    return check_latents(sound, codec, "the latents", codec.max_frames)


def check_latents(latents: Sound, codec: Codec, what: str, most: int, hint: str | None = None) -> Floats:
    """Return latents float32 [frames, channels], of a codec with channels. what: names them. most: limit of the frames.

    Raises VoiceError for another shape or type, no frames or too many, and values that are not numbers.
    """
    found = latents.dtype if isinstance(latents, np.ndarray) else f"a {type(latents).__name__}"
    if not isinstance(latents, np.ndarray) or latents.dtype != np.float32:
        raise VoiceError(f"{what} are {found}; this codec takes latents, float32 [frames, {codec.channels}]", hint=hint)
    if latents.ndim != 2 or latents.shape[1] != codec.channels or not 1 <= len(latents) <= most:
        raise VoiceError(
            f"{what} have shape {list(latents.shape)}; [1 to {most:,} frames, {codec.channels}] is expected", hint=hint
        )
    if not np.isfinite(latents).all():
        raise VoiceError(f"{what} hold values that are not numbers", hint="encode the recording again")
    return latents


def check_codes(codes: npt.NDArray[np.integer], codec: Codec, quirks: Quirks = USUAL) -> Ints:
    """Return codes of any integer type, [k, frames] or [1, k, frames] with 1 <= k <= K, as int64 [k, frames].

    quirks: of sound; a value above the last entry of its codebook then becomes that entry, as in the original.
    Raises VoiceError for another shape or type, no frames or too many, and values outside a codebook.
    """
    sizes = codec.codebook_sizes
    check_integers(codes, "the codes")
    plain = codes[0] if codes.ndim == 3 and len(codes) == 1 else codes
    if plain.ndim != 2 or not 1 <= len(plain) <= len(sizes):
        raise VoiceError(f"the codes have shape {list(codes.shape)}; the codec takes [{len(sizes)} codebooks or fewer, frames]")
    frames = plain.shape[1]
    if not 1 <= frames <= codec.max_frames:
        raise VoiceError(f"there are {frames} frames of codes; the codec takes 1 to {codec.max_frames}")
    check_entries(np.minimum(plain, 0) if quirks.sound else plain, sizes[: len(plain)], "the codes")
    return clamp_codes(plain.astype(np.int64), codec) if quirks.sound else plain.astype(np.int64)


def check_integers(codes: npt.NDArray[np.integer], what: str) -> None:
    """Check that codes are an array of integers: floats would be truncated. Raises VoiceError otherwise."""
    if not isinstance(codes, np.ndarray) or not np.issubdtype(codes.dtype, np.integer):
        found = codes.dtype if isinstance(codes, np.ndarray) else f"a {type(codes).__name__}"
        raise VoiceError(f"{what}: the codes are {found}; an array of integers is expected")


def check_entries(codes: npt.NDArray[np.integer], sizes: Sequence[int], what: str) -> None:
    """Check that each row of `codes` [k, at least 1 frame] holds values from 0 to its size − 1. Raises VoiceError otherwise."""
    for row, (values, size) in enumerate(zip(codes, sizes, strict=True)):
        low, high = int(values.min()), int(values.max())
        if low < 0 or high >= size:
            raise VoiceError(
                f"{what} hold {low if low < 0 else high} in codebook {row}, which has the entries 0 to {size - 1}",
                hint="were they made with this bundle's codec? add the voice again",
            )


def clamp_codes(codes: Ints, codec: Codec) -> Ints:
    """Return codes int64 [k, frames] in which the last entry of a codebook replaces every value above it.

    A language model can draw a code that the codec does not have, since its table may be wider than a codebook.
    """
    last = np.array(codec.codebook_sizes[: len(codes)], np.int64)[:, None] - 1
    return np.minimum(codes, last)
