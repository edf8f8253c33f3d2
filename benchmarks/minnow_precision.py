"""Word error rate of the embedded voice by precision: `python benchmarks/minnow_precision.py`.

minnow is exported by each recipe, and speaks the same held-out sentences in all of its voices with the same seeds. The codec in 8
bits gets the codes of fp32, and its audio is compared, too. Word error rates are pocketsphinx's: they compare recipes, and are no
measure of a listener's errors. Needs the `dev` extra and Debian's package flite, for the recognition of voices; writes
results/minnow-precision.json.
"""

from __future__ import annotations

import os
import sys
import tempfile
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any

import click
import numpy as np

from fishrt import TTS
from fishrt.metrics import signal_over_error
from fishrt_export import Options, export_bundle
from fishrt_export.targets.codec import decoder
from minnow_quality import CLASSIFIER_SENTENCES, SENTENCES, VOICES, flite
from quality import Recogniser, VoiceClassifier, mfcc_summary, word_errors, words
from record import write_record

CHECKPOINT = Path(__file__).parents[1] / "export/minnow"
RECIPES: dict[str, dict[str, Any]] = {
    "fp32": {},
    "int8": {"precision": "int8"},
    "int8-rows": {"precision": "int8-rows"},
    "int4": {"precision": "int4"},
    "all-int4": {"precision": "int4", "keep": {"fast_ar.*": "int4", "slow_ar.output": "int4"}},
    "codec-int8": {"codec_int8": True},
}
"""Options by name. The first recipe is the baseline."""
_DRAWS = 2000
_loaded: dict[Path, tuple[TTS, Recogniser]] = {}


@click.command(context_settings={"show_default": True})
@click.option("--count", default=130, help="Held-out sentences, each spoken in every voice.")
@click.option("--seeds", default=1, help="Seeds of each sentence.")
@click.option("--workers", default=os.cpu_count() or 1, help="Processes.")
@click.option("--out", type=click.Path(path_type=Path), help="Record to write.  [default: results/minnow-precision.json]")
def main(count: int, seeds: int, workers: int, out: Path | None) -> None:
    """Export, speak and recognise, and write the record."""
    sentences = SENTENCES.read_text().splitlines()
    examples = {v: [mfcc_summary(*flite(s, v)) for s in sentences[-CLASSIFIER_SENTENCES:]] for v in VOICES}
    classify = VoiceClassifier(examples)
    spoken = sentences[: min(count, len(sentences) - CLASSIFIER_SENTENCES)]
    with tempfile.TemporaryDirectory() as folder, ProcessPoolExecutor(workers) as pool:
        rows: dict[str, list[dict[str, Any]]] = {}
        sizes = {}
        decoder.LEAST_CHANNELS = 1  # minnow's decoder is too narrow to gain from 8 bits; here it serves to hear them
        for name, options in RECIPES.items():
            bundle = export_bundle(CHECKPOINT, Path(folder, name), Options(**options))
            sizes[name] = bundle.manifest.total_bytes
        jobs = [(Path(folder), s, v, seed) for s in spoken for v in VOICES for seed in range(seeds)]
        with click.progressbar(length=len(jobs), label="Speaking", file=sys.stderr) as bar:
            for heard in pool.map(measure, jobs):  # all recipes of a sentence together: changes of the machine's speed affect all
                for name, row in heard.items():
                    row["voice_heard"] = classify(np.array(row.pop("summary")))
                    rows.setdefault(name, []).append(row)
                bar.update(1)
    summary = {name: {"bytes": sizes[name], **summarise(rows[name], rows["fp32"])} for name in RECIPES}
    path = write_record("minnow-precision", {"seeds": seeds, "summary": summary, "utterances": rows}, out)
    for name, figures in summary.items():
        click.echo(f"{name:10} {figures}")
    click.echo(f"written to {path}")


def measure(job: tuple[Path, str, str, int]) -> dict[str, dict[str, Any]]:
    """Measure one sentence with each recipe."""
    folder, text, voice, seed = job
    rows: dict[str, dict[str, Any]] = {}
    sound = np.empty(0, np.float32)
    for name in RECIPES:
        if folder / name not in _loaded:
            _loaded[folder / name] = TTS.load(folder / name, threads=1), Recogniser()
        tts, recognise = _loaded[folder / name]
        speech = tts.speak(text, voice=voice, seed=seed)
        heard = recognise(speech.pcm, speech.sample_rate)
        rows[name] = {
            "words": len(words(text)),
            "errors": word_errors(text, heard),
            "voice": voice,
            "ended": speech.info.stop_reasons == ("end",),
            "summary": mfcc_summary(speech.pcm, speech.sample_rate).tolist(),
        }
        if name == "fp32":
            sound = speech.pcm
        elif name == "codec-int8":  # the same codes
            rows[name]["snr_db"] = signal_over_error(sound, speech.pcm)
    return rows


def summarise(rows: list[dict[str, Any]], baseline: list[dict[str, Any]]) -> dict[str, Any]:
    """Return the word error rate, and its difference to the baseline with the bootstrap interval of 95 %."""
    count, errors, others = (
        np.array([r[key] for r in of]) for of, key in ((rows, "words"), (rows, "errors"), (baseline, "errors"))
    )
    drawn = np.random.default_rng(0).integers(0, len(rows), (_DRAWS, len(rows)))
    differences = (errors - others)[drawn].sum(axis=1) / count[drawn].sum(axis=1)
    ratios = [r["snr_db"] for r in rows if "snr_db" in r]
    return {
        **({"snr_db": round(float(np.mean(ratios)), 1), "least_snr_db": round(min(ratios), 1)} if ratios else {}),
        "utterances": len(rows),
        "word_error_rate": round(float(errors.sum() / count.sum()), 4),
        "difference": round(float((errors - others).sum() / count.sum()), 4),
        "difference_95_percent": [round(float(d), 4) for d in np.quantile(differences, (0.025, 0.975))],
        "voice_recognised": round(float(np.mean([r["voice_heard"] == r["voice"] for r in rows])), 4),
        "ended_by_itself": round(float(np.mean([r["ended"] for r in rows])), 4),
    }


if __name__ == "__main__":
    main()
