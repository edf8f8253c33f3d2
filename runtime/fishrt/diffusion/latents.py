"""The latents of a voice: those of its recordings, one after the other, as many whole patches as they fill."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np

from ..arrays import Floats, Pcm
from ..bundle.diffusion import Diffusion
from ..bundle.features import Codec
from ..errors import AudioError

GAP_S = 1.0
"""Seconds of silence between two recordings of a voice."""

Encode = Callable[[Pcm], Floats]
"""Waveform float32 [samples] → latents float32 [frames, channels]."""


def voice_latents(recordings: Sequence[Pcm], encode: Encode, model: Diffusion, codec: Codec) -> Floats:
    """Return the latents of a voice, float32 [frames, channels], whole patches.

    recordings: at least one, each float32 [samples] at the codec's rate; one that is louder than full scale is made softer.
    As in the original, parts of `voice_part_frames` are encoded for themselves. It puts silence behind a shorter part, which is
    left out here: the encoder is causal.
    Raises AudioError for recordings that are together too long, or shorter than a patch.
    """
    pcm = joined([_limited(recording) for recording in recordings], round(GAP_S * codec.sample_rate))
    frames = len(pcm) // codec.hop
    least, most = model.patch, model.max_voice_frames
    if not least <= frames <= most:
        seconds = len(pcm) / codec.sample_rate
        raise AudioError(
            f"a voice of {seconds:.2f} s is too {'short' if frames < least else 'long'}; "
            f"the model takes {least / codec.frame_rate:.2f} to {most / codec.frame_rate:.1f} s",
            hint="use clean speech of one speaker" if frames < least else "use fewer or shorter recordings",
        )
    end, part = (frames - frames % model.patch) * codec.hop, model.voice_part_frames * codec.hop
    return np.concatenate([encode(pcm[start : min(start + part, end)]) for start in range(0, end, part)])


def joined(recordings: Sequence[Pcm], gap: int) -> Pcm:
    """Return recordings one after the other, with `gap` samples of silence between two."""
    silence = np.zeros(gap, np.float32)
    return np.concatenate([part for recording in recordings for part in (silence, recording)][1:])


def _limited(recording: Pcm) -> Pcm:
    peak: np.float32 = np.abs(recording).max(initial=1.0)
    return recording / peak
