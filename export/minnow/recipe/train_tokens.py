"""Stage 1: training of the codes. A teacher with log-mels replaces the codec's encoder, and a linear layer its decoder.

The quantiser between them (downsample, pre_module, codebooks, post_module, upsample) is the real one, so that its codes are final
after this stage. No layer runs at the sample rate, which takes minutes instead of hours. The decoder, the language model and the
encoder are then trained independently.
"""

from __future__ import annotations

from pathlib import Path
from typing import cast

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from fishrt_export.models.codec.dac import Quantizer, VectorQuantizer
from fishrt_export.models.codec.dac_config import DacConfig
from fishrt_export.models.codec.layers import CausalConv1d, ConvNeXtBlock

from .config import CODEC, DELAY, FEATURE_HOP, HOP, SAMPLE_RATE
from .log_mel import LogMel
from .synth import SpeechData
from .trainer import train

SPECTRA = ((1024, 80), (640, 80), (256, 40))
"""Window in samples and mel bands. Long windows resolve the pitch, short ones the onsets."""
CROP_FRAMES = 50
BATCH = 32
PLAIN_STEPS = 300
"""Steps without quantisation before the codebooks are filled from the teacher's output."""
RESEED_EVERY = 40


class Teacher(nn.Module):
    """Causal network from audio [batch, frames·HOP] to features [batch, latent_dim, 4·frames], and log-mels as targets."""

    def __init__(self, config: DacConfig) -> None:
        super().__init__()
        self.spectra = nn.ModuleList(LogMel(config.sample_rate, window, FEATURE_HOP, mels) for window, mels in SPECTRA)
        bands = sum(mels for _, mels in SPECTRA)
        dim = config.latent_dim
        self.stem = CausalConv1d(bands, dim, 3)
        self.blocks = nn.Sequential(ConvNeXtBlock(dim), ConvNeXtBlock(dim))
        self.head = nn.Conv1d(dim, bands, 1)
        nn.init.constant_(self.head.bias, -2.0)  # type: ignore[arg-type]

    def mels(self, audio: Tensor, *, ends: bool) -> Tensor:
        """Return log-mels [batch, bands, steps] of audio [batch, samples].

        Windows end with their step (input), or have their centre DELAY samples before its end (target).
        """
        steps = audio.shape[-1] // FEATURE_HOP
        parts = []
        for module in self.spectra:
            spectrum = cast(LogMel, module)
            length = spectrum.length
            offset = FEATURE_HOP - length if ends else FEATURE_HOP - DELAY - length // 2
            parts.append(spectrum(audio, offset, steps))
        return torch.cat(parts, dim=-1).transpose(1, 2)

    def features(self, mels: Tensor) -> Tensor:
        return cast(Tensor, self.blocks(self.stem(mels)))


class TokenModel(nn.Module):
    """Teacher and quantiser, trained together."""

    def __init__(self) -> None:
        super().__init__()
        self.config = DacConfig.from_json(CODEC)
        self.teacher = Teacher(self.config)
        self.quantizer = Quantizer(self.config, max_frames=1024)
        for quantizer in self.quantizer.codebooks:
            nn.init.normal_(quantizer.out_proj.weight, std=0.3)
            nn.init.zeros_(quantizer.out_proj.bias)  # type: ignore[arg-type]

    def encode(self, audio: Tensor) -> Tensor:
        """Return codes int64 [batch, codebooks, frames] of audio float32 [batch, frames·HOP]."""
        return self.quantizer.encode(self.teacher.features(self.teacher.mels(audio, ends=True)))


def straight_through(quantizer: VectorQuantizer, z: Tensor, step: int) -> tuple[Tensor, Tensor, Tensor]:
    """Return the quantised features with a straight-through gradient, the codebook loss and the indices."""
    e = quantizer.project(z)
    indices = quantizer.nearest(e)
    if (step - PLAIN_STEPS) % RESEED_EVERY == 0:
        _reseed(quantizer, e, indices, everything=step == PLAIN_STEPS)
        indices = quantizer.nearest(e)
    rows = quantizer.codebook(indices).transpose(1, 2)
    loss = F.mse_loss(rows, e.detach()) + 0.25 * F.mse_loss(e, rows.detach())
    return quantizer.out_proj(e + (rows - e).detach()), loss, indices


@torch.no_grad()
def _reseed(quantizer: VectorQuantizer, e: Tensor, indices: Tensor, *, everything: bool) -> None:
    """Set codebook rows that this batch did not use, or all, to random vectors of the batch."""
    used = torch.bincount(indices.flatten(), minlength=quantizer.codebook.num_embeddings)
    dead = torch.nonzero(used == 0)[:, 0] if not everything else torch.arange(len(used))
    pool = e.transpose(1, 2).flatten(0, 1)
    quantizer.codebook.weight[dead] = pool[torch.randperm(len(pool))[: len(dead)]]


def train_tokens(folder: Path, data: SpeechData, *, steps: int, hours: float, seed: int = 1) -> None:
    """Train on the first `hours` of the corpus that are not held out."""
    torch.manual_seed(seed)
    model = TokenModel()
    audio = training_audio(data, hours)

    def step(n: int, rng: torch.Generator) -> dict[str, Tensor]:
        batch = crops(audio, BATCH, CROP_FRAMES * HOP, rng)
        teacher, quantizer = model.teacher, model.quantizer
        target = teacher.mels(batch, ends=False)
        with torch.autocast("cpu", torch.bfloat16):
            z = quantizer.pre_module(quantizer.downsample(teacher.features(teacher.mels(batch, ends=True))))
        z = z.float()
        vq_loss, total, residual = torch.zeros(()), torch.zeros_like(z), z
        used = 0
        if n < PLAIN_STEPS:
            total = z
        else:
            # Some rows use only the first codebooks, so that these learn to carry most of the information.
            depth = torch.randint(1, len(quantizer.codebooks) + 1, (BATCH,), generator=rng)
            depth[torch.rand(BATCH, generator=rng) < 0.6] = len(quantizer.codebooks)
            for i, codebook in enumerate(quantizer.codebooks):
                out, loss, indices = straight_through(codebook, residual, n)
                keep = (i < depth).to(z.dtype)[:, None, None]
                total, residual, vq_loss = total + keep * out, residual - out, vq_loss + loss
                used += len(torch.unique(indices))
        with torch.autocast("cpu", torch.bfloat16):
            predicted = teacher.head(quantizer.upsample(quantizer.post_module(total)))
        mel_loss = F.l1_loss(predicted.float()[..., 8:], target[..., 8:])
        return {"loss": mel_loss + 0.25 * vq_loss, "mel": mel_loss, "vq": vq_loss, "entries": torch.tensor(float(used))}

    train("tokens", folder, model, step, steps=steps, learning_rate=1.5e-3, seed=seed)


def training_audio(data: SpeechData, hours: float) -> Tensor:
    """Return the int16 samples of the utterances that are not held out, one after another, up to `hours`."""
    limit, pieces, total = int(hours * 3600 * SAMPLE_RATE), [], 0
    for u in data.utterances:
        if not u.held_out and total < limit:
            pieces.append(data.pcm[u.start : u.start + u.length])
            total += u.length
    return torch.from_numpy(np.concatenate(pieces))


def crops(audio: Tensor, count: int, length: int, rng: torch.Generator) -> Tensor:
    """Return random stretches of the training audio: float32 [count, length]."""
    starts = torch.randint(0, len(audio) - length, (count,), generator=rng)
    return torch.stack([audio[s : s + length] for s in starts.tolist()]).float() / 32768.0
