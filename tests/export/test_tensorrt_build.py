"""The builder and the cache of plans. TensorRT and CUDA are simulated; see fake_tensorrt."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest

from fake_cuda_runtime import FakeCudaRuntime
from fishrt_engines import FishrtError, GraphError, ProviderError, open_engine
from fishrt_engines.trt import api as trt_api
from fishrt_engines.trt import plans as trt_plans
from fishrt_engines.trt.device import Device
from fishrt_export.errors import ExportError
from fishrt_export.targets.tensorrt import build as trt_build
from fishrt_export.targets.tensorrt.build import build_plan
from fishrt_export.targets.tensorrt.lowering import FORMS
from helpers_trt import SPEC, Simulated, profiles, request_for, simulated, write_attention, write_small

DECOMPOSABLE = "TRT_decomposable"


@pytest.fixture
def gpu(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Simulated]:
    with simulated(tmp_path / "cache", monkeypatch) as there:
        yield there


@pytest.fixture
def small(tmp_path: Path) -> Path:
    return write_small(tmp_path / "bundle")


def opened(path: Path) -> Any:
    return open_engine(path, SPEC, provider="tensorrt")


def entries(tmp_path: Path) -> list[Path]:
    return sorted((tmp_path / "cache/plans").glob("*/entry.json"))


def test_a_plan_is_built_once(gpu, small, tmp_path):
    told: list[tuple[str, float]] = []
    plan, built = build_plan(request_for(small), lambda stage, part: told.append((stage, part)))
    assert built
    assert plan.path.is_file()
    assert [part for _, part in told] == sorted(part for _, part in told)
    assert ("Selecting Tactics", 0.25) in told
    assert told[-1] == ("Building Engine", 1.0)
    again, built = build_plan(request_for(small))
    assert (again, built, gpu.trt.builds) == (plan, False, 1)
    assert len(entries(tmp_path)) == 1
    assert not [path for path in (tmp_path / "cache/plans").iterdir() if path.name.startswith(".")]


@pytest.mark.parametrize(
    "changes",
    [
        {"max_len": 16},
        {"precision": "fp16"},
        {"profiles": profiles(longest=6)},
        {"workspace": 1 << 30},
        {"spec": replace(SPEC, identity="of other weights")},
    ],
    ids=lambda changes: next(iter(changes)),
)
def test_whatever_a_plan_depends_on_gives_another_one(gpu, small, tmp_path, changes):
    build_plan(request_for(small))
    assert build_plan(request_for(small, **changes))[1]
    assert len(entries(tmp_path)) == 2


def test_a_plan_is_found_by_the_identity_of_its_graph(gpu, small):
    """The graph and its weights are not read."""
    build_plan(request_for(small))
    small.write_bytes(b"not read")
    assert opened(small).provider == "tensorrt"
    with pytest.raises(ProviderError, match=r"no TensorRT plan of small\.onnx"):
        open_engine(small, replace(SPEC, identity="of other weights"), provider="tensorrt")
    with pytest.raises(ValueError, match="its description has none"):
        open_engine(small, replace(SPEC, identity=""), provider="tensorrt")


def test_the_options_reach_tensorrt(gpu, small):
    build_plan(request_for(small, workspace=5 << 30, profiles=profiles(batch=3)))
    (config,) = gpu.trt.configs
    assert list(config.limits.values()) == [5 << 30]
    prefill, step = (profile.shapes for profile in config.profiles)
    assert prefill["tokens"] == ((1, 2), (1, 4), (3, 8))
    assert step["tokens"] == ((1, 1), (1, 1), (3, 1))
    assert step["key_cache.0"] == ((1, 1, 12, 4), (1, 1, 12, 4), (3, 1, 12, 4))


def test_a_dimension_of_one_size_is_a_number_in_the_graph(gpu, small):
    build_plan(request_for(small))
    for profile in gpu.trt.configs[0].profiles:
        assert set(profile.shapes) == {"tokens"}  # nothing else is dynamic


def test_timings_of_kernels_are_kept(gpu, small, tmp_path, caplog):
    build_plan(request_for(small))
    (kept,) = (tmp_path / "cache/plans").glob("timing-*.cache")
    first = kept.read_bytes()
    build_plan(request_for(small, max_len=20))
    assert kept.read_bytes() == first + b" more"
    for spoilt in (b"timings of another", b"\0\1\2"):
        caplog.clear()
        kept.write_bytes(spoilt)
        build_plan(request_for(small, max_len=30 + len(spoilt)))
        assert kept.read_bytes() == first
        assert "they are measured again" in caplog.text


def test_what_the_importer_does_not_take_is_told_in_full(gpu, tmp_path):
    path = write_small(tmp_path / "bundle", op_type="Acosh")
    with pytest.raises(GraphError, match=r"cannot import small\.onnx: Acosh the_node: no importer is registered"):
        build_plan(request_for(path))
    assert entries(tmp_path) == []
    gpu.trt.faults["parse"] = "the file ends too early"
    with pytest.raises(GraphError, match="the file ends too early"):
        build_plan(request_for(path))


@pytest.mark.parametrize("call", ["Builder", "build_serialized_network"])
def test_a_build_that_fails_says_why(gpu, small, tmp_path, call):
    gpu.trt.faults[call] = "could not find any implementation for node the_node"
    with pytest.raises(GraphError, match="could not find any implementation for node the_node") as error:
        build_plan(request_for(small))
    assert call == "Builder" or "--debug" in (error.value.hint or "")
    assert entries(tmp_path) == []
    gpu.trt.faults.clear()
    assert build_plan(request_for(small))[1]


@pytest.mark.parametrize(("kernels", "built"), [("fused", "fused"), ("none", "decomposable"), ("nothing", "primitive")])
def test_the_forms_of_attention_are_tried_in_turn(gpu, tmp_path, kernels, built):
    """The first that TensorRT can build is kept, and not tried again."""
    path = write_attention(tmp_path / "bundle")

    def refuses(model: onnx.ModelProto) -> str | None:
        told = [a.i for node in model.graph.node if node.op_type == "Attention" for a in node.attribute if a.name == DECOMPOSABLE]
        fused = any(node.op_type == "Attention" for node in model.graph.node)
        return None if not fused or kernels == "fused" or (kernels == "none" and told == [1]) else "no kernel for the attention"

    gpu.trt.refuses = refuses
    request = request_for(path)
    plan, now = build_plan(request)
    assert (plan.attention, now, len(gpu.trt.configs)) == (built, True, 1 + FORMS.index(built))
    assert build_plan(request) == (plan, False)
    q = np.random.default_rng(1).normal(size=(1, 2, 3, 4)).astype(np.float32)
    ours, cpu = (open_engine(path, request.spec, provider=name).run({"q": q})["y"] for name in ("tensorrt", "cpu"))
    np.testing.assert_allclose(ours, cpu, atol=1e-6)
    simple = replace(request, lowering=replace(request.lowering, primitive_attention=True))
    assert build_plan(simple)[0].attention == "primitive"


def test_a_profile_that_is_not_taken_is_an_error(gpu, small):
    trt_api.log_of(gpu.trt).log(1, "an error of something else, long ago")
    gpu.trt.faults["add_optimization_profile"] = ""
    with pytest.raises(GraphError, match="adding profile prefill failed: it gave no reason"):
        build_plan(request_for(small))
    gpu.trt.faults.clear()
    backwards = (replace(profiles()[0], dims={"batch": (1, 1, 1), "length": (4, 2, 8)}),)
    with pytest.raises(GraphError, match="setting tokens in profile prefill failed: tokens: the shapes are not in order"):
        build_plan(request_for(small, profiles=backwards))
    lacking = (replace(profiles()[0], dims={"batch": (1, 1, 1)}),)
    with pytest.raises(ValueError, match=r"profile prefill of small\.onnx does not give length"):
        build_plan(request_for(small, profiles=lacking))


def test_an_interrupt_ends_the_build_and_leaves_nothing(gpu, small, tmp_path):
    def interrupt(stage: str, part: float) -> None:
        if stage == "Selecting Tactics":
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        build_plan(request_for(small), interrupt)
    assert gpu.trt.builds == 0
    assert not list((tmp_path / "cache").rglob("*.plan"))


def test_a_plan_that_cannot_be_written_is_an_error_and_leaves_nothing(gpu, small, tmp_path, monkeypatch):
    def full(*_: Any) -> Any:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(trt_plans.cache, "digest", full)
    with pytest.raises(FishrtError, match=r"cannot be written to .*: No space left on device"):
        build_plan(request_for(small))
    assert not list((tmp_path / "cache").rglob("*.plan"))
    monkeypatch.undo()
    with simulated(tmp_path / "cache", monkeypatch):
        assert build_plan(request_for(small))[1]


def test_a_full_disk_is_seen_before_the_build(gpu, small, monkeypatch):
    monkeypatch.setattr(shutil, "disk_usage", lambda _: type("Usage", (), {"free": 10})())
    with pytest.raises(FishrtError, match="GB of disk"):
        build_plan(request_for(small))
    assert gpu.trt.builds == 0


def test_missing_weights_are_an_error(gpu, small):
    small.with_name("small.onnx.data").unlink()
    with pytest.raises(ExportError, match=r"the weights .*small\.onnx\.data cannot be read"):
        build_plan(request_for(small))
    small.unlink()
    with pytest.raises(ExportError, match="cannot be read"):
        build_plan(request_for(small))


@pytest.mark.parametrize("link", [os.symlink, os.link])
def test_weights_behind_a_link_are_built(gpu, small, tmp_path, link):
    """Hubs keep files as links; `retarget` links what it does not change."""
    plan, _ = build_plan(request_for(small))
    expected = plan.path.read_bytes()
    weights = small.with_name("small.onnx.data")
    weights.rename(tmp_path / "blob")
    link(tmp_path / "blob", weights)
    again, built = build_plan(request_for(small, spec=replace(SPEC, identity="of the same graph")))
    assert built
    assert again.path.read_bytes() == expected


def test_too_little_device_memory_is_told_with_figures(small, tmp_path, monkeypatch):
    with simulated(tmp_path / "cache", monkeypatch, memory=3 << 30) as gpu:
        message = r"building small\.onnx needs about 4\.29 GB of device memory; 3\.22 of 3\.22 GB are free on Simulated GPU"
        with pytest.raises(FishrtError, match=message):
            build_plan(request_for(small, workspace=4 << 30))
        assert gpu.trt.builds == 0
        build_plan(request_for(small, workspace=2 << 30))


@pytest.mark.parametrize(
    ("capability", "precision", "message"),
    [((7, 5), "bf16", r"bf16 needs compute capability 8\.0; Simulated GPU has 7\.5"), ((7, 0), "fp16", "fp16 needs .* 7.5")],
)
def test_a_precision_that_the_device_lacks(small, tmp_path, monkeypatch, capability, precision, message):
    with simulated(tmp_path / "cache", monkeypatch, capability=capability), pytest.raises(ProviderError, match=message):
        build_plan(request_for(small, precision=precision))


@pytest.mark.parametrize(("devices", "message"), [(None, "InsufficientDriver"), (0, "NoDevice")])
def test_no_device_is_an_error(small, tmp_path, monkeypatch, devices, message):
    with simulated(tmp_path / "cache", monkeypatch, devices=devices), pytest.raises(ProviderError, match=message) as error:
        build_plan(request_for(small))
    assert "CUDA_VISIBLE_DEVICES" in (error.value.hint or "")


def test_an_allocation_that_fails_all_the_same_is_an_error(monkeypatch):
    """Another program may take memory between the look and the allocation."""
    cuda = FakeCudaRuntime(memory=100)
    device = Device(cuda)
    monkeypatch.setattr(device, "memory", lambda: (1000, 1000))
    with pytest.raises(FishrtError, match=r"no memory for a thing: CUDA says 'cudaErrorMemoryAllocation' \(2\)"):
        device.allocate(500, "a thing")


def test_without_a_plan_nothing_is_built(gpu, small):
    with pytest.raises(ProviderError, match=r"there is no TensorRT plan of small\.onnx for this machine$"):
        opened(small)
    assert gpu.trt.builds == 0


@pytest.mark.parametrize(
    ("elsewhere", "reason"),
    [
        ({"version": "11.3.0.99"}, r"was built by TensorRT 11\.3\.0\.99, and this is 11\.4\.0\.106"),
        ({"name": "Other GPU"}, r"was built on Other GPU \(compute capability 8\.9\), and this is Simulated GPU"),
        ({"capability": (9, 0)}, r"compute capability 9\.0\), and this is .* 8\.9"),
        ({"memory": 40 << 30}, "was built on a device with 40 GiB, and this has 8"),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else "",
)
def test_a_foreign_plan_is_refused_with_the_reason(small, tmp_path, monkeypatch, elsewhere, reason):
    with simulated(tmp_path / "cache", monkeypatch, **elsewhere):
        build_plan(request_for(small))
    with simulated(tmp_path / "cache", monkeypatch) as gpu:
        with pytest.raises(ProviderError, match=reason):
            opened(small)
        assert build_plan(request_for(small))[1]
        assert opened(small).provider == "tensorrt"
        assert gpu.trt.builds == 1


@pytest.mark.parametrize(
    ("name", "value", "reason"), [("LOWERING", 99, "another version of fishrt"), ("system", "", "was built on")]
)
def test_a_plan_of_other_software_is_refused(gpu, small, monkeypatch, name, value, reason):
    if name == "LOWERING":
        monkeypatch.setattr(trt_plans, name, value)
    else:
        monkeypatch.setattr(trt_plans.platform, name, lambda: "Otheros")
    build_plan(request_for(small))
    monkeypatch.undo()
    with simulated(Path(small.parent.parent / "cache"), monkeypatch), pytest.raises(ProviderError, match=reason):
        opened(small)


def test_a_plan_that_was_altered_is_refused_and_built_again(gpu, small):
    plan, _ = build_plan(request_for(small))
    whole = plan.path.read_bytes()
    for spoil in (lambda: plan.path.write_bytes(whole[:-1]), lambda: plan.path.write_bytes(whole[:-1] + b"x"), plan.path.unlink):
        spoil()
        with pytest.raises(ProviderError, match=r"was altered or is not whole|lacks engine.plan"):
            opened(small)
        assert build_plan(request_for(small))[1]
        assert plan.path.read_bytes() == whole


@pytest.mark.parametrize("change", ["not json", {"key": None}, {"facts": {}}, {"digests": None}, {}], ids=str)
def test_a_description_that_was_altered_is_refused(gpu, small, tmp_path, change):
    build_plan(request_for(small))
    (entry,) = entries(tmp_path)
    content = json.loads(entry.read_text())
    if isinstance(change, str):
        entry.write_text(change)
    else:
        content["key"]["machine"]["tensorrt"] = "12.0.0.0"  # a description that matches another machine
        entry.write_text(json.dumps({**content, **change}))
    with pytest.raises(ProviderError, match="is damaged"):
        opened(small)
    assert build_plan(request_for(small))[1]
    opened(small)


def test_of_several_plans_the_one_that_was_asked_for_last_runs(gpu, small):
    for max_len in (10, 20, 10):
        build_plan(request_for(small, max_len=max_len))
        assert opened(small).limits["cache"] == max_len
    assert gpu.trt.builds == 2


def test_weights_outside_of_the_folder_are_refused(gpu, small, tmp_path):
    inside = small.read_bytes()
    (tmp_path / "secret").write_bytes(b"x" * 1000)
    small.write_bytes(inside.replace(b"small.onnx.data", b"../../../secret"))
    with pytest.raises(ExportError, match="weights outside of its folder"):
        build_plan(request_for(small))


def test_progress_is_monotonic_for_phases_that_are_not_announced(gpu):
    """Phases may end early, or report steps that they did not announce."""
    told: list[tuple[str, float]] = []
    monitor = trt_build._monitor(gpu.trt, lambda stage, part: told.append((stage, part)))
    monitor.phase_start("a", None, 1)
    assert monitor.step_complete("a", 3)
    assert monitor.step_complete("unknown", 0)
    monitor.phase_finish("unknown")
    monitor.phase_finish("a")
    assert all(0 <= part <= 1 for _, part in told)
