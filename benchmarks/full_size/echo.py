"""A checkpoint of a diffusion model: the model with its PCA, and the folder of its codec in it."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import Tensor

from fishrt_export.checkpoint.diffusion.files import CODEC_REPOSITORY, PCA, PCA_NAMES, WEIGHTS
from fishrt_export.checkpoint.names import CODEC_CONFIG
from fishrt_export.models.codec.dac_config import DacConfig
from fishrt_export.models.codec.load import OFFICIAL
from fishrt_export.models.echo.config import EchoConfig, EncoderSizes
from fishrt_export.sources.echo import EchoSource

from .safetensors_file import write_bfloat16
from .sizes import SMALL_DAC, overlaid
from .weights import codec_tensors, generator, row_ranges

ECHO = "echo"
"""The name of the family."""
_ENCODER = EncoderSizes(layers=14, dim=1280, heads=10, head_dim=128, hidden=3328)
SIZES = EchoConfig(
    channels=80,
    width=2048,
    layers=24,
    heads=16,
    head_dim=128,
    hidden=5888,
    embedding=512,
    rank=256,
    vocabulary=256,
    patch=4,
    text=_ENCODER,
    speaker=_ENCODER,
    latent=_ENCODER,
)
"""The official sizes."""
_SMALL_ENCODER = EncoderSizes(layers=2, dim=64, heads=4, head_dim=16, hidden=128)
TINY = replace(
    SIZES,
    **{"width": 64, "layers": 2, "heads": 4, "head_dim": 16, "hidden": 128, "embedding": 32, "rank": 16},
    **dict.fromkeys(("text", "speaker", "latent"), _SMALL_ENCODER),
)


def write_echo(out: Path, *, seed: int, tiny: bool, progress: Callable[[str], None]) -> Path:
    """Write a checkpoint into the new or existing folder `out`, and return the folder."""
    config, codec = TINY if tiny else SIZES, DacConfig.from_json(overlaid(OFFICIAL, SMALL_DAC if tiny else {}))
    folder = out / CODEC_REPOSITORY.partition("/")[2]
    folder.mkdir(parents=True, exist_ok=True)
    progress(WEIGHTS)
    shapes = EchoSource(config, {}).shapes()
    write_bfloat16(out / WEIGHTS, shapes, lambda name: _pieces(name, shapes[name], config, seed))
    progress(PCA)
    components = torch.linalg.qr(torch.randn(codec.latent_dim, codec.latent_dim, generator=generator(seed, PCA)))[0]
    values = components[:, : config.channels].T.contiguous(), torch.zeros(codec.latent_dim), torch.ones(1)
    if tiny:  # the codec is narrower than the latents
        values = torch.randn(config.channels, codec.latent_dim, generator=generator(seed, PCA)), *values[1:]
    save_file(dict(zip(PCA_NAMES, values, strict=True)), out / PCA)
    progress(folder.name)
    save_file(codec_tensors(codec, seed), folder / WEIGHTS)
    if tiny:
        windows = {"window_size": codec.pre_module.window}
        (folder / CODEC_CONFIG).write_text(json.dumps(windows))
    return out


def random_weights(config: EchoConfig, seed: int = 0) -> dict[str, Tensor]:
    """Return bfloat16 tensors by the names of an official checkpoint."""
    shapes = EchoSource(config, {}).shapes()
    return {name: torch.cat([*_pieces(name, shape, config, seed)]) for name, shape in shapes.items()}


def _pieces(name: str, shape: tuple[int, ...], config: EchoConfig, seed: int) -> Iterator[Tensor]:
    """Yield bfloat16 rows of a tensor, in order."""
    drawn = generator(seed, name)
    for start, stop in row_ranges(shape):
        x = torch.randn((stop - start, *shape[1:]), generator=drawn)
        if "norm" in name:
            x = 1 + 0.05 * x
        elif name.endswith("bias"):
            x *= 0.01
        else:
            x /= math.sqrt(shape[-1])
            if name.endswith((".wo.weight", ".w2.weight")):
                x /= math.sqrt(2 * config.layers)
        yield x.to(torch.bfloat16)
