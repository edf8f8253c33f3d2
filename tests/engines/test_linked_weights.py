"""Bundles whose files are links, as in the cache of a model hub: everything that opens a graph finds its weights."""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import onnxruntime
import pytest

from fake_cuda import FakeCuda
from fishrt import TTS
from fishrt.bundle.folder import Bundle, embedded_bundle, sha256
from fishrt.bundle.manifest import MANIFEST
from fishrt_engines import GraphError, open_engine
from fishrt_engines.ort import session as ort_session
from fishrt_engines.ort.packed import parse_model
from fishrt_engines.ort.session import graph_source

pytestmark = pytest.mark.slow


def in_a_hub_cache(bundle: Path, out: Path) -> Path:
    """Each file is a link to one that is named by its hash."""
    for file in (path for path in bundle.rglob("*") if path.is_file()):
        link = out / "snapshots" / "abc" / file.relative_to(bundle)
        link.parent.mkdir(parents=True, exist_ok=True)
        blob = out / "blobs" / sha256(file)
        blob.parent.mkdir(exist_ok=True)
        shutil.copy(file, blob)
        link.symlink_to(os.path.relpath(blob, link.parent))
    return out / "snapshots" / "abc"


def with_linked_weights(bundle: Path, out: Path) -> Path:
    """Graphs are files; the weights of each lie in another folder."""
    made = Path(shutil.copytree(bundle, out / "bundle"))
    for file in made.glob("*.onnx.data"):
        (out / file.stem).mkdir()
        file.rename(out / file.stem / "weights")
        file.symlink_to(out / file.stem / "weights")
    return made


def with_linked_graphs(bundle: Path, out: Path) -> Path:
    """Weights are files; the graphs lie in another folder."""
    made = Path(shutil.copytree(bundle, out / "bundle"))
    for file in made.glob("*.onnx"):
        file.rename(out / file.name)
        file.symlink_to(out / file.name)
    return made


def linked_file_by_file(bundle: Path, out: Path) -> Path:
    """Link every file, as `cp -rs` does."""
    return Path(shutil.copytree(bundle, out / "bundle", copy_function=lambda file, link: Path(link).symlink_to(file)))


def linked_as_a_whole(bundle: Path, out: Path) -> Path:
    """The folder is a link."""
    (out / "bundle").symlink_to(bundle)
    return out / "bundle"


LAYOUTS = (in_a_hub_cache, with_linked_weights, with_linked_graphs, linked_file_by_file, linked_as_a_whole)


@pytest.fixture(params=LAYOUTS, ids=lambda layout: layout.__name__)
def linked(request: pytest.FixtureRequest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Bundle:
    """The bundle of minnow in each layout."""
    monkeypatch.setenv("FISHRT_CACHE", str(tmp_path / "cache"))
    layout: Callable[[Path, Path], Path] = request.param
    return Bundle.load(layout(embedded_bundle(), tmp_path))


def test_it_is_whole_and_speaks(linked: Bundle) -> None:
    assert (linked.path / MANIFEST).is_file()
    linked.verify()
    said = TTS.load(linked, threads=1).speak("Good morning.", seed=1, max_frames=8)
    expected = TTS.load(threads=1).speak("Good morning.", seed=1, max_frames=8)
    np.testing.assert_array_equal(said.codes, expected.codes)


def test_every_graph_opens_and_is_kept(linked: Bundle, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(ort_session, "WORTH_KEEPING", 0)
    specs = [spec for graph in linked.manifest.graphs.values() for spec in (graph.spec, *(f.spec for f in graph.forms))]
    on_cpu = {spec.file: spec for spec in specs if "16" not in spec.file}
    for spec in on_cpu.values():
        for _ in range(2):  # the second time, from the cache
            open_engine(linked.file(spec.file), spec, provider="cpu", threads=1)
    assert len(list((tmp_path / "cache").iterdir())) == len(on_cpu) > len(linked.manifest.graphs)


def test_so_it_does_on_a_device(linked: Bundle, monkeypatch: pytest.MonkeyPatch) -> None:
    FakeCuda(monkeypatch)
    spec = linked.manifest.specs["codec_decode"]
    open_engine(linked.file(spec.file), spec, provider="cuda", threads=1)


def test_so_it_does_for_other_providers(linked: Bundle) -> None:
    """CoreML's sessions use this function."""
    for spec in linked.manifest.specs.values():
        options = onnxruntime.SessionOptions()
        onnxruntime.InferenceSession(graph_source(linked.file(spec.file), options), options, ["CPUExecutionProvider"])


@pytest.mark.parametrize("name", ["../secret", "/etc/hostname", "weights/../../secret"])
def test_a_graph_itself_cannot_lead_out_of_its_folder(tmp_path: Path, name: str) -> None:
    spec = Bundle.load(embedded_bundle()).manifest.specs["fast_ar"]
    model = parse_model(embedded_bundle() / spec.file)
    for tensor in model.graph.initializer:
        for entry in tensor.external_data:
            if entry.key == "location":
                entry.value = name
    folder = tmp_path / "bundle"
    (folder / "weights").mkdir(parents=True)
    (folder / spec.file).write_bytes(model.SerializeToString())
    shutil.copy(embedded_bundle() / f"{spec.file}.data", tmp_path / "secret")
    with pytest.raises(GraphError, match="outside of its folder") as caught:
        open_engine(folder / spec.file, spec, provider="cpu", threads=1)
    assert caught.value.hint == "export the bundle again"
