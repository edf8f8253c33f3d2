"""The cases that verify each graph: several lengths, state carried over several steps, and ragged batches."""

from __future__ import annotations

from dataclasses import replace
from itertools import pairwise
from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt

from fishrt.bundle.features import Codec, LanguageModel
from fishrt.language_model.drawing import MOST_RANKED
from fishrt.language_model.sampling import main_ids
from fishrt_engines.engine import GraphSpec

from ..checkpoint.config import ModelConfig
from ..checkpoint.identify import AudioIds
from ..graph.report import Case, Feeds

if TYPE_CHECKING:
    from ..models.codec.load import CodecConfig

Ints = npt.NDArray[np.int64]
STEPS = 3
FRAMES = 32
"""Rows of a call of the frame graph."""
FEW = 30
"""Candidates that it ranks in a second call."""


def slow_ar_cases(config: ModelConfig | LanguageModel, ids: AudioIds) -> list[Case]:
    """Return cases of prefill and single steps: one row, two rows of different lengths, and one row at the last positions.

    Shorter rows are padded on the right. All caches are filled to their last row; alone, a row fills its own by several columns
    in one call, as behind a known voice. The last case writes to the start of a short cache although its positions are high: a
    cache of all positions may not fit in memory. Its columns attend to the whole cache, in the graph as in the module.
    """
    rng = np.random.default_rng(1)
    cases = [_slow_ar_case(config, ids, lengths, rng) for lengths in ((5,), (9, 4))]
    last = _slow_ar_case(config, ids, (5,), rng)
    end = max(int(feeds["position_ids"].max()) for feeds in last.calls) + 1
    high = [{**feeds, "position_ids": feeds["position_ids"] + config.max_seq_len - end} for feeds in last.calls]
    return [*cases, replace(last, calls=tuple(high))]


def _slow_ar_case(config: ModelConfig | LanguageModel, ids: AudioIds, lengths: tuple[int, ...], rng: np.random.Generator) -> Case:
    lengths = tuple(min(length, max(config.max_seq_len - STEPS, 1)) for length in lengths)
    batch, longest = len(lengths), max(lengths)
    ends = np.array(lengths)
    calls: list[Feeds] = [
        {
            "prompt": random_prompt(config, ids, (batch, longest), rng),
            "position_ids": np.tile(np.arange(longest), (batch, 1)),
            "write_index": np.zeros(batch, np.int64),
            "last_index": ends - 1,
        }
    ]
    room = min(STEPS, config.max_seq_len - longest)
    for length in [1] * room if batch > 1 else [1, room - 1][:room]:
        calls.append(
            {
                "prompt": random_prompt(config, ids, (batch, length), rng),
                "position_ids": ends[:, None] + np.arange(length),
                "write_index": ends,
                "last_index": np.full(batch, length - 1),
            }
        )
        ends = ends + length
    return Case(tuple(calls), {"batch": batch, "cache": longest + STEPS})


def random_prompt(config: ModelConfig | LanguageModel, ids: AudioIds, shape: tuple[int, int], rng: np.random.Generator) -> Ints:
    """Return a prompt int64 [batch, 1 + codebooks, length] whose columns are text or audio at random."""
    batch, length = shape
    codes = rng.integers(0, config.codebook_width, (batch, config.num_codebooks, length))
    audio = rng.random((batch, length)) < 0.5
    spoken = rng.integers(ids.semantic.start, ids.semantic.stop, (batch, length))
    main = np.where(audio, spoken, rng.integers(0, config.vocab_size, (batch, length)))
    return np.concatenate([main[:, None], codes * audio[:, None]], axis=1)


def fast_ar_cases(config: ModelConfig | LanguageModel, hidden: int) -> list[Case]:
    """Return cases of two frames on one cache: one row with positions 0 and 1 in one call, and two rows position by position.

    hidden: width of the slow AR's hidden states.
    """
    rng = np.random.default_rng(2)
    return [_fast_ar_case(config, hidden, batch, first, rng) for batch, first in ((1, 2), (2, 1))]


def _fast_ar_case(config: ModelConfig | LanguageModel, width: int, batch: int, first: int, rng: np.random.Generator) -> Case:
    last = config.num_codebooks
    calls: list[Feeds] = []
    for _ in range(2):
        hidden = rng.standard_normal((batch, width)).astype(np.float32)
        codes = rng.integers(0, config.codebook_width, (batch, last))
        edges = [0, *range(min(first, last), last + 1)]
        for start, stop in pairwise(edges):
            calls.append(
                {
                    "hidden": hidden,
                    "codes": np.ascontiguousarray(codes[:, start:stop]),
                    "position_ids": np.tile(np.arange(start, stop), (batch, 1)),
                    "write_index": np.full(batch, start),
                }
            )
    return Case(tuple(calls), {"batch": batch})


def frame_cases(lm: LanguageModel, spec: GraphSpec) -> list[Case]:
    """Return a case of two calls: FRAMES rows, each with settings and windows of its own. In the second few are ranked.

    A row has a token that is about as likely as all others together and often in windows. Settings let much be drawn.
    """
    rng, ids = np.random.default_rng(5), main_ids(lm)
    likely = rng.integers(0, len(ids), FRAMES)
    made: Feeds = {
        "temperature": rng.uniform(0.5, 10, (FRAMES, 1)),
        "top_p": rng.choice([0.5, 0.9, 1.0], (FRAMES, 1)),
        "top_k": rng.choice([5, FEW, len(ids)], (FRAMES, 1)),
        "penalty": rng.choice([0.1, 1.0, 1.3], (FRAMES, 1)),  # the first makes the penalised the likeliest
        "least_code": rng.integers(0, 2, (FRAMES, 1)),
    }
    for tensor in spec.feeds:
        shape = tensor.resolve({"batch": FRAMES, "main_ranked": len(ids), "code_ranked": lm.fast_candidates})
        if tensor.name == "recent":
            made["recent"] = np.where(rng.random(shape) < 0.5, ids[likely][:, None], -1)
        elif tensor.name.startswith("penalised"):
            made[tensor.name] = rng.integers(0, (len(ids) if tensor.name == "penalised_main" else lm.fast_candidates) + 1, shape)
        elif tensor.name.endswith("ranks"):
            made[tensor.name] = np.arange(min(shape[0], MOST_RANKED))
        elif tensor.name.endswith("noise"):
            made[tensor.name] = rng.standard_exponential(shape)
        elif tensor.name not in made:
            made[tensor.name] = rng.standard_normal(shape)
    places = ids[likely] if made["logits"].shape[1] > len(ids) else likely
    made["logits"][np.arange(FRAMES), places] = np.log(len(ids)) + rng.uniform(-1, 3, FRAMES)
    feeds = {tensor.name: made[tensor.name].astype(tensor.dtype) for tensor in spec.feeds}
    few = {name: feeds[name][:FEW] for name in ("main_ranks", "code_ranks")}
    return [Case((feeds, {**feeds, **few, "top_k": np.minimum(feeds["top_k"], FEW)}), {})]


def codec_encode_cases(config: CodecConfig | Codec, sight: int) -> list[Case]:
    """Return cases of noise: the shortest audio, two rows, and audio longer than the encoder's context, `sight` frames.

    Audio ends within a frame if the codec can encode that.
    """
    rng = np.random.default_rng(3)
    sizes = ((1, config.min_samples), (2, 7 * config.hop - 1), (1, _longer_than(config, sight) * config.hop - config.hop // 2))
    whole = [(batch, 1, -(-samples // config.sample_multiple) * config.sample_multiple) for batch, samples in sizes]
    return [Case(({"audio": rng.uniform(-0.5, 0.5, shape).astype(np.float32)},), {}) for shape in whole]


def codec_decode_cases(config: CodecConfig | Codec, spec: GraphSpec, sight: int) -> list[Case]:
    """Return cases of random codes or latents: three frames, two rows, and more than the decoder's context, `sight` frames.

    One frame holds codes past the codebooks' ends, and another holds −1. A graph with a state takes them in three calls: one
    frame, most of the others, and the rest.
    """
    rng = np.random.default_rng(4)
    names = [tensor.name for tensor in spec.feeds]
    axes = [tensor.shape.index("frames") for tensor in spec.feeds]
    cases = []
    for batch, frames in ((1, 3), (2, 11), (1, _longer_than(config, sight))):
        feeds: Feeds = {"position_ids": np.tile(np.arange(frames), (batch, 1))}
        if names[0] == "codes":
            feeds["codes"] = _random_codes(np.array(config.codebook_sizes)[:, None], batch, frames, rng)
        else:
            feeds["latents"] = rng.standard_normal(spec.feeds[0].resolve({"batch": batch, "frames": frames})).astype(np.float32)
        cuts = [1, 2 * frames // 3] if spec.states else []
        chunks = zip(*(np.split(feeds[name], cuts, axis=axis) for name, axis in zip(names, axes, strict=True)), strict=True)
        calls = [dict(zip(names, map(np.ascontiguousarray, chunk), strict=True)) for chunk in chunks]
        cases.append(Case(tuple(calls), {"batch": batch} if spec.states else {}))
    return cases


def _random_codes(sizes: Ints, batch: int, frames: int, rng: np.random.Generator) -> Ints:
    codes = rng.integers(0, sizes, (batch, len(sizes), frames))
    codes[0, :, -1] += sizes[:, 0]
    codes[0, -1, 0] = -1
    return codes


def _longer_than(config: CodecConfig | Codec, sight: int) -> int:
    """Return a number of frames of which about a third is outside the context of the last, so that even codes would differ."""
    return min(sight * 3 // 2 + 3, config.max_frames)
