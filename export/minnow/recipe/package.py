"""Last stage: the trained parts as a checkpoint folder in the official S2-Pro layout, ready for `fishrt export`."""

from __future__ import annotations

import json
from pathlib import Path

import soundfile
import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from fishrt_export.models.codec.dac import Dac
from fishrt_export.models.codec.dac_config import DacConfig

from .config import CODEC, DEFAULTS, LANGUAGE_MODEL
from .synth import SAMPLE_RATE, VOICES, flite
from .text_tokens import CONTROL, build_tokenizer, token_id
from .train_decoder import DecodeModel, load_tokens
from .train_encoder import EncodeModel
from .train_lm import vocab_size

REFERENCE = "Please call my brother, and ask him to bring the big blue bag from the kitchen."
"""Text of the reference recording of each built-in voice, spoken by the flite voice of the same name."""
DEFAULT_VOICE = "awb"
"""The voice that a speech recogniser understands best."""
NOTICE = """\
minnow, the embedded voice of fishrt, is licensed like fishrt itself under the Apache License 2.0.

It was trained on speech made by flite with the voices slt, rms and awb of Carnegie Mellon University (BSD-style licence; the
recordings behind them are the CMU ARCTIC databases, free for any use), from sentences of Debian's `fortunes` package, words of
`scowl`, and templates of our own. The recipe is export/minnow/recipe.
"""


def write_checkpoint(folder: Path, out: Path) -> None:
    """Write the checkpoint folder `out` from the stages' results in `folder`. Raises FileExistsError if `out` is not empty."""
    if out.exists() and any(out.iterdir()):
        raise FileExistsError(f"{out} is not empty")
    out.mkdir(parents=True, exist_ok=True)
    tokenizer = build_tokenizer()
    _write_language_model(folder, out)
    tokenizer.save(str(out / "tokenizer.json"))
    end = "<|im_end|>"
    roles = {"eos_token": end, "pad_token": "<|pad|>"}
    _write_json(out / "tokenizer_config.json", {"tokenizer_class": "PreTrainedTokenizerFast", **roles})
    _write_json(out / "special_tokens_map.json", roles)
    torch.save(weight_normed(trained_codec(folder)), out / "codec.pth")
    _write_json(out / "codec_config.json", CODEC)
    _write_json(out / "fishrt.json", DEFAULTS)
    for voice in VOICES:
        reference = out / "references" / voice
        reference.mkdir(parents=True)
        soundfile.write(reference / "reference.flac", flite(REFERENCE, voice)[0], SAMPLE_RATE)
        (reference / "reference.lab").write_text(REFERENCE + "\n")
    (out / "references" / "default.txt").write_text(DEFAULT_VOICE + "\n")
    (out / "LICENSE").write_text(NOTICE)


def _write_language_model(folder: Path, out: Path) -> None:
    tokenizer = build_tokenizer()
    ids = {name: token_id(tokenizer, name) for name in (*CONTROL, "<|semantic:0|>")}
    size = CODEC["quantizer"]["semantic_codebook_size"]
    config = {
        **LANGUAGE_MODEL,
        "text_config": {**LANGUAGE_MODEL["text_config"], "vocab_size": vocab_size()},
        "eos_token_id": ids["<|im_end|>"],
        "pad_token_id": ids["<|pad|>"],
        "audio_pad_token_id": ids["<|audio_pad|>"],
        "semantic_start_token_id": ids["<|semantic:0|>"],
        "semantic_end_token_id": ids["<|semantic:0|>"] + size - 1,
    }
    _write_json(out / "config.json", config)
    modules = torch.load(folder / "lm.pt", weights_only=True)["modules"]
    trained = {k.removeprefix("model."): v for k, v in modules.items() if k.startswith("model.")}
    save_file({_official_name(k): v.to(torch.bfloat16).contiguous() for k, v in trained.items()}, out / "model.safetensors")


def _official_name(name: str) -> str:
    """Return the name of a flat parameter in the files of S2-Pro."""
    if name.startswith("fast_"):
        return "audio_decoder." + name.removeprefix("fast_")
    return f"audio_decoder.{name}" if name.startswith("codebook_embeddings.") else f"text_model.model.{name}"


def trained_codec(folder: Path) -> Dac:
    """Return the codec from stage 1's codebooks, stage 2's decoding half and stage 4's encoding half."""
    codec = Dac(DacConfig.from_json(CODEC), max_frames=1)
    quantizer = load_tokens(folder).quantizer
    decoding, encoding = DecodeModel(quantizer), EncodeModel(quantizer)
    decoding.load_state_dict(torch.load(folder / "decoder.pt", weights_only=True)["modules"])
    encoding.load_state_dict(torch.load(folder / "encoder.pt", weights_only=True)["modules"])
    codec.quantizer.load_state_dict(decoding.quantizer.state_dict(), strict=False)
    codec.quantizer.downsample.load_state_dict(encoding.downsample.state_dict())
    codec.quantizer.pre_module.load_state_dict(encoding.pre_module.state_dict(), strict=False)
    codec.encoder.load_state_dict(encoding.encoder.state_dict())
    codec.decoder.load_state_dict(decoding.decoder.state_dict())
    return codec


def weight_normed(codec: Dac) -> dict[str, Tensor]:
    """Return the codec's weights in float16 under the names of the official files, with their weight norm.

    The convolutions of encoder and decoder have the newer names of weight norm, the projections of the codebooks the older ones.
    """
    state: dict[str, Tensor] = {}
    for name, tensor in codec.state_dict().items():
        module = codec.get_submodule(name.rsplit(".", 1)[0])
        normed = isinstance(module, (nn.Conv1d, nn.ConvTranspose1d)) and name.endswith(".weight")
        stem = name.removesuffix(".weight")
        magnitude = tensor.norm(dim=tuple(range(1, tensor.ndim)), keepdim=True) if normed else tensor
        if normed and name.startswith(("encoder.", "decoder.")):
            state[f"{stem}.parametrizations.weight.original0"] = magnitude.half()
            state[f"{stem}.parametrizations.weight.original1"] = tensor.half()
        elif normed and name.endswith(("in_proj.weight", "out_proj.weight")):
            state[f"{stem}.weight_g"], state[f"{stem}.weight_v"] = magnitude.half(), tensor.half()
        else:
            state[name] = tensor.half()
    return state


def _write_json(path: Path, value: object) -> None:
    path.write_text(json.dumps(value, indent=1) + "\n")
