"""The fast AR: from the slow AR's output and the codes so far to the logits of the next code."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from fishrt_engines.engine import GraphSpec, StatePair, TensorSpec

from ..checkpoint.config import ModelConfig
from .transformer import Transformer, cache_names


class FastAR(Transformer):
    """The fast AR as a module: position 0 takes `hidden`, position j the embedding of code j − 1.

    All codebooks share one embedding table and one head.
    """

    def __init__(self, config: ModelConfig) -> None:
        super().__init__(config.fast, config.num_codebooks)
        self.embeddings = nn.Embedding(config.codebook_width, config.fast.dim)
        self.output = nn.Linear(config.fast.dim, config.codebook_width, bias=False)

    ENTERS, LEAVES = ("hidden", "codes", "position_ids"), ()

    def enter(self, hidden: Tensor, codes: Tensor, position_ids: Tensor) -> Tensor:
        """Return the input of the first block, [batch, length, dim]; see `fast_ar_spec` for the arguments."""
        return torch.where((position_ids == 0).unsqueeze(-1), hidden.unsqueeze(1), self.embeddings(codes))

    def leave(self, x: Tensor) -> tuple[Tensor]:
        """Return the logits of the last column [batch, codebook_width] from the last block's output x [batch, length, dim]."""
        return (self.output(self.norm(x[:, -1])),)

    def forward(
        self, hidden: Tensor, codes: Tensor, position_ids: Tensor, write_index: Tensor, caches: Sequence[Tensor]
    ) -> tuple[Tensor, ...]:
        """Return the logits and then the updated caches; see `fast_ar_spec`. The caches are one list."""
        x, updated = self.run_layers(self.enter(hidden, codes, position_ids), position_ids, write_index, caches)
        return *self.leave(x), *updated


def fast_ar_spec(config: ModelConfig) -> GraphSpec:
    """Return the inputs, outputs and states of the graph of `FastAR`."""
    cache = ("batch", config.fast.kv_heads, config.num_codebooks, config.fast.head_dim)
    names = cache_names(config.fast.layers)
    return GraphSpec(
        file="fast_ar.onnx",
        inputs=(
            TensorSpec("hidden", "float32", ("batch", config.fast.dim)),
            TensorSpec("codes", "int64", ("batch", "length")),
            TensorSpec("position_ids", "int64", ("batch", "length")),
            TensorSpec("write_index", "int64", ("batch",)),
            *(TensorSpec(name, "float32", cache) for name, _ in names),
        ),
        outputs=(
            TensorSpec("logits", "float32", ("batch", config.codebook_width)),
            *(TensorSpec(name, "float32", cache) for _, name in names),
        ),
        states=tuple(StatePair(*pair) for pair in names),
    )
