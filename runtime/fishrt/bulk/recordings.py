"""`fishrt codec encode FOLDER OUT`: each recording below a folder becomes a file of codes, as fine-tuning takes them."""

from __future__ import annotations

import os
import threading
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from hashlib import blake2b
from pathlib import Path
from typing import Any

import numpy as np

from ..audio.files import read_audio
from ..codec import frames_of
from ..errors import AudioError, FishrtError
from ..jobs.engine import BadRow, Known, Report, Row, Stop, Told, run
from ..jobs.folder import Made, content_digest, stamp
from ..jobs.threads import in_threads
from ..tts import TTS
from ..voices.files import AUDIO_SUFFIXES
from ..voices.recordings import SILENCE
from ..voices.voice import npy_bytes

_WORDS = ".lab"
"""Suffix of the transcript beside a recording."""


@dataclass(frozen=True, slots=True)
class Recording:
    """A row as its worker gets it."""

    path: Path
    source: Mapping[str, Any]
    """Size, time and SHA-256 of the file, for the manifest."""
    words: bytes | None
    """Its transcript, as stored beside it; None without one."""
    copied: bool
    """Whether the transcript is written beside the codes."""


class EncodeJob:
    """The recordings below a folder as rows for the engine."""

    result = "codes"

    def __init__(self, tts: TTS, folder: Path, out: Path) -> None:
        """Make a job of a folder. out: of the results; may be the same."""
        self._tts, self._folder = tts, folder
        self._copied = not (out.exists() and out.samefile(folder))

    def rows(self, known: Known) -> Iterator[Row | BadRow]:
        """See `jobs.engine.Job`."""
        for number, path in enumerate(_recordings(self._folder), 1):
            id = path.relative_to(self._folder).with_suffix("").as_posix()
            try:
                yield self._row(number, id, path, known)
            except OSError as error:
                yield BadRow(number, id, f"{path} cannot be read: {error.strerror or error}")

    def _row(self, number: int, id: str, path: Path, known: Known) -> Row:
        source = stamp(path)
        hashes = [entry["source"] for entry in known.get(id, ()) if {**entry.get("source", {}), **source} == entry.get("source")]
        source["sha256"] = hashes[0]["sha256"] if hashes else content_digest(path)
        words = path.with_suffix(_WORDS).read_bytes() if path.with_suffix(_WORDS).is_file() else None
        decides = (path.suffix, source["sha256"], words if self._copied else b"", self._tts.bundle.manifest.codec.fingerprint)
        digest = blake2b(repr(decides).encode(), digest_size=16).hexdigest()
        return Row(number, id, digest, f"{id}.npy", source["bytes"], Recording(path, source, words, self._copied))

    def check(self, row: Row) -> None:
        """See `jobs.engine.Job`. A recording is read when it is encoded."""

    @property
    def digest_of(self) -> Callable[[Path], str | None]:
        """See `jobs.engine.Job`. An .npy file has no place for a digest: what the manifest lacks is made again."""
        return _unknown

    def describe(self, row: Row, path: Path) -> Mapping[str, Any]:
        """See `jobs.engine.Job`."""
        raise AssertionError("no file of codes carries a digest")


class Encoder:
    """What encodes recordings, one at a time: padding to a common length would change the last codes."""

    batch = 1

    def __init__(self, tts: TTS) -> None:
        self._tts, self._one = tts, threading.Lock()
        self._closed = False

    def compute(self, payload: Recording) -> Made:
        """Encode a recording. See `jobs.threads.Worker`."""
        codec = self._tts.bundle.manifest.codec
        pcm, rate = read_audio(payload.path, max_seconds=codec.max_frames / codec.frame_rate)
        if np.abs(pcm).max() < SILENCE:
            raise AudioError(f"{payload.path} is silent", hint="check that the right file or channel was recorded")
        with self._one:
            if self._closed:
                raise FishrtError("the run was ended")
            sound = self._tts.encode(pcm, rate)
        record = {"frames": frames_of(sound), "seconds": round(len(pcm) / rate, 3), "source": payload.source}
        warnings = () if payload.words is not None else (f"{payload.path} has no transcript: {_WORDS} beside it",)
        beside = {_WORDS: payload.words} if payload.copied and payload.words is not None else None
        return Made(npy_bytes(sound), record, warnings, beside)

    def close(self) -> None:
        """Encode nothing more."""
        self._closed = True


def encode_folder(
    tts: TTS,
    folder: str | Path,
    out: str | Path,
    *,
    tell: Told = lambda report, outcome: None,
    stop: Stop = lambda: False,
) -> Report:
    """Encode all recordings below a folder into the same tree of .npy files, with their transcripts, as a job: see `render`.

    Raises FishrtError if there is no such folder, and as `jobs.engine.run`.
    """
    folder, out = Path(folder), Path(out)
    if not folder.is_dir():
        raise FishrtError(f"there is no folder {folder}")
    return run(EncodeJob(tts, folder, out), out, in_threads(Encoder(tts)), tell=tell, stop=stop)


def _recordings(folder: Path) -> list[Path]:
    """Return the audio files below a folder, sorted; links that lead out of it are left out."""
    found, top = [], folder.resolve()
    for inner, _, names in os.walk(folder):
        for path in (Path(inner, name) for name in names):
            if path.suffix.lower() in AUDIO_SUFFIXES and not path.name.startswith("."):
                if path.is_symlink() and not path.resolve().is_relative_to(top):
                    continue
                found.append(path)
    return sorted(found)


def _unknown(_: Path) -> str:
    return ""
