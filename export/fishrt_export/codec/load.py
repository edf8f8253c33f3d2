"""Reads a DAC codec: `codec.pth` and its sizes, which no checkpoint carries and which are the official ones if not given."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import asdict
from typing import Any

import torch
from torch import Tensor

from ..checkpoint import CodecFiles, only_tensors, read_pickle
from ..errors import ExportError
from ..weights import fuse_weight_norm
from .dac import DacConfig

_TRANSFORMER = {
    "n_layer": 8,
    "n_head": 16,
    "dim": 1024,
    "intermediate_size": 3072,
    "head_dim": 64,
    "rope_base": 10000,
    "norm_eps": 1e-5,
}
_MODULE = {"window_size": 128, "input_dim": 1024, "config": _TRANSFORMER}

OFFICIAL: dict[str, Any] = {
    "sample_rate": 44100,
    "encoder_dim": 64,
    "encoder_rates": [2, 4, 8, 8],
    "decoder_dim": 1536,
    "decoder_rates": [8, 8, 4, 2],
    "encoder_transformer_layers": [0, 0, 0, 4],
    "transformer_general_config": {"rope_base": 10000, "norm_eps": 1e-5},
    "quantizer": {
        "input_dim": 1024,
        "n_codebooks": 9,
        "codebook_size": 1024,
        "codebook_dim": 8,
        "semantic_codebook_size": 4096,
        "downsample_factor": [2, 2],
        "pre_module": _MODULE,
        "post_module": _MODULE,
    },
}
"""S2-Pro, in the originals' field names."""

_PARTS = ("encoder.", "quantizer.", "decoder.")
_IGNORED_ENDINGS = (".causal_mask", ".freqs_cis", ".inited", ".cluster_size", ".embed_avg")
"""Buffers that are computed here (S1-era files carry them), and leftovers of training."""
_IGNORED_STARTS = ("quantizer.semantic_predictor_module.",)


def read_codec_config(files: CodecFiles) -> DacConfig:
    """Raises ExportError for a `codec_config.json` with missing, mistyped, contradictory or unknown fields."""
    return DacConfig.from_json(OFFICIAL if files.config is None else files.config)


def read_stored_codec(files: CodecFiles) -> dict[str, Tensor]:
    """The tensors of `codec.pth` that inference needs, as stored, by the names of `Dac` but for weight norm."""
    data = read_pickle(files.weights)
    if any("generator" in name for name in data):
        data = {name.replace("generator.", ""): value for name, value in data.items() if "generator." in name}
    kept = {name: value for name, value in data.items() if _is_needed(name)}
    if not kept:
        raise ExportError(f"{files.weights} holds no codec: no tensor is named encoder.*, quantizer.* or decoder.*")
    return only_tensors(kept, str(files.weights))


def fuse_codec(stored: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The tensors by the names of `Dac`, weight norm multiplied out."""
    return fuse_weight_norm(stored)


def fingerprint(fused: Mapping[str, Tensor], config: DacConfig) -> str:
    """Hex SHA-256 over the config and the names, dtypes, shapes and bytes of the fused weights.

    Codecs that sound the same have equal fingerprints, however their weight norm was stored.
    """
    digest = hashlib.sha256(json.dumps(asdict(config), sort_keys=True).encode())
    for name in sorted(fused):
        tensor = fused[name].contiguous()
        digest.update(f"{name} {tensor.dtype} {list(tensor.shape)}\n".encode())
        digest.update(tensor.flatten().view(torch.uint8).numpy().data)
    return digest.hexdigest()


def _is_needed(name: str) -> bool:
    return name.startswith(_PARTS) and not name.startswith(_IGNORED_STARTS) and not name.endswith(_IGNORED_ENDINGS)
