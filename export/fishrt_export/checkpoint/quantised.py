"""Checkpoints of upstream's own quantiser, which stores the weights of linear layers as integers.

They are recognised by their tensors, not by the folder's name as upstream does. int8 becomes float32 when it is read, with the
values that upstream computes with.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from ..errors import ExportError
from .lazy import Lazy, Maker, makers

_SCALES = ".scales"
_INT4 = ".scales_and_zeros"
_OTHER_FORMS = (
    ("GPTQ or AWQ", ".qweight"),
    ("bitsandbytes", ".weight.quant_state.bitsandbytes__"),
    ("bitsandbytes", ".SCB"),
    ("compressed-tensors", ".weight_packed"),
    ("FP8", ".weight.scale"),
    ("FP8", ".weight_scale"),
    ("FP8", ".scale_weight"),
    ("MLX", ".biases"),
)
"""Formats of other tools, and a part of their tensors' names."""


def dequantise(tensors: Mapping[str, Tensor], expected: Mapping[str, tuple[int, ...]]) -> Mapping[str, Tensor]:
    """Return the tensors, with each int8 `weight` [out, in] multiplied by its `scales` [out].

    expected: shapes of the model's tensors. The quantiser drops the biases of its layers; they become zeros. Raises ExportError
    for int4, whose layout is that of one kind of GPU, and for the formats of other tools. Weights and scales that do not fit
    are left for `find_problems`.
    """
    for form, ending in _OTHER_FORMS:
        if found := [name for name in tensors if ending in name]:
            raise ExportError(
                f"the weights are quantised ({form}: {found[0]} and {len(found) - 1} more), which is not supported",
                hint="export the checkpoint that they were made from",
            )
    if packed := [name for name in tensors if name.endswith(_INT4)]:
        raise ExportError(
            f"the weights are quantised to int4 ({packed[0]} and {len(packed) - 1} more): packed in tiles for CUDA kernels, in "
            "groups whose size is only in the folder's name, which is not supported",
            hint="export the checkpoint that they were made from, or its int8 form",
        )
    result = makers(tensors)
    for stem in [name.removesuffix(_SCALES) for name in tensors if name.endswith(_SCALES)]:
        weight = tensors.get(f"{stem}.weight")
        if weight is None or weight.dtype != torch.int8 or tensors[stem + _SCALES].shape != weight.shape[:1]:
            continue
        del result[stem + _SCALES]
        result[f"{stem}.weight"] = _dequantising(tensors, stem)
        bias = f"{stem}.bias"
        if bias in expected and bias not in tensors:
            result[bias] = _zeros(expected[bias])
    return Lazy(result)


def _dequantising(tensors: Mapping[str, Tensor], stem: str) -> Maker:
    return lambda: tensors[f"{stem}.weight"].float() * tensors[stem + _SCALES].float().unsqueeze(-1)


def _zeros(shape: tuple[int, ...]) -> Maker:
    return lambda: torch.zeros(shape)
