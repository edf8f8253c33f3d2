"""Another sample rate of a sound, whole and in parts."""

from __future__ import annotations

import tracemalloc

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fishrt.audio.resample import Resampler, resample
from fishrt.errors import AudioError

RATE = 16000
TONE = (0.5 * np.sin(np.arange(RATE // 2) * 2 * np.pi * 440 / RATE)).astype(np.float32)


def test_resampling_keeps_the_tone() -> None:
    up = resample(TONE, RATE, 44100)
    assert (len(up), up.dtype) == (22050, np.float32)
    expected = 0.5 * np.sin(np.arange(22050) * 2 * np.pi * 440 / 44100)
    assert np.abs(up - expected)[1000:-1000].max() < 1e-3
    assert resample(TONE, RATE, RATE) is TONE


def test_resampling_from_an_odd_rate_takes_little_memory() -> None:
    """All kernels together would take a gigabyte."""
    odd, target = 15_000_001, 44100
    given = np.sin(np.arange(odd // 10) * 2 * np.pi * 1000 / odd).astype(np.float32)
    tracemalloc.start()
    pcm = resample(given, odd, target)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert np.abs(pcm - np.sin(np.arange(len(pcm)) * 2 * np.pi * 1000 / target))[20:-20].max() < 1e-3
    assert peak < 100e6


def test_resampling_refuses_nonsense() -> None:
    with pytest.raises(AudioError, match="0 Hz"):
        resample(TONE, 0, RATE)


@pytest.mark.parametrize(("rate", "target", "samples"), [(48000, 8000, 1), (8000, 44100, 1), (44101, 44100, 7), (3, 2, 100)])
def test_resampling_takes_any_rates_and_lengths(rate: int, target: int, samples: int) -> None:
    """The number of samples is scaled and rounded up; a constant stays constant away from the ends."""
    flat = resample(np.full(samples, 0.5, np.float32), rate, target)
    assert len(flat) == -(-samples * target // rate)
    if samples == 100:
        assert np.abs(flat[20:-20] - 0.5).max() < 1e-3


def test_resampling_in_blocks_changes_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    whole = resample(TONE[:1000], RATE, 44100)
    for at_once in (1, 1000, 100_000):
        monkeypatch.setattr("fishrt.audio.resample._PRODUCTS", at_once)
        np.testing.assert_array_equal(resample(TONE[:1000], RATE, 44100), whole)


RATES = st.sampled_from([(16000, 24000), (24000, 16000), (44100, 24000), (44100, 48000), (44101, 24000), (8000, 8000)])


@settings(max_examples=100, deadline=None)
@given(rates=RATES, samples=st.integers(0, 1500), sizes=st.lists(st.integers(0, 400), min_size=1).filter(any))
def test_parts_together_are_the_whole(rates: tuple[int, int], samples: int, sizes: list[int]) -> None:
    pcm = np.random.default_rng(samples).uniform(-1, 1, samples).astype(np.float32)
    resampler, parts, at = Resampler(*rates), [], 0
    while at < samples:
        size = sizes[len(parts) % len(sizes)]
        parts.append(resampler.push(pcm[at : at + size]))
        at += size
    np.testing.assert_array_equal(np.concatenate([*parts, resampler.finish()]), resample(pcm, *rates))


def test_parts_come_soon_and_the_old_ones_are_forgotten() -> None:
    """All but the last milliseconds of what is pushed is out; ten minutes in parts take no more memory than a part."""
    resampler = Resampler(44100, 24000)
    assert len(resampler.push(np.zeros(4410, np.float32))) > 2400 - 24
    tracemalloc.start()
    for _ in range(600):
        resampler.push(np.zeros(44100, np.float32))
    kept = tracemalloc.get_traced_memory()[0]
    tracemalloc.stop()
    assert kept < 1e6
