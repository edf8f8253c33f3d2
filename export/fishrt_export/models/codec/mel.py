"""Log-mel spectrogram by convolutions, which are ordinary operators in a graph.

The Fourier transform has two steps, for n = 64·a + b: a sum over a, with the window, then one over b. Sums of 32 and 64 numbers
are a tenth of the work of sums of 2048, with smaller rounding errors. Kernels and filters are computed in float64 and rounded
once; no checkpoint holds them.
"""

from __future__ import annotations

import math

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor, nn
from torch.nn import functional as F

Floats = npt.NDArray[np.float64]


class LogMel(nn.Module):
    """audio [batch, 1, samples] → [batch, bands, ⌊samples / hop⌋].

    Both ends have reflection padding, so that the first window is centred on the first hop; the end has one more sample if
    window − hop is odd. There must be more samples than (window − hop) / 2, rounded up.
    """

    first: Tensor
    second: Tensor
    filters: Tensor

    def __init__(self, *, sample_rate: int, bands: int, window: int, hop: int) -> None:
        super().__init__()
        self.window, self.hop = window, hop
        self.inner = math.gcd(64, window, hop)
        constants = (*_fourier_kernels(window, self.inner), _mel_filters(sample_rate, bands, window))
        for name, value in zip(("first", "second", "filters"), constants, strict=True):
            self.register_buffer(name, torch.from_numpy(value.astype(np.float32)), persistent=False)

    def forward(self, audio: Tensor) -> Tensor:
        spare = self.window - self.hop
        real, imaginary = self._spectrum(F.pad(audio, (spare // 2, -(-spare // 2)), mode="reflect")).unbind(1)
        magnitude = (real.square() + imaginary.square() + 1e-6).sqrt()
        return (self.filters @ magnitude).clamp(min=1e-5).log()

    def _spectrum(self, audio: Tensor) -> Tensor:
        """Return real and imaginary parts [batch, 2, window / 2 + 1, windows] of audio [batch, 1, samples]."""
        batch, inner, outer = audio.shape[0], self.inner, self.window // self.inner
        count = audio.shape[-1] // inner
        rows = audio[:, 0].narrow(1, 0, count * inner).reshape(batch, count, inner).transpose(1, 2)
        partial = F.conv1d(rows, self.first, stride=self.hop // inner, groups=inner).reshape(batch, inner, 2, outer, -1)
        by_phase = partial.permute(0, 3, 2, 1, 4).flatten(1, 3)
        full = F.conv1d(by_phase, self.second, groups=outer).reshape(batch, outer, 2, inner // 2 + 1, -1)
        return full.permute(0, 2, 3, 1, 4).flatten(2, 3)[:, :, : self.window // 2 + 1]


def _fourier_kernels(window: int, inner: int) -> tuple[Floats, Floats]:
    """Return the kernels of both steps, for sample n = inner·a + b and frequency f = outer·d + c.

    Modulo the window, n·f = inner·a·c + b·f. The first kernel is [b · (real, imaginary) · c, 1, a], with a periodic Hann window;
    the second is [c · (real, imaginary) · d, (real, imaginary) · b, 1].
    """
    outer = window // inner
    a, b, d = np.arange(outer), np.arange(inner), np.arange(inner // 2 + 1)
    n = inner * a + b[:, None]
    hann = 0.5 - 0.5 * np.cos(2 * np.pi * n / window)
    first = hann[:, None, :] * _turn(np.outer(a, a), outer)  # [b, c, a]
    frequency = outer * d + a[:, None]
    second = _turn(frequency[:, :, None] * b, window)  # [c, d, b]
    to_real = np.stack([second.real, -second.imag], axis=2)
    to_imaginary = np.stack([second.imag, second.real], axis=2)
    return (
        np.stack([first.real, first.imag], axis=1).reshape(-1, 1, outer),
        np.stack([to_real, to_imaginary], axis=1).reshape(-1, 2 * inner, 1),
    )


def _turn(steps: npt.NDArray[np.int64], period: int) -> npt.NDArray[np.complex128]:
    """Return exp(−2πi·steps / period). Steps are reduced modulo the period first, which keeps full precision."""
    turned: npt.NDArray[np.complex128] = np.exp(-2j * np.pi * (steps % period) / period)
    return turned


def _mel_filters(sample_rate: int, bands: int, window: int) -> Floats:
    """Return triangles of equal area, [bands, window / 2 + 1], evenly spaced on Slaney's mel scale up to half the sample rate."""
    edges = _mel_to_hz(np.linspace(0, _hz_to_mel(sample_rate / 2), bands + 2))
    frequencies = np.linspace(0, sample_rate / 2, window // 2 + 1)
    left, centre, right = (edges[i : bands + i, None] for i in range(3))
    rising, falling = (frequencies - left) / (centre - left), (right - frequencies) / (right - centre)
    return np.maximum(0, np.minimum(rising, falling)) * (2 / (right - left))


# Slaney's scale is linear up to 1 kHz, which is mel 15, and has 27 steps for each factor of 6.4 above.


def _hz_to_mel(hz: float) -> float:
    return 3 * hz / 200 if hz < 1000 else 15 + 27 * float(np.log(hz / 1000)) / float(np.log(6.4))


def _mel_to_hz(mel: Floats) -> Floats:
    return np.where(mel < 15, 200 * mel / 3, 1000 * np.exp((mel - 15) * np.log(6.4) / 27))
