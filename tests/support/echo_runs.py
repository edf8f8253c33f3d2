"""Runs of the golden vectors of Echo-TTS: their noise, settings and voices, as fishrt takes them."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np

from fishrt.diffusion.denoising import Denoising
from fishrt.diffusion.generate import Denoiser, KeysValues, Utterance


class Stored:
    """The noise of a run, for one text."""

    def __init__(self, noise: np.ndarray) -> None:
        self.noise = noise

    def draw(self, frames: int, channels: int) -> np.ndarray:
        drawn, self.noise = self.noise[:frames], self.noise[frames:]
        assert drawn.shape == (frames, channels)
        return drawn


class Recorded:
    """An engine, and the feeds of its calls as they were."""

    def __init__(self, engine: Any) -> None:
        self.spec, self._engine = engine.spec, engine
        self.calls: list[dict[str, np.ndarray]] = []

    def run(self, feeds: Mapping[str, Any]) -> dict[str, Any]:
        self.calls.append({name: np.array(feed) for name, feed in feeds.items()})
        return self._engine.run(feeds)


def settings_of(case: Mapping[str, Any]) -> Denoising:
    """Return the settings of a case of either sampler."""
    names = {
        "num_steps": "steps",
        "cfg_scale_text": "cfg_text",
        "cfg_scale_speaker": "cfg_speaker",
        "truncation_factor": "truncation",
        "speaker_kv_scale": "force_speaker",
        "speaker_kv_min_t": "force_min_t",
        "speaker_kv_max_layers": "force_layers",
        "block_sizes": "blocks",
        "sequence_length": "frames",
        "early_stop_on_zero": "early_stop",
    }
    kept = ("cfg_min_t", "cfg_max_t", "init_scale", "rescale_k", "rescale_sigma", "zero_eps", "zero_tail_frames")
    values = {names.get(name, name): value for name, value in case.items() if name in names or name in kept}
    return Denoising(**{"early_stop": False, **values})


def voice_of(denoiser: Denoiser, latents: np.ndarray, mask: np.ndarray) -> KeysValues | None:
    """Return the voice of the patches that are seen: those whose first frame is valid, which are the first ones."""
    seen = mask[:: denoiser.model.patch]
    count = int(seen.sum())
    assert seen[:count].all()
    return denoiser.voice(latents[: denoiser.model.patch * count]) if count else None


def finish(utterance: Utterance) -> np.ndarray:
    """Take all steps; return what was given out."""
    parts = []
    while utterance.stop_reason is None:
        if (given := utterance.advance()) is not None:
            parts.append(given)
    return np.concatenate(parts)
