"""One measurement in its own process, printed as JSON: `python benchmarks/cpu_process.py WHAT BUNDLE CHECKPOINT …`.

`cpu.py` starts fishrt's and the peers' in turn, so that none is affected by another's threads or memory.
"""

from __future__ import annotations

import json
import time
from pathlib import Path
from typing import Any

import click

from fishrt import TTS
from fishrt.bench.language_model import measure_contexts, measure_frames, measure_prefill
from fishrt.bench.measure import TEXT, measure_codec
from fishrt.bench.setup import bench_voice, open_timed
from fishrt.bundle.folder import Bundle
from fishrt.language_model.prompt import PromptBuilder
from fishrt.metrics import rtf
from fishrt.text.tokenizer import Tokenizer
from fishrt_engines.machine import peak_memory

SECONDS_PER_BYTE = 0.065
"""Seconds of English speech for a byte of text: random weights do not produce the end token in time."""


@click.command()
@click.argument("what", type=click.Choice(["ours", "frames", "fp32", "bf16", "texts"]))
@click.argument("bundle", type=click.Path(path_type=Path))
@click.argument("checkpoint", type=click.Path(path_type=Path))
@click.option("--frames", default=32)
@click.option("--threads", type=int)
@click.option("--codec/--no-codec", default=True)
@click.option("--sentences", default="1,2,4,8", help="For `texts`.")
def main(what: str, bundle: Path, checkpoint: Path, frames: int, threads: int | None, codec: bool, sentences: str) -> None:
    """Print one measurement.

    ours, fp32, bf16: the language model's frames, prefill and contexts, and the codec's decoding, by fishrt or by torch.
    frames: the language model's frames by fishrt, and nothing else. texts: RTF of whole requests of several lengths, by fishrt.
    """
    loaded = Bundle.load(bundle)
    if what == "texts":
        found = _measure_texts(loaded, [int(n) for n in sentences.split(",")], threads)
    elif what == "frames":
        found = measure_frames(loaded, open_timed(loaded, provider="cpu", threads=threads)[1], TEXT, frames)
    elif what == "ours":
        tts, engines = open_timed(loaded, provider="cpu", threads=threads)
        found = _measure(loaded, engines, tts.decode, frames, codec=codec)
    else:
        import torch

        from torch_peer import DTYPES, open_torch, open_torch_decoder

        if threads:
            torch.set_num_threads(threads)
        decode = open_torch_decoder(checkpoint, DTYPES[what]) if codec else None
        found = _measure(loaded, open_torch(checkpoint, DTYPES[what]), decode, frames, codec=codec)
    click.echo(json.dumps(found | {"peak_rss_bytes": peak_memory()}))


def _measure(bundle: Bundle, engines: Any, decode: Any, frames: int, *, codec: bool) -> dict[str, Any]:
    manifest = bundle.manifest
    found = measure_frames(bundle, engines, TEXT, frames)
    found["prefill"] = measure_prefill(manifest.language_model, engines["slow_ar"])
    found["contexts"] = measure_contexts(manifest.language_model, engines["slow_ar"])
    if codec:
        found["codec"] = measure_codec(manifest.codec, decode)
    return found


def _measure_texts(bundle: Bundle, counts: list[int], threads: int | None) -> dict[str, Any]:
    tts, voice, rows, manifest = TTS.load(bundle, threads=threads), bench_voice(bundle), [], bundle.manifest
    prompts = PromptBuilder(Tokenizer.load(bundle.tokenizer), manifest.language_model)
    tts.speak(TEXT, voice=voice, seed=0, max_frames=4)
    for count in counts:
        text = " ".join([TEXT] * count)
        pieces = len(prompts.split(text))
        frames = round(SECONDS_PER_BYTE * len(text) * manifest.codec.frame_rate / pieces)
        begun = time.perf_counter()
        speech = tts.speak(text, voice=voice, seed=0, max_frames=frames)
        seconds = time.perf_counter() - begun
        spoken = {"bytes": len(text), "pieces": pieces, "frames": speech.info.frames, "audio_s": round(speech.info.audio_s, 3)}
        rows.append({**spoken, "rtf": round(rtf(seconds, speech.info.audio_s), 4)})
    return {"texts": rows}


if __name__ == "__main__":
    main()
