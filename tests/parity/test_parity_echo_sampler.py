"""Trajectories of the diffusion model with stored noise, against the original sampler and its streaming server.

sdec/* is not compared: it counts the samples of a decoder that decodes the last frames again with each block, an approximation.
Ours has a state and is exact; what it is given is compared with oracle/*.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import pytest

from echo_runs import Recorded, Stored, finish, settings_of, voice_of
from echo_vectors import arrays, echo_golden, meta
from fishrt.audio.resample import resample
from fishrt.diffusion.denoising import Denoising
from fishrt.diffusion.ending import Ending, first_flat, last_flat
from fishrt.diffusion.generate import Denoiser, Utterance
from fishrt.diffusion.latents import voice_latents
from fishrt.diffusion.sampler import Block, rescaled, times
from helpers_diffusion import diffusion_model, latent_codec
from reference_dit import ReferenceDiT, read_weights, reference_engines
from tolerances import TOLERANCES

pytestmark = pytest.mark.parity


@pytest.fixture(scope="module")
def dit() -> ReferenceDiT:
    return ReferenceDiT(read_weights(echo_golden() / "checkpoint/echo-tts-base/pytorch_model.safetensors"))


@pytest.fixture(params=["reference", pytest.param("graphs", marks=pytest.mark.slow)])
def engines(request: pytest.FixtureRequest, dit: ReferenceDiT) -> dict[str, Recorded]:
    """The denoiser of the reference, and the exported graphs on the CPU."""
    reference = reference_engines(dit)
    if request.param == "reference":
        return {role: Recorded(engine) for role, engine in reference.items()}
    model = request.getfixturevalue("echo_model")
    return {role: Recorded(model.engine(role)) for role in reference}


def run(name: str, engines: Mapping[str, Any], denoiser: Denoiser, settings: Denoising, row: int = 0) -> np.ndarray:
    """Generate one row of a run; return its latents. Compare times, rows and positions of all steps."""
    a = arrays()
    voice_from = name if f"{name}/speaker_latent" in a else "stream"
    voice = voice_of(denoiser, a[f"{voice_from}/speaker_latent"][row], a[f"{voice_from}/speaker_mask"][row])
    tokens = a[f"{name}/text_ids"][row][a[f"{name}/text_mask"][row]].astype(np.int64)
    before = a[f"{name}/continuation_latent"][row] if f"{name}/continuation_latent" in a else None
    utterance = Utterance(denoiser, tokens, voice, settings, Stored(a[f"{name}/noise"][row]), before=before)
    engines["denoise"].calls.clear()
    engines["schedule"].calls.clear()
    given = finish(utterance)
    calls = engines["denoise"].calls
    assert utterance.step == utterance.steps == len(calls)
    batch = len(a[f"{name}/text_ids"])
    # the original computes a row without voice for a text that has none
    expected = [min(rows // batch, 3 if voice else 2) for rows in a[f"{name}/rows"]]
    assert [call["text_mask"].shape[1] for call in calls] == expected
    assert {call["text_keys"].shape[3] for call in calls} == {len(tokens) + (settings.variant == "streaming")}
    if f"{name}/start_pos" in a:
        assert [int(call["position_ids"][0, 0]) for call in calls] == a[f"{name}/start_pos"].tolist()
    if f"{name}/x_steps" in a:
        steps = np.stack([call["latents"][0] for call in calls])
        np.testing.assert_allclose(steps, a[f"{name}/x_steps"][:, row], atol=TOLERANCES["trajectory"], rtol=0)
    return given if before is None else np.concatenate([before, given])


def runs(kind: str) -> list[tuple[str, dict[str, Any]]]:
    """Return the names and cases of the runs, of a kind."""
    found = {"stream": meta()["stream_runs"]}.get(kind) or {k: v for k, v in meta()["trajectories"].items() if v["kind"] == kind}
    assert found
    return list(found.items())


@pytest.mark.parametrize("kind", ["full", "blockwise", "stream"])
def test_runs_with_stored_noise(kind: str, dit: ReferenceDiT, engines: dict[str, Any]) -> None:
    denoiser = Denoiser(engines, dit.model())
    for name, case in runs(kind):
        variant = "streaming" if kind == "stream" else "official"
        settings = Denoising(variant=variant).over(settings_of(case)).resolve(dit.model())
        wanted = arrays()[f"{name}/latent_out"]
        for row in range(len(wanted)):
            found = run(name, engines, denoiser, settings, row)
            np.testing.assert_allclose(found, wanted[row], atol=TOLERANCES["trajectory"], rtol=0, err_msg=name)


def test_times_of_the_steps() -> None:
    for steps, wanted in meta()["t_schedules"].items():
        np.testing.assert_array_equal(times(int(steps), 0.999), np.array(wanted, np.float32))
    for name, case in (*runs("full"), *runs("stream")):
        count = len(case.get("block_sizes", "1"))
        steps = np.broadcast_to(case["num_steps"], count)
        scales = np.broadcast_to(case.get("init_scale") or 0.999, count)
        ours = np.concatenate([times(int(n), float(scale))[:-1] for n, scale in zip(steps, scales, strict=True)])
        np.testing.assert_array_equal(ours, arrays()[f"{name}/t_steps"])


def test_guided_steps(dit: ReferenceDiT) -> None:
    for key, wanted in meta()["cfg_steps"].items():
        steps, low, high = key.split("|")
        settings = Denoising(steps=int(steps), cfg_min_t=float(low), cfg_max_t=float(high)).resolve(dit.model())
        block = Block(np.zeros((1, dit.channels), np.float32), times(int(steps), 0.999), settings, 1.0, voiced=True)
        rows = []
        while not block.done:
            rows.append(len(block.rows))
            block.accept(np.zeros((len(block.rows), 1, dit.channels), np.float32))
        assert rows == [3 if guided else 1 for guided in wanted]


def test_rescaling() -> None:
    a = arrays()
    for (t, k, sigma), wanted in zip(meta()["rescale_cases"], a["rescale/out"], strict=True):
        found = rescaled(a["rescale/v"], a["rescale/x"], float(np.float32(t)), k, sigma)
        np.testing.assert_allclose(found, wanted, atol=TOLERANCES["trajectory"], rtol=0)


def test_text_without_words_is_the_token_before_every_text(dit: ReferenceDiT, engines: dict[str, Any]) -> None:
    a = arrays()
    found = Denoiser(engines, dit.model()).wordless()
    assert a["stream/uncond_text_ids"][a["stream/uncond_text_mask"]].tolist() == [0]
    for ours, kind in ((found.keys, "k"), (found.values, "v")):
        wanted = a[f"stream/uncond_text_{kind}_bos"][:, 0]  # [layers, heads, head_dim]
        np.testing.assert_allclose(ours[0, :, :, 0], wanted, atol=TOLERANCES["lm"], rtol=0)


def test_recordings_are_resampled_and_made_softer() -> None:
    """With an encoder that gives the samples themselves, of which a multiple of 4 is kept."""
    model, codec = diffusion_model(), latent_codec(hop=1)
    for n, rate in enumerate(meta()["load_audio_sr"]):
        recording = arrays()[f"load_audio/in{n}"].mean(axis=0, dtype=np.float32)
        found = voice_latents(resample(recording, rate, codec.sample_rate), lambda pcm: pcm[:, None], model, codec)
        wanted = arrays()[f"load_audio/out{n}"][0]
        assert len(found) == len(wanted) - len(wanted) % 4
        allowed = meta()["tolerances"]["suggested"]["load_audio"]
        np.testing.assert_allclose(found[:, 0], wanted[: len(found)], atol=allowed, rtol=0)


def test_ends_of_speech() -> None:
    for case in meta()["flatten_cases"]:
        latents = arrays()[f"flat/{case['name']}"].astype(np.float32)
        assert first_flat(latents, ended=True) == case["upstream"], case["name"]
        assert last_flat(latents) == case["stream_w20_s0p05"], case["name"]
        assert last_flat(latents, 32, 0.02) == case["stream_w32_s0p02"], case["name"]


def test_streams_whose_latents_are_known(dit: ReferenceDiT) -> None:
    """The velocity (x − target) ÷ t leads to the target: which blocks are made, what they give out, and where speech ends."""
    hop = next(case["upstream_cropped_samples"] // case["upstream"] for case in meta()["flatten_cases"] if case["upstream"])
    for name, case in meta()["oracle_streams"].items():
        target = arrays()[f"oracle/{name}_target"][0].astype(np.float32)
        sizes = {"blocks": case["block_sizes"], "steps": case["num_steps"], **case["overrides"]}
        settings = Denoising(variant="streaming", **sizes).resolve(dit.model())
        ending, start, calls, given, made = Ending(settings), 0, 0, [], np.zeros_like(target)
        for number, (frames, steps) in enumerate(zip(case["block_sizes"], case["num_steps"], strict=True)):
            noise = np.random.default_rng(number).standard_normal((frames, target.shape[1]), np.float32)
            block = Block(noise, times(steps, 0.999), settings, 1.0, voiced=True)
            aim = target[start : start + frames]
            while not block.done:
                velocity = (block.latents - aim) / block.t
                block.accept(np.stack([velocity] * len(block.rows)))
                calls += 1
            made[start : start + frames] = block.latents
            start += frames
            given.append(len(ending.push(block.latents, last=start == len(target))))
            if ending.stopped:
                break
        assert calls == case["forward_calls"], name
        assert [(frames, n * hop) for frames, n in zip(case["block_sizes"], given, strict=False)] == [
            (frames, samples) for frames, _, samples in case["decode_calls"]
        ], name
        assert ending.end == case["decode_calls"][-1][1], name
        assert last_flat(made) * hop * 2 == case["nonstream_pcm_bytes"], name
