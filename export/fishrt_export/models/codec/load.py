"""The tensors of a codec, whose names identify its kind, and its sizes: the official ones, unless a file has others."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import asdict
from typing import Any

import torch
from torch import Tensor

from ...checkpoint.files import only_tensors, read_tensors, unwrap
from ...checkpoint.forms.folder import CodecFiles
from ...checkpoint.quantised.decode import whole_matrices
from ...errors import ExportError
from .dac_config import DacConfig
from .firefly import FireflyConfig

CodecConfig = DacConfig | FireflyConfig

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
"""Sizes of the codec of S1 and S2, in the originals' field names."""


def official_firefly(*, causal: bool) -> dict[str, Any]:
    """Return the sizes of the codec of 1.4 and 1.5, which is causal, or of 1.2, which is centred."""
    return {
        "spec_transform": {"sample_rate": 44100, "n_mels": 160, "n_fft": 2048, "hop_length": 512, "win_length": 2048},
        "backbone": {"input_channels": 160, "depths": [3, 3, 9, 3], "dims": [128, 256, 384, 512], "kernel_size": 7},
        "head": {
            "hop_length": 512,
            "upsample_rates": [8, 8, 2, 2, 2],
            "upsample_kernel_sizes": [16, 16, 4, 4, 4],
            "resblock_kernel_sizes": [3, 7, 11],
            "resblock_dilation_sizes": [[1, 3, 5], [1, 3, 5], [1, 3, 5]],
            "num_mels": 512,
            "upsample_initial_channel": 512,
            "pre_conv_kernel_size": 13,
            "post_conv_kernel_size": 13,
        },
        "quantizer": {
            "input_dim": 512,
            "n_codebooks": 1,
            "n_groups": 8 if causal else 4,
            "levels": [8, 5, 5, 5],
            "downsample_factor": [2, 2] if causal else [2],
        },
    }


_DAC, _FIREFLY = ("encoder.", "decoder."), ("backbone.", "head.")
_BOTH = ("quantizer.",)
_CAUSAL = "head.conv_pre.conv."
_IGNORED_ENDINGS = (".causal_mask", ".freqs_cis", ".inited", ".cluster_size", ".embed_avg")
"""Buffers that are computed here but also stored in files of the time of S1, and leftovers of training."""
_IGNORED_STARTS = ("quantizer.semantic_predictor_module.", "head.noise_convs.")


def read_stored_codec(files: CodecFiles) -> dict[str, Tensor]:
    """Return the tensors that inference needs, before weight norm is fused, by the names of `Dac` or `Firefly`.

    Raises ExportError.
    """
    data: Mapping[str, Any] = read_tensors(files.weights)
    if any("generator" in name for name in data):
        data = {name.replace("generator.", ""): value for name, value in data.items() if "generator." in name}
    data = unwrap(data, [part.rstrip(".") for part in (*_DAC, *_FIREFLY, *_BOTH)], files.weights)
    parts = [parts for parts in (_DAC, _FIREFLY) if any(name.startswith(parts) for name in data)]
    if len(parts) != 1:
        raise ExportError(
            f"{files.weights} holds {'parts of two codecs' if parts else 'no codec'}: "
            "a codec has encoder.*, quantizer.* and decoder.*, or backbone.*, quantizer.* and head.*",
            hint="give the publisher's file of the codec",
        )
    kept = {
        name: value
        for name, value in data.items()
        if name.startswith(parts[0] + _BOTH) and not name.startswith(_IGNORED_STARTS) and not name.endswith(_IGNORED_ENDINGS)
    }
    return only_tensors(dict(whole_matrices(kept)), str(files.weights))


def read_codec_config(files: CodecFiles, stored: Mapping[str, Tensor]) -> CodecConfig:
    """Return the codec's sizes. Raises ExportError for missing, mistyped, contradictory or unknown fields of its config."""
    if any(name.startswith(_DAC) for name in stored):
        return DacConfig.from_json(OFFICIAL if files.config is None else files.config)
    causal = any(name.startswith(_CAUSAL) for name in stored)
    return FireflyConfig.from_json(official_firefly(causal=causal) if files.config is None else files.config, causal=causal)


def fingerprint(fused: Mapping[str, Tensor], config: CodecConfig) -> str:
    """Return the hex SHA-256 of the config and of the names, dtypes, shapes and bytes of the weights with fused weight norm.

    Equal codecs have equal fingerprints, however their weight norm is stored.
    """
    digest = hashlib.sha256(json.dumps(asdict(config), sort_keys=True).encode())
    for name in sorted(fused):
        tensor = fused[name].contiguous()
        digest.update(f"{name} {tensor.dtype} {list(tensor.shape)}\n".encode())
        digest.update(tensor.flatten().view(torch.uint8).numpy().data)
    return digest.hexdigest()
