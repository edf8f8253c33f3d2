"""Voices: the codes of somebody speaking and what they said. The model goes on in that voice.

A store is a folder with one folder for each voice, `<store>/<name>/voice.json` and `codes.npy`. Two foreign layouts are read
too: upstream's `references/<id>/` (audio files, each with a `.lab` text of the same stem) and fish-speech.rs' `index.json` with
`<name>.npy`.
"""

from __future__ import annotations

import json
import os
import re
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import numpy as np
import numpy.typing as npt

from fishrt_engines.folders import data_folder

from .bundle import Bundle, Manifest
from .codec import check_entries, check_integers
from .errors import AudioError, VoiceError
from .text import check_unicode

SCHEMA = 1
MIN_SECONDS = 0.2
SILENCE = 1e-3
"""A recording whose largest sample is below this (−60 dB of full scale) holds no voice."""

_NAME = re.compile(r"[A-Za-z0-9_-](?:[A-Za-z0-9_ -]{0,253}[A-Za-z0-9_-])?")
_AUDIO_SUFFIXES = {".mp3", ".wav", ".flac", ".ogg", ".m4a", ".wma", ".aac", ".aiff", ".aif", ".aifc"}
_JSON, _CODES = "voice.json", "codes.npy"

Ints = npt.NDArray[np.int64]
Pcm = npt.NDArray[np.float32]


class Encoder(Protocol):
    """What makes codes of a recording: a TTS."""

    @property
    def bundle(self) -> Bundle:
        """Whose codec it is."""
        ...

    def encode(self, pcm: Pcm, rate: int) -> Ints:
        """pcm float32 [samples] at `rate` Hz → codes int64 [num_codebooks, frames]."""
        ...


@dataclass(frozen=True, slots=True, eq=False)
class Voice:
    """A reusable reference."""

    name: str
    codes: Ints
    """int64 [num_codebooks, frames]"""
    transcript: str
    """What is said in it, word for word."""
    fingerprint: str | None
    """Of the codec that made the codes; None where a foreign layout does not say."""

    @classmethod
    def from_audio(cls, tts: Encoder, audio: str | Path | tuple[Pcm, int], transcript: str, *, name: str = "voice") -> Voice:
        """A voice from a recording: a file, or (pcm float32 [samples] mono −1..1, rate in Hz). 10 to 30 s are best.

        Raises AudioError if it cannot be read, is no such array or rate, is shorter than 0.2 s or longer than the model takes;
        VoiceError for silence, samples that are not numbers, or an empty transcript; PromptError for a transcript that is not
        Unicode.
        """
        from .audio import read_audio

        _check_transcript(transcript, name)
        manifest = tts.bundle.manifest
        pcm, rate = audio if isinstance(audio, tuple) else read_audio(Path(audio), max_seconds=_most_seconds(manifest))
        _check_recording(pcm, rate, manifest, f"the recording of voice {name!r}" if isinstance(audio, tuple) else str(audio))
        voice = cls(name, np.asarray(tts.encode(pcm, rate), dtype=np.int64), transcript.strip(), manifest.codec.fingerprint)
        voice.check(manifest)
        return voice

    def check(self, manifest: Manifest) -> None:
        """Raises VoiceError unless a bundle can speak in this voice: transcript, same codec, number of codebooks, range."""
        codec = manifest.codec
        _check_transcript(self.transcript, self.name)
        if self.fingerprint not in (None, codec.fingerprint):
            raise VoiceError(
                f"voice {self.name!r} was made with the codec {self.fingerprint:.12}…; this bundle's is {codec.fingerprint:.12}…",
                hint=f"add it again with this bundle: fishrt voice add {self.name!r} --force --audio FILE --text TEXT",
            )
        check_integers(self.codes, f"voice {self.name!r}")
        sizes = codec.codebook_sizes
        if self.codes.ndim != 2 or self.codes.shape[0] != len(sizes) or not self.codes.shape[1]:
            raise VoiceError(
                f"voice {self.name!r} has codes of shape {list(self.codes.shape)}; this bundle needs "
                f"[{len(sizes)} codebooks, at least 1 frame]",
                hint="add it again with this bundle",
            )
        check_entries(self.codes, sizes, f"the codes of voice {self.name!r}")


class VoiceStore:
    """The voices in one folder, which need not exist before the first is added. Without a folder it is empty and stays so."""

    def __init__(self, folder: str | Path | None) -> None:
        self._folder = None if folder is None else Path(folder)

    def __str__(self) -> str:
        """Return the folder's name, for messages."""
        return "no folder" if self._folder is None else str(self._folder)

    @property
    def folder(self) -> Path:
        """Raises VoiceError where there is none."""
        if self._folder is None:
            hint = "set FISHRT_VOICE_DIR, or give --voice-dir"
            raise VoiceError("there is no folder for voices: this user has no home", hint=hint)
        return self._folder

    def list(self) -> list[str]:
        """Names of all voices, sorted. Raises VoiceError if the folder or its index cannot be read."""
        if self._folder is None:
            return []
        try:
            folders = [p.name for p in self.folder.iterdir() if _NAME.fullmatch(p.name) and p.is_dir() and _layout(p)]
        except FileNotFoundError:
            return []
        except OSError as error:
            raise VoiceError(f"the voice folder {self.folder} cannot be read: {error.strerror}") from None
        return sorted({*folders, *self._index()})

    def load(self, name: str, tts: Encoder | None = None) -> Voice:
        """One voice. `tts` encodes one that lies there as audio (upstream's layout).

        Raises VoiceError if there is none of that name or its files are damaged.
        """
        folder = self.folder / name
        layout = _layout(folder) if _NAME.fullmatch(name) else None
        if layout == "native":
            return _load_native(folder)
        if layout == "upstream":
            if tts is None:
                raise VoiceError(
                    f"voice {name!r} is stored as audio and must be encoded first", hint=f"fishrt voice add {name!r} …"
                )
            return _load_upstream(folder, tts)
        index = self._index()
        if name in index and Path(name).name == name:  # an index may hold any name, but none leads out of the folder
            return Voice(name, read_codes(self.folder / f"{name}.npy"), index[name], None)
        _check_name(name)
        known = ", ".join(self.list()) or "none"
        raise VoiceError(f"there is no voice {name!r} in {self.folder}; there are: {known}", hint="fishrt voice add NAME …")

    def is_recording(self, name: str) -> bool:
        """Whether a voice lies there as audio (upstream's layout), so that `load` needs a TTS."""
        return _NAME.fullmatch(name) is not None and _layout(self.folder / name) == "upstream"

    def add(self, voice: Voice, *, force: bool = False) -> Path:
        """Stores a voice, completely or not at all. Returns its folder. Raises VoiceError for a taken name, unless `force`."""
        _check_name(voice.name)
        target = self.folder / voice.name
        self.check_free(voice.name, force=force)
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            with tempfile.TemporaryDirectory(prefix=".adding-", dir=self.folder) as temporary:
                new, old = Path(temporary, "new"), Path(temporary, "old")
                new.mkdir()
                np.save(new / _CODES, voice.codes, allow_pickle=False)
                data = {"schema": SCHEMA, "transcript": voice.transcript, "fingerprint": voice.fingerprint}
                (new / _JSON).write_text(json.dumps(data, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
                if target.exists():
                    target.rename(old)
                try:
                    new.rename(target)
                except BaseException:
                    if old.exists():
                        old.rename(target)
                    raise
        except OSError as error:
            raise VoiceError(f"voice {voice.name!r} cannot be written to {self.folder}: {error.strerror}") from None
        return target

    def check_free(self, name: str, *, force: bool = False) -> None:
        """Raises VoiceError for a name that is not one, or is taken; with `force` only by something that `add` did not make."""
        _check_name(name)
        target = self.folder / name
        if target.exists() and _layout(target) != "native":
            raise VoiceError(f"{target} was not made by fishrt and is left alone", hint="choose another name")
        if not force and name in self.list():
            raise VoiceError(
                f"there is already a voice {name!r} in {self.folder}", hint="choose another name, or --force to replace it"
            )

    def remove(self, name: str) -> None:
        """Deletes a voice. Raises VoiceError if there is none, or if it is not fishrt's: those hold a user's own recordings."""
        _check_name(name)
        if name not in self.list():
            self.load(name)  # says what is wrong
        folder = self.folder / name
        if _layout(folder) != "native":
            raise VoiceError(
                f"voice {name!r} in {self.folder} was not made by fishrt and is left alone", hint="delete its files yourself"
            )
        try:
            with tempfile.TemporaryDirectory(prefix=".removing-", dir=self.folder) as temporary:
                folder.rename(Path(temporary, "old"))
        except OSError as error:
            raise VoiceError(f"voice {name!r} cannot be removed from {self.folder}: {error.strerror}") from None

    def _index(self) -> dict[str, str]:
        """fish-speech.rs' names and transcripts."""
        path = self.folder / "index.json"
        if not path.is_file():
            return {}
        speakers = _read_json(path).get("speakers")
        if not isinstance(speakers, dict) or not all(isinstance(text, str) for text in speakers.values()):
            raise VoiceError(f'{path} is not an index of voices: it should be {{"speakers": {{"name": "transcript"}}}}')
        return speakers


def user_folder() -> Path | None:
    """Return the folder of the user's voices: $FISHRT_VOICE_DIR, else `voices` in fishrt's data folder; None without a home."""
    if folder := os.environ.get("FISHRT_VOICE_DIR"):
        return Path(folder)
    data = data_folder()
    return data and data / "voices"


def read_codes(path: Path) -> Ints:
    """Codes int64 [num_codebooks, frames] from an .npy file of any integer type; a leading dimension of 1 is dropped.

    Raises VoiceError for a file that is not such an array, or holds negative or no codes.
    """
    try:
        stored = np.load(path, mmap_mode="r", allow_pickle=False)  # mapped: a false size in the header costs no memory
    except OSError as error:
        raise VoiceError(f"the codes {path} cannot be read: {error.strerror or error}") from None
    except (ValueError, EOFError) as error:
        raise VoiceError(
            f"{path} is not an array of codes: {error}", hint="give an .npy file as `fishrt codec encode` writes"
        ) from None
    shape = list(getattr(stored, "shape", ()))
    if (
        not isinstance(stored, np.ndarray)
        or not np.issubdtype(stored.dtype, np.integer)
        or len(shape[-2:]) < 2
        or shape[:-2] not in ([], [1])
    ):
        raise VoiceError(f"{path} is not an array of codes: integers [codebooks, frames] are expected, found {shape}")
    codes = np.array(stored.reshape(shape[-2:]), dtype=np.int64)
    if not codes.size or codes.min() < 0:
        raise VoiceError(f"{path} holds " + ("codes below 0" if codes.size else "no codes"))
    return codes


def _check_name(name: str) -> None:
    if not _NAME.fullmatch(name):
        raise VoiceError(
            f"{name!r} cannot be the name of a voice",
            hint="use letters, digits, '-', '_' and spaces inside, at most 255 characters",
        )


def _check_transcript(transcript: str, name: str) -> None:
    check_unicode(transcript, f"the transcript of voice {name!r}")
    if not transcript.strip():
        raise VoiceError(f"voice {name!r} has no transcript", hint="give the words that are spoken in the recording")


def _most_seconds(manifest: Manifest) -> float:
    """The longest recording that codec and context take."""
    return min(manifest.codec.max_frames, manifest.language_model.max_prompt) / manifest.codec.frame_rate


def _check_recording(pcm: Pcm, rate: int, manifest: Manifest, what: str) -> None:
    from .audio import check_pcm

    check_pcm(pcm, rate, what)
    seconds, most = len(pcm) / rate, _most_seconds(manifest)
    if not MIN_SECONDS <= seconds <= most:
        wrong = "short" if seconds < MIN_SECONDS else "long"
        raise AudioError(
            f"{what} is too {wrong}: {seconds:.2f} s; a voice takes {MIN_SECONDS} s to {most:.1f} s",
            hint="use one speaker and clean speech; a few seconds are enough, 10 to 30 s are best",
        )
    if np.abs(pcm).max() < SILENCE:
        raise VoiceError(f"{what} is silent", hint="check that the right file or channel was recorded")


def _layout(folder: Path) -> str | None:
    if (folder / _JSON).is_file():
        return "native"
    return "upstream" if folder.is_dir() and _recordings(folder) else None


def _recordings(folder: Path) -> list[Path]:
    return sorted(p for p in folder.iterdir() if p.suffix.lower() in _AUDIO_SUFFIXES)


def _load_native(folder: Path) -> Voice:
    path = folder / _JSON
    data = _read_json(path)
    if data.get("schema") != SCHEMA:
        raise VoiceError(
            f"{path} has schema {data.get('schema')!r}; this version reads schema {SCHEMA}", hint="update fishrt, or add it again"
        )
    if data.keys() != {"schema", "transcript", "fingerprint"}:
        raise VoiceError(f"{path} has the keys {sorted(data)}; expected schema, transcript, fingerprint")
    transcript, fingerprint = data["transcript"], data["fingerprint"]
    if not isinstance(transcript, str) or not isinstance(fingerprint, str | None):
        raise VoiceError(f"{path} is damaged: transcript and fingerprint must be text", hint="add the voice again")
    return Voice(folder.name, read_codes(folder / _CODES), transcript, fingerprint)


def _load_upstream(folder: Path, tts: Encoder) -> Voice:
    """All recordings of a folder are one person's: their codes follow each other, and so do their transcripts."""
    voices = [Voice.from_audio(tts, path, _read_text(path.with_suffix(".lab")), name=folder.name) for path in _recordings(folder)]
    codes = np.concatenate([v.codes for v in voices], axis=1)
    return Voice(folder.name, codes, "\n".join(v.transcript for v in voices), voices[0].fingerprint)


def _read_text(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8-sig").strip()
    except OSError as error:
        raise VoiceError(f"{path} cannot be read: {error.strerror}", hint="each recording needs its transcript") from None
    except UnicodeDecodeError as error:
        raise VoiceError(f"{path} is not UTF-8: {error.reason} at byte {error.start}", hint="convert the file to UTF-8") from None


def _read_json(path: Path) -> dict[str, object]:
    try:
        data = json.loads(_read_text(path))
    except json.JSONDecodeError as error:
        raise VoiceError(f"{path} is not JSON: {error}") from None
    if not isinstance(data, dict):
        raise VoiceError(f"{path} is not a JSON object")
    return data
