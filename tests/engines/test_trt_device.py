"""Tests that need TensorRT on a device. A fake tests all else.

These tests have not run yet. Start with: FISHRT_CACHE=/tmp/fishrt-plans pytest -m trt
"""

from __future__ import annotations

import importlib
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import fake_tensorrt as fake
from fake_cuda_runtime import FakeCudaRuntime
from fishrt.bundle.graphs import within_plans
from fishrt.codec import CodecDecoder, CodecEncoder
from fishrt.language_model.batch import DualAR
from fishrt.language_model.sampling import Sampling, SeededNoise
from fishrt_engines import open_engine
from fishrt_engines.trt.device import open_device
from fishrt_export.targets.tensorrt.build import PlanOptions, build_plan, plan_requests
from helpers_lm import frames_of
from helpers_trt import request_for, write_small

TOLERANCES = {"fp32": 2e-3, "fp16": 1e-2, "bf16": 8e-2}
"""Largest difference from the CPU, relative to the largest value: estimates from the width of the mantissa, TF32's for fp32."""


@pytest.fixture
def cache(tensorrt_device: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("FISHRT_CACHE", str(tmp_path / "cache"))
    return tmp_path


def assert_close(actual: np.ndarray, expected: np.ndarray, precision: str) -> None:
    assert np.abs(actual - expected).max() <= TOLERANCES[precision] * np.abs(expected).max()


def test_the_simulation_has_the_names_of_cuda() -> None:
    runtime = pytest.importorskip("cuda.bindings.runtime", reason="needs cuda-bindings")
    assert {name for name in vars(FakeCudaRuntime) if name.startswith("cuda")} <= set(dir(runtime))


@pytest.mark.trt
@pytest.mark.parametrize(
    ("fake", "real"),
    [
        (fake.FakeTensorRT, ""),
        (fake.Parser, "OnnxParser"),
        (fake.Profile, "IOptimizationProfile"),
        (fake.Config, "IBuilderConfig"),
        (fake.Builder, "Builder"),
        (fake.Runtime, "Runtime"),
        (fake.Engine, "ICudaEngine"),
        (fake.Context, "IExecutionContext"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_tensorrt_has_the_names_that_are_used(tensorrt_device: None, fake: Any, real: str) -> None:
    module = importlib.import_module("tensorrt")
    there = getattr(module, real) if real else module
    names = {name for name in (*vars(fake), *getattr(fake, "__annotations__", {})) if not name.startswith("_")}
    assert names - {"refused", "dtype", "run"} <= set(dir(there))


@pytest.mark.trt
def test_the_device_copies_and_launches_graphs(tensorrt_device: None) -> None:
    device = open_device()
    there, other = (device.allocate(400, "a test") for _ in range(2))
    here, back = (device.pinned((100,), np.dtype(np.float32)) for _ in range(2))
    device.download(there.address, back)
    device.synchronize()
    assert not back.any()
    graph = device.capture(lambda: device.copy(there.address, other.address, 400))
    for value in (1, 2):
        here[...] = value
        device.upload(here, there.address)
        graph.launch()
        device.download(other.address, back)
        device.synchronize()
        assert (back == value).all()


@pytest.mark.trt
@pytest.mark.parametrize("precision", ["fp32", "fp16", "bf16"])
def test_a_small_graph(cache: Path, precision: str, caplog: pytest.LogCaptureFixture) -> None:
    """Caches in place, alternating state buffers, captured steps."""
    path = write_small(cache / "bundle")
    request = request_for(path, precision=precision)
    build_plan(request)
    engines = [open_engine(path, request.spec, provider=name) for name in ("tensorrt", "cpu")]
    states = [(engine, engine.new_state(batch=1, cache=12)) for engine in engines]
    for tokens, at in (([3, 1, 4], 0), *(([n], n) for n in range(3, 12))):
        feeds = {"tokens": np.array([tokens]), "write_index": np.array([at])}
        ours, cpu = (engine.run(feeds, state)["total"].copy() for engine, state in states)
        assert_close(ours, cpu, precision)
    assert_close(*(state.read("key_cache.0") for _, state in states), precision)
    assert "without a CUDA graph" not in caplog.text


@pytest.mark.trt
@pytest.mark.parametrize("primitive", [False, True], ids=["attention", "primitive"])
@pytest.mark.parametrize("precision", ["fp32", "fp16", "bf16"])
def test_a_bundle(cache: Path, tiny_bundle: Any, precision: str, primitive: bool) -> None:
    """All graphs: logits after a prompt and after steps, whole frames, audio, and codes of audio."""
    options = PlanOptions(max_lens=(256,), primitive_attention=primitive)
    requests = dict(plan_requests(tiny_bundle, options, open_device().compute_capability))
    for role in ("slow_ar", "fast_ar"):
        lowering = replace(requests[role].lowering, precision=precision, fp32_attention=precision == "fp16")
        requests[role] = replace(requests[role], lowering=lowering)
    for request in requests.values():
        build_plan(request)
    ours = {role: open_engine(r.path, r.spec, provider="tensorrt") for role, r in requests.items()}
    graphs = tiny_bundle.manifest.specs
    cpu = {role: open_engine(tiny_bundle.file(spec.file), spec, provider="cpu") for role, spec in graphs.items()}
    lm, codec = within_plans(tiny_bundle).manifest.model, tiny_bundle.manifest.codec

    rng = np.random.default_rng(1)
    columns = np.concatenate([rng.integers(0, lm.vocab_size, (1, 40)), rng.integers(0, 10, (lm.num_codebooks, 40))])
    states = [engine["slow_ar"].new_state(batch=1, cache=64) for engine in (ours, cpu)]
    for start, end in ((0, 30), *((n, n + 1) for n in range(30, 40))):
        feeds = {
            "prompt": columns[None, :, start:end].copy(),
            "position_ids": np.arange(start, end)[None],
            "write_index": np.array([start]),
            "last_index": np.array([end - start - 1]),
        }
        logits = [engine["slow_ar"].run(feeds, state)["logits"].copy() for engine, state in zip((ours, cpu), states, strict=True)]
        assert_close(*logits, precision)

    if precision == "fp32":
        speakers = [DualAR(engine["slow_ar"], engine["fast_ar"], lm) for engine in (ours, cpu)]
        sampling = Sampling().resolve(lm.sampling)
        spoken = [frames_of(model, columns, sampling, SeededNoise(5), 8) for model in speakers]
        np.testing.assert_array_equal(spoken[0][:4], spoken[1][:4])  # TF32 may change a later draw
    codes = rng.integers(0, min(codec.codebook_sizes), (len(codec.codebook_sizes), 37))
    sound = [CodecDecoder(engine["codec_decode"], codec).decode(codes) for engine in (ours, cpu)]
    assert_close(*sound, "fp32")
    encoded = [CodecEncoder(engine["codec_encode"], codec).encode(sound[1]) for engine in (ours, cpu)]
    assert (encoded[0] == encoded[1]).mean() > 0.95
