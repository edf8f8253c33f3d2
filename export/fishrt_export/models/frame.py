"""The frame: sampling and the fast AR at all of its positions in one module, so that a column costs one launch on a device.

    slow AR's logits ─► main token ─► code 0 ─► fast AR ─► draw ─► code 1 ─► fast AR ─► … ─► column
    noise, windows, settings ──┴──────────┴──────────────────┘

It repeats the arithmetic of `fishrt.language_model.sampling` on the same noise, so both give the same codes. A frame begins with
an empty cache. A code that cannot be drawn is one of the negative values of `fishrt.language_model.drawing`.
"""

from __future__ import annotations

from typing import NamedTuple, cast

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from fishrt.bundle.features import LanguageModel
from fishrt.language_model.drawing import NOT_NUMBERS, TOO_MANY, drawn_codes
from fishrt.language_model.sampling import main_ids
from fishrt_engines.engine import GraphSpec

from .fast_ar import FastAR
from .transformer import ONNX_OPSET, Block, Step


class Ranked(NamedTuple):
    """Candidates [batch, n], the likeliest first; of equal logits, the lower index is first."""

    logits: Tensor
    order: Tensor
    """int64: their indices in the logits."""
    places: Tensor
    """int64 [n]: 0, 1, …"""
    mass: Tensor
    """Cumulative probability, the candidate included, times `total`."""
    total: Tensor
    """[batch, 1]"""
    of: int
    """Number of all candidates, ranked or not."""


class Frame(nn.Module):
    """Module from the inputs of `frame_spec` to a column int64 [batch, 1 + C]. Values of one token or code are [batch, 1]."""

    ids: Tensor
    """The main tokens of the logits that are drawn from."""

    def __init__(self, fast: FastAR, lm: LanguageModel, spec: GraphSpec) -> None:
        """spec: from `frame_spec`."""
        super().__init__()
        self.fast, self.lm = fast, lm
        self.names = tuple(tensor.name for tensor in spec.feeds)
        self.register_buffer("ids", torch.from_numpy(main_ids(lm)).to(fast.norm.weight.device), persistent=False)

    def forward(self, *feeds: Tensor) -> Tensor:
        """Return the column."""
        lm, given = self.lm, dict(zip(self.names, feeds, strict=True))
        main = self._main(given)
        known = lm.num_codebooks - drawn_codes(lm)
        codes = [self._code_zero(main)] if known else []
        hidden = given["hidden"].to(self.fast.norm.weight.dtype).unsqueeze(1)
        x = torch.cat([hidden, *map(self.fast.embeddings, codes)], dim=1)
        attention = cast(Block, self.fast.layers[0]).attention
        rows = x.shape[0], attention.kv_heads, lm.num_codebooks, attention.head_dim
        caches = [x.new_zeros(rows) for _ in range(2 * len(self.fast.layers))]
        for codebook in range(known, lm.num_codebooks):
            (logits,) = self.fast.leave(self._run_layers(x, codebook + 1 - x.shape[1], caches))
            place, code = self._code(logits.float(), given, codebook, codebook - known)
            codes.append(code)
            x = self.fast.embeddings(place)
        return torch.cat([main, *codes], dim=1)

    def _run_layers(self, x: Tensor, start: int, caches: list[Tensor]) -> Tensor:
        """Return x [batch, length, dim], of positions from `start` on, after all blocks. Updates the list of caches."""
        positions = torch.arange(start, start + x.shape[1], device=x.device)
        mask = torch.arange(caches[0].shape[2], device=x.device) <= positions.unsqueeze(1)
        step = Step(self.fast.cos, self.fast.sin, positions.expand(x.shape[0], -1), start, mask[None, None])
        for n, layer in enumerate(self.fast.layers):
            x, caches[2 * n], caches[2 * n + 1] = layer(x, step, *caches[2 * n : 2 * n + 2])
        return x

    def _main(self, given: dict[str, Tensor]) -> Tensor:
        """Return the main token."""
        lm, logits = self.lm, given["logits"]
        if lm.head == "full" and lm.main_tokens == "audio":
            logits = logits[:, self.ids]
        if "penalised_main" in given:
            logits = penalised(logits, given["penalised_main"], given["penalty"])
        ranked = rank(logits, given["main_ranks"])
        noise, (temperature, top_p, top_k) = given["main_noise"], _settings(given)
        token = self._token(*draw(ranked, noise[:, 0], temperature, top_p, top_k))
        aware = lm.sampling.repetition_aware
        if aware is None:
            return token
        hotter, wider = torch.full_like(temperature, max(aware.temperature, 1e-5)), torch.full_like(top_p, aware.top_p)
        again = self._token(*draw(ranked, noise[:, 1], hotter, wider, top_k))
        seen = (given["recent"] == token).to(torch.int32).amax(dim=1, keepdim=True).to(torch.bool)
        return torch.where(seen & (token >= lm.semantic_begin_id) & (token <= lm.semantic_end_id), again, token)

    def _token(self, place: Tensor, drawn: Tensor) -> Tensor:
        """Return the token of a draw; a negative value stays."""
        if self.lm.main_tokens == "any":
            return drawn
        return torch.where(drawn < 0, drawn, F.embedding(place, self.ids.unsqueeze(1)).squeeze(2))

    def _code_zero(self, main: Tensor) -> Tensor:
        lm = self.lm
        code = main.clamp(lm.semantic_begin_id, lm.semantic_end_id) - lm.semantic_begin_id
        return code.clamp(max=lm.codebook_width - 1)

    def _code(self, logits: Tensor, given: dict[str, Tensor], codebook: int, drawn: int) -> tuple[Tensor, Tensor]:
        logits = logits[:, : self.lm.fast_candidates]
        if "penalty" in given:
            logits = penalised(logits, given["penalised_codes"][:, codebook], given["penalty"])
        if "least_code" in given:
            places = torch.arange(logits.shape[1], device=logits.device)
            logits = torch.where(places < given["least_code"], -torch.inf, logits)
        return draw(rank(logits, given["code_ranks"]), given["code_noise"][:, drawn], *_settings(given))


def _settings(given: dict[str, Tensor]) -> tuple[Tensor, Tensor, Tensor]:
    return given["temperature"], given["top_p"], given["top_k"]


def rank(logits: Tensor, places: Tensor) -> Ranked:
    """Rank the likeliest of the logits [batch, n]: as many as there are places, int64 [at most n]."""
    likeliest, order = top(logits, places)
    first = likeliest[:, :1]
    total = torch.exp(logits - first).sum(dim=1, keepdim=True)
    return Ranked(likeliest, order, places, torch.exp(likeliest - first).cumsum(dim=1), total, logits.shape[1])


def top(logits: Tensor, places: Tensor) -> tuple[Tensor, Tensor]:
    """Return the largest logits and their indices. Of equal logits, the lower index is first, as in ONNX's TopK."""
    count = places.shape[0]
    if torch.onnx.is_in_onnx_export():
        shape = (logits.shape[0], count)
        values, order = torch.onnx.ops.symbolic_multi_out(
            "TopK",
            (logits, torch.onnx.ops.symbolic("Shape", (places,), dtype=torch.int64, shape=(1,), version=ONNX_OPSET)),
            attrs={"axis": -1},
            dtypes=(logits.dtype, torch.int64),
            shapes=(shape, shape),
            version=ONNX_OPSET,
        )
        return values, order
    values, order = torch.sort(logits, dim=1, descending=True, stable=True)
    return values[:, :count], order[:, :count]


def draw(ranked: Ranked, noise: Tensor, temperature: Tensor, top_p: Tensor, top_k: Tensor) -> tuple[Tensor, Tensor]:
    """Return an index, and it or else NOT_NUMBERS or TOO_MANY: int64 [batch, 1]. noise [batch, n]. See `sampling.sample`."""
    logits, order, places, mass, total, of = ranked
    # With a top_p of 1, a sum in float32 that is rounded up would remove a likely candidate.
    kept = ((mass <= total * top_p) | (top_p >= 1)) & (places < top_k)
    scaled = logits / temperature
    weights = torch.where(kept | (places == 0), torch.exp(scaled - scaled[:, :1]), 0.0)
    winner = (weights / noise.gather(1, order)).argmax(dim=1, keepdim=True)
    place = drawn = order.gather(1, winner)
    drawn = torch.where(kept[:, -1:] & (places[-1:] + 1 < top_k.clamp(max=of)), TOO_MANY, drawn)
    return place, torch.where(total <= 2 * of, drawn, NOT_NUMBERS)  # false for NaN


def penalised(logits: Tensor, places: Tensor, penalty: Tensor) -> Tensor:
    """See `sampling.penalised`. An index equal to the number of logits stands for none."""
    hit = logits.new_zeros(logits.shape[0], logits.shape[1] + 1).scatter(1, places, 1.0)[:, :-1].to(torch.bool)
    return torch.where(hit, torch.where(logits < 0, logits * penalty, logits / penalty), logits)
