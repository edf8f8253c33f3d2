"""The form of a set of weights, told by the names and types of its tensors. Names of files and folders mean nothing.

The first rule that applies decides. A form that is not read has the reason and what to take instead.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from ...errors import ExportError
from ..config import EITHER, FLAT, NESTED
from .gguf import KINDS
from .table import Table, count_types

SCALES_OF_FP8 = (".weight.scale", ".weight_scale", ".scale_weight")
"""What FP8 files put in the place of `.weight` for a layer's scale."""
WIDENED = ("fp8",)
"""Names of quantised forms of which a bundle keeps no weights as they are."""
QUANT_STATE = ".weight.quant_state.bitsandbytes__"
_ORIGINAL = "export the bfloat16 checkpoint that it was made from, or take its form in GPTQ, FP8, NF4, MLX or GGUF"
_LAYOUTS = ("gptq", "gptq_v2")
WIDE = {"BF16": "bfloat16", "F16": "float16", "F32": "float32", "F64": "float64"}
"""Types that are not quantised, in words."""
_CAST = "a cast to 8 bits without scales, in which most values are lost"


@dataclass(frozen=True, slots=True)
class Form:
    """The form of a set of weights."""

    name: str
    """A key of the readers, such as "gptq"; "plain" for weights that are not quantised."""
    title: str
    """The form in words."""
    bits: int | None = None
    """Bits of most quantised weights; None: not quantised, or by 16 bits and more."""
    group: str = ""
    """What shares a scale, in words."""
    maker: str = ""
    """The program that wrote the weights, if they state it."""
    quantised: int = 0
    """Number of quantised matrices."""
    exact: str = ""
    """What an export without --precision makes of quantised weights, in words."""
    refused: str = ""
    """Why the form is not read; empty: it is read."""
    instead: str = _ORIGINAL

    def check(self, source: object) -> None:
        """Raise ExportError if the form is not read. source: what has it."""
        if self.refused:
            raise ExportError(f"{source} cannot be exported: it is {self.title}: {self.refused}", hint=self.instead)


def recognise(table: Table, config: Mapping[str, Any] | None = None) -> Form:
    """Return the form. config: the content of the config.json beside the weights."""
    stated = (config or {}).get("quantization_config")
    facts = _Facts(table, stated if isinstance(stated, Mapping) else {}, config or {})
    for rule in _RULES:
        if found := rule(facts):
            return found
    return _plain(facts)


@dataclass(frozen=True, slots=True)
class _Facts:
    table: Table
    stated: Mapping[str, Any]
    """The `quantization_config`."""
    config: Mapping[str, Any]

    @property
    def method(self) -> str:
        return str(self.stated.get("quant_method", "")).lower()

    def stems(self, *ends: str) -> list[str]:
        """Return the names of layers that have a tensor of one of these ends, without the end."""
        return list(dict.fromkeys(name.removesuffix(end) for name in self.table.entries for end in ends if name.endswith(end)))

    def dtype(self, name: str) -> str:
        entry = self.table.entries.get(name)
        return entry.dtype if entry else ""

    def shape(self, name: str) -> tuple[int, ...]:
        entry = self.table.entries.get(name)
        return entry.shape if entry else ()


def _gguf(facts: _Facts) -> Form | None:
    if not facts.table.is_gguf:
        return None
    values = facts.table.metadata
    architecture = values.get("general.architecture")
    family = values.get("audiocpp.model_spec.family")
    if architecture not in ("fish-speech", "audiocpp") or (architecture == "audiocpp" and family != "fish_audio"):
        found = repr(architecture) + (f" with the family {family!r}" if family else "")
        return Form(
            "gguf",
            f"a GGUF file of the architecture {found}",
            refused="another model, whatever its name; read are 'fish-speech', and 'audiocpp' with the family 'fish_audio'",
            instead="take a GGUF file of S2-Pro, or the official checkpoint",
        )
    counts = count_types(facts.table.entries.values())
    names = {kind for kind, _, _ in KINDS.values()}
    if other := [kind for kind in counts if kind not in names]:
        return Form("gguf", f"a GGUF file with the type {other[0]}", refused="only Q8_0, Q2_K to Q6_K, Q4 and Q5 are read")
    packed = [kind for kind in counts if kind.startswith("Q")]
    maker = "s2.cpp" if architecture == "fish-speech" else "audio.cpp"
    if not packed:
        return Form("gguf", f"GGUF of {maker}, not quantised", maker=maker)
    quantised = sum(entry.dtype in packed for entry in facts.table.entries.values())
    group = "blocks of 16 or 32" if any(kind.endswith("K") for kind in packed) else "blocks of 32"
    return Form("gguf", f"GGUF of {maker}, {', '.join(packed)}", int(packed[0][1]), group, maker, quantised, _KEEPS)


_KEEPS = "the integers stay as they are"
_KEEPS_CODES = "the codes of 4 bits stay as they are; --precision int8 speaks faster on a CPU"
_WIDENS = "the weights become float32, for they are no integers: take --precision int8"


def _gptq(facts: _Facts) -> Form | None:
    layers = facts.stems(".qweight")
    if not layers:
        return None
    if facts.method == "awq" or not (facts.stems(".g_idx") or facts.method == "gptq"):
        return Form("awq", "AWQ", refused="its order of 4-bit numbers is not read")
    layout = facts.stated.get("checkpoint_format", "gptq")
    if layout not in _LAYOUTS:
        return Form("gptq", f"GPTQ in the layout {layout!r}", refused="only the layouts 'gptq' and 'gptq_v2' are read")
    first = layers[0]
    words, scales = facts.shape(f"{first}.qweight"), facts.shape(f"{first}.scales")
    inputs = facts.shape(f"{first}.g_idx")[:1] or (32 * words[0] // int(facts.stated.get("bits", 4)),)
    bits = 32 * words[0] // inputs[0] if words and inputs[0] else 0
    if bits not in (4, 8):
        return Form("gptq", f"GPTQ of {bits} bits", bits, refused="only 4 and 8 bits are read")
    maker = facts.stated.get("meta", {})
    quantizer = maker.get("quantizer", "") if isinstance(maker, Mapping) else ""
    return Form(
        str(layout),
        f"GPTQ{' v2' if layout == 'gptq_v2' else ''}{', act-order' if facts.stated.get('desc_act') else ''}",
        bits,
        f"groups of {inputs[0] // max(scales[0], 1)}" if scales else "",
        ", ".join(quantizer) if isinstance(quantizer, list) else str(quantizer),
        len(layers),
        _KEEPS,
    )


def _other_methods(facts: _Facts) -> Form | None:
    """Forms that the config or the pickle names, or that pack their weights in another way."""
    if torchao := [name for name in facts.table.classes if name.startswith("torchao.")]:
        return Form(
            "torchao",
            "a pickle of torchao's own classes",
            refused=f"loading {torchao[0]} would run its code",
            instead="export the bfloat16 checkpoint that it was made from",
        )
    if facts.stems(".weight_scale_2") or "F4" in {entry.dtype for entry in facts.table.entries.values()}:
        return Form("nvfp4", "NVFP4", refused="its layout is not read")
    if facts.stems(".weight_packed"):
        return Form("compressed-tensors", "compressed-tensors with packed weights", refused="its packing is not read")
    if facts.method == "compressed-tensors" and not _fp8_layers(facts):
        return Form("compressed-tensors", "compressed-tensors", refused="only its FP8 weights are read")
    return None


def _bitsandbytes(facts: _Facts) -> Form | None:
    found = [name.partition(QUANT_STATE) for name in facts.table.entries if QUANT_STATE in name]
    if found:
        kinds = sorted({kind.upper() for _, _, kind in found})
        nested = ", nested scales" if facts.stems(".weight.nested_absmax") else ""
        first = found[0][0]
        count, blocks = facts.shape(f"{first}.weight"), facts.shape(f"{first}.weight.absmax")
        group = f"blocks of {2 * count[0] // blocks[0]}" if count and blocks and blocks[0] else ""
        return Form("bnb4", f"bitsandbytes {'/'.join(kinds)}{nested}", 4, group, "bitsandbytes", len(found), _KEEPS_CODES)
    if layers := facts.stems(".SCB"):
        return Form("bnb8", "bitsandbytes LLM.int8", 8, "rows", "bitsandbytes", len(layers), _KEEPS)
    return None


def _fp8_layers(facts: _Facts) -> list[str]:
    return [name for name, entry in facts.table.entries.items() if entry.dtype.startswith("F8_E") and name.endswith("weight")]


def _fp8(facts: _Facts) -> Form | None:
    layers = _fp8_layers(facts)
    if not layers:
        return None
    scales = {name: _scale_of(facts, name.removesuffix(".weight")) for name in layers}
    kinds = {facts.dtype(scale) for scale in scales.values() if scale}
    if facts.stems(".weight_scale_inv"):
        return Form("fp8", "FP8 with a scale for each square of weights", 8, refused="only a scale for a tensor or a row is read")
    if kinds & {"U8", "F8_E8M0", "F8_E4M3"}:
        return Form("mxfp8", "MXFP8", 8, refused="its scales of 8 bits are not read")
    if any(facts.dtype(name) != "F8_E4M3" for name in layers):
        return Form("fp8", f"FP8 of the type {facts.dtype(layers[0]).removeprefix('F8_').lower()}", 8, refused=_CAST)
    if not all(scales.values()):
        lacking = [name for name, scale in scales.items() if not scale]
        return Form("fp8", f"FP8 without a scale for {lacking[0]}", 8, refused=_CAST)
    rows = [name for name, scale in scales.items() if len(facts.shape(scale)) == 2 and facts.shape(scale)[0] > 1]
    group = "rows" if rows else "whole tensors"
    return Form("fp8", "FP8 (e4m3)", 8, group, quantised=len(layers), exact=_WIDENS)


def _scale_of(facts: _Facts, layer: str) -> str:
    return next((layer + end for end in SCALES_OF_FP8 if layer + end in facts.table.entries), "")


def _mlx(facts: _Facts) -> Form | None:
    layers = [layer for layer in facts.stems(".scales") if facts.dtype(f"{layer}.weight") == "U32"]
    if not layers:
        return None
    stated = facts.config.get("quantization", facts.stated)
    mode = stated.get("mode", "affine") if isinstance(stated, Mapping) else "affine"
    if mode != "affine" or any(f"{layer}.biases" not in facts.table.entries for layer in layers):
        name = mode if mode != "affine" else "without biases"
        return Form("mlx", f"MLX {name}", refused="only its mode 'affine' is read", instead="take the model in MLX's mode affine")
    sizes = [stated.get("group_size")] if isinstance(stated, Mapping) else []
    widths = [(int(facts.shape(f"{layer}.weight")[-1]), int(facts.shape(f"{layer}.scales")[-1])) for layer in layers]
    group = next((size for size in sizes if isinstance(size, int) and size > 0), 64)
    bits = sorted({32 * words // (groups * group) for words, groups in widths if groups})
    title = f"MLX{', mixed bits' if len(bits) > 1 else ''}"
    return Form("mlx", title, bits[0], f"groups of {group}", "mlx", len(layers), _KEEPS)


def _upstream(facts: _Facts) -> Form | None:
    if layers := facts.stems(".scales_and_zeros"):
        tiles = facts.shape(f"{layers[0]}.weight")
        groups = facts.shape(f"{layers[0]}.scales_and_zeros")[:1] or (1,)
        group = f"groups of {tiles[1] * 32 * tiles[3] // max(groups[0], 1)}" if len(tiles) == 4 else ""
        title = "int4 of the original tools, in the tiles of NVIDIA cards"
        return Form("tiles", title, 4, group, "tools/llama/quantize.py", len(layers), _KEEPS)
    if layers := [layer for layer in facts.stems(".scales") if facts.dtype(f"{layer}.weight") == "I8"]:
        return Form("int8", "int8 of the original tools", 8, "rows", "tools/llama/quantize.py", len(layers), _KEEPS)
    return None


def _other_models(facts: _Facts) -> Form | None:
    kind = facts.config.get("model_type")
    if kind is not None and kind not in (NESTED, FLAT, EITHER):
        return Form(
            "other",
            f"a model of the type {kind!r}",
            refused=f"another model, whatever its name; Fish Speech has {NESTED!r} or {FLAT!r}",
            instead="give the folder of a Fish Speech checkpoint",
        )
    return None


def _unknown_methods(facts: _Facts) -> Form | None:
    if facts.method and facts.method not in ("gptq", "fp8", "bitsandbytes", "mlx", "compressed-tensors"):
        return Form(facts.method, f"quantised by {facts.method}", refused="its packing is not read")
    return None


def _plain(facts: _Facts) -> Form:
    counts = count_types(facts.table.entries.values())
    kind = next(iter(counts), "")
    if facts.table.metadata.get("format") == "mlx":
        title = "MLX, not quantised"
    elif "pytorch-lightning_version" in facts.table.wrapper:
        title = "a checkpoint of Lightning"
    elif re.match(r"(text_model|audio_decoder)\.", next(iter(facts.table.entries), "")):
        title = "the names of S2-Pro"
    else:
        title = "the names of the original code"
    return Form("plain", f"{title}, {WIDE.get(kind, kind)}")


_RULES: tuple[Callable[[_Facts], Form | None], ...] = (
    *(_gguf, _other_models, _other_methods, _gptq, _bitsandbytes, _fp8, _mlx, _upstream, _unknown_methods),
)
