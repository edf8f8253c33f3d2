"""The codec's modules and exported graphs against the original implementation."""

from __future__ import annotations

import json
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch.nn import functional as F

from fishrt.audio.resample import resample
from fishrt_export.graph.report import flipped_margin
from fishrt_export.models.codec.dac import Dac
from fishrt_export.models.codec.firefly import Firefly
from fishrt_export.models.codec.load import CodecConfig
from fishrt_export.sources.codec import code_margins, level_margins
from tiny import GoldenModel, assert_same_table
from tolerances import TOLERANCES

pytestmark = pytest.mark.parity

# For most arrays, the vectors contain the error of float32 against float64. The tolerance is ten times that, at least this.
SMALLEST_TOLERANCE = 1e-5

ENCODER_INPUTS = {"wav_i16", "audio_lengths", "codes", "code_lengths", "feature_lengths", "margin"}
"""Arrays of a recording that are not stages; its codes are compared with the graph's."""
QUANTIZER_STAGES = {"latents", "zq", "sem_z"}


@dataclass(frozen=True)
class Vectors:
    meta: dict[str, Any]
    arrays: Any

    def cases(self, prefix: str, part: str) -> list[str]:
        """Return the cases enc_A, enc_B, … with an array `part`."""
        names = (name.rpartition(".") for name in self.arrays)
        return sorted(case for case, _, key in names if key == part and case.startswith(prefix))

    def stages(self, case: str, *, inputs: set[str]) -> set[str]:
        """Return the names of all arrays of a case except its `inputs`."""
        return {name.partition(".")[2] for name in self.arrays if name.startswith(f"{case}.")} - inputs

    def tolerance(self, name: str) -> float:
        """Return the tolerance of an array; if the vectors have none, that of the same part of other cases."""
        part = name.partition(".")[2]
        described = self.meta["arrays"]
        alike = [entry["tol_f64"] for key, entry in described.items() if key.partition(".")[2] == part and "tol_f64" in entry]
        return max(SMALLEST_TOLERANCE, 10 * described[name].get("tol_f64", max(alike, default=0)))

    def assert_near(self, actual: torch.Tensor | np.ndarray, name: str, *, least: float = SMALLEST_TOLERANCE) -> None:
        """Check that an array is within its tolerance, or within `least` if that is larger."""
        expected = self.arrays[name]
        assert tuple(actual.shape) == expected.shape, name
        error = np.abs(np.asarray(actual) - expected).max()
        assert error <= max(self.tolerance(name), least), f"{name}: {error}"

    def tensor(self, name: str) -> torch.Tensor:
        return torch.from_numpy(self.arrays[name])


@pytest.fixture(scope="module")
def vectors(golden: Path) -> Vectors:
    meta = json.loads((golden / "codec/meta.json").read_text(encoding="utf-8"))
    return Vectors(meta, np.load(golden / "codec/vectors.npz"))


@pytest.fixture(scope="module")
def dac(golden_model: GoldenModel) -> Dac:
    if not isinstance(golden_model.codec_module, Dac):
        pytest.skip("this family has the other kind of codec")
    return golden_model.codec_module


@pytest.fixture(scope="module")
def firefly(golden_model: GoldenModel) -> Firefly:
    if not isinstance(golden_model.codec_module, Firefly):
        pytest.skip("this family has the other kind of codec")
    return golden_model.codec_module


def wave(vectors: Vectors, case: str, multiple: int) -> np.ndarray:
    """The case's audio, float32 [batch, 1, samples], filled up to a multiple."""
    pcm = np.atleast_2d(vectors.arrays[f"{case}.wav_i16"]).astype(np.float32) / 32768
    return np.pad(pcm, ((0, 0), (0, -pcm.shape[1] % multiple)))[:, None]


def recorded(modules: Any, x: torch.Tensor) -> list[torch.Tensor]:
    """The output of each module of a sequence."""
    outputs = []
    for module in modules:
        x = module(x)
        outputs.append(x)
    return outputs


# ---- the graphs of both kinds


def test_encode_graph(golden_model: GoldenModel, vectors: Vectors) -> None:
    """Codes of every recording and of the batch are equal, except choices on the margin."""
    engine, config = golden_model.engine("codec_encode"), golden_model.codec.config
    margins = code_margins(golden_model.codec_module)
    cases = vectors.cases("enc_", "wav_i16")
    assert {"enc_A", "enc_batch"} <= set(cases)
    for case in cases:
        audio, expected = wave(vectors, case, config.sample_multiple), vectors.arrays[f"{case}.codes"]
        codes = engine.run({"audio": audio})["codes"].copy()
        assert codes.shape == expected.shape
        with torch.no_grad():
            clear = margins.measure(torch.from_numpy(audio)).numpy()
        if f"{case}.margin" in vectors.arrays:
            clear = vectors.arrays[f"{case}.margin"]
        for row, frames in enumerate(unmasked(vectors, case, config)):
            codes[row, :, frames:] = expected[row, :, frames:]
        assert flipped_margin(expected, codes, clear, margins.chain) <= margins.allowed, case


def unmasked(vectors: Vectors, case: str, config: CodecConfig) -> list[int]:
    """Return the number of frames of each row that are unaffected by the originals' masking after the end of a shorter row.

    In a codec that looks ahead, all are affected: it looks further ahead than these rows are long.
    """
    batch, _, frames = vectors.arrays[f"{case}.codes"].shape
    if config.context is None or f"{case}.feature_lengths" not in vectors.arrays:
        return [frames] * batch
    lengths = vectors.arrays[f"{case}.feature_lengths"].tolist()
    return [frames if length == max(lengths) else 0 if config.context.ahead else length for length in lengths]


def test_decode_graph(golden_model: GoldenModel, vectors: Vectors) -> None:
    """All lengths and the batch; with such vectors, also codes past the end of a codebook and missing codebooks."""
    engine, config = golden_model.engine("codec_decode"), golden_model.codec.config
    cases = vectors.cases("dec_", "audio")
    assert {"dec_A", "dec_batch", *(("dec_clamp", "dec_partial") if golden_model.codec.kind == "dac" else ())} <= set(cases)
    for case in cases:
        codes = every_codebook(golden_model, vectors, case)
        feeds = {"codes": codes, "position_ids": np.tile(np.arange(codes.shape[2]), (len(codes), 1))}
        state = engine.new_state(batch=len(codes)) if engine.spec.states else None
        audio = engine.run({t.name: feeds[t.name] for t in engine.spec.feeds}, state)["audio"].copy()
        for row, frames in enumerate(unmasked(vectors, case, config)):
            masked = frames * config.hop
            audio[row, :, masked:] = vectors.arrays[f"{case}.audio"][row, :, masked:]
        vectors.assert_near(audio, f"{case}.audio")


# ---- DAC


def test_encoder_stages(dac: Dac, vectors: Vectors) -> None:
    compared = set()
    for case in vectors.cases("enc_", "wav_i16"):
        with torch.no_grad():
            blocks = recorded(dac.encoder.block, torch.from_numpy(wave(vectors, case, dac.config.hop)))
            down = dac.quantizer.downsample(blocks[-1])
            stages = {f"block{i}": block for i, block in enumerate(blocks)}
            stages |= {"enc": blocks[-1], "down": down, "pre": dac.quantizer.pre_module(down)}
        for stage in vectors.stages(case, inputs=ENCODER_INPUTS | QUANTIZER_STAGES):
            vectors.assert_near(stages[stage], f"{case}.{stage}")
            compared.add(stage)
    assert {"enc", "down", "pre"} <= compared


def test_quantizer_stages(dac: Dac, vectors: Vectors) -> None:
    """Stages use the vectors' codes, so that a choice on the margin does not change later stages."""
    quantizer, compared = dac.quantizer, set()
    for case in vectors.cases("enc_", "pre"):
        codes = torch.from_numpy(vectors.arrays[f"{case}.codes"])
        residual = torch.from_numpy(vectors.arrays[f"{case}.pre"])
        places, features = [], []
        with torch.no_grad():
            for row, codebook in enumerate(quantizer.codebooks):
                places.append(codebook.project(residual))
                features.append(codebook.lookup(codes[:, row]))
                residual = residual - features[-1]
            summed = quantizer.dequantize(codes)
        stages = {"latents": torch.cat(places, dim=1), "zq": summed, "sem_z": features[0]}
        for stage in QUANTIZER_STAGES & vectors.stages(case, inputs=ENCODER_INPUTS):
            vectors.assert_near(stages[stage], f"{case}.{stage}")
            compared.add(f"{case}.{stage}")
    held = {name for name in vectors.arrays if name.startswith("enc_") and name.partition(".")[2] in QUANTIZER_STAGES}
    assert compared == held
    assert {name.partition(".")[2] for name in compared} >= {"latents", "zq"}


def test_fewer_codebooks_are_the_first_rows(dac: Dac, golden_model: GoldenModel, vectors: Vectors) -> None:
    expected, margins = vectors.arrays["enc_nq3.codes"], code_margins(dac)
    rows = expected.shape[1]
    codes = golden_model.engine("codec_encode").run({"audio": wave(vectors, "enc_B", dac.config.hop)})["codes"][:, :rows]
    assert flipped_margin(expected, codes, vectors.arrays["enc_B.margin"][:, :rows], rows) <= margins.allowed


def test_decoder_stages(dac: Dac, golden_model: GoldenModel, vectors: Vectors) -> None:
    compared = set()
    for case in vectors.cases("dec_", "codes"):
        with torch.no_grad():
            zq = dac.quantizer.dequantize(torch.from_numpy(every_codebook(golden_model, vectors, case)))
            post = dac.quantizer.post_module(zq)
            up = dac.quantizer.upsample(post)
            blocks = recorded(dac.decoder.model, up)
            stages = {f"model{i}": block for i, block in enumerate(blocks)}
            stages |= {"zq": zq, "post": post, "up": up, "audio": torch.tanh(blocks[-1])}
        for stage in vectors.stages(case, inputs={"codes"}):
            vectors.assert_near(stages[stage], f"{case}.{stage}")
            compared.add(stage)
    assert {"zq", "post", "up", "audio"} <= compared


def every_codebook(golden_model: GoldenModel, vectors: Vectors, case: str) -> np.ndarray:
    """Return the case's codes, with −1 for missing codebooks."""
    codes = vectors.arrays[f"{case}.codes"]
    absent = len(golden_model.codec.config.codebook_sizes) - codes.shape[1]
    return np.pad(codes, ((0, 0), (0, absent), (0, 0)), constant_values=-1)


def test_rotary_table(dac: Dac, vectors: Vectors) -> None:
    expected = vectors.arrays["rope.pre_module"]
    module = dac.quantizer.pre_module
    rows = len(expected)
    assert_same_table(torch.stack([module.cos[:rows], module.sin[:rows]], dim=-1), expected)


def test_rotary_tables_of_older_files(dac: Dac, golden: Path) -> None:
    """The tables that some files contain are ignored, and computed."""
    stored = torch.load(golden / "codec/checkpoint/codec.pth", weights_only=True)
    for name in (name for name in stored if name.endswith(".freqs_cis")):
        module, table = dac.get_submodule(name.removesuffix(".freqs_cis")), stored[name].float()
        assert_same_table(torch.stack([module.cos[: len(table)], module.sin[: len(table)]], dim=-1), table.numpy())


# ---- Firefly


def test_mel_filters(firefly: Firefly, vectors: Vectors) -> None:
    error = np.abs(firefly.mel.filters.numpy().T - vectors.arrays["mel_fb"]).max()
    assert error <= TOLERANCES["mel filters"]


def test_firefly_encoder_stages(firefly: Firefly, vectors: Vectors) -> None:
    """Each stage from the vectors' own result of the one before."""
    quantizer, fsq, compared = firefly.quantizer, firefly.quantizer.residual_fsq, set()
    for case in vectors.cases("enc_", "mel"):
        with torch.no_grad():
            projected = fsq.project(vectors.tensor(f"{case}.downsample"))
            stages = {
                "mel": firefly.mel(torch.from_numpy(wave(vectors, case, 1))),
                "backbone": firefly.backbone(vectors.tensor(f"{case}.mel")),
                "downsample": quantizer.downsample(vectors.tensor(f"{case}.backbone")),
                "fsq_in": projected,
                "fsq_bound1": fsq.bound(vectors.tensor(f"{case}.fsq_in")),
                "fsq_bound2": fsq.bound(vectors.tensor(f"{case}.fsq_bound1")),
            }
        for stage in vectors.stages(case, inputs=ENCODER_INPUTS):
            vectors.assert_near(stages[stage], f"{case}.{stage}", least=TOLERANCES["log-mel"] if stage == "mel" else 0)
            compared.add(stage)
        clear = code_margins(firefly).measure(torch.from_numpy(wave(vectors, case, 1)))
        np.testing.assert_allclose(clear.detach(), vectors.arrays[f"{case}.margin"], rtol=0, atol=code_margins(firefly).allowed)
    assert compared == stages.keys()


def test_firefly_batches_are_masked_alike(firefly: Firefly, vectors: Vectors) -> None:
    """With the originals' masks between the modules, shorter rows of a batch equal the originals', too."""
    config, lengths = firefly.config, vectors.tensor("enc_batch.audio_lengths") // firefly.config.mel_hop
    codes, frames = vectors.tensor("dec_batch.codes"), vectors.tensor("dec_batch.feature_lengths")

    def masked(x: torch.Tensor, lengths: torch.Tensor) -> torch.Tensor:
        return x * (torch.arange(x.shape[-1]) < lengths[:, None, None])

    with torch.no_grad():
        features = masked(
            firefly.backbone(masked(firefly.mel(torch.from_numpy(wave(vectors, "enc_batch", 1))), lengths)), lengths
        )
        clear = level_margins(firefly.quantizer, features).numpy()
        found = firefly.quantizer.encode(features).numpy()
        up = masked(firefly.quantizer.decode(codes), frames * (config.hop // config.mel_hop))
        audio = masked(firefly.head(up), frames * config.hop)
    expected = vectors.arrays["enc_batch.codes"]
    assert flipped_margin(expected, found, clear, config.residuals) <= code_margins(firefly).allowed
    vectors.assert_near(audio, "dec_batch.audio")


def test_finite_scalar_quantiser(firefly: Firefly, vectors: Vectors) -> None:
    fsq, features = firefly.quantizer.residual_fsq, vectors.tensor("fsq.x").transpose(1, 2)
    expected = vectors.arrays["fsq.indices"].transpose(1, 0, 3, 2)  # they come as [groups, batch, frames, residuals]
    expected = expected.reshape(1, -1, expected.shape[-1])
    with torch.no_grad():
        codes = fsq.encode(features)
        quantised = fsq.decode(torch.from_numpy(expected.astype(np.int64))).transpose(1, 2)
    clear = np.repeat(vectors.arrays["fsq.margin"].transpose(1, 0, 2), firefly.config.residuals, axis=1)
    assert flipped_margin(expected, codes.numpy(), clear, firefly.config.residuals) <= code_margins(firefly).allowed
    vectors.assert_near(quantised, "fsq.out")


def test_firefly_decoder_stages(firefly: Firefly, vectors: Vectors) -> None:
    head, compared = firefly.head, set()
    for case in vectors.cases("dec_", "zq"):
        with torch.no_grad():
            zq = firefly.quantizer.residual_fsq.decode(vectors.tensor(f"{case}.codes"))
            up = firefly.quantizer.upsample(zq)
            x = head.conv_pre(up)
            stages = {"zq": zq, "up": up, "conv_pre": x, "audio": head(up)}
            for i, (rise, blocks) in enumerate(zip(head.ups, head.resblocks, strict=True)):
                stages[f"head_up{i}"] = rise(F.silu(x))
                x = stages[f"head_res{i}"] = blocks(stages[f"head_up{i}"])
        for stage in vectors.stages(case, inputs={"codes"}):
            vectors.assert_near(stages[stage], f"{case}.{stage}")
            compared.add(stage)
    assert compared == stages.keys()


def sinc_kernel(rate: int, target: int, dtype: type[np.floating[Any]]) -> tuple[np.ndarray, np.ndarray]:
    """Return the samples that each phase reads, int [phases, taps], and their weights, as `fishrt.audio.resample` has them.

    dtype: of the times in it. The originals compute these in float32.
    """
    old, new = rate // math.gcd(rate, target), target // math.gcd(rate, target)
    base = min(old, new) * 0.99
    reach, phases = math.ceil(6 * old / base), np.arange(new)[:, None]
    taps = phases * old // new + np.arange(-reach, reach + 2)
    t = (taps.astype(dtype) / dtype(old) - phases.astype(dtype) / dtype(new)) * dtype(base)
    t = t.clip(-6, 6).astype(np.float64)
    return taps, np.sinc(t) * np.cos(np.pi * t / 12) ** 2 * base / old


def rounded_times(rate: int, target: int) -> float:
    """Return the largest error that float32 times make in a sample, of samples within −1..1: a sum over the taps of one phase.

    Times of 0..1 are multiplied by a term of the reduced ratio of the rates: 1.9e-5 for 16 kHz to 44.1 kHz, 4.0e-5 for 32 kHz.
    """
    (_, single), (_, double) = (sinc_kernel(rate, target, dtype) for dtype in (np.float32, np.float64))
    return float(np.abs(single - double).sum(axis=1).max())


def test_resampling(firefly: Firefly, vectors: Vectors) -> None:
    rates = [int(name.removeprefix("resample.in_")) for name in vectors.arrays if name.startswith("resample.in_")]
    assert rates
    for rate in rates:
        target, expected = firefly.config.sample_rate, vectors.arrays[f"resample.out_{rate}"]
        actual = resample(vectors.arrays[f"resample.in_{rate}"].astype(np.float32) / 32768, rate, target)[None]
        assert actual.shape == expected.shape
        assert np.abs(actual - expected).max() <= rounded_times(rate, target) + TOLERANCES["resampled"], rate


@pytest.mark.parametrize("rate", [16_000, 32_000, 48_000])
def test_resampling_rounds_no_times(rate: int) -> None:
    """fishrt's resampling equals the formula in float64, so the difference above is the originals' rounding."""
    pcm, target = np.random.default_rng(5).uniform(-1, 1, rate).astype(np.float32), 44_100
    taps, weights = sinc_kernel(rate, target, np.float64)
    period = rate // math.gcd(rate, target)
    padded = np.pad(pcm, 2 * period)
    blocks = np.arange(2, len(pcm) // period + 2)[:, None, None] * period
    expected = (padded[blocks + taps] * weights).sum(axis=2).reshape(-1)
    assert np.abs(resample(pcm, rate, target) - expected[: len(pcm) * target // rate]).max() <= TOLERANCES["resampled"]
