"""Layers of each form as integers, or as a function that widens them. All arithmetic is float32.

A layer's tensors are looked up by what follows its name, such as ".qweight". Errors name the layer.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from math import gcd, prod

import torch
from torch import Tensor, nn

from ...errors import ExportError
from ..content import DAMAGED
from ..forms.recognise import QUANT_STATE, SCALES_OF_FP8
from ..weights import Maker, one_thread
from .integers import Integers, Packed, unpack
from .levels import BLOCKS, Levels

_TILE = 16
"""Inputs of one tile of the original int4."""
_PLUS_ONE = {4: 0x11111111, 8: 0x01010101}


@dataclass(frozen=True, slots=True)
class Layer:
    """The stored tensors of one layer, by what follows its name."""

    name: str
    parts: Mapping[str, Maker]
    inputs: int | None
    """Inputs by the config; None: unknown."""

    def tensor(self, end: str) -> Tensor:
        """Return a stored tensor. Raises ExportError if it is not there."""
        if end not in self.parts:
            raise ExportError(f"{self.name} lacks {self.name}{end}", hint=DAMAGED)
        return self.parts[end]()

    def error(self, **shapes: Tensor) -> ExportError:
        """Return the error for tensors whose shapes do not fit each other."""
        found = ", ".join(f"{name} {list(tensor.shape)}" for name, tensor in shapes.items())
        return ExportError(f"the tensors of {self.name} do not fit each other: {found}", hint=DAMAGED)


def gptq(layer: Layer, *, stores_less_one: bool) -> Integers:
    """Return GPTQ's integers. stores_less_one: the file has each zero point less one, as the layout "gptq" does."""
    words, scales = layer.tensor(".qweight"), layer.tensor(".scales").float()
    packed_zeros = layer.tensor(".qzeros")
    count, outputs = scales.shape if scales.ndim == 2 else (0, -1)
    inputs = len(layer.tensor(".g_idx")) if ".g_idx" in layer.parts else (layer.inputs or 0)
    bits = 32 * words.shape[0] // max(inputs, 1) if words.ndim == 2 else 0
    fits = bits in _PLUS_ONE and words.shape == (inputs * bits // 32, outputs) and inputs * bits % 32 == 0
    if not fits or packed_zeros.shape != (count, outputs * bits // 32) or outputs * bits % 32:
        raise layer.error(qweight=words, qzeros=packed_zeros, scales=scales)
    groups = layer.tensor(".g_idx").long() if ".g_idx" in layer.parts else torch.arange(inputs) // -(-inputs // count)
    if groups.numel() and not 0 <= int(groups.min()) <= int(groups.max()) < count:
        raise ExportError(f"{layer.name}.g_idx names groups beyond the {count} of the scales", hint=DAMAGED)
    middle = 1 << (bits - 1)
    if stores_less_one:
        packed_zeros = packed_zeros + _PLUS_ONE[bits]
    zeros = (unpack(packed_zeros, bits).to(torch.int16) & (2 * middle - 1)) - middle
    values = _centred(unpack(words.T.contiguous(), bits), bits)
    equal = inputs % count == 0 and torch.equal(groups, torch.arange(inputs) // (inputs // count))
    return Integers(
        values,
        scales.T.contiguous(),
        bits,
        zeros=zeros.T.contiguous() if zeros.any() else None,
        groups=None if equal else groups,
    )


def mlx(layer: Layer) -> Integers:
    """Return MLX's integers of 2 to 8 bits."""
    words, scales, biases = layer.tensor(".weight"), layer.tensor(".scales").float(), layer.tensor(".biases").float()
    inputs = layer.inputs or 0
    bits = 32 * words.shape[-1] // inputs if inputs else 0
    if words.ndim != 2 or not 2 <= bits <= 8 or words.shape[1] * 32 != inputs * bits or scales.shape != biases.shape:
        raise layer.error(weight=words, scales=scales, biases=biases)
    if len(scales) != len(words) or scales.ndim != 2 or not scales.shape[1] or inputs % scales.shape[1]:
        raise layer.error(weight=words, scales=scales)
    offset = 1 << (bits - 1)
    return Integers(_centred(unpack(words.view(torch.int32), bits), bits), scales, bits, offset=offset, biases=biases)


def tiles(layer: Layer) -> Integers:
    """Return the integers of upstream's int4, whose order is that of an NVIDIA card's matrix instructions."""
    words, both = layer.tensor(".weight"), layer.tensor(".scales_and_zeros").float()
    if words.ndim != 4 or words.shape[2] != 32 or both.ndim != 3 or both.shape[1:] != (8 * words.shape[0], 2):
        raise layer.error(weight=words, scales_and_zeros=both)
    eighths, blocks, _, pairs = words.shape
    inner = 2 * pairs
    padded = blocks * _TILE * inner
    inputs = layer.inputs or padded
    if not len(both) or padded % len(both) or inputs > padded:
        raise layer.error(weight=words, scales_and_zeros=both)
    # Word [a, b, t, j]: output 8a + t // 4, input 16 (b · inner + 2j) + 2 (t mod 4) + one of these, from the low half byte up.
    steps = (0, 8, 16, 24, 1, 9, 17, 25)
    values = torch.empty((eighths, 8, blocks, pairs, 32), dtype=torch.int8)
    view = words.view(eighths, blocks, 8, 4, pairs)
    with one_thread():
        for i, step in enumerate(steps):
            part = ((view >> (4 * i)) & 15).to(torch.int8) - 8
            values[..., step : step + 7 : 2] = part.permute(0, 2, 1, 4, 3)
    values = values.flatten(2).flatten(0, 1)[:, :inputs]
    group = padded // len(both)
    groups = None if inputs % group == 0 else torch.arange(inputs) // group
    used = -(-inputs // group)
    return Integers(
        values.contiguous(), both[:used, :, 0].T.contiguous(), 4, biases=both[:used, :, 1].T.contiguous(), groups=groups
    )


def int8(layer: Layer, end: str) -> Integers:
    """Return integers with a scale for each row. end: of the scales' name."""
    weight, scales = layer.tensor(".weight"), layer.tensor(end).float()
    if ".weight_format" in layer.parts and layer.tensor(".weight_format").any():
        raise ExportError(f"{layer.name}.weight is in the order of a GPU's tiles", hint="save the model in row-major order")
    if weight.ndim != 2 or scales.shape != weight.shape[:1]:
        raise layer.error(weight=weight, scales=scales)
    return Integers(weight, scales.unsqueeze(1) / 127 if end == ".SCB" else scales.unsqueeze(1), 8)


def widen_llm_int8(layer: Layer) -> Tensor:
    """Return the weight of LLM.int8 as bitsandbytes rounds it: after each of the two products."""
    return layer.tensor(".weight").float().mul_(layer.tensor(".SCB").float().unsqueeze(1)).mul_(1 / 127)


def widen_fp8(layer: Layer) -> Tensor:
    """Return an FP8 weight times its scale, of the tensor or of each row."""
    weight = layer.tensor(".weight").float()
    scale = layer.tensor(next(end for end in SCALES_OF_FP8 if end in layer.parts)).float()
    if scale.numel() == 1:
        return weight.mul_(scale.reshape(()))
    if weight.ndim != 2 or scale.numel() != len(weight) or scale.shape[0] != len(weight):
        raise layer.error(weight=weight, scale=scale)
    return weight.mul_(scale.reshape(-1, 1))


def bnb4(layer: Layer) -> Levels:
    """Return the codes of NF4 or FP4. Blocks run over the flattened weight: rows get smaller ones that divide them."""
    end = next(end for end in layer.parts if end.startswith(QUANT_STATE))
    state = _quant_state(layer, end)
    packed, table = layer.tensor(".weight").flatten().view(torch.uint8), layer.tensor(".weight.quant_map").float()
    largest = layer.tensor(".weight.absmax")
    shape, block = state.get("shape"), state.get("blocksize")
    sizes: list[int] = [n for n in shape if type(n) is int and n > 0] if isinstance(shape, list) and len(shape) == 2 else []
    count = prod(sizes) if len(sizes) == 2 else 0
    if not count or len(packed) != -(-count // 2) or type(block) is not int or block < 1 or table.shape != (16,):
        raise layer.error(weight=packed, quant_map=table)
    if ".weight.nested_absmax" in layer.parts:
        largest = _nested(layer, largest, state)
    if largest.dtype == torch.uint8 or largest.numel() != -(-count // block):
        raise layer.error(weight=packed, absmax=largest)
    (outputs, inputs), block = sizes, min(block, count)
    if inputs % 2:  # a row that begins within a byte
        halves = torch.stack((packed >> 4, packed & 15), dim=1).flatten()[:count].view(outputs, inputs)
        halves = nn.functional.pad(halves, (0, 1))
        packed = halves[:, 0::2] << 4 | halves[:, 1::2]
    of_rows = gcd(block, inputs, BLOCKS[-1])
    largest = largest.float().flatten().repeat_interleave(block // of_rows)[: count // of_rows]
    return Levels(packed.view(outputs, -1), table, largest.view(outputs, -1), inputs)


def _nested(layer: Layer, largest: Tensor, state: Mapping[str, object]) -> Tensor:
    """Return the largest of each block, which are themselves in 8 bits: rounded after the product and after the sum."""
    table, scales = layer.tensor(".weight.nested_quant_map").float(), layer.tensor(".weight.nested_absmax").float()
    block, offset = state.get("nested_blocksize"), state.get("nested_offset")
    blocks = torch.arange(largest.numel()) // block if type(block) is int and block > 0 else None
    if blocks is None or not isinstance(offset, int | float) or len(table) != 256 or int(blocks[-1]) >= scales.numel():
        raise layer.error(absmax=largest, nested_absmax=scales, nested_quant_map=table)
    return table[largest.flatten().int()] * scales[blocks] + torch.tensor(offset, dtype=torch.float32)


def _quant_state(layer: Layer, end: str) -> Mapping[str, object]:
    try:
        state = json.loads(bytes(layer.tensor(end).flatten().tolist()))
    except (ValueError, TypeError, RecursionError):
        state = None
    if not isinstance(state, dict):
        raise ExportError(f"{layer.name}{end} is no JSON object", hint=DAMAGED)
    return state


def _centred(values: Tensor, bits: int) -> Tensor:
    """Return unsigned numbers less half their range, in place; int8 of 8 bits has wrapped around."""
    return values.bitwise_xor_(-128) if bits == 8 else values.sub_(1 << (bits - 1))


def makers_of(form: str, layer: Layer) -> Maker:
    """Return the maker of a layer's weight in a form that is not GGUF; see Form.name."""
    readers: dict[str, Callable[[], Maker]] = {
        "gptq": lambda: Packed(partial(gptq, layer, stores_less_one=True)),
        "gptq_v2": lambda: Packed(partial(gptq, layer, stores_less_one=False)),
        "mlx": lambda: Packed(partial(mlx, layer)),
        "tiles": lambda: Packed(partial(tiles, layer)),
        "int8": lambda: Packed(partial(int8, layer, ".scales")),
        "bnb8": lambda: Packed(partial(int8, layer, ".SCB"), partial(widen_llm_int8, layer)),
        "bnb4": lambda: Packed(partial(bnb4, layer)),
        "fp8": lambda: partial(widen_fp8, layer),
    }
    return readers[form]()
