"""The frame graph in torch: sampling and the fast AR at all of its positions, without the host in between.

It draws as `fishrt.language_model.sampling` does. Inputs and outputs are those of
`fishrt.language_model.frame.frame_spec`, for finite logits.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from fishrt.bundle.features import LanguageModel
from fishrt.language_model.frame import drawn_codes
from fishrt.language_model.sampling import main_ids
from fishrt_export.models.fast_ar import FastAR

Feeds = dict[str, Tensor]
Ranked = tuple[Tensor, Tensor]
"""Logits [1, n] in descending order, and their indices, int64."""


class TorchFrame(nn.Module):
    """Module from feeds of the frame graph to a column int64 [1, 1 + C]. Positions of the fast AR are Python integers."""

    ids: Tensor

    def __init__(self, fast: FastAR, lm: LanguageModel) -> None:
        super().__init__()
        self.fast, self.lm = fast, lm
        self.register_buffer("ids", torch.from_numpy(main_ids(lm)).to(fast.norm.weight.device))

    def forward(self, feeds: Feeds) -> Tensor:
        lm, known = self.lm, self.lm.num_codebooks - drawn_codes(self.lm)
        main = self._main(feeds)
        codes = [self._code_zero(main)] if known else []
        hidden = feeds["hidden"].to(self.fast.norm.weight.dtype)
        caches = [
            hidden.new_empty(1, block.attention.kv_heads, lm.num_codebooks, block.attention.head_dim)
            for block in self.fast.layers
            for _ in ("key", "value")
        ]
        for codebook in range(known, lm.num_codebooks):
            fed = [torch.zeros_like(main), *codes] if codebook == known else codes[-1:]
            start = codebook + 1 - len(fed)
            positions = torch.arange(start, codebook + 1, device=main.device)[None]
            logits, *_ = self.fast(hidden, torch.cat(fed, dim=1), positions, start, caches)
            codes.append(self._code(logits.float(), feeds, codebook, codebook - known))
        return torch.cat([main, *codes], dim=1)

    def _main(self, feeds: Feeds) -> Tensor:
        lm, logits = self.lm, feeds["logits"]
        if lm.head == "full" and lm.main_tokens == "audio":
            logits = logits[:, self.ids]
        if "penalised_main" in feeds:
            logits = penalised(logits, feeds["penalised_main"], feeds["penalty"])
        ranked = rank(logits)
        token = self.ids[draw(ranked, feeds["main_noise"][:, 0], feeds["temperature"], feeds["top_p"], feeds["top_k"])]
        aware = lm.sampling.repetition_aware
        if aware is None:
            return token
        top_p = torch.full_like(feeds["top_p"], aware.top_p)
        temperature = torch.full_like(top_p, max(aware.temperature, 1e-5))
        again = self.ids[draw(ranked, feeds["main_noise"][:, 1], temperature, top_p, feeds["top_k"])]
        seen = (feeds["recent"] == token).any(dim=1, keepdim=True)
        return torch.where(seen & (token >= lm.semantic_begin_id) & (token <= lm.semantic_end_id), again, token)

    def _code_zero(self, main: Tensor) -> Tensor:
        lm = self.lm
        code = main.clamp(lm.semantic_begin_id, lm.semantic_end_id) - lm.semantic_begin_id
        return code.clamp(max=lm.codebook_width - 1)

    def _code(self, logits: Tensor, feeds: Feeds, codebook: int, drawn: int) -> Tensor:
        logits = logits[:, : self.lm.fast_candidates]
        if "penalty" in feeds:
            logits = penalised(logits, feeds["penalised_codes"][:, codebook], feeds["penalty"])
        if "least_code" in feeds:
            places = torch.arange(logits.shape[1], device=logits.device)
            logits = logits.masked_fill(places < feeds["least_code"], -torch.inf)
        noise = feeds["code_noise"][:, drawn]
        return draw(rank(logits), noise, feeds["temperature"], feeds["top_p"], feeds["top_k"])


def rank(logits: Tensor) -> Ranked:
    ordered, places = torch.sort(logits, dim=1, descending=True, stable=True)
    return ordered, places


def draw(ranked: Ranked, noise: Tensor, temperature: Tensor, top_p: Tensor, top_k: Tensor) -> Tensor:
    """Return the drawn index, int64 [1, 1]. noise [1, n], settings [1, 1].

    See `fishrt.language_model.sampling.filter_probs` and `draw`.
    """
    logits, places = ranked
    mass = torch.exp(logits - logits[:, :1]).double().cumsum(dim=1)
    n = torch.arange(logits.shape[1], device=logits.device)
    kept = ((mass <= top_p.double() * mass[:, -1:]) & (n < top_k)) | (n == 0)
    scaled = logits / temperature
    weights = torch.exp(scaled - scaled[:, :1]).masked_fill(~kept, 0.0)
    winner = (weights / noise.gather(1, places)).argmax(dim=1, keepdim=True)
    return places.gather(1, winner)


def penalised(logits: Tensor, places: Tensor, penalty: Tensor) -> Tensor:
    """See `fishrt.language_model.sampling.penalised`. An index equal to the number of logits is ignored."""
    hit = logits.new_zeros(1, logits.shape[1] + 1, dtype=torch.bool).scatter(1, places, value=True)[:, :-1]
    return torch.where(hit, torch.where(logits < 0, logits * penalty, logits / penalty), logits)
