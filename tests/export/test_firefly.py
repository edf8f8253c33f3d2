"""Firefly codecs of other sizes than the official ones: quantiser and spectrum against definitions, graphs against modules."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from fishrt_export.models.codec.fsq import GroupedFSQ
from fishrt_export.models.codec.mel import LogMel

LEVELS = (8, 5, 4)


def reference_encode(numbers: np.ndarray, residuals: int) -> np.ndarray:
    """numbers float64 [frames, len(LEVELS)] → codes [residuals, frames], one number at a time."""
    codes = np.zeros((residuals, len(numbers)), int)
    for t, frame in enumerate(numbers):
        basis = 1
        for z, count in zip(frame, LEVELS, strict=True):
            h, o, w = (count - 1) * 1.001 / 2, 0.5 if count % 2 == 0 else 0.0, count // 2

            def bound(z: float, h: float = h, o: float = o) -> float:
                return float(np.tanh(z + np.arctanh(o / h)) * h - o)

            residual = bound(z)
            for q in range(residuals):
                scale = (count - 1.0) ** -q
                level = round(bound(residual / scale))
                residual -= level / w * scale
                codes[q, t] += (level + w) * basis
            basis *= count
    return codes


def reference_decode(codes: np.ndarray) -> np.ndarray:
    """codes [residuals, frames] → numbers float64 [frames, len(LEVELS)]."""
    numbers = np.zeros((codes.shape[1], len(LEVELS)))
    for q, row in enumerate(codes):
        for t, code in enumerate(row):
            rest = int(code)
            for k, count in enumerate(LEVELS):
                rest, digit = divmod(rest, count)
                if code >= 0:
                    numbers[t, k] += (digit - count // 2) / (count // 2) * (count - 1.0) ** -q
    return numbers


@pytest.mark.parametrize("residuals", [1, 3])
def test_the_quantiser_is_as_defined(residuals: int) -> None:
    """Groups as wide as there are levels are not projected, so that the numbers are known."""
    rng = np.random.default_rng(residuals)
    fsq = GroupedFSQ(6, 2, residuals, LEVELS)
    assert not fsq.state_dict()
    features = rng.uniform(-3, 3, (1, 6, 200)).astype(np.float32)
    expected = [reference_encode(group.T.astype(np.float64), residuals) for group in np.split(features[0], 2)]
    codes = fsq.encode(torch.from_numpy(features)).numpy()[0]
    # What is close to the middle of two levels may be rounded either way, and changes the residuals behind it.
    assert (codes == np.concatenate(expected)).mean() > 0.99
    assert {*np.unique(codes)} <= {*range(160)}
    known = rng.integers(-1, 160, (1, 2 * residuals, 50))
    numbers = np.concatenate([reference_decode(group).T for group in np.split(known[0], 2)])
    np.testing.assert_allclose(fsq.decode(torch.from_numpy(known)).numpy()[0], numbers, atol=1e-6)
    past = torch.full((1, 2 * residuals, 1), 160)
    assert torch.equal(fsq.decode(past), fsq.decode(past - 1))


@pytest.mark.parametrize(("window", "hop"), [(2048, 512), (96, 30), (50, 7)])
def test_the_spectrum_is_that_of_a_fourier_transform(window: int, hop: int) -> None:
    """Of every window, whatever the sizes have in common."""
    mel = LogMel(sample_rate=16000, bands=12, window=window, hop=hop)
    audio = np.random.default_rng(1).uniform(-1, 1, window + 5 * hop + hop // 2).astype(np.float32)
    windows = np.lib.stride_tricks.sliding_window_view(audio.astype(np.float64), window)[::hop]
    hann = 0.5 - 0.5 * np.cos(2 * np.pi * np.arange(window) / window)
    expected = np.fft.rfft(windows * hann).T
    found = mel._spectrum(torch.from_numpy(audio)[None, None])[0].numpy()
    assert found.shape[2] == expected.shape[1]
    np.testing.assert_allclose(found[0] + 1j * found[1], expected, atol=2e-4 * window**0.5 / 45)


@pytest.mark.parametrize(("window", "hop"), [(96, 30), (97, 30), (50, 7), (31, 31)])
def test_the_ends_are_mirrored(window: int, hop: int) -> None:
    """So that ⌊samples / hop⌋ windows fit; where window − hop is odd, the end is mirrored by a sample more than the start."""
    mel = LogMel(sample_rate=16000, bands=12, window=window, hop=hop)
    audio = np.random.default_rng(2).uniform(-1, 1, 5 * hop + hop // 2 + window).astype(np.float32)
    padded = np.pad(audio, ((window - hop) // 2, (window - hop + 1) // 2), mode="reflect")
    windows = np.lib.stride_tricks.sliding_window_view(padded.astype(np.float64), window)[::hop]
    hann = 0.5 - 0.5 * np.cos(2 * np.pi * np.arange(window) / window)
    magnitude = np.sqrt(np.abs(np.fft.rfft(windows * hann).T) ** 2 + 1e-6)
    expected = np.log(np.maximum(mel.filters.double().numpy() @ magnitude, 1e-5))
    found = mel(torch.from_numpy(audio)[None, None])[0].numpy()
    assert found.shape[1] == len(audio) // hop
    np.testing.assert_allclose(found, expected, atol=1e-3)
