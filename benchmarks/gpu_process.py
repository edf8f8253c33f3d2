"""One part of `gpu.py` in its own process: `python benchmarks/gpu_process.py PART FINDINGS …`.

Each finding is appended to the file FINDINGS at once, as a line with a JSON object: findings survive the death of the process. A
measurement that fails is recorded as an error, and the others run nevertheless.
"""

from __future__ import annotations

import json
import time
import traceback
from collections.abc import Callable, Mapping
from dataclasses import asdict
from functools import partial
from importlib import import_module
from pathlib import Path
from types import MappingProxyType
from typing import Any

import click
import numpy as np
import torch

import gpu_graphs
from fishrt import TTS
from fishrt.bench.language_model import measure_contexts, measure_frames, measure_prefill
from fishrt.bench.measure import TEXT, BenchRequest, measure_codec, measure_requests
from fishrt.bench.setup import SPEAKING, TimedEngine, bytes_read
from fishrt.bundle.features import LanguageModel
from fishrt.bundle.folder import Bundle
from fishrt.errors import FishrtError
from fishrt.language_model.batch import Batch, DualAR
from fishrt.language_model.context import FIRST_FRAMES
from fishrt.language_model.drawing import MOST_RANKED, drawn_codes, ranks
from fishrt.language_model.sampling import Sampling, SeededNoise, main_ids
from fishrt.metrics import Summary, frame_bytes, per_second, rtf
from fishrt_engines import Array, Engine, GraphSpec, open_engine
from fishrt_engines.machine import device_memory, features, peak_memory
from fishrt_engines.providers import import_onnxruntime
from torch_peer import COMPILED, DTYPES, load_torch, open_torch_decoder, open_torch_frames

SIDES = ("ours", "eager", "compiled")
CONTEXT = 512
"""Positions before the first measured step of a batch: a voice of ten seconds, a sentence, and some speech."""
NOISES = 4
"""Sets of noise that the frames of a batch use in turn: copying noise to the device is measured, drawing it is not."""
WARM_UP = 4
SLOTS = 8
"""Rows at once of `fishrt serve`, by default."""
COPIED = 1 << 31
"""Bytes of the copy that measures the device's bandwidth."""
_COPIES = 20
TORCH_DTYPE = "bf16"


class Findings:
    """The file of findings."""

    def __init__(self, path: Path) -> None:
        self._path = path

    def put(self, name: str, value: Any) -> None:
        with self._path.open("a") as file:
            file.write(json.dumps({name: value}) + "\n")

    def attempt(self, name: str, work: Callable[[], Any]) -> None:
        """Append the result of `work`, or its error."""
        try:
            self.put(name, work())
        except Exception as error:
            traceback.print_exc()
            self.put(name, {"error": f"{type(error).__name__}: {error}"})


def read_findings(path: Path) -> dict[str, Any]:
    """Return the findings of a file. An incomplete last line is ignored; a missing file has none."""
    found: dict[str, Any] = {}
    for line in path.read_text().splitlines() if path.is_file() else ():
        try:
            found |= json.loads(line)
        except ValueError:
            break
    return found


@click.command()
@click.argument("part", type=click.Choice(["copies", "graphs", "batches", "speech", *SIDES]))
@click.argument("findings", type=click.Path(path_type=Path))
@click.option("--bundle", type=click.Path(path_type=Path))
@click.option("--checkpoint", type=click.Path(path_type=Path))
@click.option("--provider", default="cuda")
@click.option("--frames", default=64)
@click.option("--most-batch", default=64)
def main(
    part: str, findings: Path, bundle: Path | None, checkpoint: Path | None, provider: str, frames: int, most_batch: int
) -> None:
    """Measure one part.

    copies: copy bandwidth of the device. graphs: correctness. batches: of 1, 2, 4, … speech: loading, whole requests, the codec.
    ours, eager, compiled: frames of one sequence, by fishrt or by torch.
    """
    memory, found, device = _Memory(), Findings(findings), "cpu" if provider == "cpu" else "cuda"
    if part == "copies":
        found.attempt("libraries", lambda: _libraries(provider))
        found.attempt("copy_gb_s", lambda: round(copy_bandwidth(device) / 1e9, 1))
        return
    assert bundle is not None
    assert checkpoint is not None
    loaded = Bundle.load(bundle)
    if part == "graphs":
        _graphs(found, loaded, checkpoint, provider, device)
    elif part == "batches":
        _batches(found, loaded, provider, frames, most_batch, memory)
    elif part == "speech":
        _speech(found, loaded, provider, frames)
    else:
        _turn(found, part, loaded, checkpoint, provider, device, frames)
    found.put("memory", memory.taken())


def copy_bandwidth(device: str) -> float:
    """Return bytes a second, read and written, of copies within the device's memory: the best of several, as an upper limit."""
    size = COPIED if device == "cuda" else COPIED >> 5
    source, target = (torch.zeros(size, dtype=torch.uint8, device=device) for _ in range(2))
    best = float("inf")
    for _ in range(_COPIES):
        begun = time.perf_counter()
        target.copy_(source)
        if device == "cuda":
            torch.cuda.synchronize()
        best = min(best, time.perf_counter() - begun)
    return per_second(2 * size, best)


def open_frame(tts: TTS) -> Engine:
    """Open the frame graph, even if the provider's loop does not use it."""
    engine = tts.engines["fast_ar"]
    if not engine.spec.states:
        return engine
    form = tts.bundle.manifest.graphs["fast_ar"].form("tensorrt", ())
    if form is None:
        hint = "export it with `fishrt export --target cuda`"
        raise FishrtError(f"{tts.bundle.manifest.name} has no frame graph", hint=hint)
    return open_engine(tts.bundle.file(form.spec.file), form.spec, provider=engine.provider)


def _libraries(provider: str) -> dict[str, Any]:
    """Return versions of the loaded libraries: of several installed distributions, only one is loaded."""
    loaded = {"torch": torch.__version__, "cuda of torch": torch.version.cuda, "cudnn of torch": torch.backends.cudnn.version()}
    if provider == "tensorrt":
        return {**loaded, "tensorrt": import_module("tensorrt").__version__}
    ort = import_onnxruntime(provider)
    return {**loaded, "onnxruntime": ort.__version__, "cuda of onnxruntime": getattr(ort, "cuda_version", None)}


class _Memory:
    """Memory of this process, and on the device if it can be read."""

    def __init__(self) -> None:
        self._before = device_memory()

    def taken(self) -> dict[str, int | None]:
        now = device_memory()
        used = self._before[0] - now[0] if self._before and now else None
        return {"device_bytes": used, "peak_rss_bytes": peak_memory()}


def _graphs(found: Findings, bundle: Bundle, checkpoint: Path, provider: str, device: str) -> None:
    tts = TTS.load(bundle, provider=provider)
    found.attempt("computed_in", lambda: _precision(bundle, provider))
    found.attempt("frame", lambda: gpu_graphs.compare_drawing(tts, open_frame(tts)))
    found.attempt("fast_ar", lambda: gpu_graphs.compare_fast_ar(tts, checkpoint, device))
    found.attempt("known_voice", lambda: gpu_graphs.compare_known_voice(tts))
    found.attempt("slow_ar", lambda: gpu_graphs.compare_slow_ar(tts, checkpoint, device))
    found.attempt("codec", lambda: gpu_graphs.compare_codec(tts, checkpoint, device))


def _precision(bundle: Bundle, provider: str) -> str:
    """Return the precision of the language model's products."""
    graph = bundle.manifest.graphs["slow_ar"]
    if provider == "tensorrt":
        from fishrt_engines.trt.engine import find_built

        return find_built(bundle.file(graph.spec.file), graph.spec).key.lowering.precision
    form = graph.form(provider, features(provider))
    return (graph.spec if form is None else form.spec).state_tensors[0].dtype  # products have the type of the caches


def _batches(found: Findings, bundle: Bundle, provider: str, frames: int, most: int, memory: _Memory) -> None:
    tts = TTS.load(bundle, provider=provider)
    bundle = tts.bundle
    found.attempt("weights", lambda: _weights(bundle, provider))
    begun = time.perf_counter()
    slow, frame = tts.engines["slow_ar"], open_frame(tts)
    found.put("load_s", round(time.perf_counter() - begun, 3))
    if slow.traits.parts_states:
        found.attempt("slots_s", lambda: _slots(DualAR(slow, frame, bundle.manifest.language_model)))
    batch = 1
    while batch <= most:
        # Larger batches would fail, too, after a long time.
        try:
            row = measure_batch(slow, frame, bundle, batch, frames)
        except Exception as error:
            traceback.print_exc()
            found.put(f"batch {batch}", {"error": f"{type(error).__name__}: {error}"})
            return
        found.put(f"batch {batch}", {**row, "memory": memory.taken()})
        batch *= 2


def _slots(model: DualAR) -> list[float]:
    """Return the seconds to make SLOTS slots for rows: the first time, when calls are captured, and again."""
    times = []
    for _ in range(2):
        begun = time.perf_counter()
        Batch(model, SLOTS)
        times.append(round(time.perf_counter() - begun, 3))
    return times


def measure_batch(slow: Engine, frame: Engine, bundle: Bundle, batch: int, frames: int) -> dict[str, Any]:
    """Measure frames of `batch` sequences at once, from position CONTEXT on, with a cache of the loop's size.

    frame: a step of the slow AR and a call of the frame graph, from the last frame's columns to the next on the host. slow_step,
    frame_call: each alone, with its results on the host. frame_call_most_ranked: with as many candidates ranked as it ever does.
    """
    manifest = bundle.manifest
    lm, rate = manifest.language_model, manifest.codec.frame_rate
    steps = 2 * (WARM_UP + frames)
    start = max(0, min(CONTEXT, lm.max_seq_len - steps))
    rows = min(lm.max_seq_len, start + max(FIRST_FRAMES, steps))
    state = slow.new_state(batch=batch, cache=rows)
    noises, drawing = _noises(frame.spec, lm, batch)
    columns = np.zeros((batch, 1 + lm.num_codebooks, 1), np.int64)
    columns[:, 0], columns[:, 1:] = lm.semantic_begin_id, lm.code_offset
    position = start

    def step(resident: tuple[str, ...]) -> dict[str, Any]:
        nonlocal position
        index = np.full(batch, position, np.int64)
        position += 1
        feeds = {"prompt": columns, "position_ids": index[:, None], "write_index": index, "last_index": np.zeros(batch, np.int64)}
        return slow.run(feeds, state, resident)

    def draw(results: Mapping[str, Any], n: int, ranked: Mapping[str, Array] = MappingProxyType({})) -> Array:
        feeds = {**noises[n % NOISES], **ranked, "logits": results["logits"], "hidden": results["hidden"]}
        column: Array = frame.run(feeds)["column"]
        if column.min() < 0:
            raise ValueError("logits are not finite")
        return column

    whole, alone, calls, widest = [], [], [], []
    most_ranked = ranks(lm, MOST_RANKED)
    for n in range(WARM_UP + frames):
        begun = time.perf_counter()
        results = step(("logits", "hidden"))
        columns = np.ascontiguousarray(draw(results, n)[:, :, None])
        whole.append(time.perf_counter() - begun)
        begun = time.perf_counter()
        draw(results, n)
        calls.append(time.perf_counter() - begun)
        begun = time.perf_counter()
        draw(results, n, most_ranked)
        widest.append(time.perf_counter() - begun)
        begun = time.perf_counter()
        step(())
        alone.append(time.perf_counter() - begun)
    frame_times = Summary.of(whole[WARM_UP:])
    return {
        "batch": batch,
        "context": start,
        "cache": rows,
        "frame": asdict(frame_times),
        "slow_step": asdict(Summary.of(alone[WARM_UP:])),
        "frame_call": asdict(Summary.of(calls[WARM_UP:])),
        "frame_call_most_ranked": asdict(Summary.of(widest[WARM_UP:])),
        "noise_ms": round(1e3 * drawing, 3),
        "frames_per_s": round(per_second(batch, frame_times.median_s), 2),
        "acoustic_tokens_per_s": round(per_second(batch * lm.num_codebooks, frame_times.median_s), 1),
        "rtf": round(rtf(frame_times.median_s, 1 / rate), 4),
    }


def _noises(spec: GraphSpec, lm: LanguageModel, batch: int) -> tuple[list[dict[str, Array]], float]:
    """Return feeds of the frame graph with default settings, without logits and hidden, and the seconds to draw one noise."""
    sampling = Sampling().resolve(lm.sampling)
    assert sampling.temperature is not None
    settings: dict[str, Any] = {
        "temperature": sampling.temperature,
        "top_p": sampling.top_p,
        "top_k": sampling.top_k or max(len(main_ids(lm)), lm.fast_candidates),
        "recent": -1,
        "penalty": sampling.repetition_penalty,
        "least_code": lm.code_offset,
    }
    made, seconds, noise, rng = [], 0.0, SeededNoise(batch), np.random.default_rng(batch)
    for _ in range(NOISES):
        feeds = ranks(lm, settings["top_k"])
        for t in spec.inputs:
            if t.name in feeds:
                continue
            shape = t.resolve({"batch": batch})
            if t.name.endswith("noise"):
                begun = time.perf_counter()
                feeds[t.name] = np.stack([noise.fast(shape[-1]) for _ in range(shape[0] * shape[1])]).reshape(shape)
                seconds += time.perf_counter() - begun
            elif t.name.startswith("penalised"):
                most = lm.fast_candidates if t.name == "penalised_codes" else len(main_ids(lm))
                feeds[t.name] = rng.integers(0, most, shape)
            elif t.name in settings:
                feeds[t.name] = np.full(shape, settings[t.name], t.dtype)
        made.append(feeds)
    return made, seconds / NOISES


def _weights(bundle: Bundle, provider: str) -> dict[str, int]:
    """Return the bytes of weights read by a step of the slow AR, a step of the fast AR, and a frame."""
    manifest = bundle.manifest
    width = 4.0 if _precision(bundle, provider) == "float32" else 2.0
    slow, fast = (bytes_read(bundle.file(manifest.specs[role].file), width) for role in ("slow_ar", "fast_ar"))
    steps = drawn_codes(manifest.language_model)
    return {"slow_bytes": slow, "fast_bytes": fast, "fast_steps": steps, "frame_bytes": round(frame_bytes(slow, fast, steps))}


def _speech(found: Findings, bundle: Bundle, provider: str, frames: int) -> None:
    begun = time.perf_counter()
    tts = TTS.load(bundle, provider=provider)
    for role in SPEAKING:
        tts.engines[role]
    found.put("load_s", round(time.perf_counter() - begun, 3))
    found.attempt("requests", lambda: measure_requests(tts, BenchRequest(provider, frames=frames)))
    found.attempt("codec", lambda: measure_codec(bundle.manifest.codec, tts.decode, tts.encode))


def _turn(found: Findings, side: str, bundle: Bundle, checkpoint: Path, provider: str, device: str, frames: int) -> None:
    lm = bundle.manifest.language_model
    if side == "ours":
        tts = TTS.load(bundle, provider=provider)
        bundle, decode = tts.bundle, tts.decode
        engines = {"slow_ar": TimedEngine(tts.engines["slow_ar"]), "fast_ar": TimedEngine(open_frame(tts))}
    else:
        dtype = DTYPES[TORCH_DTYPE]
        # Without a device, only the code path is checked: no kernels are compiled.
        options = COMPILED if device == "cuda" else {"backend": "eager"}
        engines = open_torch_frames(load_torch(checkpoint, dtype, device), lm, options if side == "compiled" else None)
        decode = open_torch_decoder(checkpoint, dtype, device)
    found.attempt("frames", partial(_frames, bundle, engines, frames))
    found.attempt("prefill", lambda: measure_prefill(lm, engines["slow_ar"]))
    if side == "compiled":
        # Each size of a cache would be compiled for minutes. The codec is eager here, too.
        found.put("compiler", _compiler())
        return
    found.attempt("contexts", lambda: measure_contexts(lm, engines["slow_ar"]))
    found.attempt("codec", lambda: measure_codec(bundle.manifest.codec, decode))


def _frames(bundle: Bundle, engines: Mapping[str, TimedEngine], frames: int) -> dict[str, Any]:
    """Return times of the loop. Calls with resident results are only in the total, since torch does not wait for them."""
    begun = time.perf_counter()
    found = measure_frames(bundle, engines, TEXT, frames)
    kept = ("frame", "frames_per_s", "prompt_columns")
    return {
        **{name: found[name] for name in kept},
        "rtf": round(rtf(1 / found["frames_per_s"], 1 / bundle.manifest.codec.frame_rate), 4),
        "with_warm_up_s": round(time.perf_counter() - begun, 1),
    }


def _compiler() -> dict[str, Any]:
    """Return the numbers of compiled graphs, and of those not captured, which should be 0 on a device."""
    from torch._dynamo.utils import counters

    return {
        "graphs": counters["stats"]["unique_graphs"],
        "graph_breaks": sum(counters["graph_break"].values()),
        "cudagraph_skips": counters["inductor"]["cudagraph_skips"],
    }


if __name__ == "__main__":
    main()
