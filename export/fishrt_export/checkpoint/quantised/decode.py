"""From the stored tensors of a language model to its weights: quantised layers, and matrices that are stored in parts."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from functools import partial

import torch
from torch import Tensor

from ..forms.recognise import QUANT_STATE, SCALES_OF_FP8, Form
from ..weights import Lazy, Maker, makers
from .integers import joined
from .layers import Layer, makers_of

log = logging.getLogger(__name__)

_GPTQ = (".qweight", ".qzeros", ".scales", ".g_idx")
_PARTS = {
    "gptq": _GPTQ,
    "gptq_v2": _GPTQ,
    "mlx": (".weight", ".scales", ".biases"),
    "tiles": (".weight", ".scales_and_zeros"),
    "int8": (".weight", ".scales"),
    "bnb8": (".weight", ".SCB", ".weight_format"),
    "bnb4": (".weight", *(f".weight.{name}" for name in ("absmax", "quant_map", "nested_absmax", "nested_quant_map"))),
    "fp8": (".weight", *SCALES_OF_FP8),
}
"""What follows the name of a layer, for each form; of "bnb4" there is also its state."""
_MARKS = {
    "gptq": (".qweight",),
    "gptq_v2": (".qweight",),
    "tiles": (".scales_and_zeros",),
    "bnb8": (".SCB",),
    "bnb4": (QUANT_STATE,),
    "fp8": SCALES_OF_FP8,
}
"""What tells a quantised layer; ".scales" in other forms."""
_SEPARATE = {"wq": ("wq", "wk", "wv"), "q_proj": ("q_proj", "k_proj", "v_proj")}
"""Names of the parts of wqkv where they are apart, by the first of them."""
_UNUSED = (".input_scale", ".scale_input", ".k_scale", ".v_scale")
"""Scales of activations, which FP8 files may have."""


def dequantised(tensors: Mapping[str, Tensor], form: Form, expected: Mapping[str, tuple[int, ...]]) -> Mapping[str, Tensor]:
    """Return the tensors by flat names with each quantised layer as its weight, which is widened when it is looked up.

    expected: shapes of the model's tensors. Upstream's int8 drops the biases of its layers; they become zeros. Layers of which a
    part is missing or does not fit are left for `find_problems`, or raise ExportError when they are looked up.
    """
    if form.name not in _PARTS:
        return tensors
    found = makers(tensors)
    ends = _PARTS[form.name]
    marks = _MARKS.get(form.name, (".scales",))
    result = dict(found)
    for name in list(dict.fromkeys(name.partition(m)[0] for name in found for m in marks if _is_part(name, m))):
        parts: dict[str, Maker] = {end: found[name + end] for end in ends if name + end in found}
        parts |= {full.removeprefix(name): make for full, make in found.items() if full.startswith(name + QUANT_STATE)}
        if ends is not _GPTQ and ".weight" not in parts:
            continue
        if form.name == "int8" and not _fit(parts):
            continue
        for end in (*parts, *_UNUSED):
            result.pop(name + end, None)
        shape = expected.get(f"{_joined_name(name)}.weight")
        layer = Layer(name, parts, shape[1] if shape and len(shape) == 2 else None)
        result[f"{name}.weight"] = makers_of(form.name, layer)
        bias = f"{name}.bias"
        if form.name == "int8" and bias in expected and bias not in found:
            result[bias] = partial(torch.zeros, expected[bias])
    return Lazy(result)


def whole_matrices(tensors: Mapping[str, Tensor], *, tied_head: bool = False) -> Mapping[str, Tensor]:
    """Return the tensors with separate q, k and v joined, and without a head that is tied to the embedding."""
    flat = makers(tensors)
    if tied_head and (head := flat.pop("output.weight", None)):
        embeddings = flat.get("embeddings.weight")
        if embeddings is None or not torch.equal(head(), embeddings()):
            log.warning("config.json ties the output head to the token embedding: the head among the weights is left out")
    for first, names in _SEPARATE.items():
        for name in [name for name in flat if name.endswith(f"attention.{first}.weight")]:
            separate = [name.replace(f".{first}.", f".{part}.") for part in names]
            if all(part in flat for part in separate):
                flat[name.replace(f".{first}.", ".wqkv.")] = joined([flat.pop(part) for part in separate])
    return Lazy(flat)


def _is_part(name: str, mark: str) -> bool:
    return mark in name if mark == QUANT_STATE else name.endswith(mark)


def _fit(parts: Mapping[str, Maker]) -> bool:
    weight, scales = parts[".weight"](), parts[".scales"]()
    return weight.dtype == torch.int8 and scales.shape == weight.shape[:1]


def _joined_name(name: str) -> str:
    """Return the name of the layer of which a layer is a part."""
    start, _, last = name.rpartition(".")
    return f"{start}.wqkv" if any(last in parts for parts in _SEPARATE.values()) else name
