"""The part of a manifest for a diffusion model: its sizes, the limits of its inputs, and its usual settings.

text ──────► keys and values ─┐
voice ─────► keys and values ─┼─► velocity of the latents at time t ─► Euler steps from noise to latents ─► codec
before ────► keys and values ─┘
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass
from math import isfinite
from numbers import Integral, Real
from typing import Any, Literal

from .features import VOICE_SECONDS, Reads


@dataclass(frozen=True, slots=True)
class DenoisingDefaults:
    """Settings of a request that gives none. Time runs from 1, noise, to 0, speech."""

    steps: int = 40
    """Euler steps from noise to latents."""
    cfg_text: float = 3.0
    """Weight of the guidance by text: of the difference from the velocity without text."""
    cfg_speaker: float = 8.0
    """Weight of the guidance by voice."""
    cfg_min_t: float = 0.5
    """Least time of a step with guidance."""
    cfg_max_t: float = 1.0
    """Largest time of a step with guidance."""
    truncation: float | None = None
    """Factor of the noise. None: 1."""
    rescale_k: float | None = None
    """Strength of the temporal rescaling of scores. None: there is none."""
    rescale_sigma: float | None = None
    """Width of the temporal rescaling of scores. None: there is none."""


@dataclass(frozen=True, slots=True)
class Diffusion:
    """Sizes and limits of a denoiser of latents. Texts are tokens of bytes behind one 0."""

    kind: Literal["diffusion"]
    channels: int
    """Numbers of one latent frame."""
    patch: int
    """Latent frames that are one position of a voice or of the latents before a block."""
    width: int
    """Width of the denoiser's stream."""
    layers: int
    heads: int
    head_dim: int
    blockwise: bool
    """Whether it generates in blocks, each behind the latents before it: it has the graph latent_cond."""
    max_frames: int
    """Most latent frames of one generation, those before a block included."""
    max_tokens: int
    """Most tokens of one text."""
    max_voice_frames: int
    """Most latent frames of a voice."""
    voice_part_frames: int
    """Latent frames of a recording that are encoded at once."""
    denoising: DenoisingDefaults
    voice_seconds: tuple[float, ...] = VOICE_SECONDS
    """Shortest and longest recording that the model imitates well, in seconds."""
    reads: Reads | None = None
    """None: unknown, so there are no warnings."""

    def faults(self) -> Iterator[str]:
        """Yield a message for each value that is out of range or contradicts another."""
        counts = {
            "channels": self.channels,
            "patch": self.patch,
            "width": self.width,
            "layers": self.layers,
            "heads": self.heads,
            "head_dim": self.head_dim,
            "max_frames": self.max_frames,
            "max_tokens": self.max_tokens,
            "max_voice_frames": self.max_voice_frames,
            "voice_part_frames": self.voice_part_frames,
        }
        yield from (f"{name} is {count}, below 1" for name, count in counts.items() if count < 1)
        for name in ("max_frames", "max_voice_frames"):
            if self.patch > 0 and counts[name] % self.patch:
                yield f"{name} is {counts[name]}, which are no whole patches of {self.patch}"
        settings = asdict(self.denoising)
        faults = [*denoising_faults(settings), *contradictions(settings)]
        yield from (f"denoising.{what}; {rule}" for what, rule in faults)
        if len(self.voice_seconds) != 2 or not 0 < self.voice_seconds[0] <= self.voice_seconds[1]:
            yield f"voice_seconds is {list(self.voice_seconds)}, which is no least and most length"


_NUMBERS = ("cfg_text", "cfg_speaker", "cfg_min_t", "cfg_max_t")
_POSITIVE = ("truncation", "rescale_k", "rescale_sigma")


def denoising_faults(settings: Mapping[str, object]) -> Iterator[tuple[str, str]]:
    """Yield a pair for each setting that is out of range: the value found, and the rule.

    settings: by the names of the fields of DenoisingDefaults. Those of _POSITIVE may be None.
    """
    for name, value in settings.items():
        if name == "steps" and (not isinstance(value, Integral) or isinstance(value, bool) or value < 1):
            yield f"{name} is {value}", "it must be a whole number of at least 1"
        if name in _NUMBERS and not _is_finite(value):
            yield f"{name} is {value}", "it must be a finite number"
        if name in _POSITIVE and value is not None and not (_is_finite(value) and value > 0):  # type: ignore[operator]
            yield f"{name} is {value}", "it must be a finite number above 0"


def contradictions(settings: Mapping[str, Any]) -> Iterator[tuple[str, str]]:
    """Yield a pair for settings, as `denoising_faults` takes them, that contradict each other: the values found, and the rule."""
    sigma, k = settings["rescale_sigma"], settings["rescale_k"]
    if (sigma is None) != (k is None):
        yield f"rescale_k is {k} and rescale_sigma is {sigma}", "give both or neither"
    if settings["cfg_min_t"] > settings["cfg_max_t"]:
        yield f"cfg_min_t {settings['cfg_min_t']} is above cfg_max_t {settings['cfg_max_t']}", "no step would be guided"


def _is_finite(value: object) -> bool:
    return isinstance(value, Real) and not isinstance(value, bool) and isfinite(value)
