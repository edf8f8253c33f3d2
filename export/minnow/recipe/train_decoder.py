"""Stage 2: codes → waveform. Fits the codec's post_module, upsample and decoder to the final codes of stage 1.

The loss compares magnitude spectra at several window lengths, and ignores the phase. The output lags the input by DELAY samples.
"""

from __future__ import annotations

from pathlib import Path
from typing import cast

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from fishrt_export.models.codec.dac import Decoder, Quantizer
from fishrt_export.models.codec.dac_config import DacConfig

from .config import CODEC, DELAY, HOP, SAMPLE_RATE
from .log_mel import LogMel
from .synth import SpeechData
from .train_tokens import TokenModel
from .trainer import train

LOSS_SPECTRA = ((1024, 96), (512, 64), (256, 40), (128, 24))
BATCH = 8
CROP_FRAMES = 34
WARM_UP_FRAMES = 6
"""Frames at the start of a crop that are context: decoded, but not in the loss. `sources.codec_start` mends the tick of this."""


class DecodeModel(nn.Module):
    """The decoding half of the codec, with the codebooks and the encoding half of stage 1 frozen."""

    def __init__(self, quantizer: Quantizer) -> None:
        super().__init__()
        self.quantizer = quantizer
        self.decoder = Decoder(DacConfig.from_json(CODEC))
        for name, parameter in self.quantizer.named_parameters():
            parameter.requires_grad_(name.startswith(("post_module", "upsample")))

    def forward(self, codes: Tensor) -> Tensor:
        """Return audio float32 [batch, frames·HOP] of codes int64 [batch, codebooks, frames]."""
        with torch.autocast("cpu", torch.bfloat16):
            features = self.quantizer.decode(codes)
        audio: Tensor = self.decoder(features.float())
        return audio[:, 0]


class SpectralLoss(nn.Module):
    """Mean over window lengths of |Δ log mel| plus the relative error of the magnitudes."""

    def __init__(self) -> None:
        super().__init__()
        self.spectra = nn.ModuleList(LogMel(SAMPLE_RATE, window, window // 4, mels) for window, mels in LOSS_SPECTRA)

    def forward(self, predicted: Tensor, target: Tensor) -> tuple[Tensor, Tensor]:
        log_loss, linear_loss = torch.zeros(()), torch.zeros(())
        for module in self.spectra:
            spectrum = cast(LogMel, module)
            a, b = spectrum.magnitude(predicted), spectrum.magnitude(target)
            log_loss = log_loss + F.l1_loss(spectrum.log(a), spectrum.log(b))
            linear_loss = linear_loss + (a - b).norm(dim=(1, 2)).div(b.norm(dim=(1, 2)) + 1.0).mean()
        return log_loss / len(self.spectra), linear_loss / len(self.spectra)


@torch.no_grad()
def encode_corpus(folder: Path, data: SpeechData) -> None:
    """Write folder/codes.npz: `codes` uint8 [codebooks, total] and `starts` of every utterance, also of held-out ones."""
    model = load_tokens(folder)
    parts: list[np.ndarray] = []
    for n, utterance in enumerate(data.utterances):
        audio = torch.from_numpy(data.audio(utterance))[None]
        codes = model.encode(F.pad(audio, (0, -audio.shape[-1] % HOP)))[0]
        parts.append(codes.numpy().astype(np.uint8))
        if n % 2000 == 0:
            print(f"encoded {n}/{len(data.utterances)}", flush=True)
    starts = np.cumsum([0, *(p.shape[1] for p in parts)])
    np.savez(folder / "codes.npz", codes=np.concatenate(parts, axis=1), starts=starts)


def load_tokens(folder: Path) -> TokenModel:
    """Return the teacher and the quantiser of stage 1."""
    model = TokenModel()
    model.load_state_dict(torch.load(folder / "tokens.pt", weights_only=True)["modules"])
    return model.eval()


def train_decoder(folder: Path, data: SpeechData, *, steps: int, seed: int = 2) -> None:
    """Train on all utterances that are not held out."""
    torch.manual_seed(seed)
    model = DecodeModel(load_tokens(folder).quantizer).train()
    loss = SpectralLoss()
    with np.load(folder / "codes.npz") as stored:
        codes, starts = torch.from_numpy(stored["codes"]), stored["starts"]
    usable = [n for n, u in enumerate(data.utterances) if not u.held_out and starts[n + 1] - starts[n] >= CROP_FRAMES]
    forward = torch.compile(model)

    def step(_: int, rng: torch.Generator) -> dict[str, Tensor]:
        inputs, targets = [], []
        for pick in torch.randint(len(usable), (BATCH,), generator=rng).tolist():
            n = usable[pick]
            first = int(torch.randint(int(starts[n + 1] - starts[n]) - CROP_FRAMES + 1, (1,), generator=rng))
            inputs.append(codes[:, starts[n] + first : starts[n] + first + CROP_FRAMES].long())
            begin = (first + WARM_UP_FRAMES) * HOP - DELAY
            piece = torch.from_numpy(data.audio(data.utterances[n])[begin : (first + CROP_FRAMES) * HOP - DELAY])
            targets.append(F.pad(piece, (0, (CROP_FRAMES - WARM_UP_FRAMES) * HOP - len(piece))))
        predicted = forward(torch.stack(inputs))[:, WARM_UP_FRAMES * HOP :]
        log_loss, linear_loss = loss(predicted, torch.stack(targets))
        return {"loss": log_loss + linear_loss, "log": log_loss, "linear": linear_loss}

    train("decoder", folder, model, step, steps=steps, learning_rate=1.5e-3, betas=(0.8, 0.99), seed=seed)
