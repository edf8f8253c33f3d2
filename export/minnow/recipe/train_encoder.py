"""Stage 4: waveform → codes. Fits the codec's real encoder to the features of the teacher, before quantisation.

Training starts from stage 1's downsampling and pre_module and changes them too. The codebooks are frozen.
"""

from __future__ import annotations

import copy
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from fishrt_export.models.codec.dac import Encoder, Quantizer
from fishrt_export.models.codec.dac_config import DacConfig

from .config import CODEC, HOP
from .synth import SpeechData
from .train_decoder import load_tokens
from .train_tokens import crops, training_audio
from .trainer import train

BATCH = 10
CROP_FRAMES = 28
WARM_UP_FRAMES = 4


class EncodeModel(nn.Module):
    """The encoding half of the codec, up to the codebooks."""

    def __init__(self, quantizer: Quantizer) -> None:
        super().__init__()
        config = DacConfig.from_json(CODEC)
        self.encoder = Encoder(config, max_frames=1024)
        self.downsample = copy.deepcopy(quantizer.downsample)
        self.pre_module = copy.deepcopy(quantizer.pre_module)

    def forward(self, audio: Tensor) -> tuple[Tensor, Tensor]:
        """Return features at the encoder's rate and at the frame rate, of audio float32 [batch, samples]."""
        features = self.encoder(audio.unsqueeze(1))
        return features, self.pre_module(self.downsample(features))


def train_encoder(folder: Path, data: SpeechData, *, steps: int, hours: float = 8.0, seed: int = 4) -> None:
    """Train on the first `hours` of the corpus that are not held out."""
    torch.manual_seed(seed)
    tokens = load_tokens(folder)
    for parameter in tokens.parameters():
        parameter.requires_grad_(False)
    model = EncodeModel(tokens.quantizer)
    forward = torch.compile(model)
    audio = training_audio(data, hours)

    def step(_: int, rng: torch.Generator) -> dict[str, Tensor]:
        batch = crops(audio, BATCH, CROP_FRAMES * HOP, rng)
        # Users' recordings are louder or softer than flite. The codes should show it, but not break.
        batch = batch * torch.empty(BATCH, 1).uniform_(0.5, 1.5, generator=rng)
        quantizer = tokens.quantizer
        with torch.no_grad():
            wanted = tokens.teacher.features(tokens.teacher.mels(batch, ends=True))
            wanted_z = quantizer.pre_module(quantizer.downsample(wanted))[..., WARM_UP_FRAMES:]
        features, z = forward(batch)
        z = z[..., WARM_UP_FRAMES:]
        feature_loss = F.mse_loss(features[..., 16:], wanted[..., 16:]) / wanted[..., 16:].var()
        z_loss = F.mse_loss(z, wanted_z) / wanted_z.var()
        semantic = quantizer.codebooks[0]
        same = semantic.nearest(semantic.project(z)) == semantic.nearest(semantic.project(wanted_z))
        return {"loss": 0.3 * feature_loss + z_loss, "features": feature_loss, "z": z_loss, "same": same.float().mean()}

    train("encoder", folder, model, step, steps=steps, learning_rate=2e-3, betas=(0.8, 0.99), seed=seed)
