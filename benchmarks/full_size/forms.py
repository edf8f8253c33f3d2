"""Other forms of a checkpoint of S2-Pro: `cd benchmarks && python -m full_size.forms FORM OFFICIAL OUT`.

Every weight is rounded to the nearest number of its form; GPTQ itself rounds with regard to activations. Layout, names and types
are those of the published files: see tests/forms. Tokenizer and codec are the official ones. Needs the memory of the file.
"""

from __future__ import annotations

import json
import os
import struct
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import click
import torch
from safetensors.torch import save_file
from torch import Tensor

from fishrt_export.checkpoint.config import flatten
from fishrt_export.checkpoint.files import read_weights
from fishrt_export.checkpoint.forms.embedded import SIZES
from fishrt_export.checkpoint.names import CONFIG, INDEX, PICKLE
from fishrt_export.checkpoint.quantised.levels import TABLES
from fishrt_export.checkpoint.weights import flat_names

from .checkpoint import nested_name

_GROUP = 32
"""Inputs of a group of GPTQ, and of a block of Q8_0."""
_BLOCK, _NESTED = 64, 256
"""Inputs of a block of NF4, and blocks that share a scale."""
_STATE = {"quant_type": "nf4", "blocksize": _BLOCK, "dtype": "float16", "nested_blocksize": _NESTED, "nested_dtype": "float32"}

Official = Mapping[str, Tensor]
"""bfloat16 tensors by their flat names, read when they are looked up."""


def write_form(form: str, official: Path, out: Path) -> None:
    """Write the checkpoint of one of FORMS into the new folder `out`. official: a folder in the layout of S2-Pro."""
    out.mkdir(parents=True)
    for name in ("tokenizer.json", "codec.pth", "codec_config.json"):
        if (official / name).is_file():
            os.link(official / name, out / name)
    FORMS[form](flat_names(read_weights(official / INDEX)), json.loads((official / CONFIG).read_text()), out)


def _write_gptq(weights: Official, config: dict[str, Any], out: Path) -> None:
    """4 bits in groups of 32, with act-order: the layers of the slow AR."""
    found: dict[str, Tensor] = {}
    for name in weights:
        if _is_linear(name) and name.startswith("layers."):
            stem = nested_name(name).removesuffix(".weight")
            found |= {f"{stem}.{part}": tensor for part, tensor in _gptq(weights[name].float()).items()}
        else:
            found[nested_name(name)] = weights[name]
    save_file(found, out / "model.safetensors", {"format": "pt"})
    stated = {"bits": 4, "group_size": _GROUP, "desc_act": True, "sym": True, "quant_method": "gptq", "checkpoint_format": "gptq"}
    (out / CONFIG).write_text(json.dumps(config | {"quantization_config": stated}))


def _gptq(weight: Tensor) -> dict[str, Tensor]:
    outputs, inputs = weight.shape
    order = torch.randperm(inputs, generator=torch.Generator().manual_seed(inputs))  # layers with the same input have the same
    groups = weight[:, order].view(outputs, -1, _GROUP)
    scales = (groups.abs().amax(2, keepdim=True) / 7).half()
    q = torch.empty((outputs, inputs), dtype=torch.int32)
    q[:, order] = (groups / scales.float()).round_().clamp_(-8, 7).add_(8).int().view(outputs, inputs)
    g_idx = torch.empty(inputs, dtype=torch.int32)
    g_idx[order] = torch.arange(inputs, dtype=torch.int32) // _GROUP
    zeros = torch.full((inputs // _GROUP, outputs // 8), 0x77777777, dtype=torch.int32)
    return {"qweight": _packed_8(q.T), "qzeros": zeros, "scales": scales.squeeze(2).T.contiguous(), "g_idx": g_idx}


def _packed_8(q: Tensor) -> Tensor:
    """Return int32 [rows / 8, columns]: eight numbers of 4 bits of a column in each, the first in the lowest bits."""
    words = torch.zeros((len(q) // 8, q.shape[1]), dtype=torch.int32)
    for i in range(8):
        words |= q[i::8] << (4 * i)
    return words


def _write_fp8(weights: Official, config: dict[str, Any], out: Path) -> None:
    """A scale for each row of every layer, flat names, and the buffers of the original: its mask is a sixth of the file."""
    found: dict[str, Tensor] = {}
    for name in weights:
        if _is_linear(name):
            weight = weights[name].float()
            scale = weight.abs().amax(1, keepdim=True) / 448
            found |= {name: (weight / scale).to(torch.float8_e4m3fn), f"{name}.scale": scale}
        else:
            found[name] = weights[name]
    positions = config["text_config"]["max_seq_len"]
    found["_buf.causal_mask"] = torch.ones((positions, positions), dtype=torch.bool).tril_()
    save_file(found, out / "model.safetensors")
    (out / CONFIG).write_text(json.dumps(config))


def _write_nf4(weights: Official, config: dict[str, Any], out: Path) -> None:
    """Nested scales, flat names and config, the rest in float16, in one pickle."""
    found: dict[str, Tensor] = {}
    for name in weights:
        found |= _nf4(name, weights[name].float()) if _is_linear(name) else {name: weights[name].half()}
    torch.save(found, out / PICKLE)
    (out / CONFIG).write_text(json.dumps({"model_type": "dual_ar", **flatten(config)}))


def _nf4(name: str, weight: Tensor) -> dict[str, Tensor]:
    blocks, table = weight.view(-1, _BLOCK), torch.tensor(TABLES["nf4"])
    largest = blocks.abs().amax(1)
    eighths, offset = torch.linspace(-1, 1, 256), largest.mean()
    scales = torch.stack([part.abs().max() for part in (largest - offset).split(_NESTED)])
    spread = scales.repeat_interleave(_NESTED)[: len(largest)]
    eight = _nearest(eighths, (largest - offset) / spread)
    codes = _nearest(table, blocks / (eighths[eight.int()] * spread + offset).unsqueeze(1)).flatten()
    state = _STATE | {"shape": list(weight.shape), "nested_offset": offset.item()}
    return {
        name: (codes[0::2] << 4 | codes[1::2]).unsqueeze(1),
        f"{name}.absmax": eight,
        f"{name}.quant_map": table,
        f"{name}.nested_absmax": scales,
        f"{name}.nested_quant_map": eighths,
        f"{name}.quant_state.bitsandbytes__nf4": torch.tensor(list(json.dumps(state).encode()), dtype=torch.uint8),
    }


def _nearest(numbers: Tensor, values: Tensor) -> Tensor:
    """Return the index of the nearest of ascending numbers to each value, uint8."""
    return torch.bucketize(values, (numbers[1:] + numbers[:-1]) / 2).to(torch.uint8)


def _write_q8_0(weights: Official, config: dict[str, Any], out: Path) -> None:
    """s2.cpp's names: matrices and tables in Q8_0, vectors in float16, sizes in the header; the codec stays beside."""
    flat = flatten(config)
    values: dict[str, Any] = {"general.architecture": "fish-speech"} | {
        key: flat[name] for name, key in SIZES.items() if flat.get(name) is not None
    }
    shapes = {name: tuple(weights[name].shape) for name in weights}
    sizes = {name: weights[name].numel() // 32 * 34 if len(shape) > 1 else 2 * shape[0] for name, shape in shapes.items()}
    header = struct.pack("<4sIQQ", b"GGUF", 3, len(shapes), len(values))
    for key, value in values.items():
        header += _text(key) + _value(value)
    offset = 0
    for name, shape in shapes.items():
        kind = 8 if len(shape) > 1 else 1
        header += _text(name) + struct.pack(f"<I{len(shape)}QIQ", len(shape), *shape[::-1], kind, offset)
        offset += -(-sizes[name] // 32) * 32
    with (out / "s2-pro-q8_0.gguf").open("wb") as file:
        file.write(header)
        for name, shape in shapes.items():
            file.write(bytes(-file.tell() % 32))
            raw = _q8_0(weights[name].float()) if len(shape) > 1 else weights[name].half().view(torch.uint8)
            file.write(raw.numpy().data)


def _q8_0(weight: Tensor) -> Tensor:
    blocks = weight.view(-1, _GROUP)
    scale = (blocks.abs().amax(1, keepdim=True) / 127).half()
    q = (blocks / scale.float()).round_().clamp_(-128, 127).to(torch.int8)
    return torch.cat((scale.view(torch.uint8), q.view(torch.uint8)), dim=1).flatten()


def _text(text: str) -> bytes:
    return struct.pack("<Q", len(text.encode())) + text.encode()


def _value(value: str | bool | int | float) -> bytes:
    if isinstance(value, str):
        return struct.pack("<I", 8) + _text(value)
    kind, letter = (7, "?") if isinstance(value, bool) else (4, "I") if isinstance(value, int) else (6, "f")
    return struct.pack(f"<I{letter}", kind, value)


def _is_linear(name: str) -> bool:
    """Return whether a tensor is the weight of a layer, and no table or vector."""
    return name == "fast_output.weight" or ".attention.w" in name or ".feed_forward.w" in name


FORMS: dict[str, Callable[[Official, dict[str, Any], Path], None]] = {
    "gptq": _write_gptq,
    "q8_0": _write_q8_0,
    "nf4": _write_nf4,
    "fp8": _write_fp8,
}


@click.command()
@click.argument("form", type=click.Choice(list(FORMS)))
@click.argument("official", type=click.Path(exists=True, file_okay=False, path_type=Path))
@click.argument("out", type=click.Path(path_type=Path))
def main(form: str, official: Path, out: Path) -> None:
    """Write the checkpoint OUT in a FORM, made of the checkpoint OFFICIAL."""
    write_form(form, official, out)


if __name__ == "__main__":
    main()
