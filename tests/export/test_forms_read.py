"""Weights of every form are read exactly: the samples by their hashes, layers of other shapes by the definitions in numpy."""

from __future__ import annotations

import hashlib
import shutil
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

import form_samples
from fishrt_export.checkpoint import files
from fishrt_export.checkpoint.files import read_tensors, read_weights
from fishrt_export.checkpoint.forms.folder import Checkpoint
from fishrt_export.checkpoint.forms.gguf import GgufTensor
from fishrt_export.checkpoint.quantised.blocks import maker
from fishrt_export.checkpoint.quantised.integers import Integers, Packed, joined
from fishrt_export.checkpoint.quantised.layers import Layer, makers_of
from fishrt_export.checkpoint.weights import Lazy
from fishrt_export.errors import ExportError
from fishrt_export.sources.codec import open_codec
from fishrt_export.sources.language_model import open_language_model
from form_samples import HALVES, READ, SAMPLES, right
from synthetic import PLAIN, random_weights, write_flat


def digest(tensor: torch.Tensor) -> str:
    return hashlib.sha256(tensor.float().contiguous().numpy().tobytes()).hexdigest()


@pytest.mark.parametrize("form", READ)
def test_a_sample(form: str) -> None:
    source = open_language_model(Checkpoint.of(SAMPLES / form, **HALVES))
    wanted = {name: hash for name, hash in right(form).items() if not name.startswith("codec.")}
    assert source.problems() == []
    assert source.weights.keys() == wanted.keys()
    assert [name for name, hash in wanted.items() if digest(source.weights[name]) != hash] == []


def test_the_codec_inside_a_gguf_file() -> None:
    path = SAMPLES / "gguf-s2cpp-q8_0"
    found = read_tensors(Checkpoint.of(path).codec_files().weights)
    wanted = {name.removeprefix("codec."): hash for name, hash in right(path.name).items() if name.startswith("codec.")}
    assert found.keys() == wanted.keys()
    assert [name for name, hash in wanted.items() if digest(found[name]) != hash] == []
    assert open_codec(path).problems() == []


def layer_weight(form: str, parts: dict[str, Any], inputs: int) -> np.ndarray[Any, Any]:
    tensors = {end: torch.from_numpy(np.ascontiguousarray(part)) for end, part in parts.items()}
    layer = Layer("layer", {end: partial(tensors.__getitem__, end) for end in tensors}, inputs)
    return makers_of(form, layer)().numpy()


def same_bits(found: np.ndarray[Any, Any], wanted: np.ndarray[Any, Any]) -> bool:
    return found.dtype == np.float32 and np.array_equal(found, wanted)


@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("group", [-1, 16, 32, 48, 64])
@pytest.mark.parametrize("act_order", [False, True])
@pytest.mark.parametrize("sym", [False, True])
@pytest.mark.parametrize("v1", [False, True])
def test_gptq(bits: int, group: int, act_order: bool, sym: bool, v1: bool) -> None:
    rng = np.random.default_rng(bits + group)
    parts, weight = form_samples.gptq(rng, 24, 192, bits=bits, group=group, act_order=act_order, sym=sym, v1=v1)
    assert same_bits(layer_weight("gptq" if v1 else "gptq_v2", parts, 192), weight)
    if not act_order:
        del parts[".g_idx"]
        assert same_bits(layer_weight("gptq" if v1 else "gptq_v2", parts, 192), weight)


def test_gptq_with_a_last_group_that_is_not_full() -> None:
    parts, weight = form_samples.gptq(np.random.default_rng(0), 8, 80, bits=4, group=32, act_order=True, sym=False, v1=True)
    assert same_bits(layer_weight("gptq", parts, 80), weight)


def test_a_zero_point_of_nought_borrows_from_its_word() -> None:
    """In the first layout a zero point of 0 is stored as −1 of the whole word, and the word's sum restores it."""
    parts, weight = form_samples.gptq(np.random.default_rng(0), 8, 32, bits=4, group=32, act_order=False, sym=True, v1=False)
    zeros = np.array([[0, 8, 3, 8, 8, 8, 8, 5]])
    scale = parts[".scales"].astype(np.float32)
    parts[".qzeros"] = (form_samples.pack_bits(zeros, 4).view(np.uint32) - np.uint32(0x11111111)).view(np.int32)
    wanted = np.round(weight / scale.T) + 8 - zeros.T
    assert same_bits(layer_weight("gptq", parts, 32), (wanted * scale.T).astype(np.float32))


@pytest.mark.parametrize("bits", [2, 3, 4, 5, 6, 8])
@pytest.mark.parametrize("group", [32, 64, 128])
def test_mlx(bits: int, group: int) -> None:
    parts, weight = form_samples.mlx(np.random.default_rng(bits), 24, 384, bits=bits, group=group)
    assert same_bits(layer_weight("mlx", parts, 384), weight)


@pytest.mark.parametrize("inner", [2, 4, 8])
@pytest.mark.parametrize("group", [32, 64, 128])
@pytest.mark.parametrize("inputs", [256, 192, 160])
def test_tiles(inner: int, group: int, inputs: int) -> None:
    parts, weight = form_samples.tiles(np.random.default_rng(group), 16, inputs, group=group, inner=inner, padded=256)
    assert same_bits(layer_weight("tiles", parts, inputs), weight)


RIGHT = {
    **{"Q8_0": "4b684c394e1e96e8", "Q4_0": "61ac17df84ec7053", "Q4_1": "eaaeb246a220d181", "Q5_0": "be1ddbfd5ad132d6"},
    **{"Q5_1": "ece5de8458813383", "Q2_K": "254a3997e084d2bb", "Q3_K": "5719e886bf22744e", "Q4_K": "c02026ca31f755ed"},
    **{"Q5_K": "eee6050ad2c09315", "Q6_K": "51816c0dde110d0e"},
}
"""The start of the SHA-256 of the weight by `gguf.quants.dequantize` of the package gguf 0.19.0."""


@pytest.mark.parametrize("kind", form_samples.GGUF)
def test_blocks_of_gguf(tmp_path: Path, kind: str) -> None:
    path = tmp_path / "blocks"
    path.write_bytes(form_samples.gguf_blocks(kind, 24, 768))
    assert digest(maker(path, GgufTensor(kind, (24, 768), 0, path.stat().st_size))()).startswith(RIGHT[kind])


@pytest.mark.parametrize("block", [64, 128])
@pytest.mark.parametrize("nested", [None, 4, 256])
@pytest.mark.parametrize("shape", [(16, 128), (5, 48), (3, 7)])
def test_bitsandbytes(block: int, nested: int | None, shape: tuple[int, int]) -> None:
    parts, weight = form_samples.bnb4(np.random.default_rng(block), *shape, block=block, nested=nested)
    assert same_bits(layer_weight("bnb4", parts, shape[1]), weight)


@pytest.mark.parametrize("end", [".weight.scale", ".weight_scale", ".scale_weight"])
@pytest.mark.parametrize("shape", [(), (1,), (8, 1), (8,)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_fp8(end: str, shape: tuple[int, ...], dtype: torch.dtype) -> None:
    torch.manual_seed(1)
    weight, scale = torch.randn(8, 16).to(torch.float8_e4m3fn), torch.rand(shape).to(dtype)
    parts = {".weight": weight, end: scale}
    layer = Layer("layer", {name: partial(parts.__getitem__, name) for name in parts}, 16)
    wanted = weight.float() * (scale.float().reshape(-1, 1) if scale.numel() > 1 else scale.float().reshape(()))
    assert torch.equal(makers_of("fp8", layer)(), wanted)


VAST = np.frombuffer(b'{"shape":[99999999,9999999],"blocksize":64}', np.uint8).copy()
DEEP = np.frombuffer(b"[" * 3000, np.uint8).copy()
STATE = ".weight.quant_state.bitsandbytes__nf4"
MISFITS: dict[str, Any] = {
    "a group that is not there": ("gptq", {".g_idx": np.full(64, 9, np.int32)}),
    "a negative group": ("gptq", {".g_idx": np.full(64, -1, np.int32)}),
    "too few words": ("gptq", {".qweight": np.zeros((3, 24), np.int32)}),
    "zeros of another layer": ("gptq", {".qzeros": np.zeros((2, 4), np.int32)}),
    "another number of words": ("mlx", {".weight": np.zeros((24, 7), np.uint32)}),
    "no biases": ("mlx", {".biases": np.zeros((24, 1), np.float32)}),
    "a shape that is not there": ("bnb4", {".weight": np.zeros((40, 1), np.uint8)}),
    "no state": ("bnb4", {STATE: DEEP}),
    "a vast shape": ("bnb4", {STATE: VAST}),
}


@pytest.mark.parametrize(("form", "change"), MISFITS.values(), ids=MISFITS)
def test_tensors_that_do_not_fit_each_other(form: str, change: dict[str, Any]) -> None:
    rng = np.random.default_rng(0)
    made: dict[str, Any] = {
        "gptq": lambda: form_samples.gptq(rng, 24, 64, bits=4, group=32, act_order=False, sym=True, v1=True),
        "mlx": lambda: form_samples.mlx(rng, 24, 64, bits=4, group=32),
        "bnb4": lambda: form_samples.bnb4(rng, 24, 64, block=64, nested=None),
    }
    parts, _ = made[form]()
    with pytest.raises(ExportError, match=r"layer.* (do not fit each other|names groups|is no JSON object)"):
        layer_weight(form, parts | change, 64)


# ---- layouts


@pytest.mark.parametrize("prefix", ["", "model."])
def test_one_file_of_any_name_and_float_type(tmp_path: Path, prefix: str) -> None:
    weights = random_weights(PLAIN)
    write_flat(tmp_path, PLAIN, weights)
    (tmp_path / "model.pth").unlink()
    save_file({prefix + name: tensor.half() for name, tensor in weights.items()}, tmp_path / "mine-fp16.safetensors")
    source = open_language_model(tmp_path, family="s2")
    assert source.problems() == []
    assert all(torch.equal(source.weights[name], tensor.half()) for name, tensor in weights.items())


def test_a_codec_in_safetensors(tmp_path: Path) -> None:
    """With the names of codec.pth, and cast; and under the name of the pickle."""
    before = open_codec(form_samples.CODEC)
    stored = torch.load(form_samples.CODEC / "codec.pth", weights_only=True)
    tensors = {name: tensor.clone() for name, tensor in stored.items()}
    shutil.copy(form_samples.CODEC / "codec_config.json", tmp_path)
    for name in ("codec.safetensors", "codec.pth"):
        save_file(tensors, tmp_path / name)
        assert open_codec(tmp_path).fingerprint == before.fingerprint
        (tmp_path / name).unlink()


def test_the_form_of_fish_speech_rs(tmp_path: Path) -> None:
    """Names of the originals in safetensors, a tokenizer.json for 1.5, and a codec without weight norm in float16."""
    golden = form_samples.GOLDEN.parent / "fish-1.5"
    original = open_language_model(Checkpoint.of(golden / "lm/checkpoint"))
    codec = open_codec(golden / "codec/checkpoint")
    for name in ("lm/checkpoint/config.json", "codec/checkpoint/codec_config.json"):
        shutil.copy(golden / name, tmp_path)
    (tmp_path / "tokenizer.json").write_text(original.tokenizer, encoding="utf-8")
    save_file({name: tensor.contiguous() for name, tensor in original.weights.items()}, tmp_path / "model.safetensors")
    halves = {name: tensor.half() for name, tensor in codec.weights.items()}
    save_file(halves, tmp_path / "firefly-gan-vq-fsq-8x1024-21hz-generator.safetensors")
    found, found_codec = open_language_model(tmp_path), open_codec(tmp_path)
    assert found.family.name == "1.5"
    assert found.ids == original.ids
    assert all(torch.equal(found.weights[name], original.weights[name]) for name in original.weights)
    assert found_codec.problems() == []
    assert all(torch.equal(found_codec.weights[name], half) for name, half in halves.items())


def test_masks_are_never_read(tmp_path: Path) -> None:
    """The mask of a real FP8 file has a gigabyte: it is left out before anything is looked up."""
    tensors = load_file(SAMPLES / "fp8-per-row/model.safetensors")
    assert [name for name in tensors if name.startswith("_buf.")]
    shutil.copytree(SAMPLES / "fp8-per-row", tmp_path, dirs_exist_ok=True)
    found = open_language_model(Checkpoint.of(tmp_path, **HALVES)).weights
    assert not [name for name in found if "_buf" in name]


def test_a_pickle_is_opened_again_under_its_new_names(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    wanted = {f"layers.{n}.weight": torch.randn(64, 64) for n in range(5)}
    torch.save({"state_dict": {f"model.{name}": tensor for name, tensor in wanted.items()}}, tmp_path / "model.pth")
    monkeypatch.setattr(files, "_MAPPED", 20_000)  # the first two tensors
    opened: list[Path] = []
    found = read_weights(tmp_path / "model.pth")
    monkeypatch.setattr(files, "read_tensors", lambda path: opened.append(path) or read_tensors(path))
    for name in (*wanted, *reversed(wanted)):
        assert torch.equal(found[name], wanted[name])
    assert len(opened) == 4


def test_weights_are_read_one_by_one() -> None:
    found = read_weights(SAMPLES / "gguf-s2cpp-q8_0/s2-pro-q8_0.gguf")
    assert isinstance(found, Lazy)
    assert found["norm.weight"].data_ptr() != found["norm.weight"].data_ptr()


@pytest.mark.parametrize(("bits", "offset"), [(8, 0), (4, 0), (8, -8), (4, -8)])
def test_parts_are_joined_as_integers_only_if_they_are_of_one_kind(bits: int, offset: int) -> None:
    """Files of mixed types have such parts: q and k in 4 bits, and v in 8."""

    def part(seed: int, bits: int, offset: int) -> Packed:
        draw = torch.Generator().manual_seed(seed)
        values = torch.randint(0, 8, (4, 64), dtype=torch.int8, generator=draw)
        return Packed(lambda: Integers(values, torch.rand((4, 2), generator=draw.manual_seed(seed)), bits, offset))

    parts = [part(1, 4, -8), part(2, bits, offset)]
    made, whole = joined(parts), torch.cat([each() for each in parts])
    assert torch.equal(made(), whole)
    assert isinstance(made, Packed) == ((bits, offset) == (4, -8))
    if isinstance(made, Packed):
        assert torch.equal(made.read().widened(), whole)
