"""Optimised graphs on disk: found again, made again if damaged, and optional."""

from __future__ import annotations

import errno
import json
import logging
import os
import signal
from dataclasses import replace
from itertools import pairwise
from pathlib import Path

import numpy as np
import onnx
import pytest
from click.testing import CliRunner
from onnx import TensorProto, helper, numpy_helper

from fishrt.cli import main
from fishrt_engines import Engine, FishrtError, GraphSpec, TensorSpec, open_engine
from fishrt_engines import cache as store
from fishrt_engines.folders import cache_folder
from fishrt_engines.ort import packed
from fishrt_engines.ort import session as ort_session

WIDTHS = (256, 96, 160, 32)
SPEC = GraphSpec(
    "layers.onnx",
    inputs=(TensorSpec("x", "float32", ("batch", WIDTHS[0])),),
    outputs=(TensorSpec("y", "float32", ("batch", WIDTHS[-1])),),
)


def write_graph(folder: Path) -> Path:
    """Linear layers of 4-bit weights, of sizes that ONNX Runtime does not align when it saves them, and one of float32."""
    rng = np.random.default_rng(0)
    nodes, constants, x = [], [], "x"
    for n, (k, width) in enumerate(pairwise(WIDTHS)):
        packed = rng.integers(0, 256, k * width // 2, dtype=np.uint8).tobytes()
        constants.append(helper.make_tensor(f"w{n}", TensorProto.INT4, (k, width), packed, raw=True))
        constants.append(numpy_helper.from_array(rng.random((k // 32, width), np.float32), f"s{n}"))
        nodes.append(helper.make_node("DequantizeLinear", [f"w{n}", f"s{n}"], [f"d{n}"], axis=0, block_size=32))
        nodes.append(helper.make_node("MatMul", [x, f"d{n}"], [f"x{n}"]))
        x = f"x{n}"
    constants.append(numpy_helper.from_array(rng.random((WIDTHS[-1], WIDTHS[-1]), np.float32), "last"))
    nodes.append(helper.make_node("MatMul", [x, "last"], ["y"]))
    (i,), (o,) = (
        [helper.make_tensor_value_info(t.name, TensorProto.FLOAT, t.shape) for t in tensors]
        for tensors in (SPEC.inputs, SPEC.outputs)
    )
    model = helper.make_model(
        helper.make_graph(nodes, "g", [i], [o], constants), opset_imports=[helper.make_opsetid("", 24)], ir_version=10
    )
    onnx.save(model, folder / SPEC.file, save_as_external_data=True, location=f"{SPEC.file}.data", size_threshold=64)
    return folder / SPEC.file


@pytest.fixture
def graph(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("FISHRT_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(ort_session, "WORTH_KEEPING", 0)
    return write_graph(tmp_path)


def opened(graph: Path, identity: str = "these weights") -> Engine:
    return open_engine(graph, replace(SPEC, identity=identity), provider="cpu", threads=1)


def spoken(engine: Engine) -> np.ndarray:
    x = np.random.default_rng(1).standard_normal((3, WIDTHS[0])).astype(np.float32)
    return engine.run({"x": x})["y"]


def entries() -> list[Path]:
    folder = cache_folder()
    return sorted(folder.iterdir()) if folder and folder.is_dir() else []


def test_a_kept_graph_gives_the_same(graph: Path) -> None:
    plain = spoken(opened(graph, identity=""))
    assert entries() == []
    made = spoken(opened(graph))
    (entry,) = entries()
    stamp = entry.stat().st_mtime_ns
    found = spoken(opened(graph))
    np.testing.assert_array_equal(made, plain)
    np.testing.assert_array_equal(found, plain)
    assert [e.stat().st_mtime_ns for e in entries()] == [stamp]
    assert sorted(f.name for f in entry.iterdir()) == ["entry.json", "graph.onnx", "graph.onnx.data"]


def test_the_kept_graph_is_what_runs(graph: Path) -> None:
    """The cached graph runs without the portable one."""
    expected = spoken(opened(graph))
    graph.with_name(f"{graph.name}.data").write_bytes(b"gone")
    np.testing.assert_array_equal(spoken(opened(graph)), expected)


def test_everything_kept_is_aligned(graph: Path) -> None:
    """ONNX Runtime saves small packed weights unaligned, and reads unaligned ones wrongly."""
    opened(graph)
    model = onnx.load(entries()[0] / "graph.onnx", load_external_data=False)
    places = [{e.key: e.value for e in t.external_data} for t in model.graph.initializer if t.external_data]
    packed = [buffer for place in places if "prepacked_0" in place for buffer in place["prepacked_0"].split("|")[1:]]
    assert len(packed) >= len(WIDTHS)
    starts = [int(buffer.split(";")[0]) for buffer in packed] + [int(place["offset"]) for place in places]
    assert all(start % 64 == 0 for start in starts)


@pytest.mark.parametrize("name", ["graph.onnx", "graph.onnx.data", "entry.json"])
@pytest.mark.parametrize("damage", ["cut", "altered", "missing"])
def test_a_damaged_entry_is_made_again(graph: Path, name: str, damage: str, caplog: pytest.LogCaptureFixture) -> None:
    expected = spoken(opened(graph))
    file = entries()[0] / name
    if damage == "missing":
        file.unlink()
    elif damage == "cut":
        os.truncate(file, file.stat().st_size // 2)
    else:
        content = bytearray(file.read_bytes())
        content[:8] = b"\xff" * 8
        file.write_bytes(content)
    with caplog.at_level(logging.WARNING):
        np.testing.assert_array_equal(spoken(opened(graph)), expected)
    assert "it is made again" in caplog.text
    caplog.clear()
    opened(graph)
    assert not caplog.text


def test_an_entry_that_does_not_load_is_made_again(graph: Path, caplog: pytest.LogCaptureFixture) -> None:
    """Its hashes may be right, since they are of the written files."""
    expected = spoken(opened(graph))
    (entry,) = entries()
    (entry / "graph.onnx").write_bytes(b"no graph")
    described = json.loads((entry / "entry.json").read_text())
    described["digests"]["graph.onnx"] = store.digest(entry / "graph.onnx")
    (entry / "entry.json").write_text(json.dumps(described))
    with caplog.at_level(logging.WARNING):
        np.testing.assert_array_equal(spoken(opened(graph)), expected)
    assert "cannot be loaded" in caplog.text


@pytest.mark.parametrize("what", ["identity", "cpu", "onnxruntime"])
def test_another_graph_machine_or_version_has_another_entry(graph: Path, what: str, monkeypatch: pytest.MonkeyPatch) -> None:
    opened(graph)
    if what == "cpu":
        monkeypatch.setattr(ort_session, "cpu_identity", lambda: "another CPU")
    elif what == "onnxruntime":
        monkeypatch.setattr("onnxruntime.__version__", "9.9")
    opened(graph, identity="other weights" if what == "identity" else "these weights")
    assert len(entries()) == 2


def test_a_folder_that_cannot_be_written_does_no_harm(
    graph: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    expected = spoken(opened(graph, identity=""))
    (tmp_path / "file").write_bytes(b"")
    monkeypatch.setenv("FISHRT_CACHE", str(tmp_path / "file/cache"))
    with caplog.at_level(logging.INFO):
        for _ in range(2):
            np.testing.assert_array_equal(spoken(opened(graph)), expected)
    first, again = caplog.messages
    assert (
        first
        == again
        == f"optimised graphs cannot be written to {tmp_path}/file/cache, and are made again at every start: "
        + (os.strerror(errno.ENOTDIR))
    )


def test_a_full_disk_leaves_nothing_behind(
    graph: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def full(*_: object) -> int:
        raise OSError(28, "No space left on device")

    expected = spoken(opened(graph, identity=""))
    monkeypatch.setattr(packed, "_copy", full)
    with caplog.at_level(logging.WARNING):
        np.testing.assert_array_equal(spoken(opened(graph)), expected)
    assert "No space left" in caplog.text
    assert entries() == []


def test_a_full_disk_while_onnx_runtime_writes(graph: Path, caplog: pytest.LogCaptureFixture) -> None:
    resource = pytest.importorskip("resource", reason="limits are POSIX's")
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    handler = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    try:
        expected = spoken(opened(graph, identity=""))
        resource.setrlimit(resource.RLIMIT_FSIZE, (4096, before[1]))
        with caplog.at_level(logging.WARNING):
            found = spoken(opened(graph))
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
        signal.signal(signal.SIGXFSZ, handler)
    np.testing.assert_array_equal(found, expected)
    assert entries() == []


def test_another_process_may_have_been_faster(graph: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    expected = spoken(opened(graph))
    (entry,) = entries()
    find, blind = store.find, [True]
    monkeypatch.setattr(store, "find", lambda folder, key: None if blind and blind.pop() else find(folder, key))
    np.testing.assert_array_equal(spoken(opened(graph)), expected)
    assert entries() == [entry]


def test_a_start_from_the_cache_parses_no_graph(graph: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    expected = spoken(opened(graph))
    monkeypatch.setattr(ort_session.packed, "parse_model", lambda path: pytest.fail(f"{path.name} is parsed"))
    np.testing.assert_array_equal(spoken(opened(graph)), expected)


def test_small_graphs_are_not_kept(graph: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ort_session, "WORTH_KEEPING", 10**9)
    opened(graph)
    assert entries() == []


def test_a_damaged_portable_graph_is_an_error(graph: Path) -> None:
    graph.write_bytes(b"no graph")
    with pytest.raises(FishrtError, match="is not a graph"):
        opened(graph)
    assert entries() == []


def test_a_user_is_told_of_it_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FISHRT_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(ort_session, "WORTH_KEEPING", 5_000_000)  # minnow's slow AR has more
    speak = ["speak", "Good morning.", "--max-frames", "3", "--threads", "1", "-o", str(tmp_path / "a.wav")]
    first, second = (CliRunner().invoke(main, speak) for _ in range(2))
    assert first.stderr.count("optimising slow_ar_cpu.onnx for this machine, once") == 1
    assert "optimising" not in second.stderr
    monkeypatch.setenv("FISHRT_CACHE", str(tmp_path / "another"))
    assert "optimising" not in CliRunner().invoke(main, [*speak, "--quiet"]).stderr
    assert len(entries()) == 1
