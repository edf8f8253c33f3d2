"""Measurements of one bundle: loading, each graph, the loop, and whole requests.

Everything runs once before it is timed. Times of graphs are taken in the engines during real work. Loading and memory are
measured in separate processes, with a separate folder of optimised graphs.
"""

from __future__ import annotations

import tempfile
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from fishrt_engines.machine import usable_threads

from ..arrays import Ints, Pcm
from ..bundle.features import Codec
from ..bundle.folder import Bundle
from ..errors import SamplingError
from ..metrics import Summary, bandwidth_share, frame_bytes, per_second, rtf
from ..progress import Progress
from ..speaking.stream import without_warnings
from ..tts import TTS
from ..voices.voice import Voice
from .child import run_child
from .language_model import PREFILL, REPEATS, measure_batches, measure_contexts, measure_frames, measure_prefill
from .setup import bench_prompt, bench_voice, bytes_read, describe_machine, made_up_voice, open_timed, read_bandwidth

TEXT = "The birch canoe slid on the smooth planks, and the small dog ran after it."
_CODEC_SECONDS = 3.0


@dataclass(frozen=True, slots=True)
class BenchRequest:
    """Settings of the measurements."""

    provider: str = "auto"
    threads: int | None = None
    """For each graph; None means the physical cores."""
    text: str = TEXT
    frames: int = 64
    """Frames of each timed generation, unless the model ends before."""
    batch: tuple[int, ...] = ()
    """Sizes of batches to measure."""

    def __post_init__(self) -> None:
        if self.frames < 2:
            raise SamplingError(f"{self.frames} frames to measure", hint="at least 2: the first is part of the prefill")


def bench(bundle: Bundle, request: BenchRequest, progress: Progress = lambda *_: None) -> dict[str, Any]:
    """Return all measurements of one bundle, ready for JSON; `metrics.py` and the functions below define the entries.

    progress: the parts of the time are those of the embedded voice.
    Raises FishrtError as `TTS.load` and `TTS.speak` do.
    """
    bench_prompt(bundle, request.text)  # raises for a bad text now, not minutes later
    progress("read bandwidth", 0.0)
    machine = describe_machine()
    threads = usable_threads(request.threads)
    limit = read_bandwidth(threads)
    found: dict[str, Any] = {
        "bundle": _describe(bundle),
        "request": {**asdict(request), "prefill_columns": PREFILL, "repeats": REPEATS, "warm_up": "each measure once"},
    }
    progress("loading, in separate processes", 0.1)
    found |= _measure_processes(bundle, request)
    tts, engines = open_timed(bundle, provider=request.provider, threads=request.threads)
    progress("frames", 0.5)
    found |= measure_frames(bundle, engines, request.text, request.frames)
    found["batches"] = measure_batches(bundle, engines, request.text, request.frames, request.batch)
    progress("prefill and contexts", 0.54)
    lm, slow = bundle.manifest.language_model, engines["slow_ar"]
    found |= {"prefill": measure_prefill(lm, slow), "contexts": measure_contexts(lm, slow)}
    progress("codec", 0.55)
    found["codec"] = measure_codec(bundle.manifest.codec, tts.decode, tts.encode)
    progress("requests", 0.63)
    found |= measure_requests(tts, request)
    # Measured twice: other programs may have slowed the first measurement.
    limit = max(limit, read_bandwidth(threads))
    found["machine"] = {**machine, "read_gb_s": round(limit / 1e9, 2)}
    found["weights"] = _measure_bandwidth(bundle, found, limit)
    return found


def _describe(bundle: Bundle) -> dict[str, Any]:
    manifest = bundle.manifest
    return {
        "name": manifest.name,
        "precision": {role: graph.precision for role, graph in manifest.graphs.items()},
        "bytes": manifest.total_bytes,
        "codebooks": manifest.language_model.num_codebooks,
        "frame_rate": manifest.codec.frame_rate,
    }


def _measure_processes(bundle: Bundle, request: BenchRequest) -> dict[str, Any]:
    """Measure a cold start, without optimised graphs on disk (the system may cache the files), then cached starts."""
    with tempfile.TemporaryDirectory() as folder:
        cache = Path(folder)

        def start(frames: int = 0) -> Any:
            return run_child(
                bundle.path,
                provider=request.provider,
                threads=request.threads,
                cache=cache,
                text=request.text,
                frames=frames,
            )

        cold = start()
        cached = [start() for _ in range(3)]
        speaking = start(request.frames)
    return {
        "load": {"cold_s": round(cold.load_s, 3), "cached_s": round(float(np.median([c.load_s for c in cached])), 3)},
        "memory": {
            "cold_load_peak_bytes": cold.peak_rss_bytes,
            "cached_load_peak_bytes": cached[-1].peak_rss_bytes,
            "speaking_peak_bytes": speaking.peak_rss_bytes,
        },
    }


def _measure_bandwidth(bundle: Bundle, found: dict[str, Any], limit: float) -> dict[str, Any]:
    """Return the bytes of weights that the steps read, their bandwidth, and its share of the machine's, `limit`."""
    graphs = bundle.manifest.graphs
    slow, fast = (bytes_read(bundle.file(graphs[role].spec.file)) for role in ("slow_ar", "fast_ar"))
    total = frame_bytes(slow, fast, found["fast_steps_per_frame"])
    slow_s, frame_s = (found[name]["median_ms"] / 1e3 for name in ("slow_step", "frame"))
    return {
        "slow_bytes": slow,
        "fast_bytes": fast,
        "frame_bytes": round(total),
        "slow_gb_s": round(per_second(slow, slow_s) / 1e9, 2),
        "frame_gb_s": round(per_second(total, frame_s) / 1e9, 2),
        "slow_share": round(bandwidth_share(slow, slow_s, limit), 4),
        "frame_share": round(bandwidth_share(total, frame_s, limit), 4),
    }


def measure_codec(
    codec: Codec, decode: Callable[[Ints], object], encode: Callable[[Pcm, int], object] | None = None
) -> dict[str, Any]:
    """Measure both directions, or decoding alone, on random input of _CODEC_SECONDS. decode, encode: those of a TTS."""
    rng = np.random.default_rng(0)
    frames = round(_CODEC_SECONDS * codec.frame_rate)
    audio_s = frames / codec.frame_rate
    codes = np.stack([rng.integers(0, size, frames) for size in codec.codebook_sizes])
    pcm = rng.uniform(-0.5, 0.5, frames * codec.hop).astype(np.float32)
    times = {"decode": _timed(lambda: decode(codes))}
    if encode is not None:
        times["encode"] = _timed(lambda: encode(pcm, codec.sample_rate))
    return {
        "audio_s": round(audio_s, 3),
        **{name: {**asdict(time), "rtf": round(rtf(time.median_s, audio_s), 4)} for name, time in times.items()},
    }


def measure_requests(tts: TTS, request: BenchRequest) -> dict[str, Any]:
    """Measure whole requests, from text to waveform. A known voice has spoken before; a new one has not."""
    with without_warnings():  # the limit of frames cuts requests off on purpose
        return _measure_requests(tts, request)


def _measure_requests(tts: TTS, request: BenchRequest) -> dict[str, Any]:
    voice, manifest = bench_voice(tts.bundle), tts.bundle.manifest
    speech = tts.speak(request.text, voice=voice, seed=0, max_frames=request.frames)
    speaking = _timed(lambda: tts.speak(request.text, voice=voice, seed=0, max_frames=request.frames), warm_up=False)

    def first_audio(asked: Voice) -> None:
        for chunk in tts.stream(request.text, voice=asked, seed=0, max_frames=request.frames):
            if len(chunk.pcm):
                return  # which closes the stream

    known = _timed(partial(first_audio, voice))
    new = Summary.of([_seconds(partial(first_audio, made_up_voice(manifest, seed))) for seed in range(1, 4)])
    return {
        "speak": {
            **asdict(speaking),
            "audio_s": round(speech.info.audio_s, 3),
            "frames": speech.info.frames,
            "rtf": round(rtf(speaking.median_s, speech.info.audio_s), 4),
        },
        "ttfa": {"known_voice": asdict(known), "new_voice": asdict(new)},
    }


def _timed(work: Callable[[], object], *, warm_up: bool = True) -> Summary:
    if warm_up:
        work()
    return Summary.of([_seconds(work) for _ in range(REPEATS)])


def _seconds(work: Callable[[], object]) -> float:
    begun = time.perf_counter()
    work()
    return time.perf_counter() - begun
