"""Settings of a generation: ranges, defaults, blocks, presets."""

from __future__ import annotations

from dataclasses import asdict
from typing import Any

import pytest

from fishrt.bundle.diffusion import DenoisingDefaults
from fishrt.diffusion.denoising import PRESETS, Denoising, per_block, preset
from fishrt.diffusion.text import Pace
from fishrt.errors import SamplingError
from helpers_diffusion import diffusion_model

MODEL = diffusion_model()


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"steps": 0}, "steps is 0"),
        ({"steps": 2.5}, "steps is 2.5"),
        ({"steps": True}, "steps is True"),
        ({"steps": [4, 0], "blocks": [8, 8]}, "steps is 0"),
        ({"steps": []}, "steps has 0 values"),
        ({"steps": [4, 4], "blocks": [8]}, "steps has 2 values for 1 block"),
        ({"truncation": [0.8], "blocks": [8, 8]}, "truncation has 1 value for 2 blocks"),
        ({"init_scale": [0.9, 0.9, 0.9], "blocks": [8, 8]}, "init_scale has 3 values for 2 blocks"),
        ({"cfg_text": float("nan")}, "cfg_text is nan"),
        ({"cfg_speaker": "8"}, "cfg_speaker is 8"),
        ({"cfg_min_t": float("inf")}, "cfg_min_t is inf"),
        ({"truncation": 0.0}, "truncation is 0.0"),
        ({"init_scale": 0.0}, "init_scale is 0.0"),
        ({"init_scale": 1.5}, "init_scale is 1.5"),
        ({"rescale_k": -1.0}, "rescale_k is -1.0"),
        ({"force_speaker": 0.0}, "force_speaker is 0.0"),
        ({"force_min_t": 1.1}, "force_min_t is 1.1"),
        ({"force_layers": 0}, "force_layers is 0"),
        ({"blocks": []}, r"blocks is \(\)"),
        ({"blocks": 640}, "blocks is 640"),
        ({"blocks": "32"}, "blocks is '32'"),
        ({"blocks": [8, 0]}, r"blocks is \(8, 0\)"),
        ({"frames": 0}, "frames is 0"),
        ({"early_stop": 1}, "early_stop is 1"),
        ({"zero_eps": -0.1}, "zero_eps is -0.1"),
        ({"zero_tail_frames": 0}, "zero_tail_frames is 0"),
        ({"variant": "fork"}, "variant is 'fork'"),
        ({"pace": 2.7}, "pace is 2.7"),
    ],
)
def test_a_value_out_of_range_is_refused(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(SamplingError, match=message) as caught:
        Denoising(**settings)
    assert caught.value.hint


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"rescale_k": 1.2}, "rescale_k is 1.2 and rescale_sigma is None"),
        ({"rescale_sigma": 3.0}, "rescale_k is None and rescale_sigma is 3.0"),
        ({"cfg_min_t": 0.9, "cfg_max_t": 0.8}, "cfg_min_t 0.9 is above cfg_max_t 0.8"),
        ({"force_min_t": 0.9}, "without force_speaker"),
        ({"force_layers": 2}, "without force_speaker"),
        ({"blocks": [32, 64], "frames": 100}, r"the blocks \[32, 64\] are 96 frames, but frames is 100"),
        ({"blocks": [320, 324]}, "644 frames are wanted"),
        ({"frames": 641}, "641 frames are wanted"),
        ({"steps": [4, 4]}, "steps has 2 values for 1 block"),
    ],
)
def test_what_does_not_fit_the_rest_or_the_model_is_refused(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(SamplingError, match=message) as caught:
        Denoising(**settings).resolve(MODEL)
    assert caught.value.hint


def test_blocks_need_a_model_that_makes_them() -> None:
    model = diffusion_model(blockwise=False)
    assert Denoising(blocks=[640]).resolve(model).blocks == (640,)
    with pytest.raises(SamplingError, match="2 blocks are wanted"):
        Denoising(blocks=[320, 320]).resolve(model)


def test_defaults_are_those_of_the_bundle() -> None:
    model = diffusion_model(denoising=DenoisingDefaults(steps=9, cfg_speaker=5.0, truncation=0.8))
    found = Denoising(cfg_text=2.0, truncation=None).resolve(model)
    assert found == Denoising(
        steps=9,
        cfg_text=2.0,
        cfg_speaker=5.0,
        cfg_min_t=0.5,
        cfg_max_t=1.0,
        truncation=0.8,
        init_scale=0.999,
        blocks=(640,),
        frames=640,
        early_stop=True,
        zero_eps=0.012,
        zero_tail_frames=32,
        variant="official",
    )


def test_resolved_settings_resolve_to_themselves() -> None:
    for settings in (Denoising(), Denoising(force_speaker=1.5, blocks=[8, 8], steps=[3, 4]), preset("equal")):
        once = settings.resolve(MODEL)
        assert once.resolve(MODEL) == once


def test_force_speaker_has_the_defaults_of_the_original_page() -> None:
    found = Denoising(force_speaker=1.5).resolve(MODEL)
    assert (found.force_min_t, found.force_layers) == (0.9, MODEL.layers)
    assert Denoising(force_speaker=1.5, force_min_t=0.0, force_layers=1).resolve(MODEL).force_min_t == 0.0


def test_blocks_and_frames_say_the_same() -> None:
    assert Denoising(frames=100).resolve(MODEL).blocks == (100,)
    assert Denoising(blocks=[32, 64]).resolve(MODEL).frames == 96
    assert Denoising(blocks=[32, 64], frames=96).resolve(MODEL).frames == 96


def test_lists_are_kept_as_tuples() -> None:
    found = Denoising(steps=[2, 3], blocks=[4, 4], truncation=[0.8, 0.9])
    assert (found.steps, found.blocks, found.truncation) == ((2, 3), (4, 4), (0.8, 0.9))
    assert hash(found) == hash(Denoising(steps=(2, 3), blocks=(4, 4), truncation=(0.8, 0.9)))
    assert per_block((2, 3), 2) == (2, 3)
    assert per_block(0.5, 2) == (0.5, 0.5)


def test_settings_go_over_a_preset() -> None:
    found = Denoising(cfg_text=1.0, pace=Pace(max_s=9.0)).over(preset("low"))
    assert (found.blocks, found.steps, found.cfg_text) == ((32, 64, 272, 272), (8, 10, 15, 15), 1.0)
    assert found.pace == Pace(max_s=9.0)
    with pytest.raises(SamplingError, match="steps has 4 values for 1 block"):
        Denoising(blocks=[64]).over(preset("low"))


@pytest.mark.parametrize(
    ("given", "steps", "blocks"),
    [
        (Denoising(), (8, 15, 20), (32, 128, 480)),
        (Denoising(cfg_text=2.0, truncation=0.8), (8, 15, 20), (32, 128, 480)),
        (Denoising(steps=5), 5, (32, 128, 480)),
        (Denoising(frames=100), (8, 15), (32, 68)),
        (Denoising(frames=32), (8,), (32,)),
        (Denoising(blocks=(16, 16)), None, (16, 16)),
        (Denoising(steps=(9,)), (9,), None),
        (Denoising(truncation=(0.9, 0.8, 0.8)), None, None),
    ],
)
def test_a_stream_has_blocks_unless_settings_speak_of_them(given: Denoising, steps: Any, blocks: Any) -> None:
    found = given.streamed(MODEL)
    assert (found.steps, found.blocks) == (steps, blocks)
    assert (found.cfg_text, found.truncation) == (given.cfg_text, given.truncation)
    assert given.streamed(diffusion_model(blockwise=False)) == given
    assert found.streamed(MODEL) == found


def test_a_stream_has_all_frames_of_a_larger_window() -> None:
    assert Denoising().streamed(diffusion_model(max_frames=800)).blocks == (32, 128, 640)


def test_settings_of_later_pieces() -> None:
    found = Denoising(steps=2, later=Denoising(steps=3)).resolve(MODEL)
    assert found.later == Denoising(steps=3).resolve(MODEL)
    assert found.first(40).later == Denoising(steps=3).resolve(MODEL).first(40)
    with pytest.raises(SamplingError, match="641 frames"):
        Denoising(later=Denoising(frames=641)).resolve(MODEL)
    with pytest.raises(SamplingError, match="later is 3"):
        Denoising(later=3)  # type: ignore[arg-type]


def test_presets() -> None:
    assert preset(" Low-Mid ") is PRESETS["low_mid"]
    flat = preset("Independent-High-Speaker-CFG-Flat")
    assert (flat.cfg_text, flat.cfg_speaker, flat.truncation, flat.rescale_k, flat.rescale_sigma) == (3.0, 8.0, 0.8, 1.2, 3.0)
    assert {sum(made.resolve(MODEL).blocks or ()) for made in PRESETS.values()} == {640}
    with pytest.raises(SamplingError, match="no preset 'turbo'") as caught:
        preset("turbo")
    assert "low_mid" in str(caught.value.hint)


def test_settings_are_plain_data() -> None:
    assert asdict(preset("default"))["blocks"] == (32, 128, 480)
