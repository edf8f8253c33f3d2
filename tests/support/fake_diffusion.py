"""A TTS of a small diffusion model without graphs: a denoiser and a codec of latents, in numpy.

The denoiser is the reference of the real one, whose speech never ends, or one that knows what it says: `known_engines`.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from fakes import FakeEngine, FakeState
from fishrt import TTS
from fishrt.bundle.diffusion import DenoisingDefaults, Diffusion
from fishrt.bundle.features import Codec
from fishrt_engines import Array, StatePair, TensorSpec
from helpers_diffusion import diffusion_bundle, diffusion_model, diffusion_specs, latent_codec
from reference_dit import ReferenceDiT, random_weights, reference_engines

CODEC = latent_codec(sample_rate=800, hop=100, sample_multiple=100, max_frames=700)
"""8 frames a second."""


def latent_engines(codec: Codec = CODEC) -> dict[str, FakeEngine]:
    """Return a codec whose sound depends on the frame, its position and the frames before; a frame encodes to its mean sample."""
    assert codec.channels is not None
    model_specs = diffusion_specs(ReferenceDiT(random_weights()).model(channels=codec.channels))
    carry = [TensorSpec(name, "float32", ("batch", 1)) for name in ("carry", "carry_out")]
    decode_spec = replace(
        model_specs["codec_decode"],
        inputs=(*model_specs["codec_decode"].inputs, carry[0]),
        outputs=(*model_specs["codec_decode"].outputs, carry[1]),
        states=(StatePair("carry", "carry_out"),),
    )

    def encode(feeds: Mapping[str, Array], state: None) -> dict[str, Array]:
        frames, rest = divmod(feeds["audio"].shape[2], codec.hop)
        assert rest == 0
        means = feeds["audio"][:, 0].reshape(-1, frames, codec.hop).mean(axis=2, keepdims=True)
        return {"latents": np.repeat(means, codec.channels, axis=2).astype(np.float32)}

    def decode(feeds: Mapping[str, Array], state: FakeState) -> dict[str, Array]:
        sums, positions = feeds["latents"][0].sum(axis=1), feeds["position_ids"][0]
        heard = state.arrays["carry"][0, 0] + np.cumsum(sums)
        state.arrays["carry"][0, 0] = heard[-1]
        waves = np.tanh(0.1 * sums + 0.01 * heard + 0.001 * positions)
        return {"audio": np.repeat(waves, codec.hop)[None, None].astype(np.float32)}

    return {"codec_encode": FakeEngine(model_specs["codec_encode"], encode), "codec_decode": FakeEngine(decode_spec, decode)}


def diffusion_tts(folder: Path, *, voices: Path | None = None, weights: Mapping[str, Any] | None = None, **changes: Any) -> TTS:
    """Return a TTS whose `engines` record their calls. changes: of the model."""
    reference = ReferenceDiT(random_weights() if weights is None else weights)
    bundle = diffusion_bundle(folder, model=reference.model(**changes), codec=CODEC)
    return TTS(bundle, {**reference_engines(reference), **latent_engines()}, voices or folder / "none")


def known_engines(model: Diffusion) -> dict[str, FakeEngine]:
    """Return a denoiser that says `known_latents` of its text and voice, whatever the noise."""
    specs = diffusion_specs(model)

    def keys_values(of: str, values: np.ndarray) -> dict[str, Array]:
        shape = (1, model.layers, model.heads, len(values), model.head_dim)
        array = np.broadcast_to(values[:, None].astype(np.float32), shape)
        return {f"{of}_keys": array, f"{of}_values": array}

    def text_cond(feeds: Mapping[str, Array], state: None) -> dict[str, Array]:
        return keys_values("text", feeds["tokens"][0])

    def speaker_cond(feeds: Mapping[str, Array], state: None) -> dict[str, Array]:
        return keys_values("speaker", feeds["latents"][0].reshape(-1, model.patch * model.channels).mean(axis=1))

    def latent_cond(feeds: Mapping[str, Array], state: None) -> dict[str, Array]:
        return keys_values("latent", np.zeros(feeds["latents"].shape[1] // model.patch))

    def schedule(feeds: Mapping[str, Array], state: None) -> dict[str, Array]:
        shape = (len(feeds["t"]), model.layers, 6, model.width)
        return {"modulation": np.broadcast_to(feeds["t"][:, None, None, None], shape).astype(np.float32)}

    def denoise(feeds: Mapping[str, Array], state: None) -> dict[str, Array]:
        heard = feeds["text_mask"][0, 0]
        voice = feeds["speaker_keys"][0, 0, 0, :, 0][feeds["speaker_mask"][0, 0]]
        target = known_latents(feeds["text_keys"][0, 0, 0, heard, 0], voice, model)[feeds["position_ids"][0]]
        velocity = (feeds["latents"] - target) / feeds["modulation"][0, 0, 0, 0]
        return {"velocity": np.repeat(velocity[:, None], feeds["text_mask"].shape[1], axis=1).astype(np.float32)}

    functions = {f.__name__: f for f in (text_cond, speaker_cond, latent_cond, schedule, denoise)}
    return {role: FakeEngine(specs[role], function) for role, function in functions.items() if role in specs}


def known_latents(tokens: np.ndarray, voice: np.ndarray, model: Diffusion) -> np.ndarray:
    """Return all latents of a window, float32 [max_frames, channels]: as many frames of speech as tokens, then silence."""
    frames = np.arange(model.max_frames)[:, None]
    speech = np.sin(frames * np.arange(1, model.channels + 1) + tokens.sum() + 10 * voice.sum())
    return np.where(frames < len(tokens), speech, 0).astype(np.float32)


def known_tts(folder: Path, **changes: Any) -> TTS:
    """Return a TTS that says `known_latents`. changes: of the model."""
    model = diffusion_model(**{"max_frames": 200, "denoising": DenoisingDefaults(steps=3), **changes})
    bundle = diffusion_bundle(folder, model=model, codec=CODEC)
    return TTS(bundle, {**known_engines(model), **latent_engines()}, folder / "none")
