"""Word error rate of the embedded voice and of flite, its teacher: `python benchmarks/minnow_quality.py`.

Each held-out sentence is spoken by flite and by minnow in the same voice. Word error rates are pocketsphinx's: they compare the
two, and are no measure of a listener's errors. Needs the `dev` extra and Debian's package flite; writes
results/minnow-quality.json.
"""

from __future__ import annotations

import io
import os
import subprocess
import sys
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any

import click
import numpy as np
import soundfile

from fishrt import TTS
from fishrt.metrics import rtf
from quality import Recogniser, VoiceClassifier, mfcc_summary, word_errors, words
from record import write_record

SENTENCES = Path(__file__).parent / "held_out.txt"
VOICES = ("slt", "rms", "awb")
CLASSIFIER_SENTENCES = 30
"""Sentences from the end of the list for the classifier; minnow does not speak them."""


@click.command(context_settings={"show_default": True})
@click.option("--bundle", type=click.Path(path_type=Path), help="Bundle to measure.  [default: the embedded one]")
@click.option("--count", default=120, help="Held-out sentences, spoken by the three voices in turn.")
@click.option("--workers", default=os.cpu_count() or 1, help="Processes.")
@click.option("--out", type=click.Path(path_type=Path), help="Record to write.  [default: results/minnow-quality.json]")
def main(bundle: Path | None, count: int, workers: int, out: Path | None) -> None:
    """Speak and recognise, and write the record."""
    sentences = SENTENCES.read_text().splitlines()
    if count > len(sentences) - CLASSIFIER_SENTENCES:
        raise click.UsageError(f"--count {count}: the list has {len(sentences) - CLASSIFIER_SENTENCES} sentences to speak")
    examples = {v: [mfcc_summary(*flite(s, v)) for s in sentences[-CLASSIFIER_SENTENCES:]] for v in VOICES}
    jobs = [(bundle, s, VOICES[n % len(VOICES)], n) for n, s in enumerate(sentences[:count])]
    with (
        ProcessPoolExecutor(workers) as pool,
        click.progressbar(length=count, label="Speaking", file=sys.stderr) as bar,
    ):
        rows = []
        for row in pool.map(measure, jobs):
            rows.append(row)
            bar.update(1)
    classify = VoiceClassifier(examples)
    for row in rows:
        row["voice_heard"] = classify(np.array(row.pop("summary")))
        row["flite_voice_heard"] = classify(np.array(row.pop("flite_summary")))
    summary = summarise(rows)
    path = write_record("minnow-quality", {"summary": summary, "sentences": rows}, out)
    for key, value in summary.items():
        click.echo(f"{key:34} {value}")
    click.echo(f"written to {path}")


def measure(job: tuple[Path | None, str, str, int]) -> dict[str, Any]:
    """Measure one sentence of flite and of minnow."""
    bundle, text, voice, seed = job
    tts, recognise = _tools(bundle)
    reference, rate = flite(text, voice)
    speech = tts.speak(text, voice=voice, seed=seed)
    heard, flite_heard = recognise(speech.pcm, speech.sample_rate), recognise(reference, rate)
    return {
        "text": text,
        "voice": voice,
        "seed": seed,
        "words": len(words(text)),
        "heard": heard,
        "errors": word_errors(text, heard),
        "flite_heard": flite_heard,
        "flite_errors": word_errors(text, flite_heard),
        "seconds": round(speech.info.audio_s, 3),
        "flite_seconds": round(len(reference) / rate, 3),
        "compute_s": round(speech.info.timings.compute_s, 3),
        "stop_reasons": speech.info.stop_reasons,
        "summary": mfcc_summary(speech.pcm, speech.sample_rate).tolist(),
        "flite_summary": mfcc_summary(reference, rate).tolist(),
    }


def summarise(rows: list[dict[str, Any]]) -> dict[str, Any]:
    """Return the figures that the README quotes."""
    spoken = sum(r["words"] for r in rows)
    wer, flite_wer = (sum(r[key] for r in rows) / spoken for key in ("errors", "flite_errors"))
    ratios = np.array([r["seconds"] / r["flite_seconds"] for r in rows])
    return {
        "sentences": len(rows),
        "word_error_rate": round(wer, 4),
        "flite_word_error_rate": round(flite_wer, 4),
        "difference": round(wer - flite_wer, 4),
        "voice_recognised": round(float(np.mean([r["voice_heard"] == r["voice"] for r in rows])), 4),
        "flite_voice_recognised": round(float(np.mean([r["flite_voice_heard"] == r["voice"] for r in rows])), 4),
        "duration_within_30_percent": round(float(np.mean(np.abs(ratios - 1) <= 0.3)), 4),
        "stopped_by_end_token": round(float(np.mean([all(s == "end" for s in r["stop_reasons"]) for r in rows])), 4),
        "rtf": round(rtf(sum(r["compute_s"] for r in rows), sum(r["seconds"] for r in rows)), 4),
    }


def flite(text: str, voice: str) -> tuple[np.ndarray, int]:
    """Return flite's audio: float32 [samples], and its sample rate in Hz."""
    done = subprocess.run(["flite", "-voice", voice, "-t", text, "-o", "/dev/stdout"], capture_output=True, check=True)
    pcm, rate = soundfile.read(io.BytesIO(done.stdout), dtype="float32")
    return pcm, rate


_loaded: dict[Path | None, tuple[TTS, Recogniser]] = {}


def _tools(bundle: Path | None) -> tuple[TTS, Recogniser]:
    """Return the TTS and the recogniser, loaded once in each process."""
    if bundle not in _loaded:
        _loaded[bundle] = TTS.load(bundle, threads=1), Recogniser()
    return _loaded[bundle]


if __name__ == "__main__":
    main()
