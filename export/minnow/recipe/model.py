"""The dual-AR model for training: whole sequences at once, without caches. Parameter names are the checkpoint's."""

from __future__ import annotations

from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from fishrt_export.models.transformer import FeedForward, apply_rope, rope_table

GUIDED_LAYER = 2
GUIDED_LETTERS = (0.0, 2.0)
"""Targets of the first attention heads of GUIDED_LAYER in the slow AR, in letters ahead of the letter to be spoken next. The
letters that follow decide how a letter sounds."""
GUIDED_WIDTH = 1.5
"""Standard deviation of a guided head's target, in letters."""
HEARD_LAYER = 3
"""Layer whose output predicts the phone to be spoken next."""


class Attention(nn.Module):
    """Causal grouped-query attention over a whole sequence."""

    def __init__(self, config: dict[str, Any]) -> None:
        super().__init__()
        self.heads, self.kv_heads, self.head_dim = config["n_head"], config["n_local_heads"], config["head_dim"]
        dim = config["dim"]
        self.wqkv = nn.Linear(dim, (self.heads + 2 * self.kv_heads) * self.head_dim, bias=False)
        self.wo = nn.Linear(self.heads * self.head_dim, dim, bias=False)
        self.normed = config["attention_qk_norm"]
        if self.normed:
            self.q_norm = nn.RMSNorm(self.head_dim, eps=config["norm_eps"])
            self.k_norm = nn.RMSNorm(self.head_dim, eps=config["norm_eps"])

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor, position_ids: Tensor) -> tuple[Tensor, Tensor]:
        """Return the output and the attention weights [batch, heads, length, length]."""
        widths = [n * self.head_dim for n in (self.heads, self.kv_heads, self.kv_heads)]
        q, k, v = (part.unflatten(-1, (-1, self.head_dim)).transpose(1, 2) for part in self.wqkv(x).split(widths, dim=-1))
        if self.normed:
            q, k = _norm(q, self.q_norm), _norm(k, self.k_norm)
        q, k = apply_rope(q, cos, sin, position_ids), apply_rope(k, cos, sin, position_ids)
        groups = self.heads // self.kv_heads
        y, weights = _attention(q, k.repeat_interleave(groups, dim=1), v.repeat_interleave(groups, dim=1))
        return cast(Tensor, self.wo(y.transpose(1, 2).flatten(2))), weights


def _norm(x: Tensor, norm: nn.RMSNorm) -> Tensor:
    # The fused kernel needs a weight of the input's dtype; mixed dtypes are several times slower.
    return F.rms_norm(x, norm.normalized_shape, norm.weight.to(x.dtype), norm.eps)


def _attention(q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
    """Return causal attention, and its weights, of q, k and v, each [batch, heads, length, head_dim].

    In bfloat16 on a CPU, this trains faster than the fused kernel.
    """
    length, dtype = q.shape[2], q.dtype
    bias = torch.full((length, length), float("-inf"), dtype=dtype).triu(1)
    with torch.autocast("cpu", enabled=False):
        scores = torch.baddbmm(bias, q.flatten(0, 1), k.flatten(0, 1).transpose(1, 2), alpha=q.shape[-1] ** -0.5)
        weights = scores.softmax(-1)
        return (weights @ v.flatten(0, 1)).view_as(q), weights.view(*q.shape[:2], length, length)


class Block(nn.Module):
    """Pre-norm attention and feed-forward."""

    def __init__(self, config: dict[str, Any]) -> None:
        super().__init__()
        self.attention = Attention(config)
        self.feed_forward = FeedForward(config["dim"], config["intermediate_size"])
        self.attention_norm = nn.RMSNorm(config["dim"], eps=config["norm_eps"])
        self.ffn_norm = nn.RMSNorm(config["dim"], eps=config["norm_eps"])

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor, position_ids: Tensor) -> tuple[Tensor, Tensor]:
        y, weights = self.attention(self.attention_norm(x), cos, sin, position_ids)
        x = x + y
        return x + cast(Tensor, self.feed_forward(self.ffn_norm(x))), weights


class DualAr(nn.Module):
    """Slow and fast AR with the embeddings of both."""

    def __init__(self, config: dict[str, Any], *, vocab_size: int, semantic_begin: int, end_id: int) -> None:
        super().__init__()
        slow, fast = config["text_config"], config["audio_decoder_config"]
        self.codebooks, self.width = fast["num_codebooks"], fast["vocab_size"]
        self.semantic_begin = semantic_begin
        self.embeddings = nn.Embedding(vocab_size, slow["dim"])
        self.codebook_embeddings = nn.Embedding(self.codebooks * self.width, slow["dim"])
        self.layers = nn.ModuleList(Block(slow) for _ in range(slow["n_layer"]))
        self.norm = nn.RMSNorm(slow["dim"], eps=slow["norm_eps"])
        self.fast_project_in = nn.Linear(slow["dim"], fast["dim"])
        self.fast_embeddings = nn.Embedding(self.width, fast["dim"])
        self.fast_layers = nn.ModuleList(Block(fast) for _ in range(fast["n_layer"]))
        self.fast_norm = nn.RMSNorm(fast["dim"], eps=fast["norm_eps"])
        self.fast_output = nn.Linear(fast["dim"], self.width, bias=False)
        head = torch.tensor([end_id, *range(semantic_begin, semantic_begin + self.width)])
        tables = {
            "head_ids": head,
            "offsets": torch.arange(self.codebooks) * self.width,
            "slow_rope": torch.stack(rope_table(slow["max_seq_len"], slow["head_dim"], slow["rope_base"])),
            "fast_rope": torch.stack(rope_table(self.codebooks, fast["head_dim"], slow["rope_base"])),
        }
        for name, table in tables.items():
            self.register_buffer(name, table, persistent=False)
        for module in self.modules():
            if isinstance(module, (nn.Linear, nn.Embedding)):
                nn.init.normal_(module.weight, std=0.02)
        for layers in (self.layers, self.fast_layers):
            for block in layers:
                for out in (block.attention.wo, block.feed_forward.w2):  # type: ignore[union-attr]
                    nn.init.normal_(out.weight, std=0.02 / (2 * len(layers)) ** 0.5)  # type: ignore[union-attr, arg-type]

    def slow(self, prompt: Tensor, letter: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Return normed hidden and the output of HEARD_LAYER, both [batch, length, dim], and the guided heads' error.

        prompt: int64 [batch, 1+codebooks, length]. letter: float32 [batch, length], the column of the letter to be spoken next, 0
        if no frame follows. The error is the mean share of a head's attention outside a Gaussian around its target.
        """
        main, codes = prompt[:, 0], prompt[:, 1:].transpose(1, 2)
        audio = ((main >= self.semantic_begin) & (main < self.semantic_begin + self.width)).unsqueeze(-1)
        summed = self.codebook_embeddings(codes + cast(Tensor, self.offsets)).sum(dim=2)
        x = self.embeddings(main)
        x = torch.where(audio, (x + summed) / (self.codebooks + 1) ** 0.5, x)
        cos, sin = cast(Tensor, self.slow_rope)
        position_ids = torch.arange(main.shape[1]).expand(main.shape[0], -1)
        heard, astray = x, torch.zeros(())
        for n, layer in enumerate(self.layers):
            x, weights = layer(x, cos, sin, position_ids)
            if n == GUIDED_LAYER:
                wanted = letter[:, None, :, None] + torch.tensor(GUIDED_LETTERS)[:, None, None]
                off = 1.0 - torch.exp(-0.5 * ((torch.arange(main.shape[1]) - wanted) / GUIDED_WIDTH).square())
                share = (weights[:, : len(GUIDED_LETTERS)].float() * off).sum(-1).mean(1)
                astray = share[letter > 0].mean()
            if n == HEARD_LAYER:
                heard = x
        return cast(Tensor, self.norm(x)), heard, astray

    def main_logits(self, hidden: Tensor) -> Tensor:
        """Return logits [..., 1+width] of hidden [..., dim]: the end token, then the semantic codes."""
        return F.linear(hidden, self.embeddings(cast(Tensor, self.head_ids)))

    def fast(self, hidden: Tensor, codes: Tensor) -> Tensor:
        """Return logits [frames, codebooks − 1, width] of codes 1… from hidden [frames, dim], codes int64 [frames, codebooks]."""
        known = self.fast_embeddings(codes[:, :-1])
        x = torch.cat((self.fast_project_in(hidden).unsqueeze(1), known.to(hidden.dtype)), dim=1)
        cos, sin = cast(Tensor, self.fast_rope)
        position_ids = torch.arange(self.codebooks).expand(len(x), -1)
        for layer in self.fast_layers:
            x, _ = layer(x, cos, sin, position_ids)
        return cast(Tensor, self.fast_output(self.fast_norm(x[:, 1:])))
