"""One side's turn of `diffusion.py` in its own process, printed as JSON: `diffusion_process.py SIDE PLACE`.

SIDE: the precision of the bundle PLACE; or torch-fp32 or torch-bf16, with the checkpoint PLACE.
"""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from fishrt_engines import GraphSpec
from fishrt_engines.machine import default_threads, peak_memory

SAMPLE_FRAMES = 640
TEXT_TOKENS = 200
VOICE_FRAMES = 216
FIRST = {"frames": 32, "steps": 8}
"""The first block of a stream."""
_TEXT = "The birch canoe slid on the smooth planks, and the small dog ran after it."


def feeds(spec: GraphSpec, frames: int, rows: int) -> dict[str, Any]:
    """Return random inputs of the denoiser, in the order of its spec."""
    rng, patch = np.random.default_rng(0), 4
    dims = {"batch": 1, "rows": rows, "frames": frames, "tokens": TEXT_TOKENS, "patches": VOICE_FRAMES // patch, "prefix": 1}
    found: dict[str, Any] = {}
    for tensor in spec.inputs:
        shape = [dims.get(size, size) if isinstance(size, str) else size for size in tensor.shape]
        if tensor.dtype == "bool":
            found[tensor.name] = np.full(shape, tensor.name != "latent_mask")
        elif tensor.dtype == "int64":
            found[tensor.name] = np.arange(shape[1], dtype=np.int64)[None]
        else:
            found[tensor.name] = rng.standard_normal(shape).astype(np.float32)
    return found


def calls(spec: GraphSpec, run: Callable[[Mapping[str, Any]], object]) -> dict[str, float]:
    """Return milliseconds of each call; those of a block are the least of three."""
    found = {}
    run(feeds(spec, FIRST["frames"], 3))
    for what, frames, repeats in (("block", FIRST["frames"], 3), ("whole", SAMPLE_FRAMES, 1)):
        for rows in (1, 3):
            given = feeds(spec, frames, rows)
            found[f"{what}_{rows}_ms"] = min(milliseconds(lambda given=given: run(given)) for _ in range(repeats))
    return found


def milliseconds(call: Callable[[], object]) -> float:
    begun = time.perf_counter()
    call()
    return round(1e3 * (time.perf_counter() - begun), 2)


def ours(bundle: str) -> dict[str, Any]:
    """Measure a bundle: a stream up to its first block first, so that its memory is that of speaking alone."""
    from fishrt import TTS, Denoising
    from fishrt.codec import CodecDecoder

    tts, found = TTS.load(bundle, provider="cpu"), {}
    codec, channels = tts.bundle.manifest.codec, tts.bundle.manifest.diffusion.channels
    rest = SAMPLE_FRAMES - FIRST["frames"]
    settings = Denoising(steps=FIRST["steps"], blocks=(FIRST["frames"], rest), early_stop=False)
    for name in ("load_s", "first_audio_s"):  # the first request opens the graphs
        begun = time.perf_counter()
        stream = tts.stream(_TEXT, seed=0, denoising=settings)
        next(chunk for chunk in stream if len(chunk))
        found[name] = round(time.perf_counter() - begun, 3)
        stream.close()
    found["peak_bytes"] = peak_memory()
    engines, rng = tts.engines, np.random.default_rng(0)
    once = {
        "text": {"tokens": np.ones((1, TEXT_TOKENS), np.int64), "mask": np.ones((1, TEXT_TOKENS), bool)},
        "speaker": {"latents": rng.standard_normal((1, VOICE_FRAMES, channels)).astype(np.float32)},
    }
    for name, role in (("text", "text"), ("voice", "speaker")):
        found[f"{name}_ms"] = min(milliseconds(lambda role=role: engines[f"{role}_cond"].run(once[role])) for _ in range(2))
    found["schedule_ms"] = milliseconds(lambda: engines["schedule"].run({"t": np.linspace(0.999, 0, 20, dtype=np.float32)}))
    decoder = CodecDecoder(engines["codec_decode"], codec)
    latents = rng.standard_normal((SAMPLE_FRAMES, channels)).astype(np.float32)
    found["decode_s"] = round(milliseconds(lambda: decoder.decode(latents)) / 1e3, 3)
    denoise = engines["denoise"]
    return found | calls(denoise.spec, denoise.run)


def torchs(checkpoint: str, dtype: str) -> dict[str, Any]:
    """Measure the exporter's torch module of the denoiser."""
    import torch

    from fishrt_export.checkpoint.weights import load
    from fishrt_export.sources.echo import open_echo

    torch.set_num_threads(default_threads())
    source, _ = open_echo(Path(checkpoint))
    job = next(job for job in source.jobs() if job.role == "denoise")
    module = load(job.build(), job.weights).eval()
    if dtype == "bf16":
        module = module.bfloat16()

    def run(given: Mapping[str, Any]) -> object:
        tensors = [torch.from_numpy(array) for array in given.values()]
        if dtype == "bf16":
            tensors = [tensor.bfloat16() if tensor.is_floating_point() else tensor for tensor in tensors]
        with torch.inference_mode(), torch.autocast("cpu", torch.bfloat16, enabled=dtype == "bf16"):
            return module(*tensors)

    return calls(job.spec, run)


if __name__ == "__main__":
    side, place = sys.argv[1:]
    kind, _, dtype = side.partition("-")
    print(json.dumps(torchs(place, dtype) if kind == "torch" else ours(place)))
