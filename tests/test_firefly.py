"""Firefly codecs of other sizes than the official ones: quantiser and spectrum against definitions, graphs against modules."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from fishrt_engines import open_engine
from fishrt_export.codec.firefly import Firefly, FireflyConfig
from fishrt_export.codec.fsq import GroupedFSQ
from fishrt_export.codec.mel import LogMel
from fishrt_export.codec.source import open_codec

LEVELS = (8, 5, 4)
CONFIG: dict[str, Any] = {
    "spec_transform": {"sample_rate": 16000, "n_mels": 20, "n_fft": 96, "hop_length": 30, "win_length": 96},
    "backbone": {"input_channels": 20, "depths": [1, 2], "dims": [6, 12], "kernel_size": 5},
    "head": {
        "hop_length": 30,
        "upsample_rates": [5, 3, 2],
        "upsample_kernel_sizes": [7, 3, 4],
        "resblock_kernel_sizes": [3, 5],
        "resblock_dilation_sizes": [[1, 2], [3]],
        "num_mels": 12,
        "upsample_initial_channel": 16,
        "pre_conv_kernel_size": 3,
        "post_conv_kernel_size": 5,
    },
    "quantizer": {"input_dim": 12, "n_codebooks": 2, "n_groups": 4, "levels": LEVELS, "downsample_factor": [3, 2]},
}


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


@pytest.mark.slow
@pytest.mark.parametrize("causal", [True, False], ids=["causal", "centred"])
def test_graphs_of_another_firefly(tmp_path: Path, causal: bool) -> None:
    """Odd sizes, two residuals, groups that are not projected, 16-bit weights; and any number of samples from the fewest on."""
    torch.manual_seed(0)
    config = json.loads(json.dumps(CONFIG))
    if not causal:
        config["head"]["upsample_kernel_sizes"] = [7, 3, 6]
    (tmp_path / "codec_config.json").write_text(json.dumps(config), encoding="utf-8")
    module = Firefly(FireflyConfig.from_json(config, causal=causal))
    torch.save({k: v.half() for k, v in module.state_dict().items()}, tmp_path / "firefly-gan-vq-fsq-x-generator.pth")
    source = open_codec(tmp_path)
    assert source.problems() == []
    assert source.config.hop == 180
    assert source.config.codebook_sizes == (160,) * 8
    jobs = source.jobs()
    for job in jobs:
        parity = job.run(tmp_path).parity
        assert parity.max_abs_error <= parity.tolerance
    engine = open_engine(tmp_path / jobs[0].spec.file, jobs[0].spec, provider="cpu")
    assert source.config.min_samples == (34 if causal else 180)
    for samples in (source.config.min_samples, 180, 181, 209, 210, 359, 360, 361, 1000):
        steps = samples // 30
        frames = (steps + 5) // 6 if causal else steps // 6
        if samples >= source.config.min_samples:
            codes = engine.run({"audio": np.zeros((1, 1, samples), np.float32)})["codes"]
            assert codes.shape == (1, 8, frames), samples
