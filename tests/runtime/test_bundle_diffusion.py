"""Bundles of diffusion models: they load, strictly, and code for the other kind of model refuses them."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from fishrt.bundle.diffusion import DenoisingDefaults, denoising_faults
from fishrt.bundle.folder import Bundle
from fishrt.bundle.graphs import within_plans
from fishrt.bundle.manifest import MANIFEST, Manifest
from fishrt.bundle.memory import estimate
from fishrt.errors import BundleError
from fishrt_engines import ProviderError
from helpers_cli import run
from helpers_diffusion import diffusion_bundle, diffusion_manifest, diffusion_model, diffusion_specs, latent_codec
from helpers_text import described, manifest


def edited(edit: Callable[[dict[str, Any]], object], of: Manifest) -> str:
    data = json.loads(of.to_json())
    edit(data)
    return json.dumps(data)


@pytest.mark.parametrize("blockwise", [True, False])
def test_a_bundle_loads_and_verifies(tmp_path: Path, blockwise: bool) -> None:
    bundle = diffusion_bundle(tmp_path / "bundle", model=diffusion_model(blockwise=blockwise))
    bundle.verify()
    assert bundle.manifest.diffusion.blockwise == blockwise
    assert ("latent_cond" in bundle.manifest.roles) == blockwise
    assert Manifest.from_json(bundle.manifest.to_json()) == bundle.manifest


def test_the_kind_decides_how_a_model_is_read() -> None:
    """The union is told apart by `kind`: errors are about the fields of that kind, not about those of another."""
    for of, name in ((diffusion_manifest(), "max_voice_frames"), (manifest(), "vocab_size")):
        with pytest.raises(BundleError, match=rf"manifest\.model lacks the keys: {name}$"):
            Manifest.from_json(edited(lambda m, name=name: m["model"].pop(name), of))
    for kind in ("other", 3, None, ["diffusion"]):
        with pytest.raises(BundleError, match=r"model\.kind is .*; known are dual_ar, diffusion") as caught:
            Manifest.from_json(edited(lambda m, kind=kind: m["model"].update(kind=kind), manifest()))
        assert caught.value.hint == "update fishrt, or export again"
    with pytest.raises(BundleError, match="lacks the keys: kind"):
        Manifest.from_json(edited(lambda m: m["model"].pop("kind"), manifest()))
    with pytest.raises(BundleError, match=r"manifest\.model is \[\]"):
        Manifest.from_json(edited(lambda m: m.update(model=[]), manifest()))


@pytest.mark.parametrize(
    ("edit", "says"),
    [
        *[(lambda m, n=n: m["model"].update({n: 0}), f"{n} is 0") for n in ("channels", "layers", "head_dim", "max_tokens")],
        (lambda m: m["model"].update(max_frames=641), "max_frames is 641, which are no whole patches of 4"),
        (lambda m: m["model"].update(patch=0), "patch is 0"),
        (lambda m: m["model"].update(voice_seconds=[3]), "voice_seconds is"),
        (lambda m: m["model"]["denoising"].update(steps=0), r"denoising\.steps is 0; it must be a whole number"),
        (lambda m: m["model"]["denoising"].update(truncation=0.0), r"denoising\.truncation is 0.0; .* above 0"),
        (lambda m: m["model"]["denoising"].update(rescale_k=1.2), "give both or neither"),
        (lambda m: m["model"]["denoising"].update(cfg_min_t=1.5), r"denoising\.cfg_min_t 1.5 is above cfg_max_t 1.0"),
        (lambda m: m["codec"].update(channels=9), "channels is 8, but those of the codec are 9"),
        (lambda m: m["codec"].update(codebook_sizes=[4]), "a codec has latents or codes"),
        (lambda m: m["codec"].update(channels=None), "channels is None with 0 codebook_sizes"),
        (lambda m: m.update(tokenizer="tokenizer.json"), "the tokenizer is tokenizer.json for a model of the kind diffusion"),
        (
            lambda m: m["graphs"].pop("latent_cond"),
            "they must be text_cond, speaker_cond, latent_cond, schedule, denoise, codec_",
        ),
        (lambda m: m["model"].update(blockwise=False), "they must be text_cond, speaker_cond, schedule, denoise, codec_encode"),
        (lambda m: m["model"].update(width=13), r"modulation of schedule is .* expected a last dimension of 13"),
        (lambda m: m["model"].update(layers=3), r"modulation of schedule is .* expected a second dimension of 3"),
        (lambda m: m["model"].update(head_dim=4), "text_keys of text_cond"),
    ],
)
def test_values_that_cannot_be(edit: Callable[[dict[str, Any]], object], says: str) -> None:
    with pytest.raises(BundleError, match=says):
        Manifest.from_json(edited(edit, diffusion_manifest()))


def test_a_language_model_needs_codes_and_a_tokenizer() -> None:
    with pytest.raises(BundleError, match="the tokenizer is None for a model of the kind dual_ar"):
        manifest(tokenizer=None).check()
    with pytest.raises(BundleError, match="num_codebooks is 4, but there are 0"):
        manifest(codec=latent_codec()).check()


def test_code_for_one_kind_refuses_the_other(tmp_path: Path) -> None:
    bundle = diffusion_bundle(tmp_path / "bundle")
    with pytest.raises(BundleError, match="this is for language models; test is a diffusion model"):
        _ = bundle.manifest.language_model
    with pytest.raises(BundleError, match="this is for diffusion models; test is a language model"):
        _ = manifest().diffusion
    with pytest.raises(BundleError, match="test has no tokenizer"):
        _ = bundle.tokenizer


def test_a_manifest_written_before_latents_loads() -> None:
    assert Manifest.from_json(edited(lambda m: m["codec"].pop("channels"), manifest())) == manifest()


def test_the_need_of_a_bundle() -> None:
    model = diffusion_model()
    graphs = {role: replace(graph, memory=100 + n) for n, (role, graph) in enumerate(described(diffusion_specs(model)).items())}
    need = estimate(diffusion_manifest(graphs=graphs))
    assert need.encoding == graphs["codec_encode"].memory
    assert need.speaking == sum(graph.memory for graph in graphs.values()) - need.encoding
    assert need.cache == 1000 * 2 * 4 * 2 * 2 * 6
    assert need.state == 0


def test_inspect(tmp_path: Path) -> None:
    bundle = diffusion_bundle(tmp_path / "bundle")
    result = run("inspect", bundle.path, "--verify")
    assert result.exit_code == 0, result.output
    for words in "at most 29.7 s at once, in blocks|40 steps; guidance by text 3|latents of 8 channels|graph denoise".split("|"):
        assert words in result.stdout
    assert run("inspect", "--json", bundle.path).exit_code == 0
    assert Bundle.load(bundle.path).manifest.summary in repr(bundle)
    assert (bundle.path / MANIFEST).is_file()


@pytest.mark.parametrize(
    ("settings", "wrong"),
    [
        ({}, []),
        ({"truncation": 0.8, "rescale_k": 1.2, "rescale_sigma": 3}, []),
        ({"steps": 1.5}, ["steps is 1.5"]),
        ({"steps": True}, ["steps is True"]),
        ({"cfg_text": float("nan"), "cfg_speaker": "8"}, ["cfg_text is nan", "cfg_speaker is 8"]),
        ({"cfg_min_t": None}, ["cfg_min_t is None"]),
        ({"truncation": float("inf")}, ["truncation is inf"]),
    ],
)
def test_settings_that_are_out_of_range(settings: dict[str, Any], wrong: list[str]) -> None:
    defaults = {name: getattr(DenoisingDefaults(), name) for name in DenoisingDefaults.__slots__}
    assert [what for what, _ in denoising_faults({**defaults, **settings})] == wrong


def test_plans_of_tensorrt_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ProviderError, match="is a diffusion model, for which there are no plans"):
        within_plans(diffusion_bundle(tmp_path / "bundle"))
