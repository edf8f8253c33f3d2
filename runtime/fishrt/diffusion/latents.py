"""The latents of a voice: those of its recording, as many whole patches as it fills."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

from ..arrays import Floats, Pcm
from ..bundle.diffusion import Diffusion
from ..bundle.features import Codec
from ..errors import AudioError
from ..voices.recordings import limited

Encode = Callable[[Pcm], Floats]
"""Waveform float32 [samples] → latents float32 [frames, channels]."""


def voice_latents(pcm: Pcm, encode: Encode, model: Diffusion, codec: Codec) -> Floats:
    """Return the latents of a voice, float32 [frames, channels], whole patches.

    pcm: float32 [samples] at the codec's rate; what is louder than full scale is made softer.
    As in the original, parts of `voice_part_frames` are encoded for themselves. It puts silence behind a shorter part, which is
    left out here: the encoder is causal.
    Raises AudioError for a recording that is too long, or shorter than a patch.
    """
    pcm, frames = limited(pcm), len(pcm) // codec.hop
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
