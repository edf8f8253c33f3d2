"""From text and recording to sound by the exported graphs, against the original programs: e2e*, stream_e2e, spkenc/*.

spkenc/padmax16 and spkenc/max8 pad and cut to a length, which fishrt does not: it refuses a voice that is too long.
"""

from __future__ import annotations

import numpy as np
import pytest

from echo_model import EchoModel
from echo_runs import Stored, finish, settings_of, voice_of
from echo_vectors import arrays, meta
from fishrt.diffusion.denoising import Denoising
from fishrt.diffusion.generate import Denoiser, Utterance
from fishrt.diffusion.latents import voice_latents
from fishrt.diffusion.text import split, tokens
from fishrt_engines import open_engine
from helpers_diffusion import diffusion_model, latent_codec
from tolerances import TOLERANCES

pytestmark = pytest.mark.parity
ROLES = ("text_cond", "speaker_cond", "latent_cond", "schedule", "denoise")


@pytest.fixture(scope="module")
def denoiser(echo_model: EchoModel) -> Denoiser:
    engines = {role: echo_model.engine(role) for role in ROLES}
    shape = {t.name: t.shape for t in (*engines["denoise"].spec.inputs, *engines["speaker_cond"].spec.inputs)}
    _, layers, heads, _, head_dim = shape["text_keys"]
    model = diffusion_model(
        channels=shape["latents"][2],
        width=shape["modulation"][3],
        layers=layers,
        heads=heads,
        head_dim=head_dim,
        patch=meta()["config"]["speaker_patch_size"],
    )
    return Denoiser(engines, model)


def decoded(echo_model: EchoModel, latents: np.ndarray) -> np.ndarray:
    """Return the sound of latents [frames, channels], all at once."""
    engine = echo_model.engine("codec_decode")
    feeds = {"latents": np.ascontiguousarray(latents[None]), "position_ids": np.arange(len(latents))[None]}
    return engine.run(feeds, engine.new_state(batch=1))["audio"][0, 0].copy()


def allowed(name: str) -> float:
    return float(meta()["tolerances"]["suggested"][name])


@pytest.mark.parametrize("name", ["e2e", "e2e_noref", "e2e_padded"])
def test_a_text_is_spoken(echo_model: EchoModel, denoiser: Denoiser, name: str) -> None:
    case, a = meta()[name], arrays()
    settings = settings_of(case["sampler"]).resolve(denoiser.model)
    (piece,) = split(case["text"], 29.7, denoiser.model.max_tokens)
    assert piece == case["normalized"]
    assert len(tokens(piece)) == case["text_valid"]
    voice = voice_of(denoiser, a[f"{name}/speaker_latent"][0], a[f"{name}/speaker_mask"][0])
    assert (voice is None) == (name == "e2e_noref")
    found = finish(Utterance(denoiser, tokens(piece), voice, settings, Stored(a["e2e/noise"][0])))
    np.testing.assert_allclose(found, a[f"{name}/latent_out"][0], atol=TOLERANCES["trajectory"], rtol=0)
    if f"{name}/audio" in a:
        np.testing.assert_allclose(decoded(echo_model, found), a[f"{name}/audio"][0, 0], atol=allowed("ae_audio"), rtol=0)


def test_the_number_of_threads_changes_nothing(echo_model: EchoModel, denoiser: Denoiser) -> None:
    """Of graphs this small."""
    latents = []
    for threads in (1, 2):
        graphs = {role: echo_model.jobs[role].spec for role in ROLES}
        engines = {
            role: open_engine(echo_model.bundle.path / spec.file, spec, provider="cpu", threads=threads)
            for role, spec in graphs.items()
        }
        settings = Denoising(blocks=[32, 64], steps=3).resolve(denoiser.model)
        latents.append(finish(Utterance(Denoiser(engines, denoiser.model), tokens("[S1] Hello there."), None, settings, 3)))
    np.testing.assert_array_equal(*latents)


def test_a_text_is_streamed(echo_model: EchoModel, denoiser: Denoiser) -> None:
    case, a = meta()["stream_e2e"], arrays()
    settings = Denoising(variant="streaming").over(settings_of({"early_stop_on_zero": True, **case})).resolve(denoiser.model)
    (piece,) = split(case["text"], 29.7, denoiser.model.max_tokens, variant="streaming")
    voice = voice_of(denoiser, a["stream/speaker_latent"][0], a["stream/speaker_mask"][0])
    utterance = Utterance(denoiser, tokens(piece), voice, settings, Stored(a["stream_e2e/noise"][0]))
    pcm = np.clip(decoded(echo_model, finish(utterance)), -1, 1) * 32767
    wanted = a["stream_e2e/pcm"].astype(np.int64)
    assert len(pcm) * 2 == sum(case["bytes_per_yield"])
    assert np.abs(pcm.astype(np.int64) - wanted).max() <= allowed("pcm_int16")


def test_a_known_stream_is_decoded(echo_model: EchoModel) -> None:
    case, a = meta()["oracle_streams"]["stop_in_block2"], arrays()
    frames = sum(frames for frames, _, _ in case["decode_calls"])
    pcm = np.clip(decoded(echo_model, a["oracle/stop_in_block2_target"][0, :frames].astype(np.float32)), -1, 1) * 32767
    assert np.abs(pcm.astype(np.int64) - a["oracle/stop_in_block2_pcm"]).max() <= allowed("pcm_int16")


@pytest.mark.parametrize(("name", "part"), [("default", 4), ("onechunk", 12)])
def test_a_recording_has_the_latents_of_the_original(echo_model: EchoModel, name: str, part: int) -> None:
    """In parts of so many frames; the original puts silence behind the last."""
    encode, hop = echo_model.engine("codec_encode"), echo_model.codec.config.hop

    def encoded(pcm: np.ndarray) -> np.ndarray:
        return encode.run({"audio": np.ascontiguousarray(pcm[None, None])})["latents"][0]

    found = voice_latents(arrays()["ae/audio"][0], encoded, diffusion_model(voice_part_frames=part), latent_codec(hop=hop))
    mask = arrays()[f"spkenc/{name}_mask"][0]
    assert mask.all()
    np.testing.assert_allclose(found, arrays()[f"spkenc/{name}_latent"][0], atol=allowed("ae_latent"), rtol=0)
