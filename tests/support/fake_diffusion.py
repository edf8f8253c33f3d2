"""A TTS of a small diffusion model without graphs: the reference of the denoiser, and a codec of latents, in numpy."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from fakes import FakeEngine, FakeState
from fishrt import TTS
from fishrt.bundle.features import Codec
from fishrt_engines import Array, StatePair, TensorSpec
from helpers_diffusion import diffusion_bundle, diffusion_specs, latent_codec
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
