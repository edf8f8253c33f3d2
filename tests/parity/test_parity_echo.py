"""The diffusion model's modules and exported graphs against the original implementation: enc/*, den/*, pca/*, ae/*, spkenc/*."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from echo_model import EchoModel
from echo_vectors import arrays, meta
from fishrt_engines import Array
from fishrt_export.graph.verify import run_module

pytestmark = pytest.mark.parity

Run = Callable[..., dict[str, Array]]
COMPARED = {
    *(f"enc/{of}_{what}" for of in ("text", "speaker", "latent") for what in ("state", "kv")),
    *(f"den/{name}" for name in ("timestep_embedding", "cond_embed", "v_cond", "v_no_text", "v_no_speaker", "v_neither")),
    *(
        f"den/{name}"
        for name in ("in_proj_out", "block0_attn_adaln_out", "block0_attn_gate", "block0_attention_out", "block0_out")
    ),
    *(name for name in arrays() if name.startswith("den/v_prefix_startpos")),
    *("pca/latent", "pca/zq_out", "ae/codes", "ae/zq", "ae/latent", "ae/dec_zq_in", "ae/dec_audio"),
    *("spkenc/nodiv_latent", "spkenc/onechunk_latent", "stream/uncond_text_k_bos", "stream/uncond_text_v_bos"),
}
"""Arrays that the tests below compare."""
INPUTS = {
    *(f"enc/{name}" for name in ("text_ids", "text_mask", "speaker_latent", "speaker_mask", "prefix_latent")),
    *("den/x", "den/t", "den/cond_embed_shape", "pca/zq_in", "pca/latent_in", "ae/audio", "ae/dec_latent_in"),
}
PREFIX_T = 0.6
"""The time of den/v_prefix_*, as the vectors describe it."""


@pytest.fixture(scope="module", params=["module", "graph"])
def run(request: pytest.FixtureRequest, echo_model: EchoModel) -> Run:
    """Run a role's torch module, or its exported graph, on named arrays."""

    def of_module(role: str, **feeds: Array) -> dict[str, Array]:
        return run_module(echo_model.modules[role], echo_model.jobs[role].spec, contiguous(feeds))[0]

    def of_graph(role: str, **feeds: Array) -> dict[str, Array]:
        return echo_model.engine(role).run(contiguous(feeds))

    return of_module if request.param == "module" else of_graph


def contiguous(feeds: dict[str, Array]) -> dict[str, Array]:
    return {name: np.array(array, order="C") for name, array in feeds.items()}


def assert_near(actual: Any, name: str, tolerance: str, expected: np.ndarray | None = None) -> None:
    """Check an array of the vectors, or the part of it that is `expected`, within the vectors' own suggested tolerance."""
    assert name in COMPARED
    expected = arrays()[name] if expected is None else expected
    actual = np.asarray(actual)
    assert actual.shape == expected.shape, name
    error, allowed = np.abs(actual - expected).max(), meta()["tolerances"]["suggested"][tolerance]
    assert error <= allowed, f"{name} differs by {error:.3g}"


def kv(found: dict[str, Array]) -> np.ndarray:
    """Return keys and values [batch, layers, heads, n, head_dim] as [layers, 2, batch, n, heads, head_dim]."""
    return np.stack(list(found.values()), axis=2).transpose(1, 2, 0, 4, 3, 5)


def text(name: str = "enc/text") -> dict[str, Array]:
    return {"tokens": arrays()[f"{name}_ids"].astype(np.int64), "mask": arrays()[f"{name}_mask"]}


def patches(frames: Array) -> Array:
    """Return the mask of patches, each of which is visible if its first frame is valid."""
    return frames[:, :: meta()["config"]["speaker_patch_size"]]


def test_sizes_are_those_of_the_original(echo_model: EchoModel) -> None:
    config, sizes = echo_model.sources[0].config, meta()["config"]
    assert (config.channels, config.width, config.layers, config.heads) == tuple(
        sizes[name] for name in ("latent_size", "model_size", "num_layers", "num_heads")
    )
    assert (config.hidden, config.embedding, config.rank, config.vocabulary, config.patch) == tuple(
        sizes[name]
        for name in ("intermediate_size", "timestep_embed_size", "adaln_rank", "text_vocab_size", "speaker_patch_size")
    )
    for encoder, of in ((config.text, "text"), (config.speaker, "speaker"), (config.latent, "speaker")):
        assert encoder is not None
        named = {"layers": "num_layers", "dim": "model_size", "heads": "num_heads", "hidden": "intermediate_size"}
        assert {name: getattr(encoder, name) for name in named} == {name: sizes[f"{of}_{key}"] for name, key in named.items()}


def test_states_of_the_encoders(echo_model: EchoModel) -> None:
    modules = echo_model.modules
    with torch.no_grad():
        given = [torch.from_numpy(array) for array in text().values()]
        assert_near(modules["text_cond"].states(*given), "enc/text_state", "encoders_and_kv")
        for role, of, latents in (("speaker", "speaker", "speaker_latent"), ("latent", "latent", "prefix_latent")):
            found = modules[f"{role}_cond"].states(torch.from_numpy(arrays()[f"enc/{latents}"]))
            assert_near(found, f"enc/{of}_state", "encoders_and_kv")


@pytest.mark.parametrize("batch", [1, 2])
def test_keys_and_values(run: Run, batch: int) -> None:
    """Of each row of a batch alone, too: rows are independent, and a padded text has the keys of the whole batch."""
    found = {
        "text": run("text_cond", **{name: array[-batch:] for name, array in text().items()}),
        "speaker": run("speaker_cond", latents=arrays()["enc/speaker_latent"][-batch:]),
        "latent": run("latent_cond", latents=arrays()["enc/prefix_latent"][-batch:]),
    }
    for of, arrays_of in found.items():
        assert_near(kv(arrays_of), f"enc/{of}_kv", "encoders_and_kv", arrays()[f"enc/{of}_kv"][:, :, -batch:])


def test_keys_do_not_depend_on_padding(run: Run) -> None:
    """A text at its true length has the keys that it has in a padded batch."""
    for row, length in enumerate(arrays()["enc/text_mask"].sum(axis=1)):
        found = run("text_cond", **{name: array[row : row + 1, :length] for name, array in text().items()})
        assert_near(kv(found), "enc/text_kv", "encoders_and_kv", arrays()["enc/text_kv"][:, :, row : row + 1, :length])


def test_the_text_of_bos_alone(run: Run) -> None:
    found = run("text_cond", **text("stream/uncond_text"))
    for name, array in found.items():
        assert_near(array[0, :, :, 0][:, None], f"stream/uncond_text_{name[5]}_bos", "encoders_and_kv")


def test_the_embedding_of_times(echo_model: EchoModel) -> None:
    schedule = echo_model.modules["schedule"]
    with torch.no_grad():
        embedded = schedule.embed(torch.from_numpy(arrays()["den/t"]))
        assert_near(embedded, "den/timestep_embedding", "denoiser_v")
        shared = schedule.cond_module(embedded)
    expected = arrays()["den/cond_embed"]
    assert shared.shape[-1] == arrays()["den/cond_embed_shape"][-1]
    assert_near(shared[:, None].expand(expected.shape), "den/cond_embed", "denoiser_v")


def feeds(run: Run, t: float, **changes: Array) -> dict[str, Array]:
    """Return the feeds of the denoiser at a time, with four rows of guidance: all, no text, no voice, neither."""
    found = arrays()
    batch, frames = found["den/x"].shape[:2]
    text_mask, speaker_mask = found["enc/text_mask"], patches(found["enc/speaker_mask"])
    no_text, no_speaker = np.zeros_like(text_mask), np.zeros_like(speaker_mask)
    modulation = run("schedule", t=np.array([t], np.float32))["modulation"]
    made = {
        "latents": found["den/x"],
        "modulation": np.broadcast_to(modulation, (batch, *modulation.shape[1:])),
        "position_ids": np.tile(np.arange(frames), (batch, 1)),
        **run("text_cond", **text()),
        "text_mask": np.stack([text_mask, no_text, text_mask, no_text], axis=1),
        **run("speaker_cond", latents=found["enc/speaker_latent"]),
        "speaker_mask": np.stack([speaker_mask, speaker_mask, no_speaker, no_speaker], axis=1),
        "speaker_scale": np.ones((batch, modulation.shape[1]), np.float32),
    }
    prefix = {
        name: np.zeros_like(made[f"text_{name.partition('_')[2]}"][..., :1, :]) for name in ("latent_keys", "latent_values")
    }
    return {**made, **prefix, "latent_mask": np.zeros((batch, 1), bool), **changes}


ROWS = ("cond", "no_text", "no_speaker", "neither")


@pytest.mark.parametrize("step", range(5))
def test_the_denoiser(run: Run, step: int) -> None:
    times = arrays()["den/t"]
    if step >= len(times):
        pytest.skip("the vectors have fewer times")
    found = run("denoise", **feeds(run, times[step]))["velocity"]
    for row, name in enumerate(ROWS):
        assert_near(found[:, row], f"den/v_{name}", "denoiser_v", arrays()[f"den/v_{name}"][step])


def test_rows_of_guidance_and_of_the_batch_are_independent(run: Run) -> None:
    """Each alone has the same velocity."""
    given = feeds(run, arrays()["den/t"][1])
    for n in range(len(given["latents"])):
        for row, name in enumerate(ROWS):
            alone = {key: array[n : n + 1] for key, array in given.items()}
            alone = {key: alone[key][:, row : row + 1] if key in ("text_mask", "speaker_mask") else alone[key] for key in alone}
            found = run("denoise", **alone)["velocity"]
            assert_near(found[:, 0], f"den/v_{name}", "denoiser_v", arrays()[f"den/v_{name}"][1][n : n + 1])


@pytest.mark.parametrize("name", [name for name in arrays() if name.startswith("den/v_prefix_startpos")])
def test_the_denoiser_behind_latents(run: Run, name: str) -> None:
    """Given only the visible patches, and given all with a mask."""
    start, patch = int(name.removeprefix("den/v_prefix_startpos")), meta()["config"]["speaker_patch_size"]
    known = run("latent_cond", latents=arrays()["enc/prefix_latent"])
    given = feeds(run, PREFIX_T)
    batch, count = len(given["latents"]), known["latent_keys"].shape[3]
    visible = -(-start // patch)
    for shown in {count, max(visible, 1)}:
        behind = {
            **{key: array[:, :, :, :shown] for key, array in known.items()},
            "latent_mask": np.tile(patch * np.arange(shown) < start, (batch, 1)),
            "position_ids": given["position_ids"] + start,
            **{key: given[key][:, :1] for key in ("text_mask", "speaker_mask")},
        }
        found = run("denoise", **{**given, **behind})["velocity"]
        assert_near(found[:, 0], name, "denoiser_v")


def test_inside_the_first_block(echo_model: EchoModel) -> None:
    """At t = 0.75: what is modulated, the attention, the gate and the sum."""
    denoiser, seen = echo_model.modules["denoise"], dict[str, torch.Tensor]()

    def keep(name: str) -> Callable[[nn.Module, Any, torch.Tensor], None]:
        return lambda _module, _given, result: seen.update({name: result})

    block = denoiser.layers[0]
    hooks = [
        denoiser.in_proj.register_forward_hook(keep("in_proj_out")),
        block.attention.register_forward_hook(keep("block0_attention_out")),
        block.attention.register_forward_pre_hook(lambda _module, given: seen.update(block0_attn_adaln_out=given[0])),
        block.register_forward_hook(keep("block0_out")),
    ]

    def run(role: str, **given: Array) -> dict[str, Array]:
        return run_module(echo_model.modules[role], echo_model.jobs[role].spec, contiguous(given))[0]

    given = feeds(run, 0.75)
    run("denoise", **{**given, **{name: given[name][:, :1] for name in ("text_mask", "speaker_mask")}})
    for hook in hooks:
        hook.remove()
    for name, value in seen.items():
        assert_near(value, f"den/{name}", "denoiser_v")
    gates = given["modulation"][:, 0, 2][:, None]
    assert_near(gates, "den/block0_attn_gate", "denoiser_v")


def test_components(echo_model: EchoModel) -> None:
    codec, found = echo_model.codec, arrays()
    with torch.no_grad():
        assert_near(codec.analysis(torch.from_numpy(found["pca/zq_in"]).transpose(1, 2)), "pca/latent", "pca")
        assert_near(codec.synthesis(torch.from_numpy(found["pca/latent_in"])).transpose(1, 2), "pca/zq_out", "pca")
        summed = codec.synthesis(torch.from_numpy(found["ae/dec_latent_in"]))
    assert_near(summed, "ae/dec_zq_in", "pca")


def padded(audio: Array, frames: int, hop: int) -> Array:
    """Return audio [batch, 1, frames · hop] of audio [batch, samples], silent at the end."""
    return np.pad(audio, ((0, 0), (0, frames * hop - audio.shape[1])))[:, None]


def test_the_codec_inside(echo_model: EchoModel) -> None:
    codec, found = echo_model.codec, arrays()
    frames = found["ae/codes"].shape[2]
    with torch.no_grad():
        features = codec.encoder(torch.from_numpy(padded(found["ae/audio"], frames, codec.config.hop)))
        assert np.array_equal(codec.quantizer.encode(features), found["ae/codes"])
        assert_near(codec.quantizer.quantise(features), "ae/zq", "ae_latent")
        audio = codec.decode(torch.from_numpy(found["ae/dec_latent_in"]))
    assert_near(audio, "ae/dec_audio", "ae_audio")


def test_the_codec(echo_model: EchoModel) -> None:
    found, encode, decode = arrays(), echo_model.engine("codec_encode"), echo_model.engine("codec_decode")
    audio = padded(found["ae/audio"], found["ae/latent"].shape[1], echo_model.codec.config.hop)
    assert_near(encode.run({"audio": audio})["latents"], "ae/latent", "ae_latent")
    latents = found["ae/dec_latent_in"]
    for chunk in (latents.shape[1], 1, 4):
        state, heard = decode.new_state(batch=1), []
        for start in range(0, latents.shape[1], chunk):
            part = latents[:, start : start + chunk]
            positions = np.arange(start, start + part.shape[1])[None]
            heard.append(decode.run({"latents": np.ascontiguousarray(part), "position_ids": positions}, state)["audio"].copy())
        assert_near(np.concatenate(heard, axis=2), "ae/dec_audio", "ae_audio")


@pytest.mark.parametrize(("name", "part"), [("nodiv", 4), ("onechunk", 12)])
def test_latents_of_a_voice(echo_model: EchoModel, name: str, part: int) -> None:
    """Of parts of so many frames, each encoded alone, the last padded with silence."""
    encode, hop = echo_model.engine("codec_encode"), echo_model.codec.config.hop
    audio = arrays()["ae/audio"]
    pieces = [audio[:, start : start + part * hop] for start in range(0, audio.shape[1], part * hop)]
    found = np.concatenate([encode.run({"audio": padded(piece, part, hop)})["latents"] for piece in pieces], axis=1)
    expected = arrays()[f"spkenc/{name}_latent"]
    assert_near(found[:, : expected.shape[1]], f"spkenc/{name}_latent", "ae_latent")


def test_every_array_of_a_network_is_compared() -> None:
    networks = {name for name in arrays() if name.startswith(("enc/", "den/", "pca/", "ae/"))}
    assert networks == INPUTS | {name for name in COMPARED if name.startswith(("enc/", "den/", "pca/", "ae/"))}
