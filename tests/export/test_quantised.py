"""Upstream's int8: what it leaves out, and what does not fit."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import Tensor

from fishrt_export.sources.language_model import LanguageModelSource, open_language_model
from synthetic import EVERYTHING, PLAIN, random_weights, write_flat


def int8(weights: dict[str, Tensor]) -> dict[str, Tensor]:
    """Quantise as upstream does: every linear layer, symmetric by rows, without its bias."""
    result = {}
    for name, weight in weights.items():
        if name.endswith(".bias"):
            continue
        if weight.ndim != 2 or "embeddings" in name:
            result[name] = weight
            continue
        scales = weight.float().abs().amax(dim=1) / 127.5
        result[name] = (weight.float() / scales[:, None]).round().clamp(-128, 127).to(torch.int8)
        result[name.removesuffix("weight") + "scales"] = scales.to(torch.bfloat16)
    return result


def opened(folder: Path, config: dict[str, object], weights: dict[str, Tensor]) -> LanguageModelSource:
    return open_language_model(write_flat(folder, config, weights), family="s2")


@pytest.mark.parametrize("config", [PLAIN, EVERYTHING], ids=["plain", "everything"])
def test_int8(tmp_path: Path, config: dict[str, object]) -> None:
    weights = random_weights(config)
    source = opened(tmp_path, config, int8(weights))
    assert source.problems() == []
    for name, weight in weights.items():
        found = source.weights[name]
        if name.endswith(".bias"):
            assert not found.any(), name
        elif weight.ndim != 2 or "embeddings" in name:
            assert torch.equal(found, weight), name
        else:
            step = weight.float().abs().amax(dim=1, keepdim=True) / 127.5
            assert found.dtype == torch.float32
            # Half a step of rounding, one where the largest was cut off, and the rounding of the scales to bfloat16.
            assert ((found - weight.float()).abs() <= step * (1 + 128 * 2**-8)).all(), name


def test_what_does_not_fit_is_listed(tmp_path: Path) -> None:
    weights = int8(random_weights(PLAIN))
    del weights["fast_output.scales"], weights["layers.0.attention.wo.weight"]
    weights["layers.0.feed_forward.w1.scales"] = torch.zeros(3, dtype=torch.bfloat16)
    assert sorted(opened(tmp_path, PLAIN, weights).problems()) == [
        "missing: layers.0.attention.wo.weight [16, 24]",
        "unexpected: layers.0.attention.wo.scales [16]",
        "unexpected: layers.0.feed_forward.w1.scales [3]",
        "wrong type: fast_output.weight holds torch.int8; expected bfloat16, float16 or float32",
        "wrong type: layers.0.feed_forward.w1.weight holds torch.int8; expected bfloat16, float16 or float32",
    ]
