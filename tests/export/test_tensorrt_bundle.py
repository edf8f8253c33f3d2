"""Bundles on TensorRT: their plans, the command that builds them, and the same speech as on the CPU.

TensorRT and CUDA are simulated; see fake_tensorrt.
"""

from __future__ import annotations

import json
import re
import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from fishrt.bundle.folder import Bundle
from fishrt.bundle.graphs import BundleGraphs, with_positions, within_plans
from fishrt.codec import CodecDecoder, CodecEncoder, chunk_frames
from fishrt.errors import FishrtError, PromptError, ProviderError
from fishrt.language_model.batch import DualAR
from fishrt.language_model.sampling import Sampling, SeededNoise
from fishrt.tts import TTS
from fishrt_engines import Engine, open_engine
from fishrt_engines.trt.plans import PlanRequest
from fishrt_export.targets.tensorrt.build import PlanOptions, build_plan, plan_requests
from helpers_cli import refused, run
from helpers_lm import frames_of, row_of, spoken
from helpers_trt import Simulated, simulated

SM89 = (8, 9)
OPTIONS = PlanOptions(max_lens=(64,))


@pytest.fixture
def gpu(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Simulated]:
    with simulated(tmp_path / "cache", monkeypatch) as there:
        yield there


def engine(bundle: Bundle, role: str, provider: str, request: PlanRequest | None = None) -> Engine:
    spec = bundle.manifest.specs[role] if request is None else request.spec
    return open_engine(bundle.file(spec.file), spec, provider=provider)


def exactly(bundle: Bundle, options: PlanOptions = OPTIONS) -> dict[str, PlanRequest]:
    """Return requests in float32, so that results can be compared."""
    requests = dict(plan_requests(bundle, options, SM89))
    return {role: replace(r, lowering=replace(r.lowering, precision="fp32")) for role, r in requests.items()}


def test_the_same_codes_as_on_the_cpu(gpu, tiny_bundle):
    requests = exactly(tiny_bundle)
    for role in ("slow_ar", "fast_ar"):
        build_plan(requests[role])
    lm = within_plans(tiny_bundle).manifest.model
    assert lm.max_seq_len == 64
    on_gpu = DualAR(
        engine(tiny_bundle, "slow_ar", "tensorrt"), engine(tiny_bundle, "fast_ar", "tensorrt", requests["fast_ar"]), lm
    )
    on_cpu = DualAR(engine(tiny_bundle, "slow_ar", "cpu"), engine(tiny_bundle, "fast_ar", "cpu"), lm)
    rng = np.random.default_rng(2)
    prompt = np.concatenate([rng.integers(0, lm.vocab_size, (1, 9)), rng.integers(0, 10, (lm.num_codebooks, 9))])
    sampling = Sampling().resolve(lm.sampling)
    codes = [frames_of(model, prompt, sampling, SeededNoise(5), 24) for model in (on_gpu, on_cpu)]
    assert len(codes[0]) > 3
    np.testing.assert_array_equal(*codes)
    assert gpu.cuda.launches > 2 * (len(codes[0]) - 4)  # the slow AR's step and the frame graph


def test_the_same_sound_as_on_the_cpu(gpu, tiny_bundle):
    requests, codec = exactly(tiny_bundle), tiny_bundle.manifest.codec
    for role in ("codec_decode", "codec_encode"):
        build_plan(requests[role])
    codes = np.random.default_rng(1).integers(0, min(codec.codebook_sizes), (len(codec.codebook_sizes), 37))
    pcm = [CodecDecoder(engine(tiny_bundle, "codec_decode", where), codec).decode(codes) for where in ("tensorrt", "cpu")]
    np.testing.assert_allclose(*pcm, atol=1e-5)
    encoders = [CodecEncoder(engine(tiny_bundle, "codec_encode", where), codec) for where in ("tensorrt", "cpu")]
    fits = pcm[1][: 32 * codec.hop]
    np.testing.assert_array_equal(*(encoder.encode(fits) for encoder in encoders))
    with pytest.raises(
        FishrtError, match=f"samples of {codec.sample_multiple} to {len(fits)}; this call has .*samples of {len(pcm[1])}"
    ):
        encoders[0].encode(pcm[1])


def test_all_graphs_are_built_for_the_sizes_that_the_runtime_asks_for(tiny_bundle):
    lm, codec = tiny_bundle.manifest.model, tiny_bundle.manifest.codec
    requests = dict(plan_requests(tiny_bundle, PlanOptions(max_batch=4), SM89))
    dims = {role: [dict(profile.dims) for profile in request.profiles] for role, request in requests.items()}
    longest = lm.max_prompt
    assert dims["slow_ar"] == [{"batch": (1, 1, 4), "length": (2, 256, longest)}, {"batch": (1, 1, 4), "length": (1, 1, 1)}]
    assert dims["fast_ar"] == [{"batch": (1, 1, 4)}]
    most = chunk_frames(tiny_bundle.manifest.specs["codec_decode"], codec)[1]
    assert dims["codec_decode"] == [{"batch": (1, 1, 1), "frames": (1, most, most)}]
    least, _, samples = dims["codec_encode"][0]["samples"]
    assert least % codec.sample_multiple == samples % codec.sample_multiple == 0
    assert least >= codec.min_samples
    assert samples >= longest * codec.hop
    assert {role: request.lowering.precision for role, request in requests.items()} == {
        "slow_ar": "bf16",
        "fast_ar": "bf16",
        "codec_decode": "fp32",
        "codec_encode": "fp32",
    }
    assert requests["slow_ar"].lowering.max_len == lm.max_seq_len
    assert requests["fast_ar"].spec == tiny_bundle.manifest.graphs["fast_ar"].forms[-1].spec


@pytest.mark.parametrize(
    ("stored", "asked", "capability", "computed"),
    [
        ("fp32", None, (8, 0), "bf16"),
        ("fp32", None, (7, 5), "fp16"),
        ("fp16", "fp16", (9, 0), "fp16"),
        ("int4", None, (9, 0), "fp16"),
        ("int4", "int4", (9, 0), "fp16"),
        ("int8", "int8", (7, 5), "fp16"),
        ("int8", "bf16", (9, 0), "bf16"),
    ],
)
def test_precisions(tiny_bundle, stored, asked, capability, computed):
    bundle = stored_in(tiny_bundle, stored)
    lowering = dict(plan_requests(bundle, PlanOptions(precision=asked), capability))["slow_ar"].lowering
    assert lowering.precision == computed
    assert lowering.fp32_attention == (computed == "fp16")
    chosen = dict(plan_requests(bundle, PlanOptions(precision=asked, fp32_attention=False), capability))["slow_ar"].lowering
    assert not chosen.fp32_attention


@pytest.mark.parametrize(
    ("asked", "message"),
    [("int4", "int4 needs weights in int4, and those of this bundle's slow AR are in fp32"), ("fp8", "fp8 needs scales")],
)
def test_precisions_that_a_bundle_does_not_have_are_refused(tiny_bundle, asked, message):
    with pytest.raises(ProviderError, match=message) as error:
        plan_requests(tiny_bundle, PlanOptions(precision=asked), (9, 0))
    assert "--precision" in (error.value.hint or "")


def stored_in(bundle: Bundle, precision: str) -> Bundle:
    graphs = bundle.manifest.graphs
    slow = replace(graphs["slow_ar"], precision=precision)
    return replace(bundle, manifest=replace(bundle.manifest, graphs={**graphs, "slow_ar": slow}))


def test_positions(tiny_bundle):
    lm = replace(tiny_bundle.manifest.model, max_seq_len=32768, max_prompt=30720)
    wide = replace(tiny_bundle, manifest=replace(tiny_bundle.manifest, model=lm))
    assert dict(plan_requests(wide, PlanOptions(), SM89))["slow_ar"].lowering.max_len == 4096
    assert dict(plan_requests(wide, PlanOptions(max_lens=(20000,)), SM89))["slow_ar"].lowering.max_len == 20000
    several = plan_requests(wide, PlanOptions(max_lens=(20000, 1024)), SM89)
    assert [r.lowering.max_len for _, r in several] == [1024, 20000, None, None, None]  # the longest last: it sets the limit
    with pytest.raises(FishrtError, match="the length is 40000; the model takes up to 32768"):
        plan_requests(wide, PlanOptions(max_lens=(40000,)), SM89)
    assert (with_positions(lm, 4096).max_seq_len, with_positions(lm, 4096).max_prompt) == (4096, 2048)
    assert with_positions(lm, 1000).max_prompt == 500
    assert with_positions(lm, 50000) == lm


def test_speech_ends_where_the_plan_does(gpu, tiny_bundle):
    requests = exactly(tiny_bundle, PlanOptions(max_lens=(16,)))
    for role in ("slow_ar", "fast_ar"):
        build_plan(requests[role])
    lm = within_plans(tiny_bundle).manifest.model
    model = DualAR(
        engine(tiny_bundle, "slow_ar", "tensorrt"), engine(tiny_bundle, "fast_ar", "tensorrt", requests["fast_ar"]), lm
    )
    for seed in range(20):
        prompt = np.zeros((1 + lm.num_codebooks, 5), np.int64)
        row = row_of(model, prompt, Sampling().resolve(lm.sampling), SeededNoise(seed))
        spoken(model, row)
        if row.stop_reason == "max_seq_len":
            assert row.drawn.shape[1] == 11
            return
    pytest.fail("the model always ended by itself")


def test_without_plans_the_command_is_told(gpu, tiny_bundle):
    with pytest.raises(ProviderError, match="there is no TensorRT plan") as error:
        within_plans(tiny_bundle)
    assert error.value.hint == f"fishrt build-trt {tiny_bundle.path}"
    with pytest.raises(ProviderError) as error:
        BundleGraphs(tiny_bundle, "tensorrt", None)["slow_ar"]
    assert error.value.hint == f"fishrt build-trt {tiny_bundle.path}"


def test_the_command(gpu, tiny_bundle, tmp_path):
    arguments = ["build-trt", tiny_bundle.path, "--precision", "fp16", "--max-len", 600, "--workspace", 1.5]
    done = run(*arguments)
    assert done.exit_code == 0, done.output
    assert done.stdout == ""
    said = re.findall(r"MB  (.*), built in \d s", done.stderr)
    assert said == ["slow_ar.onnx in fp16", "frame.onnx in fp16", "codec_decode.onnx in fp32", "codec_encode.onnx in fp32"]
    assert {limit for config in gpu.trt.configs for limit in config.limits.values()} == {3 << 29}
    again = json.loads(run(*arguments, "--json").stdout)
    assert (again["ok"], again["command"], again["bundle"]) == (True, "build-trt", str(tiny_bundle.path))
    assert [(plan["role"], plan["built"]) for plan in again["plans"]] == [
        ("slow_ar", False),
        ("fast_ar", False),
        ("codec_decode", False),
        ("codec_encode", False),
    ]
    assert all(Path(plan["path"]).stat().st_size == plan["bytes"] for plan in again["plans"])
    assert run(*arguments, "--quiet").stderr == ""
    both = run(*arguments, "--max-len", 512, "--json")
    plans = [(plan["role"], plan["max_len"], plan["attention"], plan["built"]) for plan in json.loads(both.stdout)["plans"]]
    assert plans[:2] == [("slow_ar", 512, "fused", True), ("slow_ar", 600, "fused", False)]
    assert within_plans(tiny_bundle).manifest.model.max_seq_len == 600


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--precision", "fp8"], "fp8 needs scales"),
        (["--precision", "int4"], "export the checkpoint with --precision int4"),
        (["--precision", "fp32"], "fp32"),
        (["--max-len", "511"], "--max-len"),
        (["--max-len", "9999"], "the model takes up to 4096 positions"),
        (["--workspace", "0"], "--workspace"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_the_command_refuses(gpu, tiny_bundle, arguments: list[Any], message):
    refused(run("build-trt", tiny_bundle.path, *arguments), message)
    assert gpu.trt.builds == 0


def test_the_command_without_tensorrt(tiny_bundle, monkeypatch):
    """Its extra is named first, since it brings onnx, too."""
    monkeypatch.setitem(sys.modules, "fishrt_export.targets.tensorrt.build", None)
    refused(run("build-trt", tiny_bundle.path), "tensorrt", "fishrt[trt]")


def test_the_command_tells_what_tensorrt_said(gpu, tiny_bundle):
    gpu.trt.faults["build_serialized_network"] = "no tactic for node slow.0"
    refused(run("build-trt", tiny_bundle.path), "no tactic for node slow.0", "--debug")


def test_speaking(gpu, tiny_bundle):
    """From text to audio. Numbers are those of float16, so only shapes and types are checked."""
    with pytest.raises(ProviderError, match="there is no TensorRT plan"):
        TTS.load(tiny_bundle, provider="tensorrt")
    assert run("build-trt", tiny_bundle.path, "--precision", "fp16", "--max-len", 600).exit_code == 0
    tts = TTS.load(tiny_bundle, provider="tensorrt")
    chunks = list(tts.stream("Hello!", seed=3, max_frames=6))
    pcm = np.concatenate([chunk.pcm for chunk in chunks])
    assert np.isfinite(pcm).all()
    assert len(pcm) == sum(chunk.codes.shape[1] for chunk in chunks) * tts.bundle.manifest.codec.hop > 0
    assert {engine.provider for engine in (tts.engines[role] for role in tts.engines)} == {"tensorrt"}
    assert tts.encode(np.zeros(4000, np.float32), tts.sample_rate).shape[0] == len(tts.bundle.manifest.codec.codebook_sizes)
    with pytest.raises(PromptError, match="the model takes 300 and then speech"):
        tts.speak("Hello!", system="Speak slowly. " * 300)
