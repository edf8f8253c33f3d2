"""The corpus spoken by flite: one flat file of 16 kHz PCM and an index, both reproducible from the seed.

The voices are flite's `slt`, `rms` and `awb`, which Carnegie Mellon University distributes under a BSD-style licence.
"""

from __future__ import annotations

import json
import subprocess
import tempfile
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
import soundfile

from .corpus import Sentence, build_corpus

SAMPLE_RATE = 16_000
VOICES = ("slt", "rms", "awb")


@dataclass(frozen=True, slots=True)
class Utterance:
    """One spoken sentence: `length` samples at `start` in the PCM file."""

    text: str
    source: str
    held_out: bool
    voice: str
    start: int
    length: int
    phones: list[tuple[str, float]]
    """Each phone with the time of its end, in seconds; `pau` is silence."""


def flite(text: str, voice: str) -> tuple[np.ndarray, list[tuple[str, float]]]:
    """Return `text` spoken by a flite voice, int16 [samples] at 16 kHz, mono, and each phone with its end in seconds."""
    with tempfile.NamedTemporaryFile(suffix=".wav") as wav:
        command = ["flite", "-voice", voice, "-psdur", "-t", text, "-o", wav.name]
        printed = subprocess.run(command, capture_output=True, check=True, text=True).stdout
        pcm, rate = soundfile.read(wav.name, dtype="int16")
    if rate != SAMPLE_RATE or pcm.ndim != 1:
        raise RuntimeError(f"flite voice {voice} gives {rate} Hz, {pcm.ndim} axes; expected mono at {SAMPLE_RATE} Hz")
    phones = [(name, float(end)) for name, _, end in (pair.partition(":") for pair in printed.split())]
    return np.asarray(pcm), phones


class SpeechData:
    """The spoken corpus on disk: `utterances` and a read-only view of all samples (int16)."""

    def __init__(self, folder: Path) -> None:
        lines = (folder / "index.jsonl").read_text().splitlines()
        self.utterances = [Utterance(**json.loads(line)) for line in lines]
        self.pcm = np.memmap(folder / "audio.i16", dtype=np.int16, mode="r")

    def audio(self, utterance: Utterance) -> np.ndarray:
        """Return the audio of an utterance: float32 [samples], -1..1."""
        piece = self.pcm[utterance.start : utterance.start + utterance.length]
        return piece.astype(np.float32) / 32768.0


def synthesise(folder: Path, *, templates: int, word_lists: int, seed: int, workers: int = 2) -> None:
    """Speak the whole corpus into `folder`, each sentence with one voice, in turn. The index is written last."""
    folder.mkdir(parents=True, exist_ok=True)
    corpus = build_corpus(templates=templates, word_lists=word_lists, seed=seed)
    start = 0
    index: list[str] = []
    with (folder / "audio.i16").open("wb") as out, ThreadPoolExecutor(workers) as pool:
        for sentence, voice, pcm, phones in pool.map(_speak, _assign(corpus)):
            out.write(pcm.tobytes())
            entry = Utterance(sentence.text, sentence.source, sentence.held_out, voice, start, len(pcm), phones)
            index.append(json.dumps(asdict(entry)))
            start += len(pcm)
            if len(index) % 1000 == 0:
                print(f"{len(index)}/{len(corpus)} sentences, {start / SAMPLE_RATE / 3600:.2f} h", flush=True)
    (folder / "index.jsonl").write_text("\n".join(index) + "\n")


def _assign(corpus: list[Sentence]) -> Iterator[tuple[Sentence, str]]:
    for n, sentence in enumerate(corpus):
        yield sentence, VOICES[n % len(VOICES)]


def _speak(job: tuple[Sentence, str]) -> tuple[Sentence, str, np.ndarray, list[tuple[str, float]]]:
    sentence, voice = job
    return sentence, voice, *flite(sentence.text, voice)
