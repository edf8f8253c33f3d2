"""Voices on disk: names of folders, fishrt's own files, and the layouts of two other projects.

<store>/<name>/voice.json        transcript, and which codes there are             (fishrt)
               recording.wav     the recording as it was given, mono, float32; not in bundles
               codes….npy        for each codec that the voice was used with; latents….npy for a codec of latents
<store>/<name>/*.wav, *.lab      recordings, each with its words                   (fish-speech)
<store>/index.json, <name>.npy   words and codes                                   (fish-speech.rs)
"""

from __future__ import annotations

import json
import os
import re
import unicodedata
from dataclasses import asdict, dataclass
from pathlib import Path

from ..bundle.strict import parse_dataclass
from ..errors import BundleError, VoiceError
from .loudness import Loudness

SCHEMA = 2
VOICE_JSON, INDEX_JSON = "voice.json", "index.json"
RECORDING, CODES, LATENTS = "recording.wav", "codes.npy", "latents.npy"

_MOST_NAME_BYTES = 255
_JOINERS = "\u200c\u200d"
"""Joiners, which words of some scripts need."""
_RESERVED = re.compile(r"(?:con|prn|aux|nul|com[0-9¹²³]|lpt[0-9¹²³])(?:\..*)?", re.IGNORECASE)
"""Names of devices on Windows, with any ending."""
AUDIO_SUFFIXES = {".mp3", ".wav", ".flac", ".ogg", ".opus", ".m4a", ".wma", ".aac", ".aiff", ".aif", ".aifc"}


@dataclass(frozen=True, slots=True)
class StoredCodes:
    """Codes or latents of a voice for one codec."""

    fingerprint: str | None
    """Fingerprint of the codec; None: unknown."""
    file: str
    loudness: Loudness | None
    """Loudness of the decoded codes; None: not measured, or silent."""


@dataclass(frozen=True, slots=True)
class StoredVoice:
    """The content of a `voice.json`."""

    schema: int
    transcript: str
    recording: str | None
    """File name; None: there are only codes."""
    codes: tuple[StoredCodes, ...]

    def to_json(self) -> str:
        """Return the text of the file."""
        return json.dumps(asdict(self), indent=1, ensure_ascii=False) + "\n"


def canonical(name: str) -> str:
    """Return the NFC form of a name: file systems and keyboards write accents in two ways."""
    return unicodedata.normalize("NFC", name)


def check_name(name: str) -> None:
    """Check that a voice, and its folder, can have this name on every system. Raises VoiceError otherwise."""
    if not is_name(name):
        raise VoiceError(
            f"{name!r} cannot be the name of a voice" if name else "the voice has no name",
            hint="use letters and digits of any script, '-' and '_'; spaces and dots only inside; at most 255 bytes",
        )


def is_name(name: str) -> bool:
    """Return whether `check_name` accepts a name."""
    name = canonical(name)
    fits = all(char in "-_ ." + _JOINERS or unicodedata.category(char)[0] in "LMN" for char in name)
    return (
        fits
        and bool(name)
        and not {name[0], name[-1]} & set(" ." + _JOINERS)
        and not _RESERVED.fullmatch(name)
        and len(name.encode()) <= _MOST_NAME_BYTES
    )


def recordings(folder: Path) -> list[Path]:
    """Return the audio files in a folder, except hidden ones: macOS adds `._x.wav` to `x.wav` on some disks."""
    found = (p for p in folder.iterdir() if p.suffix.lower() in AUDIO_SUFFIXES)
    return sorted(p for p in found if not p.name.startswith(".") and p.is_file())


def layout(folder: Path) -> str | None:
    """Return "fishrt" or "recordings" for the folder of a voice; None for any other."""
    if (folder / VOICE_JSON).is_file():
        return "fishrt"
    return "recordings" if folder.is_dir() and recordings(folder) else None


def check_folder(folder: Path, *, transcripts: bool = True) -> None:
    """Check that a folder holds a voice, without reading recordings or codes. Raises VoiceError with the reason otherwise.

    transcripts: whether each recording needs one.
    """
    try:
        kind = layout(folder)
    except OSError as error:
        raise VoiceError(f"{folder} cannot be read: {error.strerror}") from None
    if kind == "fishrt":
        stored = read_stored(folder)
        # os.path: no error for a name that no file can have
        if missing := [c.file for c in stored.codes if not os.path.isfile(folder / c.file)]:  # noqa: PTH113
            raise VoiceError(f"{folder / missing[0]} is missing", hint="add the voice again")
    elif kind == "recordings":
        for path in recordings(folder) if transcripts else ():
            if not path.with_suffix(".lab").is_file():
                raise VoiceError(f"{path} has no transcript {path.stem}.lab", hint="write there the words of the recording")
    else:
        raise VoiceError(f"{folder} holds no voice: neither {VOICE_JSON} nor a recording", hint="fishrt voice add NAME …")


def read_stored(folder: Path) -> StoredVoice:
    """Read a `voice.json`, also of schema 1. Raises VoiceError."""
    path = folder / VOICE_JSON
    data = read_json(path)
    schema = data.get("schema")
    if schema not in (1, SCHEMA):
        raise VoiceError(
            f"{path} has schema {schema!r}; this version reads schemas 1 and {SCHEMA}", hint="update fishrt, or add it again"
        )
    if schema == 1:
        codes = {"fingerprint": data.pop("fingerprint", 0), "file": CODES, "loudness": None}
        data |= {"schema": SCHEMA, "recording": None, "codes": [codes]}
    try:
        stored = parse_dataclass(StoredVoice, data, VOICE_JSON)
    except BundleError as error:
        raise VoiceError(f"{path} is damaged: {error}", hint="add the voice again") from None
    if any(c.loudness and not c.loudness.possible for c in stored.codes):
        raise VoiceError(f"{path} is damaged: no sound has such a loudness", hint="add the voice again")
    files = [c.file for c in stored.codes] + [stored.recording or RECORDING]
    if not stored.codes or any(Path(file).name != file for file in files):
        raise VoiceError(f"{path} is damaged: it must name codes, in files of its folder", hint="add the voice again")
    return stored


def read_index(folder: Path) -> dict[str, str]:
    """Return fish-speech.rs' names and transcripts; none without an index. Raises VoiceError."""
    path = folder / INDEX_JSON
    if not path.is_file():
        return {}
    speakers = read_json(path).get("speakers")
    if not isinstance(speakers, dict) or not all(isinstance(text, str) for text in speakers.values()):
        raise VoiceError(f'{path} is not an index of voices: it should be {{"speakers": {{"name": "transcript"}}}}')
    return speakers


def read_text(path: Path) -> str:
    """Return a UTF-8 file, stripped, without a byte order mark. Raises VoiceError."""
    try:
        return path.read_text(encoding="utf-8-sig").strip()
    except OSError as error:
        raise VoiceError(f"{path} cannot be read: {error.strerror}", hint="each recording needs its transcript") from None
    except UnicodeDecodeError as error:
        raise VoiceError(f"{path} is not UTF-8: {error.reason} at byte {error.start}", hint="convert the file to UTF-8") from None


def read_json(path: Path) -> dict[str, object]:
    """Return the object in a JSON file. Raises VoiceError."""
    try:
        data = json.loads(read_text(path))
    except (ValueError, RecursionError) as error:
        raise VoiceError(f"{path} is not JSON: {error}") from None
    if not isinstance(data, dict):
        raise VoiceError(f"{path} is not a JSON object")
    return data
