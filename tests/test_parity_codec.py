"""The codec's modules and exported graphs against the original implementation."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from fishrt_export.verify import MARGIN, flipped_margin
from tiny import GoldenModel, assert_same_table

pytestmark = pytest.mark.parity

# The vectors tell how far float32 was from float64 for most arrays; ten times that is allowed, and never less than this.
SMALLEST_TOLERANCE = 1e-5

ENCODER_INPUTS = {"wav_i16", "audio_lengths", "codes", "code_lengths", "margin"}
"""What the vectors hold of a recording besides stages; its codes are compared with those of the graph."""
QUANTIZER_STAGES = {"latents", "zq", "sem_z"}


@dataclass(frozen=True)
class Vectors:
    meta: dict[str, Any]
    arrays: Any

    def cases(self, prefix: str, part: str) -> list[str]:
        """enc_A, enc_B, … for which the vectors hold `part`."""
        names = (name.rpartition(".") for name in self.arrays)
        return sorted(case for case, _, key in names if key == part and case.startswith(prefix))

    def stages(self, case: str, *, inputs: set[str]) -> set[str]:
        """Everything that the vectors hold of one case but its `inputs`."""
        return {name.partition(".")[2] for name in self.arrays if name.startswith(f"{case}.")} - inputs

    def tolerance(self, name: str) -> float:
        """Of one array; where the vectors do not say, that of the same part of the other cases."""
        part = name.partition(".")[2]
        described = self.meta["arrays"]
        alike = [entry["tol_f64"] for key, entry in described.items() if key.partition(".")[2] == part and "tol_f64" in entry]
        return max(SMALLEST_TOLERANCE, 10 * described[name].get("tol_f64", max(alike)))

    def assert_near(self, actual: torch.Tensor | np.ndarray, name: str) -> None:
        expected = self.arrays[name]
        assert tuple(actual.shape) == expected.shape, name
        error = np.abs(np.asarray(actual) - expected).max()
        assert error <= self.tolerance(name), f"{name}: {error}"


@pytest.fixture(scope="module")
def vectors(golden: Path) -> Vectors:
    meta = json.loads((golden / "codec/meta.json").read_text(encoding="utf-8"))
    return Vectors(meta, np.load(golden / "codec/vectors.npz"))


def wave(vectors: Vectors, case: str, hop: int) -> np.ndarray:
    """The case's audio, float32 [batch, 1, frames · hop]."""
    pcm = np.atleast_2d(vectors.arrays[f"{case}.wav_i16"]).astype(np.float32) / 32768
    return np.pad(pcm, ((0, 0), (0, -pcm.shape[1] % hop)))[:, None]


def recorded(modules: Any, x: torch.Tensor) -> list[torch.Tensor]:
    """The output of each module of a sequence."""
    outputs = []
    for module in modules:
        x = module(x)
        outputs.append(x)
    return outputs


def test_encoder_stages(golden_model: GoldenModel, vectors: Vectors) -> None:
    dac, compared = golden_model.dac, set()
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


def test_quantizer_stages(golden_model: GoldenModel, vectors: Vectors) -> None:
    """Along the vectors' own codes, so that a choice on the margin does not change what is compared."""
    quantizer, compared = golden_model.dac.quantizer, set()
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


def test_encode_graph(golden_model: GoldenModel, vectors: Vectors) -> None:
    """Codes of every recording, the batch among them, exactly but for choices on the margin."""
    engine, hop = golden_model.engine("codec_encode"), golden_model.codec.config.hop
    cases = vectors.cases("enc_", "margin")
    assert cases
    for case in cases:
        codes = engine.run({"audio": wave(vectors, case, hop)})["codes"]
        expected = vectors.arrays[f"{case}.codes"]
        assert codes.shape == expected.shape
        assert flipped_margin(expected, codes, vectors.arrays[f"{case}.margin"]) <= MARGIN, case


def test_fewer_codebooks_are_the_first_rows(golden_model: GoldenModel, vectors: Vectors) -> None:
    expected = vectors.arrays["enc_nq3.codes"]
    audio = wave(vectors, "enc_B", golden_model.codec.config.hop)
    codes = golden_model.engine("codec_encode").run({"audio": audio})["codes"][:, : expected.shape[1]]
    assert flipped_margin(expected, codes, vectors.arrays["enc_B.margin"][:, : expected.shape[1]]) <= MARGIN


def test_decoder_stages(golden_model: GoldenModel, vectors: Vectors) -> None:
    dac, compared = golden_model.dac, set()
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
    """The case's codes, with −1 for codebooks that it leaves out."""
    codes = vectors.arrays[f"{case}.codes"]
    absent = len(golden_model.codec.config.codebook_sizes) - codes.shape[1]
    return np.pad(codes, ((0, 0), (0, absent), (0, 0)), constant_values=-1)


def test_decode_graph(golden_model: GoldenModel, vectors: Vectors) -> None:
    """All lengths, the batch, codes past the end of a codebook, and missing codebooks."""
    engine, cases = golden_model.engine("codec_decode"), vectors.cases("dec_", "audio")
    assert {"dec_clamp", "dec_partial", "dec_batch"} <= set(cases)
    for case in cases:
        codes = every_codebook(golden_model, vectors, case)
        vectors.assert_near(engine.run({"codes": codes})["audio"], f"{case}.audio")


def test_rotary_table(golden_model: GoldenModel, vectors: Vectors) -> None:
    expected = vectors.arrays["rope.pre_module"]
    module = golden_model.dac.quantizer.pre_module
    rows = len(expected)
    assert_same_table(torch.stack([module.cos[:rows], module.sin[:rows]], dim=-1), expected)
