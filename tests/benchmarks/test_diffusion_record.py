"""The record of a diffusion model: times of utterances from those of calls, and ratios to the faster module of torch."""

from __future__ import annotations

import pytest

import diffusion


def test_half_of_the_steps_have_three_rows() -> None:
    medians = {"whole_1_ms": {"int8": 1000.0}, "whole_3_ms": {"int8": 3000.0}}
    audio_s = 640 * 2048 / 44100
    assert diffusion.per_second(medians, "int8") == {
        str(steps): pytest.approx(steps / 2 * (1 + 3) / audio_s, abs=1e-3) for steps in (40, 20, 10)
    }


def test_the_faster_module_of_torch_counts() -> None:
    calls = {f"{what}_{rows}_ms" for what in ("whole", "block") for rows in (1, 3)}
    medians = {call: {"int8": 10.0, "torch-fp32": 50.0, "torch-bf16": 30.0} for call in calls}
    found = diffusion.gains(medians, "int8")
    assert found == dict.fromkeys(("whole_1", "whole_3", "block_1", "block_3"), 3.0)
