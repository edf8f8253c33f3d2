"""Bundles of diffusion models: what an export makes of official checkpoints, in all precisions, and which ones it refuses."""

from __future__ import annotations

import json
import logging
import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from echo_model import EchoModel, state_windows
from fishrt import TTS, Denoising
from fishrt.bundle.folder import Bundle
from fishrt.bundle.graphs import BundleGraphs
from fishrt_engines import open_engine
from fishrt_engines.engine import GraphSpec
from fishrt_export import Lora, Options, export_bundle
from fishrt_export.checkpoint.diffusion.files import find_diffusion, is_diffusion
from fishrt_export.errors import ExportError
from fishrt_export.graph import stretches, utterance
from fishrt_export.graph.utterance import utterance_error
from fishrt_export.models.echo.config import is_blockwise
from fishrt_export.retarget import retarget
from fishrt_export.sources.echo import open_echo
from fishrt_export.sources.echo_cases import diffusion_cases
from fishrt_export.targets.forms import device_form
from full_size.echo import TINY, random_weights
from helpers_cli import run
from helpers_text import OWN_GOLDEN

ROLES = ("text_cond", "speaker_cond", "latent_cond", "schedule", "denoise", "codec_encode", "codec_decode")
MODEL, PCA, CODEC = "pytorch_model.safetensors", "pca_state.safetensors", "fish-s1-dac-min"
Weights = dict[str, torch.Tensor]


@pytest.fixture
def checkpoint(tmp_path: Path) -> Path:
    """Both official repositories, side by side. The first is returned."""
    return Path(shutil.copytree(OWN_GOLDEN / "echo-tts/checkpoint", tmp_path / "in")) / "echo-tts-base"


def edit(path: Path, change: Callable[[Weights], object]) -> None:
    weights = load_file(path)
    change(weights)
    save_file(weights, path)


def even(checkpoint: Path) -> Path:
    """Give a checkpoint random weights whose widths blocks of integers divide."""
    save_file(random_weights(TINY), checkpoint / MODEL)
    state_windows(checkpoint.parent)  # so that the graphs of the codec are the shared ones
    return checkpoint


# --- the folders ---------------------------------------------------------------------------------------------------------------


def test_the_codec_lies_beside_the_model_or_in_its_folder_or_is_given(checkpoint: Path, tmp_path: Path) -> None:
    parent = checkpoint.parent
    for folder in (checkpoint, parent):
        assert is_diffusion(folder)
        assert find_diffusion(folder).codec == parent.absolute() / CODEC / MODEL
    inside = Path(shutil.move(parent / CODEC, checkpoint / "any name"))
    assert find_diffusion(checkpoint).codec == inside / MODEL
    away = Path(shutil.move(inside, tmp_path / "away"))
    with pytest.raises(ExportError, match="has no codec") as caught:
        find_diffusion(checkpoint)
    assert caught.value.hint == "give it: --codec jordand/fish-s1-dac-min"
    assert find_diffusion(checkpoint, away).codec == away / MODEL
    with pytest.raises(ExportError, match="echo-tts-base has no codec"):
        find_diffusion(checkpoint, checkpoint)


def test_files_are_known_by_their_tensors(checkpoint: Path) -> None:
    (checkpoint / MODEL).rename(checkpoint / "dit.safetensors")
    (checkpoint / PCA).rename(checkpoint / "components.safetensors")
    found = find_diffusion(checkpoint)
    assert (found.weights.name, found.pca.name) == ("dit.safetensors", "components.safetensors")
    shutil.copy(checkpoint / "dit.safetensors", checkpoint / "again.safetensors")
    with pytest.raises(ExportError, match=r"has 2 files of a model: .*again.*dit"):
        find_diffusion(checkpoint)


def test_a_language_model_is_none(tmp_path: Path) -> None:
    assert not is_diffusion(OWN_GOLDEN / "s2-pro/lm/checkpoint")
    assert not is_diffusion(tmp_path / "absent")


@pytest.mark.parametrize(
    ("spoil", "says"),
    [
        (lambda folder: (folder / PCA).unlink(), rf"has no PCA \({PCA}\)"),
        (lambda folder: (folder / MODEL).unlink(), "has no model"),
        (lambda folder: (folder / MODEL).write_bytes(b"version https://git-lfs.github.com/spec/v1\noid"), "git-lfs pointer"),
        (lambda folder: (folder / MODEL).write_bytes((folder / MODEL).read_bytes()[:3000]), "damaged"),
        (lambda folder: (folder / PCA).write_bytes(b"<html>"), "is a web page"),
    ],
)
def test_files_that_are_missing_or_damaged(checkpoint: Path, tmp_path: Path, spoil: Callable[[Path], object], says: str) -> None:
    spoil(checkpoint)
    result = run("export", checkpoint, tmp_path / "out")
    assert result.exit_code == 2
    assert not (tmp_path / "out").exists()
    with pytest.raises(ExportError, match=says):
        find_diffusion(checkpoint)


def test_names_of_other_programs(checkpoint: Path) -> None:
    """mlx-audio has a prefix, and another name of the products of times. What is left over is named."""
    config = open_echo(checkpoint)[0].config

    def rename(weights: Weights) -> None:
        for name in list(weights):
            weights["model." + name.replace("cond_module.", "cond_module.layers.")] = weights.pop(name)

    edit(checkpoint / MODEL, rename)
    source, _ = open_echo(checkpoint)
    assert source.config == config
    assert source.problems() == []
    edit(checkpoint / MODEL, lambda weights: weights.update({"model.in_proj.biases": torch.zeros(2)}))
    with pytest.raises(ExportError, match=r"in_proj\.biases"):
        export_bundle(checkpoint, checkpoint.with_name("out"), Options())


# --- what does not fit ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("file", "change", "says"),
    [
        (MODEL, lambda w: w["blocks.1.attention.wq.weight"].fill_(torch.nan), "not finite: blocks.1.attention.wq.weight"),
        (MODEL, lambda w: w.pop("latent_norm.weight"), r"missing: latent_norm\.weight"),
        (MODEL, lambda w: w.update(stray=torch.zeros(2)), r"unexpected: stray \[2\]"),
        (MODEL, lambda w: w.pop("in_proj.weight"), r"lacks in_proj\.weight, which states a size"),
        (MODEL, lambda w: w.update({"text_encoder.text_embedding.weight": torch.zeros(64, 36)}), "64 embeddings of tokens"),
        (PCA, lambda w: w.update(pca_components=torch.zeros(80, 79)), "not the PCA of this model and codec.*80 channels"),
        (PCA, lambda w: w.update(pca_components=torch.zeros(79, 80)), "not the PCA of this model and codec"),
        (PCA, lambda w: w.pop("latent_scale"), "missing: latent_scale"),
        (PCA, lambda w: w["latent_scale"].fill_(0), "a latent_scale of 0; it must be above 0"),
        (PCA, lambda w: w["pca_mean"].fill_(torch.inf), "not finite: pca_mean"),
        (f"../{CODEC}/{MODEL}", lambda w: w.pop("decoder.model.0.conv.bias"), r"missing: decoder\.model\.0\.conv\.bias"),
        (f"../{CODEC}/{MODEL}", lambda w: w["encoder.block.0.conv.bias"].fill_(torch.nan), "not finite: encoder.block.0"),
    ],
)
def test_weights_that_do_not_fit(
    checkpoint: Path, tmp_path: Path, file: str, change: Callable[[Weights], object], says: str
) -> None:
    edit(checkpoint / file, change)
    with pytest.raises(ExportError, match=says):
        export_bundle(checkpoint, tmp_path / "out")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(("family", "says"), [("s1-mini", "80 channels and the codec"), ("fish-1.5", "codec has no codec")])
def test_another_codec(checkpoint: Path, tmp_path: Path, family: str, says: str) -> None:
    """Of other sizes, or of another kind."""
    shutil.rmtree(checkpoint.parent / CODEC)
    folder = tmp_path / "codec"
    folder.mkdir()
    (file,) = (OWN_GOLDEN / family / "codec/checkpoint").glob("*.pth")
    stored = torch.load(file, weights_only=True)
    tensors = {name: tensor.contiguous().clone() for name, tensor in stored.items() if isinstance(tensor, torch.Tensor)}
    save_file(tensors, folder / MODEL)
    with pytest.raises(ExportError, match=says):
        export_bundle(checkpoint, tmp_path / "out", Options(codec=folder))


@pytest.mark.parametrize("option", ["--head", "--family", "--codec-int8", "--lora"])
def test_options_of_language_models_are_refused_by_name(checkpoint: Path, tmp_path: Path, option: str) -> None:
    lora = Lora(checkpoint / MODEL, 16)
    options = {
        "--head": Options(head="full"),
        "--family": Options(family="s1"),
        "--codec-int8": Options(codec_int8=True),
        "--lora": Options(lora=lora),
    }
    with pytest.raises(ExportError, match=f"{option}.* is for language models"):
        export_bundle(checkpoint, tmp_path / "out", options[option])


def test_a_codec_that_is_named_must_be_there(tiny_checkpoint: Path, tmp_path: Path) -> None:
    with pytest.raises(ExportError, match="the folder of --codec has no codec"):
        export_bundle(tiny_checkpoint, tmp_path / "out", Options(codec=tmp_path))


def test_a_config_of_the_codec_is_strict(checkpoint: Path) -> None:
    path = checkpoint.parent / CODEC / "codec_config.json"
    path.write_text(json.dumps({"window_size": 6, "encoder_window_size": 20}))
    config = open_echo(checkpoint)[1].config
    assert config.pre_module.window == config.post_module.window == 6
    assert [t.window for t in config.encoder_transformers if t] == [20]
    for wrong, says in (({"windows": 1}, "unknown fields: windows"), ({"window_size": 0}, "window_size is 0")):
        path.write_text(json.dumps(wrong))
        with pytest.raises(ExportError, match=says):
            open_echo(checkpoint)


# --- bundles -------------------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def bundle(echo_model: EchoModel) -> Bundle:
    return echo_model.bundle


def test_a_bundle(bundle: Bundle) -> None:
    bundle.verify()
    manifest = bundle.manifest
    assert manifest.roles == tuple(role for role in ROLES)
    assert manifest.tokenizer is None
    assert (manifest.family, manifest.recipe) == ("Echo-TTS", "fp32, graphs for cuda, coreml, tensorrt")
    assert manifest.licence.name.startswith("CC-BY-NC-SA-4.0")
    assert manifest.codec.channels == manifest.diffusion.channels == 80
    assert manifest.graphs["denoise"].utterance is None, "no weight is rounded"
    assert all(graph.parity and graph.parity.max_abs_error <= graph.parity.tolerance for graph in manifest.graphs.values())
    result = run("inspect", bundle.path, "--trt")
    assert result.exit_code == 0
    assert "latents of 80 channels" in result.stdout
    assert result.stdout.count("errors: none") == len(ROLES)


@pytest.mark.parametrize("budget", [stretches.BUDGET, 1])
def test_the_error_of_an_utterance_is_none_without_rounding(
    bundle: Bundle, echo_model: EchoModel, monkeypatch: pytest.MonkeyPatch, budget: int
) -> None:
    """Also with the module in stretches of one block."""
    monkeypatch.setattr(stretches, "BUDGET", budget)
    jobs = {role: job for role, job in echo_model.jobs.items() if not role.startswith("codec")}
    found = utterance_error(jobs, bundle)
    assert found is not None
    assert found.error < 1e-3
    monkeypatch.setattr(utterance, "available_memory", lambda: 1000)
    assert utterance_error(jobs, bundle) is None


def test_forms_for_devices(bundle: Bundle) -> None:
    """All but the schedule and the codec are computed in 16 bits on CUDA; CoreML decodes in fixed lengths."""
    forms = {role: [form for form in graph.forms if form.provider == "cuda"] for role, graph in bundle.manifest.graphs.items()}
    assert {role for role, found in forms.items() if found} == {"text_cond", "speaker_cond", "latent_cond", "denoise"}
    assert [form.needs for form in forms["denoise"]] == [("bfloat16",), ()]
    coreml = bundle.manifest.graphs["codec_decode"].form("coreml", ())
    assert coreml is not None
    assert [part.frames for part in coreml.parts] == [1, 4, 16]


def test_a_stream_of_fixed_lengths_is_the_whole(bundle: Bundle) -> None:
    graph = bundle.manifest.graphs["codec_decode"]
    frames, channels = 11, bundle.manifest.diffusion.channels
    feeds = {
        "latents": np.random.default_rng(0).standard_normal((1, frames, channels)).astype(np.float32),
        "position_ids": np.arange(frames)[None],
    }
    whole = open_engine(bundle.file(graph.spec.file), graph.spec, provider="cpu")
    from fishrt_engines.ort.coreml import Part, StaticEngine

    form = graph.form("coreml", ())
    assert form is not None
    parts = {part.frames: part for part in form.parts}

    def open_part(size: int) -> Part:
        specs = (parts[size].front, parts[size].back)
        return Part(*(open_engine(bundle.file(spec.file), spec, provider="cpu") for spec in specs))

    static = StaticEngine(form.spec, "frames", parts, open_part)
    found = static.run(feeds, static.new_state(batch=1))["audio"]
    expected = whole.run(feeds, whole.new_state(batch=1))["audio"]
    np.testing.assert_allclose(found, expected, atol=1e-3)


def ran(bundle: Bundle, role: str, spec: GraphSpec) -> list[np.ndarray]:
    engine = open_engine(bundle.file(spec.file), spec, provider="cpu")
    cases = diffusion_cases(role, bundle.manifest.specs[role], bundle.manifest.diffusion.patch)
    return [array for case in cases for array in engine.run(case.calls[0]).values()]


@pytest.mark.parametrize("role", ["text_cond", "speaker_cond", "latent_cond", "denoise"])
def test_16_bits_are_the_same_graph(bundle: Bundle, role: str, tmp_path: Path) -> None:
    """In float16 on a CPU, which computes what a device does in other order. Float16 rounds by 2^-11."""
    copy = Bundle(Path(shutil.copytree(bundle.path, tmp_path / "copy")), bundle.manifest)
    portable = bundle.manifest.specs[role]
    spec = device_form(copy.path, portable, "float16")
    assert spec is not None
    for found, expected in zip(ran(copy, role, spec), ran(copy, role, portable), strict=True):
        error = float(np.sqrt(np.mean((found - expected) ** 2) / np.mean(expected**2)))
        assert 0 < error < 2e-2, role


def test_another_target_is_added_without_torch(echo_model: EchoModel, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(echo_model.bundle.path, tmp_path / "bundle"))
    made = retarget(folder, ["cpu", "cuda"])
    made.verify()
    before = echo_model.bundle.manifest
    assert {role: graph.spec for role, graph in made.manifest.graphs.items()} == before.specs
    assert {role: graph.files for role, graph in made.manifest.graphs.items()} == {
        role: graph.files for role, graph in before.graphs.items()
    }
    assert list(BundleGraphs(made, "cpu", 1)) == list(before.graphs)


@pytest.mark.slow
@pytest.mark.parametrize("precision", ["int8", "int4", "fp16"])
def test_precisions(checkpoint: Path, tmp_path: Path, precision: str) -> None:
    bundle = export_bundle(even(checkpoint), tmp_path / "out", Options(precision=precision))
    graphs = bundle.manifest.graphs
    assert graphs["denoise"].precision == precision
    assert graphs["text_cond"].precision == ("fp16" if precision == "fp16" else "int8")
    assert graphs["codec_decode"].precision == ("fp16" if precision == "fp16" else "fp32")
    with TTS.load(bundle, provider="cpu") as tts:
        speech = tts.speak("Hello.", seed=1, denoising=Denoising(steps=2, blocks=(4, 4)))
    assert speech.info.frames == 8
    assert np.isfinite(speech.pcm).all()
    error = graphs["denoise"].utterance
    assert error is not None
    assert (error.frames, error.steps, error.provider) == (32, 8, "cpu")
    least, most = {"fp16": (0, 1e-5), "int8": (5e-4, 0.1), "int4": (5e-3, 0.3)}[precision]  # bfloat16 weights fit float16
    assert least < error.error < most
    assert f"latents of an utterance, on cpu: {error.error:.1%} off" in run("inspect", bundle.path).stdout
    report = bundle.manifest.quantisation
    if precision == "fp16":
        assert report is None
        return
    assert report is not None
    layers = {layer.name: layer for layer in report.layers}
    assert layers["denoise.layers.0.attention.wq"].precision == precision
    assert layers["denoise.out_proj"].precision == "int8"
    assert layers["schedule.cond_module.0"].precision == "int8"
    assert layers["text_cond.encoder.text_embedding"].block is None
    assert all(0 < layer.error < (0.02 if layer.precision == "int8" else 0.15) for layer in report.layers if layer.block)
    (form,) = graphs["denoise"].forms
    assert form.spec.rounds_activations
    assert form.activations_error is not None
    assert 0 < form.activations_error < 0.05
    retargeted = retarget(tmp_path / "out", ["cuda"])
    assert [form.provider for form in retargeted.manifest.graphs["denoise"].forms] == ["cpu", "cuda"]


@pytest.mark.thorough
@pytest.mark.slow
def test_a_model_without_blocks(checkpoint: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    edit(checkpoint / MODEL, lambda weights: [weights.pop(name) for name in list(weights) if is_blockwise(name)])
    state_windows(checkpoint.parent)
    with caplog.at_level(logging.WARNING):
        result = run("export", checkpoint, tmp_path / "out", "--json")
    assert result.exit_code == 0, result.output
    assert "no tensors for generation in blocks" in caplog.text
    bundle = Bundle.load(tmp_path / "out")
    assert not bundle.manifest.diffusion.blockwise
    assert "latent_cond" not in bundle.manifest.graphs
    assert "latent_mask" not in [tensor.name for tensor in bundle.manifest.specs["denoise"].inputs]
    assert "not in blocks" in run("inspect", bundle.path).stdout
