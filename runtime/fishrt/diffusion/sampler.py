"""From noise to latents by Euler steps: times, guidance, rescaling, and the factor on the voice, in numpy.

    noise ─► x at t₀ ─► velocity of x at t₀ ─► x at t₁ ─► … ─► x at 0: latents
                          └ one row with all, one without text, one without voice; beyond the guided times the first alone

A `Block` runs no graph: it says what to compute next, and takes the velocities. Noise is passed in, so that a run can be repeated
from a seed or from recorded noise.
"""

from __future__ import annotations

from typing import Literal, Protocol

import numpy as np

from ..arrays import Floats
from ..errors import GraphError
from .denoising import Denoising

Row = Literal["all", "no_text", "no_voice"]
"""What the velocity of a row depends on: text and voice, or one of the two."""


class Noise(Protocol):
    """A source of noise."""

    def draw(self, frames: int, channels: int) -> Floats:
        """Return normally distributed noise, float32 [frames, channels], for the next block."""
        ...


class SeededNoise:
    """Noise from a numpy Generator: the same seed gives the same noise, and that of several blocks is that of one long block."""

    def __init__(self, seed: int) -> None:
        self._generator = np.random.default_rng(seed)

    def draw(self, frames: int, channels: int) -> Floats:
        """See `Noise`."""
        return self._generator.standard_normal((frames, channels), np.float32)


def times(steps: int, init_scale: float) -> Floats:
    """Return the times of all steps and 0, float32 [steps + 1], descending, to the bit as the original has them."""
    back = np.arange(steps, -1, -1)
    step = float(np.float32(1) / np.float32(steps))
    first_half = 2 * back > steps
    even = np.where(first_half, 1 - (steps - back) * step, back * step).astype(np.float32)
    return even * np.float32(init_scale)


def rescaled(velocity: Floats, x: Floats, t: float, k: float, sigma: float) -> Floats:
    """Return the velocity after temporal rescaling of the score; shapes are equal. At t = 1 nothing changes."""
    if t >= 1:
        return velocity
    snr = ((1 - t) / t) ** 2
    ratio = (snr * sigma**2 + 1) / (snr * sigma**2 / k + 1)
    # (ratio ((1 − t) v + x) − x) / (1 − t), without the difference of two large numbers near t = 1
    return ratio * velocity + ((ratio - 1) / (1 - t)) * x


class Block:
    """One block of frames on its way from noise to latents."""

    def __init__(
        self, noise: Floats, times: Floats, denoising: Denoising, truncation: float, *, voiced: bool, factor: float = 1.0
    ) -> None:
        """noise: float32 [frames, channels]. times: see `times`. denoising: resolved. voiced: whether there is a voice.

        factor: `voice_factor` of the block before.
        """
        self.latents: Floats = noise * np.float32(truncation)
        """float32 [frames, channels] at time `t`."""
        self.step = 0
        """Number of the next step."""
        self._times, self._settings = times, denoising
        self._forced = denoising.force_speaker
        self.voice_factor = factor * (self._forced or 1.0)
        """Factor on the voice's keys and values in the next step, in the layers that force_speaker changes."""
        assert denoising.cfg_text is not None
        assert denoising.cfg_speaker is not None
        weights: dict[Row, float] = {"no_text": denoising.cfg_text, "no_voice": denoising.cfg_speaker if voiced else 0.0}
        self._weights = {row: weight for row, weight in weights.items() if weight}

    @property
    def done(self) -> bool:
        """Whether the latents are those at time 0."""
        return self.step == len(self._times) - 1

    @property
    def t(self) -> np.float32:
        """The time of the next step."""
        time: np.float32 = self._times[self.step]
        return time

    @property
    def rows(self) -> tuple[Row, ...]:
        """The velocities that the next step needs. A row that has no weight, or would equal the first, is none of them."""
        low, high = np.float32(self._settings.cfg_min_t), np.float32(self._settings.cfg_max_t)
        return ("all", *self._weights) if low <= self.t <= high else ("all",)

    def accept(self, velocity: Floats) -> None:
        """Take a step with the velocities of `rows`, float32 [rows, frames, channels].

        Raises GraphError if they are not numbers.
        """
        if not np.isfinite(velocity).all():
            raise GraphError(
                "a graph gave velocities that are not numbers",
                hint="use settings nearer to the usual ones; if these fail, the bundle is damaged: export it again",
            )
        settings, t, following = self._settings, self.t, self._times[self.step + 1]
        v = velocity[0].copy()
        for other, row in zip(velocity[1:], self.rows[1:], strict=True):
            v += self._weights[row] * (velocity[0] - other)
        if settings.rescale_k is not None and settings.rescale_sigma is not None:
            v = rescaled(v, self.latents, float(t), settings.rescale_k, settings.rescale_sigma)
        if self._forced is not None and following < np.float32(settings.force_min_t) <= t:
            self.voice_factor /= self._forced
        self.latents = self.latents + v * (following - t)
        self.step += 1
