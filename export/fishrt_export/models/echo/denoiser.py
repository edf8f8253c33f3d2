"""The denoiser, which computes the velocity of latents at a time, and the schedule, which computes all that depends on times.

    t ─► embedding ─► three products ─► for each block and branch: shift, scale and gate, each by a product of low rank

A block modulates what its norms give, and gates what its branches add. Its attention sees the latents themselves and the keys and
values of text, voice and earlier latents. Rows of guidance share all of these, and differ in what their masks hide.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import cast

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from fishrt_engines.engine import GraphSpec, TensorSpec

from ..stack import Stack
from ..transformer import FeedForward, attend
from .conditions import keys_values
from .config import NORM_EPS, EchoConfig
from .layers import GatedAttention, Rotary, rotate

_FASTEST = 1000.0
"""Largest frequency of the embedding of a time, in radians."""
PARTS = ("shift", "scale", "gate")
BRANCHES = ("attention_adaln", "mlp_adaln")


class Modulation(nn.Module):
    """Shift, scale and gate of one branch of a block: each what the schedule gives, and a product of low rank with it."""

    def __init__(self, config: EchoConfig) -> None:
        super().__init__()
        for part in PARTS:
            self.add_module(f"{part}_down", nn.Linear(config.width, config.rank, bias=False))
            self.add_module(f"{part}_up", nn.Linear(config.rank, config.width))

    def forward(self, shared: Sequence[Tensor], activated: Sequence[Tensor]) -> list[Tensor]:
        """Return shift, scale and gate [steps, width] of the shared ones and of their SiLU."""
        low = [self.get_submodule(f"{part}_down")(x) for part, x in zip(PARTS, activated, strict=True)]
        shift, scale, gate = (self.get_submodule(f"{part}_up")(x) + c for part, x, c in zip(PARTS, low, shared, strict=True))
        return [shift, scale, torch.tanh(gate)]


class Schedule(nn.Module):
    """The modulation of all blocks at each of some times."""

    frequencies: Tensor

    def __init__(self, config: EchoConfig) -> None:
        super().__init__()
        half = config.embedding // 2
        frequencies = _FASTEST * np.exp(-np.log(10000.0) * np.arange(half) / half)
        self.register_buffer("frequencies", torch.from_numpy(frequencies.astype(np.float32)), persistent=False)
        width = config.width
        self.cond_module = nn.Sequential(
            nn.Linear(2 * half, width, bias=False),
            nn.SiLU(),
            nn.Linear(width, width, bias=False),
            nn.SiLU(),
            nn.Linear(width, 3 * width, bias=False),
        )
        self.layers = nn.ModuleList(
            nn.ModuleDict({branch: Modulation(config) for branch in BRANCHES}) for _ in range(config.layers)
        )

    def embed(self, t: Tensor) -> Tensor:
        """Return the embedding [steps, embedding] of times float32 [steps]."""
        angles = t.unsqueeze(-1) * self.frequencies
        return torch.cat([torch.cos(angles), torch.sin(angles)], dim=-1)

    def forward(self, t: Tensor) -> Tensor:
        shared = self.cond_module(self.embed(t)).chunk(3, dim=-1)
        activated = [F.silu(part) for part in shared]
        six = [[part for b in BRANCHES for part in cast(nn.ModuleDict, layer)[b](shared, activated)] for layer in self.layers]
        return torch.stack([torch.stack(parts, dim=1) for parts in six], dim=1)


class JointAttention(GatedAttention):
    """Attention of the latents over themselves and over given keys and values. Half of the heads have rotary positions."""

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor, keys: Tensor, values: Tensor, mask: Tensor) -> Tensor:
        """Return [sequences, frames, width] of x of this shape, with keys and values [sequences, heads, n, head_dim]."""
        q, k, v = self.project(x)
        q, k = (rotate(part, cos, sin, self.heads // 2) for part in (q, k))
        return self.finish(x, attend(q, torch.cat([k, keys], dim=2), torch.cat([v, values], dim=2), mask))


class Block(nn.Module):
    """Attention and feed-forward, each with a modulated norm and a gate. The norms have no weights: theirs are ones."""

    def __init__(self, config: EchoConfig) -> None:
        super().__init__()
        self.attention = JointAttention(config.width, config.heads, config.head_dim)
        self.mlp = FeedForward(config.width, config.hidden)
        self.attention_norm = nn.RMSNorm(config.width, eps=NORM_EPS)
        self.mlp_norm = nn.RMSNorm(config.width, eps=NORM_EPS)

    def forward(self, x: Tensor, modulation: Sequence[Tensor], *seen: object) -> Tensor:
        """Return the stream [sequences, frames, width]. modulation: six of [sequences, 1, width]; seen: of the attention."""
        shift, scale, gate, mlp_shift, mlp_scale, mlp_gate = modulation
        x = x + gate * self.attention(self.attention_norm(x) * (1 + scale) + shift, *seen)
        return x + mlp_gate * cast(Tensor, self.mlp(self.mlp_norm(x) * (1 + mlp_scale) + mlp_shift))


class Denoiser(Stack):
    """The velocity of latents. A sequence of its stream is one row of guidance of one latent of the batch."""

    ENTERS, LEAVES, ENTRY = ("latents", "text_mask"), ("text_mask",), ("in_proj.",)
    SHARED = (
        *("modulation", "position_ids", "text_keys", "text_values", "text_mask"),
        *("speaker_keys", "speaker_values", "speaker_mask", "speaker_scale", "latent_keys", "latent_values", "latent_mask"),
    )
    STREAM = ("sequences", "frames")

    def __init__(self, config: EchoConfig) -> None:
        super().__init__()
        self.width = config.width
        self.rotary = Rotary(config.head_dim)
        self.in_proj = nn.Linear(config.channels, config.width)
        self.layers = nn.ModuleList(Block(config) for _ in range(config.layers))
        self.out_norm = nn.RMSNorm(config.width, eps=NORM_EPS)
        self.out_proj = nn.Linear(config.width, config.channels)

    def enter(self, latents: Tensor, text_mask: Tensor) -> Tensor:
        """Return the first block's input from latents [batch, frames, channels]."""
        return for_rows(self.in_proj(latents), text_mask)

    def leave(self, x: Tensor, text_mask: Tensor) -> tuple[Tensor]:
        """Return the velocity [batch, rows, frames, channels]."""
        velocity: Tensor = self.out_proj(self.out_norm(x))
        return (velocity.reshape(*text_mask.shape[:2], *velocity.shape[1:]),)

    def run_layers(
        self,
        x: Tensor,
        *,
        modulation: Tensor,
        position_ids: Tensor,
        text_keys: Tensor,
        text_values: Tensor,
        text_mask: Tensor,
        speaker_keys: Tensor,
        speaker_values: Tensor,
        speaker_mask: Tensor,
        speaker_scale: Tensor,
        latent_keys: Tensor | None = None,
        latent_values: Tensor | None = None,
        latent_mask: Tensor | None = None,
        caches: Sequence[Tensor] = (),
        layers: slice = slice(None),
    ) -> tuple[Tensor, list[Tensor]]:
        """Return the stream after these blocks; see `denoise_spec`. There are no caches."""
        cos, sin = (for_rows(part, text_mask) for part in self.rotary(position_ids))
        keys, values, masks = [text_keys], [text_values], [text_mask]
        if latent_keys is not None and latent_values is not None and latent_mask is not None:
            keys, values = [latent_keys, *keys], [latent_values, *values]
            masks.insert(0, latent_mask.unsqueeze(1).expand(-1, text_mask.shape[1], -1))
        own = torch.ones_like(position_ids, dtype=torch.bool).unsqueeze(1).expand(-1, text_mask.shape[1], -1)
        mask = torch.cat([own, *masks, speaker_mask], dim=2).flatten(0, 1)[:, None, None]
        mask = mask.expand(-1, 1, position_ids.shape[1], -1)
        for n in range(len(self.layers))[layers]:
            factors = speaker_scale[:, n, None, None, None]
            given = (
                for_rows(torch.cat([*(part[:, n] for part in parts), voice[:, n] * factors], dim=2), text_mask)
                for parts, voice in ((keys, speaker_keys), (values, speaker_values))
            )
            six = for_rows(modulation[:, n], text_mask).unsqueeze(2).unbind(1)
            x = self.layers[n](x, six, cos, sin, *given, mask)
        return x, []

    def forward(self, *feeds: Tensor) -> Tensor:
        """Return the velocity; see `denoise_spec`."""
        shared = dict(zip(self.SHARED, feeds[1:], strict=False))
        x, _ = self.run_layers(self.enter(feeds[0], shared["text_mask"]), **shared)  # type: ignore[arg-type]
        return self.leave(x, shared["text_mask"])[0]


def for_rows(x: Tensor, text_mask: Tensor) -> Tensor:
    """Return x [batch, …] for each row of guidance, [batch · rows, …], with the rows of text_mask [batch, rows, tokens]."""
    return x.unsqueeze(1).expand(-1, text_mask.shape[1], *[-1] * (x.ndim - 1)).flatten(0, 1)


def schedule_spec(config: EchoConfig) -> GraphSpec:
    """Return the input and output of the graph of Schedule."""
    times = TensorSpec("t", "float32", ("steps",))
    return GraphSpec("schedule.onnx", (times,), (_modulation(config, "steps"),))


def denoise_spec(config: EchoConfig) -> GraphSpec:
    """Return the inputs and output of the graph of Denoiser.

    modulation: of one time for each of the batch. position_ids: of the frames, from the start of the utterance. text_mask,
    speaker_mask: what each row of guidance sees. speaker_scale: factors of keys and values. latent_*: of the patches before a
    block; without any, one that is masked.
    """
    text, speaker, latent = (
        (*keys_values(config, of, length), TensorSpec(f"{of}_mask", "bool", ("batch", *rows, length)))
        for of, length, rows in (("text", "tokens", ["rows"]), ("speaker", "patches", ["rows"]), ("latent", "prefix", []))
    )
    return GraphSpec(
        "denoise.onnx",
        (
            TensorSpec("latents", "float32", ("batch", "frames", config.channels)),
            _modulation(config, "batch"),
            TensorSpec("position_ids", "int64", ("batch", "frames")),
            *text,
            *speaker,
            TensorSpec("speaker_scale", "float32", ("batch", config.layers)),
            *(latent if config.latent else ()),
        ),
        (TensorSpec("velocity", "float32", ("batch", "rows", "frames", config.channels)),),
    )


def _modulation(config: EchoConfig, first: str) -> TensorSpec:
    return TensorSpec("modulation", "float32", (first, config.layers, len(BRANCHES) * len(PARTS), config.width))
