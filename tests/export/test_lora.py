"""A LoRA is merged by its rules, and an error lists all differences to the model."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from fishrt.bundle.features import Reads
from fishrt_export.checkpoint.families import FAMILIES
from fishrt_export.checkpoint.lora import merge
from fishrt_export.errors import ExportError
from fishrt_export.options import Lora
from fishrt_export.sources.language_model import open_language_model
from synthetic import EVERYTHING, PLAIN, random_weights, write_flat

RANK = 3
EMBEDDINGS = ("embeddings", "codebook_embeddings", "fast_embeddings")


def random_lora(weights: dict[str, Tensor], *modules: str, rank: int = RANK) -> dict[str, Tensor]:
    """Pairs for some modules, or for all that training may adapt."""
    found: dict[str, Tensor] = {}
    for name, weight in weights.items():
        module = name.removesuffix(".weight")
        if weight.ndim != 2 or module == name or (modules and module not in modules):
            continue
        rows, columns = reversed(weight.shape) if module in EMBEDDINGS else weight.shape
        found |= {f"{module}.lora_A": torch.randn(rank, columns), f"{module}.lora_B": torch.randn(rows, rank)}
    return found


def write(folder: Path, tensors: dict[str, Any], *, prefix: str = "model.") -> Path:
    path = folder / "step_000000010.ckpt"
    torch.save({"state_dict": {prefix + name: tensor for name, tensor in tensors.items()}, "global_step": 10}, path)
    return path


@pytest.mark.parametrize("prefix", ["model.", "", "module.", "model._orig_mod."])
def test_every_module_is_merged(tmp_path: Path, prefix: str) -> None:
    weights = random_weights(EVERYTHING)
    pairs = random_lora(weights)
    merged = merge(weights, Lora(write(tmp_path, pairs, prefix=prefix), alpha=6, rank=RANK))
    assert merged.keys() == weights.keys()
    for name, weight in weights.items():
        module = name.removesuffix(".weight")
        expected = weight
        if f"{module}.lora_A" in pairs:
            change = 2 * (pairs[f"{module}.lora_B"].double() @ pairs[f"{module}.lora_A"].double())
            expected = weight.double() + (change.T if module in EMBEDDINGS else change)
            assert merged[name].dtype == torch.float32
        torch.testing.assert_close(merged[name].double(), expected.double(), rtol=0, atol=1e-5)


def test_other_modules_stay_as_they_are(tmp_path: Path) -> None:
    weights = random_weights(EVERYTHING)
    merged = merge(weights, Lora(write(tmp_path, random_lora(weights, "fast_output")), alpha=6))
    changed = {name for name in weights if merged[name] is not weights[name]}
    assert changed == {"fast_output.weight"}


def test_the_rows_of_the_audio_head_are_merged(tmp_path: Path) -> None:
    """With a tied head, they are the merged embedding."""
    weights = random_weights(PLAIN)
    lora = Lora(write(tmp_path, random_lora(weights, "embeddings")), alpha=6)
    source = open_language_model(write_flat(tmp_path / "checkpoint", PLAIN, weights), family="s2", lora=lora)
    assert torch.equal(source.slow_weights("audio")["output.weight"], source.weights["embeddings.weight"][source.audio_head])
    assert not torch.equal(source.weights["embeddings.weight"], weights["embeddings.weight"].float())


def test_what_a_lora_taught_the_model_to_read_is_not_known(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(FAMILIES, "s2", replace(FAMILIES["s2"], reads=Reads(("en",), "abc", ("[]",))))
    weights = random_weights(PLAIN)
    checkpoint = write_flat(tmp_path / "checkpoint", PLAIN, weights)
    lora = Lora(write(tmp_path, random_lora(weights, "embeddings")), alpha=6)
    assert open_language_model(checkpoint, family="s2").describe("audio").reads == Reads(("en",), "abc", ("[]",))
    assert open_language_model(checkpoint, family="s2", lora=lora).describe("audio").reads == Reads((), None, ("[]",))


def refused(tmp_path: Path, weights: dict[str, Tensor], tensors: dict[str, Any], **options: Any) -> str:
    with pytest.raises(ExportError) as caught:
        merge(weights, Lora(write(tmp_path, tensors), **{"alpha": 16, **options}))
    return str(caught.value)


def test_everything_that_does_not_fit_is_named_at_once(tmp_path: Path) -> None:
    weights = random_weights(PLAIN)
    pairs = random_lora(weights, "embeddings", "layers.0.attention.wo", "layers.1.attention.wo", "fast_output")
    del pairs["fast_output.lora_A"]
    pairs["embeddings.lora_A"] = pairs["embeddings.lora_A"][:, :-1]
    pairs["layers.0.attention.wo.lora_B"][0, 0] = float("nan")
    pairs |= {"layers.9.attention.wo.lora_A": torch.zeros(3, 4), "norm.lora_A": torch.zeros(3, 1), "norm.weight": torch.zeros(1)}
    pairs |= {"output.lora_A": torch.zeros(3, 16), "output.lora_B": torch.zeros(48, 3)}
    message = refused(tmp_path, weights, pairs)
    for problem in (
        "missing: fast_output.lora_A [3, 16]",
        "wrong shape: embeddings.lora_A is [3, 47], expected [3, 48]",
        "not finite: layers.0.attention.wo.lora_B",
        "unknown module: the model has no matrix layers.9.attention.wo.weight",
        "unknown module: the model has no matrix norm.weight",
        "unknown module: the model has no matrix output.weight: its head is its token embedding",
        "unexpected: norm.weight",
        "(7 problems)",
    ):
        assert problem in message


def test_the_rank(tmp_path: Path) -> None:
    weights = random_weights(PLAIN)
    pairs = random_lora(weights, "fast_output")
    message = refused(tmp_path, weights, pairs, rank=8)
    assert "does not fit the model at rank 8 (2 problems)" in message
    assert "wrong shape: fast_output.lora_A is [3, 16], expected [8, 16]" in message
    other = random_lora(weights, "embeddings", rank=5)
    assert "wrong shape: fast_output.lora_B is [14, 3], expected [14, 5]" in refused(tmp_path, weights, pairs | other)
    crossed = {**pairs, "fast_output.lora_B": torch.zeros(14, 5)}
    assert "wrong shape: fast_output.lora_B is [14, 5], expected [14, 3]" in refused(tmp_path, weights, crossed)


@pytest.mark.parametrize(
    ("numbers", "message"),
    [
        *(({"alpha": alpha}, "alpha is") for alpha in (0, -1, float("nan"), float("inf"))),
        ({"alpha": 16, "rank": 0}, "rank is 0"),
    ],
)
def test_numbers_must_count(tmp_path: Path, numbers: dict[str, Any], message: str) -> None:
    weights = random_weights(PLAIN)
    assert message in refused(tmp_path, weights, random_lora(weights, "fast_output"), **numbers)


def test_a_file_without_a_lora(tmp_path: Path) -> None:
    weights = random_weights(PLAIN)
    assert "holds no LoRA: none of its" in refused(tmp_path, weights, weights)
    for path in (tmp_path, tmp_path / "absent.ckpt"):
        with pytest.raises(ExportError, match="is not a file"):
            Lora(path, alpha=16)


def test_a_lora_in_place_of_the_model(tmp_path: Path) -> None:
    weights = random_weights(PLAIN)
    write_flat(tmp_path, PLAIN, {f"model.{name}": tensor for name, tensor in random_lora(weights).items()})
    with pytest.raises(ExportError, match="the weights are those of a LoRA") as caught:
        open_language_model(tmp_path, family="s2")
    assert "--lora" in str(caught.value.hint)


def test_a_lora_of_no_rank(tmp_path: Path) -> None:
    weights = random_weights(PLAIN)
    assert "wrong rank: found 0" in refused(tmp_path, weights, random_lora(weights, "fast_output", rank=0))
