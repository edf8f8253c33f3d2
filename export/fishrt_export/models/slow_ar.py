"""The slow AR: from prompt columns to the next frame's semantic logits and the fast AR's input."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from fishrt_engines.engine import GraphSpec, StatePair, TensorSpec

from ..checkpoint.config import ModelConfig
from .transformer import Transformer, cache_names


class SlowAR(Transformer):
    """The slow AR as one module for prefill and step.

    `head_size` is the number of logits. None is a tied head: the whole vocabulary, through the token embedding.
    """

    def __init__(self, config: ModelConfig, semantic: range, head_size: int | None) -> None:
        super().__init__(config.slow, config.max_seq_len)
        self.config, self.semantic = config, semantic
        dim = config.slow.dim
        self.embeddings = nn.Embedding(config.vocab_size, dim)
        self.codebook_embeddings = nn.Embedding(config.num_codebooks * config.codebook_width, dim)
        self.output = nn.Linear(dim, head_size, bias=False) if head_size else None
        self.fast_project_in = nn.Linear(dim, config.fast.dim) if config.projects else nn.Identity()

    ENTERS, LEAVES = ("prompt",), ("last_index",)

    def enter(self, prompt: Tensor) -> Tensor:
        """Return the input of the first block [batch, length, dim] from a prompt int64 [batch, 1 + codebooks, length]."""
        main, codes = prompt.select(1, 0), prompt.narrow(1, 1, self.config.num_codebooks)
        if self.config.codebook_offsets:
            codes = (
                codes + torch.arange(self.config.num_codebooks, device=prompt.device).unsqueeze(-1) * self.config.codebook_width
            )
        audio = self.codebook_embeddings(codes).sum(dim=1)
        is_audio = ((main >= self.semantic[0]) & (main <= self.semantic[-1])).unsqueeze(-1)
        text = self.embeddings(main)
        both = text + audio
        if self.config.scale_codebook_embeddings:
            both = both / math.sqrt(self.config.num_codebooks + 1)
        return torch.where(is_audio, both, text)

    def leave(self, x: Tensor, last_index: Tensor) -> tuple[Tensor, Tensor]:
        """Return logits [batch, head_size] and hidden [batch, fast_dim] of column last_index [batch] of x.

        x [batch, length, dim] is the last block's output.
        """
        return self.read_out(x.gather(1, last_index[:, None, None].expand(-1, 1, x.shape[2])).squeeze(1))

    def read_out(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Return logits [..., head_size] and hidden [..., fast_dim] from the last block's output x [..., dim]."""
        normed = self.norm(x)
        hidden = self.fast_project_in(normed if self.config.norm_fast_input else x)
        head = self.output.weight if self.output is not None else self.embeddings.weight
        return F.linear(normed, head), hidden

    def forward(
        self, prompt: Tensor, position_ids: Tensor, write_index: Tensor, last_index: Tensor, caches: Sequence[Tensor]
    ) -> tuple[Tensor, ...]:
        """Return logits, hidden and then the updated caches; see `slow_ar_spec`. The caches are one list."""
        x, updated = self.run_layers(self.enter(prompt), position_ids, write_index, caches)
        return *self.leave(x, last_index), *updated


def slow_ar_spec(config: ModelConfig, head_size: int) -> GraphSpec:
    """Return the inputs, outputs and states of the graph of `SlowAR`."""
    cache = ("batch", config.slow.kv_heads, "cache", config.slow.head_dim)
    names = cache_names(config.slow.layers)
    return GraphSpec(
        file="slow_ar.onnx",
        inputs=(
            TensorSpec("prompt", "int64", ("batch", 1 + config.num_codebooks, "length")),
            TensorSpec("position_ids", "int64", ("batch", "length")),
            TensorSpec("write_index", "int64", ("batch",)),
            TensorSpec("last_index", "int64", ("batch",)),
            *(TensorSpec(name, "float32", cache) for name, _ in names),
        ),
        outputs=(
            TensorSpec("logits", "float32", ("batch", head_size)),
            TensorSpec("hidden", "float32", ("batch", config.fast.dim)),
            *(TensorSpec(name, "float32", cache) for _, name in names),
        ),
        states=tuple(StatePair(*pair) for pair in names),
    )
