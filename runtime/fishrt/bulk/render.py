"""`fishrt render`: each line of an input becomes a file of speech."""

from __future__ import annotations

import math
import threading
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import astuple, dataclass, replace
from functools import lru_cache
from hashlib import blake2b, sha256
from pathlib import Path
from typing import Any

import soundfile

from ..audio.encode import encode_audio
from ..bundle.features import LanguageModel
from ..bundle.manifest import Manifest
from ..bundle.quantisation import ROWS
from ..errors import FishrtError, PromptError, VoiceError
from ..jobs.engine import BadRow, Known, Report, Row, Stop, Told, Work, message, run
from ..jobs.folder import Made, Shard, content_digest
from ..jobs.threads import in_threads
from ..language_model.prompt import DIALECTS
from ..language_model.sampling import Sampling
from ..request import Request
from ..speaking.scheduler import ScheduledStream, Scheduler
from ..speaking.stream import whole_chunks
from ..text.split import SPEAKER
from ..tts import TTS
from ..voices.voice import Voice
from .places import file_name, places
from .rows import InputFormat, Line, canonical, content_id, read_lines

FORMAT = 1
"""Number of the job format: of what a digest is made of."""
USUAL_BATCH = 8
"""Rows spoken together where that changes no row: beyond, a CPU gains little."""
_TAG = "fishrt"


@dataclass(frozen=True, slots=True)
class Speakable:
    """A row as its worker gets it."""

    request: Request
    """Its voices are names."""
    references: tuple[tuple[Path, str], ...]
    """Recordings with their words, which come after the voices."""
    format: str
    digest: str


class RenderJob:
    """The lines of an input as rows for the engine."""

    result = "audio"

    def __init__(
        self, tts: TTS, data: bytes, kind: InputFormat, out: Path, *, base: Path, defaults: Request, format: str, batch: int
    ) -> None:
        """Make a job of an input. It is read when the rows are asked for.

        base: the folder of relative references. defaults: options of rows that do not say otherwise; its text is not used.
        format: of rows that name none. batch: rows spoken together, where that may change them; else 1.
        """
        self._tts, self._data, self._kind, self._out, self._base = tts, data, kind, out, base
        self._defaults, self._format, self._batch = defaults, format, batch
        self._voice = lru_cache(None)(self._voice_digest)
        self._reference = lru_cache(None)(_file_digest)

    def rows(self, known: Known) -> Iterator[Row | BadRow]:
        """See `jobs.engine.Job`."""
        found: list[tuple[int, str | None, Speakable | FishrtError]] = []
        for number, line in read_lines(self._data, self._kind):
            id = None if isinstance(line, FishrtError) else line.id or content_id(line)
            try:
                found.append((number, id, line if isinstance(line, FishrtError) else self._speakable(line, str(id))))
            except FishrtError as error:
                found.append((number, id, error))
        names = {id: f"{file_name(id)}.{row.format}" for _, id, row in found if id and isinstance(row, Speakable)}
        at = places(self._out / "audio", set(names.values()))
        for number, id, row in found:
            if isinstance(row, FishrtError):
                yield BadRow(number, id, message(row))
            elif id is not None:
                target = f"audio/{at[f'{file_name(id)}.{row.format}']}"
                yield Row(number, id, row.digest, target, len(row.request.text), row)

    def _speakable(self, line: Line, id: str) -> Speakable:
        usual = self._defaults
        sampling = Sampling(
            **{
                name: getattr(usual.sampling, name, None) if (value := getattr(line, name)) is None else value
                for name in ("temperature", "top_p", "top_k", "repetition_penalty")
            }
        )
        text, voices = self._said(line)
        references = tuple((self._base / each["audio"], each.get("text", "")) for each in line.references or ())
        request = replace(
            usual,
            text=text,
            voice=voices if voices is not None or references else usual.voice,
            sampling=None if sampling == Sampling() else sampling,
            seed=int.from_bytes(blake2b(id.encode(), digest_size=4).digest()) if line.seed is None else line.seed,
            max_frames=usual.max_frames if line.max_frames is None else line.max_frames,
            system=usual.system if line.system is None else line.system,
            speed=usual.speed if line.speed is None else line.speed,
        )
        format = line.format or self._format
        return Speakable(request, references, format, self._digest(request, references, format))

    def _said(self, line: Line) -> tuple[str, list[str] | None]:
        """Return the text of a line, and the voices that it names."""
        voices = [line.voice] if isinstance(line.voice, str) else line.voice
        if line.turns is None:
            assert line.text is not None
            return line.text, voices
        model = self._tts.bundle.manifest.model
        if isinstance(model, LanguageModel) and not DIALECTS[model.prompt_dialect].turns:
            raise PromptError("this model knows no turns of speakers", hint="give each turn a line of its own")
        if "voice" in line.turns[0]:
            if voices:
                raise FishrtError("the line has a voice, and so have its turns: give one")
            voices = list(dict.fromkeys(turn["voice"] for turn in line.turns))
            if line.references:
                raise FishrtError("turns name voices, and the line has references", hint="give each turn its speaker, from 0")
            return "\n".join(f"<|speaker:{voices.index(turn['voice'])}|>{turn['text']}" for turn in line.turns), voices
        return "\n".join(f"<|speaker:{turn['speaker']}|>{turn['text']}" for turn in line.turns), voices

    def _digest(self, request: Request, references: Iterable[tuple[Path, str]], format: str) -> str:
        """Return the digest of all that decides the sound of a row. Raises FishrtError for a voice that is not there."""
        model, sampling = self._tts.bundle.manifest.model, request.sampling or Sampling()
        decides = {
            "job": FORMAT,
            "text": request.text,
            "voices": None if request.voices is None else [self._voice(str(name)) for name in request.voices],
            "references": [[self._reference(path), said] for path, said in references],
            "seed": request.seed,
            "sampling": astuple(sampling.resolve(model.sampling) if isinstance(model, LanguageModel) else sampling),
            "denoising": None if request.denoising is None else astuple(request.denoising),
            "max_frames": request.max_frames,
            "system": request.system,
            "speed": request.speed,
            "format": format,
            "bundle": self._tts.bundle_sha256,
            "provider": self._tts.provider,
            "batch": self._batch,
        }
        return blake2b(canonical(decides), digest_size=16).hexdigest()

    def _voice_digest(self, name: str) -> str:
        voice = self._tts.voice(name)
        return sha256(voice.sound.tobytes() + voice.transcript.encode()).hexdigest()

    def check(self, row: Row) -> None:
        """See `jobs.engine.Job`. Recordings of references are read when the row is spoken; its speakers are unknown till then."""
        asked: Speakable = row.payload
        if not (asked.references and SPEAKER.search(asked.request.text)):
            self._tts.job(asked.request, None, whole_chunks)

    @property
    def digest_of(self) -> Callable[[Path], str | None]:
        """See `jobs.engine.Job`."""
        return digest_of

    def describe(self, row: Row, path: Path) -> Mapping[str, Any]:
        """See `jobs.engine.Job`."""
        asked: Speakable = row.payload
        with soundfile.SoundFile(path) as file:
            return {
                "seed": asked.request.seed,
                "seconds": round(file.frames / file.samplerate, 3),
                "stop": file.comment.split()[2:],
            }


class Speaker:
    """What speaks rows: a TTS, with many in one batch."""

    def __init__(self, tts: TTS, batch: int) -> None:
        self.batch = batch
        self._tts = tts
        self._scheduler = Scheduler(tts, max_active=batch, max_queue=None, known_bytes=0)
        self._streams: set[ScheduledStream] = set()
        self._lock, self._closed = threading.Lock(), False
        self._references: Callable[[Path, str], Voice] = lru_cache(64)(lambda path, said: Voice.from_file(tts, path, said))

    def compute(self, payload: Speakable) -> Made:
        """Speak a row. See `jobs.threads.Worker`."""
        request = payload.request
        if payload.references:
            voices = [*(request.voices or ()), *(self._references(path, said) for path, said in payload.references)]
            request = replace(request, voice=voices)
        stream = self._scheduler.submit(request, sizes=whole_chunks, most_buffered_s=math.inf)
        with self._lock:
            self._streams.add(stream)
            if self._closed:
                stream.close()
        try:
            speech = stream.whole()
        except (ValueError, IndexError):  # of a stream without chunks, which was closed
            if self._closed:
                raise FishrtError("the run was ended") from None
            raise
        finally:
            with self._lock:
                self._streams.discard(stream)
        if self._closed:  # it may have been closed in the middle
            raise FishrtError("the run was ended")
        stop = list(dict.fromkeys(speech.info.stop_reasons))
        comment = " ".join((_TAG, payload.digest, *stop))
        data = encode_audio(speech.pcm, speech.sample_rate, payload.format, comment)
        record = {"seed": speech.info.seed, "seconds": round(speech.duration_s, 3), "stop": stop}
        return Made(data, record, speech.info.warnings)

    def close(self) -> None:
        """Drop the rows in work at their next frame."""
        with self._lock:
            self._closed = True
            for stream in self._streams:
                stream.close()
        self._scheduler.close()


def render(
    tts: TTS,
    rows: bytes | Iterable[Mapping[str, Any]],
    out: str | Path,
    *,
    kind: InputFormat = "jsonl",
    base: str | Path = ".",
    defaults: Request | None = None,
    format: str = "wav",
    batch: int | None = None,
    shard: Shard | None = None,
    limit: int | None = None,
    spread: Callable[[int], Work] | None = None,
    tell: Told = lambda report, outcome: None,
    stop: Stop = lambda: False,
) -> Report:
    """Speak rows into the files of a folder, as `fishrt render` does: what is done is skipped, a bad row stops no other.

    rows: dicts with the fields of `rows.Line`, or an input of this `kind` as bytes. base: the folder of relative references.
    defaults: options of rows that do not say otherwise; its text is not used. batch: rows spoken together; None means
    USUAL_BATCH where that changes no row, else 1. spread: batch → what speaks rows in other processes; None: `tts` speaks them.
    Raises as `jobs.engine.run`.
    """
    data = rows if isinstance(rows, bytes) else b"".join(canonical(row) + b"\n" for row in rows)
    same = same_in_batches(tts.bundle.manifest, tts.provider)
    batch = batch or (USUAL_BATCH if same else 1)
    usual, digested = defaults or Request(""), 1 if same else batch
    job = RenderJob(tts, data, kind, Path(out), base=Path(base), defaults=usual, format=format, batch=digested)
    work = spread(batch) if spread else in_threads(Speaker(tts, batch))
    return run(job, Path(out), work, shard=shard, limit=limit, tell=tell, stop=stop)


def digest_of(path: Path) -> str | None:
    """Return the digest in the comment of an audio file; None if it has none."""
    try:
        with soundfile.SoundFile(path) as file:
            words = file.comment.split()
    except (soundfile.SoundFileError, OSError):
        return None
    return words[1] if len(words) > 1 and words[0] == _TAG else None


def same_in_batches(manifest: Manifest, provider: str) -> bool:
    """Return whether kernels surely give a row the same codes alone and in a batch.

    That is so where a CPU multiplies all of a model's matrices in integers by rows; tables are only read.
    """
    layers = manifest.quantisation.layers if manifest.quantisation else ()
    products = [layer for layer in layers if "embeddings" not in layer.name]
    head = any(layer.name == "slow_ar.output" for layer in products)  # else the table of embeddings is the head, too
    return provider == "cpu" and head and all(layer.precision == ROWS for layer in products)


def _file_digest(path: Path) -> str:
    try:
        return content_digest(path)
    except (OSError, ValueError) as error:  # ValueError: a path with a zero byte
        raise VoiceError(f"the reference {path} cannot be read: {getattr(error, 'strerror', None) or error}") from None
