"""Errors of a bundle's graphs against torch on a device, and a comparison of the frame graph's draws with the loop's.

Torch in float32, without TF32, is the reference. Torch in bfloat16 shows the error of 16 bits alone. A quantised bundle is
compared with the checkpoint's own weights, so that its errors include those of quantisation.
"""

from __future__ import annotations

import gc
import time
from collections.abc import Iterator, Mapping
from itertools import combinations
from pathlib import Path
from typing import Any

import numpy as np
import torch

from fishrt import TTS
from fishrt.arrays import Ints
from fishrt.bench.measure import TEXT
from fishrt.bench.setup import bench_prompt
from fishrt.bundle.features import USUAL, LanguageModel
from fishrt.language_model.context import ContextStore, SlowContext
from fishrt.language_model.drawing import FEW_RANKED, Draws, FrameDrawer, StepDrawer, drawn_codes
from fishrt.language_model.sampling import Sampling, SeededNoise
from fishrt_engines import Array, Engine, open_engine
from fishrt_export.sources.codec import open_codec
from torch_peer import DTYPES, open_torch, open_torch_decoder

STEPS = 8
"""Single columns after the prompt."""
FRAMES = 32
"""Frames drawn by the frame graph and by the loop."""
_CODEC_FRAMES = 64
_VOICE = 256
"""Columns of a voice of twelve seconds."""
_NEUTRAL = 0.01
"""A top_p with which nearly always only the likeliest token can be drawn."""

Outputs = dict[str, Array]


def compare_slow_ar(tts: TTS, checkpoint: Path, device: str) -> dict[str, Any]:
    """Compare a prefill and single columns: logits, hidden, and the caches at the end."""
    lm, prompt = tts.bundle.manifest.language_model, bench_prompt(tts.bundle, TEXT)
    columns = _random_columns(lm, STEPS)
    return _compare(
        _slow_outputs(tts.engines["slow_ar"], lm, prompt, columns),
        {name: _slow_outputs(engines["slow_ar"], lm, prompt, columns) for name, engines in _each_torch(checkpoint, device)},
    )


def compare_fast_ar(tts: TTS, checkpoint: Path, device: str) -> dict[str, Any]:
    """Compare the logits of every code of a frame with given codes."""
    lm = tts.bundle.manifest.language_model
    width = next(t.shape[1] for t in tts.bundle.manifest.specs["fast_ar"].feeds if t.name == "hidden")
    hidden = np.random.default_rng(1).standard_normal((1, int(width))).astype(np.float32)
    codes = _random_columns(lm, 1)[1:, 0]
    return _compare(
        _fast_outputs(open_steps(tts), lm, hidden, codes),
        {name: _fast_outputs(engines["fast_ar"], lm, hidden, codes) for name, engines in _each_torch(checkpoint, device)},
    )


def compare_drawing(tts: TTS, frame: Engine) -> dict[str, Any]:
    """Compare frames drawn by the frame graph and by the Python loop, from the same noise and the same output of the slow AR.

    The loop's columns continue the sequence. Settings are the defaults, nearly greedy ones, with which only codes of nearly equal
    probability can differ, and those with which the frame graph ranks few candidates and many.
    """
    steps = open_steps(tts)
    return {
        "loop_on": steps.provider,
        "usual": _draw_both(tts, frame, steps, Sampling()),
        "likeliest": _draw_both(tts, frame, steps, Sampling(top_p=_NEUTRAL)),
        "few ranked": _draw_both(tts, frame, steps, Sampling(top_k=FEW_RANKED)),
        "many ranked": _draw_both(tts, frame, steps, Sampling(top_k=FEW_RANKED + 1)),
    }


def compare_known_voice(tts: TTS) -> dict[str, Any]:
    """Compare the logits behind a voice that is read and behind the same voice as it is kept, and the times for both in ms."""
    lm, slow, store = tts.bundle.manifest.language_model, tts.engines["slow_ar"], ContextStore()
    head, rest = _random_columns(lm, min(_VOICE, lm.max_seq_len // 4)), _random_columns(lm, 1)
    logits, times = [], []
    for _ in range(3):  # the second copy is without first-time costs
        context = SlowContext(slow, lm.num_codebooks)
        context.reserve(head.shape[1] + 1, lm.max_seq_len // 2)
        begun = time.perf_counter()
        store.load(context, head)
        times.append(round(1e3 * (time.perf_counter() - begun), 3))
        logits.append(np.array(context.read(rest)["logits"]))
    kept = slow.traits.parts_states
    return {"columns": head.shape[1], "kept": kept, "ms": times, "logits": difference(logits[0], logits[-1])}


def compare_codec(tts: TTS, checkpoint: Path, device: str) -> dict[str, Any]:
    """Compare random codes decoded to audio, and the codes of that audio."""
    codec = tts.bundle.manifest.codec
    rng = np.random.default_rng(2)
    codes = np.stack([rng.integers(0, size, _CODEC_FRAMES) for size in codec.codebook_sizes])
    with _strict():
        expected = open_torch_decoder(checkpoint, torch.float32, device)(codes)
        module = open_codec(checkpoint).module().to(device)
        with torch.inference_mode():
            of_torch = module.encode(torch.from_numpy(expected)[None, None].to(device))[0].cpu().numpy()
    ours = tts.encode(expected, codec.sample_rate)
    return {
        "decode": difference(expected, tts.decode(codes)),
        "encode": {"codes": of_torch.size, "differ": int((of_torch != ours).sum())},
    }


def open_steps(tts: TTS) -> Engine:
    """Return the fast AR with one call for each code; with TensorRT, which has none, the CPU's."""
    fast, provider = tts.engines["fast_ar"], tts.engines["slow_ar"].provider
    if fast.spec.states:
        return fast
    spec = tts.bundle.manifest.specs["fast_ar"]
    return open_engine(tts.bundle.file(spec.file), spec, provider="cpu" if provider == "tensorrt" else provider)


def difference(expected: Array, actual: Array) -> dict[str, float]:
    """Return the largest absolute error, the largest value, and the RMS of the error ÷ the RMS of the values."""
    e, a = expected.astype(np.float64), actual.astype(np.float64)
    return {
        "max_abs_error": float(np.abs(e - a).max()),
        "max_abs": float(np.abs(e).max()),
        "relative_rms": float(np.sqrt(np.square(e - a).mean() / np.square(e).mean())),
    }


def _compare(ours: Outputs, torch_outputs: Mapping[str, Outputs]) -> dict[str, Any]:
    """Return the differences of each output between each pair of sides, the later one against the earlier."""
    sides = {**{f"torch {name}": outputs for name, outputs in torch_outputs.items()}, "ours": ours}
    return {
        f"{second} against {first}": {name: difference(sides[first][name], sides[second][name]) for name in ours}
        for first, second in combinations(sides, 2)
    }


def _each_torch(checkpoint: Path, device: str) -> Iterator[tuple[str, dict[str, Any]]]:
    """Yield torch's outputs in float32, then in bfloat16. The first model is freed before the second is loaded."""
    for name, dtype in DTYPES.items():
        with _strict():
            engines = open_torch(checkpoint, dtype, device)
            yield name, engines
        del engines
        gc.collect()
        if device == "cuda":
            torch.cuda.empty_cache()


def _strict() -> Any:
    """Compute convolutions in float32, which torch rounds to TF32 by default. Matrix products are not rounded."""
    return torch.backends.cudnn.flags(enabled=True, allow_tf32=False)


def _slow_outputs(engine: Engine, lm: LanguageModel, prompt: Ints, columns: Ints) -> Outputs:
    length, steps = prompt.shape[1], columns.shape[1]
    context = SlowContext(engine, lm.num_codebooks)
    context.reserve(length, length + steps)
    results = [{name: np.array(value) for name, value in context.read(prompt).items()}]
    for n in range(steps):
        results.append({name: np.array(value) for name, value in context.read(columns[:, n : n + 1]).items()})
    found = {f"prompt: {name}": results[0][name] for name in results[0]}
    found |= {f"steps: {name}": np.stack([result[name] for result in results[1:]]) for name in results[0]}
    caches = [context.state.read(t.name)[:, :, : length + steps].reshape(-1) for t in engine.spec.state_tensors]
    return found | {"caches": np.concatenate(caches)}


def _fast_outputs(engine: Engine, lm: LanguageModel, hidden: Array, codes: Ints) -> Outputs:
    state, known, logits = engine.new_state(batch=1), lm.num_codebooks - drawn_codes(lm), []
    for codebook in range(known, lm.num_codebooks):
        start = 0 if codebook == known else codebook
        fed = codes[max(start - 1, 0) : codebook]
        fed = np.concatenate([np.zeros(codebook + 1 - start - len(fed), np.int64), fed])
        feeds = {
            "hidden": hidden,
            "codes": fed[None],
            "position_ids": np.arange(start, codebook + 1, dtype=np.int64)[None],
            "write_index": np.array([start], np.int64),
        }
        logits.append(np.array(engine.run(feeds, state)["logits"][0]))
    return {"logits": np.stack(logits)}


def _draw_both(tts: TTS, frame: Engine, steps: Engine, sampling: Sampling) -> dict[str, Any]:
    lm, prompt = tts.bundle.manifest.language_model, bench_prompt(tts.bundle, TEXT)
    resolved = sampling.resolve(lm.sampling)
    drawers = [kind(engine, lm, 1) for kind, engine in ((StepDrawer, steps), (FrameDrawer, frame))]
    rows = [Draws(lm, resolved, SeededNoise(0), USUAL) for _ in drawers]
    for row in rows:
        row.silent = None  # the frame graph computes the codes of the end token, too
    context = SlowContext(tts.engines["slow_ar"], lm.num_codebooks)
    context.reserve(prompt.shape[1], prompt.shape[1] + FRAMES)
    mains = codes = later = 0
    column: Ints = context.rewind(prompt)
    for _ in range(FRAMES):
        results = {name: np.array(value) for name, value in context.read(column).items()}
        of_loop, of_frame = (drawer.draw(results, [row])[0].copy() for drawer, row in zip(drawers, rows, strict=True))
        differ = of_loop != of_frame
        mains += int(differ[0])
        # After a different token or code, the logits differ, too.
        if differ.any():
            codes += int(not differ[0])
            later += len(differ) - 1 - int(differ.argmax())
        for row in rows:
            row.add(of_loop)
        column = of_loop[:, None]
    return {"frames": FRAMES, "main_tokens_differ": mains, "codes_differ": codes, "not_compared": later}


def _random_columns(lm: LanguageModel, count: int) -> Ints:
    """Return random audio columns int64 [1 + C, count]."""
    rng = np.random.default_rng(3)
    main = rng.integers(lm.semantic_begin_id, lm.semantic_end_id + 1, (1, count))
    codes = rng.integers(lm.code_offset, min(lm.fast_candidates, lm.codebook_width), (lm.num_codebooks, count))
    return np.concatenate([main, codes])
