"""Forms are added to finished bundles without torch, and bundles of schema 3 become bundles of this schema."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from fishrt import TTS
from fishrt.bundle.folder import Bundle, embedded_bundle
from fishrt.bundle.manifest import MANIFEST, SCHEMA
from fishrt.errors import BundleError
from fishrt_export.errors import ExportError
from fishrt_export.options import with_targets
from fishrt_export.retarget import retarget
from fishrt_export.targets import forms


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return Path(shutil.copytree(embedded_bundle(), tmp_path / "minnow"))


def of_schema_3(folder: Path) -> None:
    """Give a bundle the manifest and the files of schema 3."""
    data = json.loads((folder / MANIFEST).read_text(encoding="utf-8"))
    graphs: dict[str, Any] = data.pop("graphs")
    for graph in graphs.values():
        for form in graph["forms"]:
            for name in (form["spec"]["file"], f"{form['spec']['file']}.data"):
                if data["files"].pop(name, None):
                    (folder / name).unlink()
        for unknown in ("columns", "rounds_activations", "identity"):
            graph["spec"].pop(unknown)
    model = data.pop("model")
    assert model.pop("kind") == "dual_ar"
    assert data.pop("quantisation") is None
    of_layers = {"layers": [{"name": "slow_ar.x", "precision": "int8", "block": 32, "error": 0.01, "reason": ""}]}
    (folder / "quantisation.json").write_text(json.dumps(of_layers), encoding="utf-8")
    old = {
        **data,
        "schema": SCHEMA - 1,
        "language_model": model,
        "graphs": {role: graph["spec"] for role, graph in graphs.items()},
        **{name: {role: graph[name] for role, graph in graphs.items()} for name in ("precision", "memory", "parity")},
    }
    (folder / MANIFEST).write_text(json.dumps(old), encoding="utf-8")


def test_a_bundle_of_schema_3_becomes_one_of_this_without_torch(folder: Path) -> None:
    before = Bundle.load(folder).manifest
    of_schema_3(folder)
    with pytest.raises(BundleError, match="has schema 3") as caught:
        Bundle.load(folder)
    assert "fishrt retarget BUNDLE --target cpu" in str(caught.value.hint)
    code = "import sys; sys.modules['torch'] = None; from fishrt.cli import main; main()"
    command = [sys.executable, "-c", code, "retarget", str(folder), "--target", "cpu", "--target", "cuda"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    bundle = Bundle.load(folder)
    bundle.verify()
    assert bundle.manifest.quantisation is not None
    for role, graph in bundle.manifest.graphs.items():
        known = [form for form in before.graphs[role].forms if form.provider in ("cpu", "cuda")]
        assert [(form.provider, form.needs) for form in graph.forms] == [(form.provider, form.needs) for form in known]
        assert replace(graph, forms=()) == replace(before.graphs[role], forms=())
        if role == "fast_ar":  # a frame is traced, so it needs an export
            assert all(form.spec.states for form in graph.forms)
        else:
            assert [form.spec for form in graph.forms] == [form.spec for form in known]
    with pytest.raises(ExportError, match="no frame graph") as refused:
        retarget(folder, ["tensorrt"])
    assert "fishrt export --target tensorrt" in str(refused.value.hint)
    assert not (folder / "quantisation.json").exists()
    said = TTS.load(bundle, threads=1).speak("Good morning.", seed=1, max_frames=8)
    np.testing.assert_array_equal(said.codes, TTS.load(threads=1).speak("Good morning.", seed=1, max_frames=8).codes)


@pytest.mark.parametrize("target", ["cpu", "cuda", "tensorrt"])
def test_forms_of_other_providers_and_the_frame_stay(folder: Path, target: str) -> None:
    before = Bundle.load(folder).manifest
    made = retarget(folder, [target]).manifest
    for role, graph in made.graphs.items():
        assert {form.spec for form in graph.forms} == {form.spec for form in before.graphs[role].forms}
        assert all(form.parity is not None for form in graph.forms if form.provider == "cpu")
    assert made.files == before.files


@pytest.mark.slow
def test_graphs_of_fixed_sizes_are_added(folder: Path) -> None:
    """Their weights are links to those of the bundle that is replaced."""
    bundle = retarget(folder, ["coreml"])
    bundle.verify()
    (form,) = (form for form in bundle.manifest.graphs["codec_decode"].forms if form.provider == "coreml")
    assert [part.frames for part in form.parts] == [1, 4, 16]
    assert all(part.parity.max_abs_error <= part.parity.tolerance for part in form.parts)


def test_a_form_that_differs_changes_nothing(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    before = sorted(path.name for path in folder.iterdir())
    real = forms.fast_operators

    def wrong(model: Any, *, cuda: bool = False) -> Any:
        columns = real(model, cuda=cuda)
        for node in model.graph:
            if node.op_type == "SkipSimplifiedLayerNormalization":
                node.replace_input_with(1, node.inputs[0])
        return columns

    monkeypatch.setattr(forms, "fast_operators", wrong)
    with pytest.raises(ExportError, match=r"_cpu\.onnx is not the graph .*\.onnx"):
        retarget(folder, ["cpu"])
    assert sorted(path.name for path in folder.iterdir()) == before
    assert [path.name for path in folder.parent.iterdir()] == [folder.name]
    Bundle.load(folder).verify()


def test_the_recipe_names_the_targets(folder: Path) -> None:
    before = Bundle.load(folder).manifest.recipe
    assert retarget(folder, ["cuda"]).manifest.recipe == with_targets(before, ["cuda"])


def test_a_bundle_of_the_hub_is_not_changed() -> None:
    with pytest.raises(ExportError, match="hf:fish/bundle is in the cache of the hub") as caught:
        retarget(Path("hf:fish/bundle"), ["cpu"])
    assert "`fishrt fetch fish/bundle FOLDER`" in str(caught.value.hint)


def test_an_unknown_target_and_a_folder_that_is_no_bundle(folder: Path, tmp_path: Path) -> None:
    with pytest.raises(ExportError, match="unknown target 'tflite'"):
        retarget(folder, ["tflite"])
    (tmp_path / "none").mkdir()
    with pytest.raises(BundleError, match="is not a bundle"):
        retarget(tmp_path / "none", ["cpu"])


def test_files_that_are_not_the_bundles_stay_and_are_not_vouched_for(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    before = Bundle.load(folder).manifest
    (folder / ".git").mkdir()
    (folder / ".git/index").write_text("one")
    (folder / "voices").rename(folder.parent / "voices")
    (folder / "voices").symlink_to("../voices")
    for name in ("notes/manifest.json", "static.json", "empty/"):
        (folder / name).parent.mkdir(exist_ok=True)
        (folder / name).mkdir() if name.endswith("/") else (folder / name).write_text("{}")
    monkeypatch.chdir(folder)
    bundle = retarget(Path(), ["cpu"])
    bundle.verify()
    assert bundle.manifest.files == before.files
    assert (folder / "notes/manifest.json").is_file()
    assert (folder / "static.json").is_file()
    (folder / ".git/index").write_text("longer")
    assert TTS.load(folder).voices == TTS.load().voices


@pytest.mark.parametrize("schema", [SCHEMA, SCHEMA - 1])
def test_a_damaged_file_is_not_vouched_for(folder: Path, schema: int) -> None:
    if schema != SCHEMA:
        of_schema_3(folder)
    weights = folder / "slow_ar.onnx.data"
    data = bytearray(weights.read_bytes())
    data[4_000_000] ^= 0x40
    weights.write_bytes(data)
    with pytest.raises(BundleError, match=r"slow_ar\.onnx\.data was altered"):
        retarget(folder, ["cpu"])


def test_a_bundle_that_changes_meanwhile_and_one_that_cannot_be_replaced_stay(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    other = Bundle.load(folder).manifest

    def change(stage: str, _done: float) -> None:
        if stage == "fast_ar":
            (folder / MANIFEST).write_text(replace(other, name="of another process").to_json(), encoding="utf-8")

    with pytest.raises(ExportError, match="another process"):
        retarget(folder, ["cpu"], change)
    assert Bundle.load(folder).manifest.name == "of another process"

    def refuse(*_: object) -> None:
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr("pathlib.Path.mkdir", refuse)
    with pytest.raises(ExportError, match=r"cannot be replaced: .*Permission denied"):
        retarget(folder, ["cpu"])


@pytest.mark.parametrize(
    ("name", "content"), [("int8_codec.json", '{"nonsense": 1}'), ("int8_codec.json", "{bad"), ("static.json", '"x"')]
)
def test_a_damaged_bundle_of_schema_3(folder: Path, name: str, content: str) -> None:
    of_schema_3(folder)
    (folder / name).write_text(content)
    with pytest.raises(BundleError, match="is no whole bundle of schema 3"):
        retarget(folder, ["cpu"])
