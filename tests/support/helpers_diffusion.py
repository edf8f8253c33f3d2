"""Helpers for tests of diffusion models: a small one, its graphs, its manifest, and a bundle without real graphs."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from fishrt.bundle.diffusion import DenoisingDefaults, Diffusion
from fishrt.bundle.features import Codec
from fishrt.bundle.folder import Bundle
from fishrt.bundle.manifest import Manifest
from fishrt_engines.engine import GraphSpec, TensorSpec
from helpers_text import FINGERPRINT, bundle_folder, described, manifest


def diffusion_model(**changes: Any) -> Diffusion:
    values: dict[str, Any] = {
        "kind": "diffusion",
        "channels": 8,
        "patch": 4,
        "width": 12,
        "layers": 2,
        "heads": 2,
        "head_dim": 6,
        "blockwise": True,
        "max_frames": 640,
        "max_tokens": 768,
        "max_voice_frames": 6400,
        "voice_part_frames": 640,
        "denoising": DenoisingDefaults(),
    }
    return Diffusion(**{**values, **changes})


def latent_codec(**changes: Any) -> Codec:
    values: dict[str, Any] = {
        "sample_rate": 44100,
        "hop": 2048,
        "codebook_sizes": (),
        "max_frames": 4096,
        "min_samples": 1,
        "sample_multiple": 2048,
        "context": None,
        "fingerprint": FINGERPRINT,
        "channels": 8,
    }
    return Codec(**{**values, **changes})


def diffusion_specs(model: Diffusion) -> dict[str, GraphSpec]:
    """Return the descriptions of a bundle's graphs. The codec has no state."""

    def floats(name: str, *shape: int | str) -> TensorSpec:
        return TensorSpec(name, "float32", shape)

    def bools(name: str, *shape: int | str) -> TensorSpec:
        return TensorSpec(name, "bool", shape)

    def pair(of: str, length: str) -> tuple[TensorSpec, ...]:
        shape = ("batch", model.layers, model.heads, length, model.head_dim)
        return (floats(f"{of}_keys", *shape), floats(f"{of}_values", *shape))

    latents = floats("latents", "batch", "frames", model.channels)
    positions = TensorSpec("position_ids", "int64", ("batch", "frames"))
    audio, modulation = floats("audio", "batch", 1, "samples"), (model.layers, 6, model.width)
    tokens = TensorSpec("tokens", "int64", ("batch", "tokens"))
    prefix = (*pair("latent", "prefix"), bools("latent_mask", "batch", "prefix")) if model.blockwise else ()
    specs = {
        "text_cond": ((tokens, bools("mask", "batch", "tokens")), pair("text", "tokens")),
        "speaker_cond": ((latents,), pair("speaker", "patches")),
        "latent_cond": ((latents,), pair("latent", "patches")),
        "schedule": ((floats("t", "steps"),), (floats("modulation", "steps", *modulation),)),
        "denoise": (
            (
                latents,
                floats("modulation", "batch", *modulation),
                positions,
                *pair("text", "tokens"),
                bools("text_mask", "batch", "rows", "tokens"),
                *pair("speaker", "patches"),
                bools("speaker_mask", "batch", "rows", "patches"),
                floats("speaker_scale", "batch", model.layers),
                *prefix,
            ),
            (floats("velocity", "batch", "rows", "frames", model.channels),),
        ),
        "codec_encode": ((audio,), (latents,)),
        "codec_decode": ((latents, positions), (audio,)),
    }
    if not model.blockwise:
        del specs["latent_cond"]
    return {role: GraphSpec(f"{role}.onnx", *tensors) for role, tensors in specs.items()}


def diffusion_manifest(**changes: Any) -> Manifest:
    """Return the manifest of `diffusion_model`. changes: of the manifest."""
    return manifest(**_values(**changes))


def diffusion_bundle(folder: Path, **changes: Any) -> Bundle:
    """Write a bundle that loads and verifies, although its graphs cannot run. changes: of the manifest."""
    return bundle_folder(folder, **_values(**changes))


def _values(**changes: Any) -> dict[str, Any]:
    model = changes.get("model") or diffusion_model()
    graphs = described(diffusion_specs(model))
    return {"model": model, "codec": latent_codec(channels=model.channels), "tokenizer": None, "graphs": graphs, **changes}
