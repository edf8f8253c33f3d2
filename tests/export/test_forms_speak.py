"""Every form of weights from its file to speech: a bundle speaks the codes of its twin, made of the same weights in float32."""

from __future__ import annotations

import json
from collections import Counter
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import save_file

from cuda_placement import copied_values
from fishrt import TTS
from fishrt.bundle.folder import Bundle
from fishrt_export import Options, export_bundle
from fishrt_export.checkpoint.forms.folder import Checkpoint
from fishrt_export.sources.language_model import open_language_model
from form_samples import HALVES, READ, SAMPLES

IN_SHORT = ("gptq-act-order", "mlx-8bit", "bnb-nf4")
"""One sample for each way in which weights are kept; `make thorough` runs all."""
KEPT: dict[str, dict[tuple[str, int], int]] = {
    "bnb-int8": {("int8", 64): 7, ("int8", 32): 4},
    "bnb-nf4": {("nf4", 64): 11},
    "fp8-per-row": {},
    "gguf-audiocpp-q8_0": {("int8", 32): 16},
    "gguf-s2cpp-q4_k": {("int4", 32): 9, ("int8", 16): 4, ("int8", 32): 2},
    "gguf-s2cpp-q8_0": {("int8", 32): 20},
    "gptq-act-order": {("int4", 32): 9},
    "mlx-4bit": {("int4", 64): 5},
    "mlx-8bit": {("int8", 64): 15},
    "upstream-int4": {("int4", 128): 11},
    "upstream-int8-s2": {("int8", 64): 7, ("int8", 32): 4},
}
"""The number of kept matrices and tables by precision and block."""


def marked(form: str) -> Any:
    return pytest.param(form, marks=() if form in IN_SHORT else pytest.mark.thorough)


@pytest.mark.slow
@pytest.mark.parametrize("form", [marked(form) for form in READ])
def test_a_bundle_speaks_the_codes_of_its_twin(tmp_path: Path, form: str) -> None:
    checkpoint = Checkpoint.of(SAMPLES / form, **HALVES)
    bundle = export_bundle(SAMPLES / form, tmp_path / "kept", Options(**HALVES))
    report = bundle.manifest.quantisation
    kept = [layer for layer in report.layers if layer.block] if report else []
    assert Counter((layer.precision, layer.block) for layer in kept) == KEPT[form]
    assert all(layer.error < 1e-6 for layer in kept)
    twin = export_bundle(twin_of(checkpoint, tmp_path / "twin"), tmp_path / "floats", Options(**HALVES))
    assert twin.manifest.quantisation is None
    assert codes(exactly(bundle)) == codes(twin)


def twin_of(checkpoint: Checkpoint, folder: Path) -> Path:
    """A checkpoint of the widened weights, in the layout of a fine-tune."""
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(checkpoint.config()))
    weights = open_language_model(checkpoint).weights
    save_file({name: tensor.float().contiguous() for name, tensor in weights.items()}, folder / "model.safetensors")
    return folder


def exactly(bundle: Bundle) -> Bundle:
    """The bundle without rounding of activations, which are in 8 bits where integers are multiplied."""

    def exact(form: Any) -> Any:
        return replace(form, spec=replace(form.spec, rounds_activations=False))

    graphs = {role: replace(graph, forms=tuple(map(exact, graph.forms))) for role, graph in bundle.manifest.graphs.items()}
    return replace(bundle, manifest=replace(bundle.manifest, graphs=graphs))


def codes(bundle: Bundle) -> list[list[int]]:
    with TTS.load(bundle, provider="cpu", threads=1) as tts:
        found: list[list[int]] = tts.speak("Hello.", seed=3, max_frames=24).codes.tolist()
        return found


@pytest.mark.slow
@pytest.mark.thorough
@pytest.mark.parametrize("form", ["mlx-8bit", "bnb-nf4"])
def test_forms_for_a_device_share_the_kept_weights(tmp_path: Path, form: str) -> None:
    bundle = export_bundle(SAMPLES / form, tmp_path / "bundle", Options(targets=["cuda"], **HALVES))
    for role in ("slow_ar", "fast_ar"):
        (made,) = [made for made in bundle.manifest.graphs[role].forms if made.provider == "cuda"]
        assert copied_values(bundle.file(made.spec.file)) == []
