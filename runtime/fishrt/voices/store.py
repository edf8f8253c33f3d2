"""Stores of voices: the user's folder of voices, and that of a bundle.

`files.py` knows the files of a store. It keeps recordings, so that any codec can use a voice, and the codes of each codec.
"""

from __future__ import annotations

import errno
import io
import logging
import os
from collections.abc import Hashable, Sequence
from dataclasses import replace
from pathlib import Path

from fishrt_engines.aside import new_folder, remove_folder, sync
from fishrt_engines.folders import data_folder

from ..arrays import Sound
from ..audio.output import write_whole
from ..bundle.folder import Bundle
from ..errors import KeptVoiceError, OutputError, TakenVoiceError, UnknownVoiceError, VoiceError
from .files import (
    CODES,
    LATENTS,
    RECORDING,
    SCHEMA,
    VOICE_JSON,
    StoredCodes,
    StoredVoice,
    canonical,
    check_folder,
    check_name,
    is_name,
    layout,
    read_index,
    read_stored,
    read_text,
    recordings,
)
from .recordings import PAUSE_S, in_turn
from .voice import Encoder, Voice, joined, npy_bytes, read_codes, words_option

log = logging.getLogger(__name__)

_PREPARED = ".prepared"
"""Folder of a store for the prepared files of voices in other projects' layouts: their own folders are not changed."""


class VoiceStore:
    """The voices in one folder, which need not exist before the first is added. Without a folder it is empty and stays so."""

    def __init__(self, folder: str | Path | None, *, fixed: bool = False) -> None:
        """Make a store of a folder. fixed: loading writes nothing, as in a bundle, whose files are hashed."""
        self._folder = None if folder is None else Path(folder)
        self._fixed = fixed
        self._loaded: dict[tuple[str, str], tuple[Hashable, Voice]] = {}
        """Name and fingerprint of a codec → state of the files, and the voice."""

    def __str__(self) -> str:
        """Return the folder's name, for messages."""
        return "no folder" if self._folder is None else str(self._folder)

    @property
    def folder(self) -> Path:
        """The folder. Raises VoiceError if there is none."""
        if self._folder is None:
            hint = "set FISHRT_VOICE_DIR, or give --voice-dir"
            raise VoiceError("there is no folder for voices: this user has no home", hint=hint)
        return self._folder

    def list(self, *, transcripts: bool = True) -> list[str]:
        """Return the names of all voices, sorted. Raises VoiceError if the folder or its index cannot be read.

        transcripts: whether recordings without their words are left out.
        """
        return sorted(self._survey(transcripts=transcripts)[0])

    def left_out(self, *, transcripts: bool = True) -> dict[str, str]:
        """Return folders and index entries that are no valid voices, with the reason of each; see `list`."""
        return self._survey(transcripts=transcripts)[1]

    def load(self, name: str, tts: Encoder | None = None, *, fingerprint: str | None = None) -> Voice:
        """Return one voice. With `tts`, its codes are those of that codec, encoded from the recording if needed.

        fingerprint: of the codec whose codes are preferred without `tts`.

        Computed codes and loudness are stored. Raises VoiceError if there is no voice of that name, its files are damaged, or it
        must be encoded and there is no `tts`.
        """
        folder = self._find(name)
        if folder is None:
            check_name(name)
            folder, key = self.folder, self._indexed(name)
            if key is None:
                known = ", ".join(self.list()) or "none"
                raise UnknownVoiceError(
                    f"there is no voice {name!r} in {self}; there are: {known}", hint="fishrt voice add NAME …"
                )
            return Voice(key, read_codes(folder / f"{key}.npy"), read_index(folder)[key], None)
        check_folder(folder, transcripts=tts is None or tts.bundle.manifest.codec.channels is None)
        if layout(folder) == "fishrt":
            return self._load_stored(folder, tts, fingerprint)
        if tts is None:
            raise VoiceError(f"voice {name!r} is stored as audio and must be encoded first", hint="give a bundle, with --bundle")
        return _load_recordings(folder, tts)

    def known(self, name: str, tts: Encoder) -> Voice:
        """Return a voice as `load` does: it is loaded once until its files change, and forgotten when they are gone."""
        key = canonical(name), tts.bundle.manifest.codec.fingerprint
        kept = self._loaded.get(key)
        if kept is None or kept[0] != self.stamp(name):
            self._loaded = {other: each for other, each in self._loaded.items() if self.holds(other[0])}
            voice = self.load(name, tts)
            kept = self._loaded[key] = (self.stamp(name), voice)  # after loading, which may write files
        return kept[1]

    def _forget(self, name: str) -> None:
        self._loaded = {key: each for key, each in self._loaded.items() if key[0] != canonical(name)}

    def holds(self, name: str) -> bool:
        """Return whether there is a voice of that name, maybe damaged. Raises VoiceError if the index cannot be read."""
        folder = self._find(name)
        return (folder is not None and layout(folder) is not None) or self._indexed(name) is not None

    def check_found(self, name: str) -> None:
        """Check that a folder of that name, if there is one, can hold a voice, and does. Raises VoiceError otherwise."""
        if folder := self._find(name):
            check_folder(folder)
        elif self._folder and (self.folder / name).is_dir():
            check_name(name)

    def needs_encoder(self, name: str) -> bool:
        """Return whether a voice is audio in another project's layout, so that `load` needs a TTS."""
        folder = self._find(name)
        return folder is not None and layout(folder) == "recordings"

    def is_recorded(self, name: str) -> bool:
        """Return whether the store has a recording of a voice, so that any codec can use it."""
        folder = self._find(name)
        return folder is not None and (layout(folder) == "recordings" or read_stored(folder).recording is not None)

    def made_here(self, name: str) -> bool:
        """Return whether a voice was made by `add`, so that it can be renamed and removed."""
        folder = self._find(name)
        return folder is not None and layout(folder) == "fishrt"

    def place(self, name: str) -> Path:
        """Return the folder that holds a voice's files."""
        return self._find(name) or self.folder

    def stamp(self, name: str) -> Hashable:
        """Return a value that changes with the files of a voice."""
        folder = self._find(name)
        paths = recordings(folder) + [p.with_suffix(".lab") for p in recordings(folder)] if folder else []
        paths += [folder / VOICE_JSON] if folder else [self.folder / "index.json", self.folder / f"{self._indexed(name)}.npy"]
        return tuple((p.name, p.stat().st_mtime_ns, p.stat().st_size) for p in paths if p.is_file())

    def prepared_folder(self, name: str) -> Path | None:
        """Return the folder of `TTS.prepare`'s files for a voice; None in a bundle."""
        if self._fixed:
            return None
        folder = self._find(name)
        if folder is not None and layout(folder) == "fishrt":
            return folder
        return self.folder / _PREPARED / canonical(name)

    def add(self, voice: Voice, *, force: bool = False) -> Path:
        """Store a voice, completely or not at all, with its recording if it has one. Return its folder.

        The voice is on disk at the end. Raises VoiceError as `check_free`, OutputError if it cannot be written.
        """
        self.check_free(voice.name, force=force)
        name = canonical(voice.name)
        target = self._find(name) or self.folder / name
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            with new_folder(target, replace=force) as new:
                _write_voice(new, voice)
            sync(self.folder)
        except OSError as error:
            if error.errno in (errno.ENOTEMPTY, errno.EEXIST):  # another process took it since the check
                raise self._taken(name) from None
            raise OutputError(f"voice {voice.name!r} cannot be written to {self}: {error.strerror or error}") from None
        return target

    def check_free(self, name: str, *, force: bool = False) -> None:
        """Check that `add` can use a name. Raises VoiceError for an invalid name, TakenVoiceError for a taken one.

        force: a voice that `add` made may have the name.
        """
        check_name(name)
        target = self._find(name) or self.folder / canonical(name)
        if target.exists() and layout(target) != "fishrt":
            raise TakenVoiceError(f"{target} was not made by fishrt and is left alone", hint="choose another name")
        if not force and (target.exists() or self._indexed(name) is not None):
            raise self._taken(name)

    def _taken(self, name: str) -> TakenVoiceError:
        hint = "choose another name, or --force to replace it"
        return TakenVoiceError(f"there is already a voice {name!r} in {self}", hint=hint)

    def rename(self, old: str, new: str) -> None:
        """Give a voice another name. Raises as `remove` and `check_free`."""
        folder = self._own_folder(old)
        self.check_free(new)
        self._forget(old)
        try:
            folder.rename(self.folder / canonical(new))
            sync(self.folder)
        except OSError as error:
            if error.errno in (errno.ENOTEMPTY, errno.EEXIST):  # another process took it since the check
                raise self._taken(new) from None
            raise OutputError(f"voice {old!r} in {self} cannot be renamed: {error.strerror}") from None

    def remove(self, name: str) -> None:
        """Delete a voice. Raises UnknownVoiceError if there is none; KeptVoiceError if another program made it."""
        folder = self._own_folder(name)
        self._forget(name)
        try:
            remove_folder(folder)
        except OSError as error:
            raise OutputError(f"voice {name!r} cannot be removed from {self}: {error.strerror}") from None

    def _own_folder(self, name: str) -> Path:
        """Return the folder of a voice that `add` made; those of other programs hold the user's recordings."""
        check_name(name)
        folder = self._find(name)
        if folder is None and self._indexed(name) is None:
            self.load(name)  # raises with the reason
        if folder is None or not self.made_here(name):
            raise KeptVoiceError(
                f"voice {name!r} in {self} was not made by fishrt and is left alone", hint="change its files yourself"
            )
        return folder

    def _survey(self, *, transcripts: bool = True) -> tuple[set[str], dict[str, str]]:
        """Return the names of all voices, and the names that are left out, each with the reason."""
        names, left_out = set(), {}
        for path in self._folders():
            try:
                check_name(path.name)
                check_folder(path, transcripts=transcripts)
                names.add(canonical(path.name))
            except VoiceError as error:
                left_out[path.name] = str(error)
        for key in read_index(self.folder) if self._folder else ():
            if not is_name(key):
                left_out[key] = f"{key!r} in index.json cannot be the name of a voice"
            elif not (self.folder / f"{key}.npy").is_file():
                left_out[key] = f"index.json names {key!r}, but {self.folder / f'{key}.npy'} is missing"
            else:
                names.add(canonical(key))
        return names, left_out

    def _folders(self) -> Sequence[Path]:
        try:
            found = () if self._folder is None else sorted(self._folder.iterdir())
            return tuple(path for path in found if not path.name.startswith(".") and path.is_dir())
        except FileNotFoundError:
            return ()
        except OSError as error:
            raise VoiceError(f"the voice folder {self.folder} cannot be read: {error.strerror}") from None

    def _find(self, name: str) -> Path | None:
        """Return the folder of a name, however its accents are spelt; None if there is none."""
        if self._folder is None or not is_name(name):
            return None
        wanted = canonical(name)
        if os.path.isdir(self._folder / wanted):  # noqa: PTH112  # no error in a folder that cannot be read: `_folders` says so
            return self._folder / wanted
        return next((path for path in self._folders() if canonical(path.name) == wanted), None)

    def _indexed(self, name: str) -> str | None:
        """Return a name as the index spells it; None if it is not there."""
        return next((key for key in read_index(self.folder) if canonical(key) == canonical(name)), None) if self._folder else None

    def _load_stored(self, folder: Path, tts: Encoder | None, fingerprint: str | None) -> Voice:
        stored, name = read_stored(folder), canonical(folder.name)
        wanted = fingerprint if tts is None else tts.bundle.manifest.codec.fingerprint
        codes = next((c for c in stored.codes if c.fingerprint == wanted), None)
        if codes is None and tts is not None and stored.recording is not None:
            voice = Voice.from_audio(tts, folder / stored.recording, stored.transcript, name=name)
            kind = Path(_file(voice)).stem
            added = StoredCodes(wanted, f"{kind}-{wanted:.16}.npy", voice.loudness)
            self._keep(folder, replace(stored, codes=(*stored.codes, added)), {added.file: voice.sound})
            return voice
        codes = codes or stored.codes[0]
        sound = read_codes(folder / codes.file, latents=True)
        voice = Voice.of(name, sound, stored.transcript, codes.fingerprint, codes.loudness)
        if tts is None or codes.fingerprint != wanted or codes.loudness is not None:
            return voice
        voice.check(tts.bundle)
        measured = replace(codes, loudness=tts.loudness(voice.sound))
        self._keep(folder, replace(stored, codes=tuple(measured if c is codes else c for c in stored.codes)), {})
        return replace(voice, loudness=measured.loudness)

    def _keep(self, folder: Path, stored: StoredVoice, arrays: dict[str, Sound]) -> None:
        """Write computed codes and loudness. If that fails, they are computed again the next time."""
        if self._fixed:
            return
        try:
            for file, sound in arrays.items():
                write_whole(folder / file, npy_bytes(sound))
            write_whole(folder / VOICE_JSON, stored.to_json().encode())
        except OutputError as error:
            log.debug("%s", error)


def find_voice(name: str, own: VoiceStore, bundle: Bundle | None) -> VoiceStore:
    """Return the store that has a voice: the user's before the bundle's. Raises VoiceError if neither has it."""
    built_in = bundle_voices(bundle)
    try:
        found = own.holds(name)
    except VoiceError as error:
        if name not in built_in:
            raise
        log.warning("%s", error)
        found = False
    if found:
        return own
    if bundle and name in built_in:
        return bundle_store(bundle)
    own.check_found(name)
    raise UnknownVoiceError(
        f"there is no voice {name!r}; yours in {own}: {', '.join(own.list()) or 'none'}; "
        f"the bundle's: {', '.join(built_in) or 'none'}",
        hint=f"fishrt voice add NAME --audio FILE{words_option(bundle)}",
    )


def bundle_store(bundle: Bundle) -> VoiceStore:
    """Return the store of the voices that a bundle brings."""
    return VoiceStore(bundle.path / "voices", fixed=True)


def bundle_voices(bundle: Bundle | None) -> tuple[str, ...]:
    """Return the names of the voices that a bundle brings."""
    return bundle.manifest.voices.names if bundle and bundle.manifest.voices else ()


def user_folder() -> Path | None:
    """Return the folder of the user's voices: $FISHRT_VOICE_DIR, else `voices` in fishrt's data folder; None without a home."""
    if folder := os.environ.get("FISHRT_VOICE_DIR"):
        return Path(folder)
    data = data_folder()
    return data and data / "voices"


def _write_voice(folder: Path, voice: Voice) -> None:
    if voice.recording is not None:
        import soundfile

        buffer, (pcm, rate) = io.BytesIO(), voice.recording
        soundfile.write(buffer, pcm, rate, "FLOAT", format="WAV")
        (folder / RECORDING).write_bytes(buffer.getvalue())
    (folder / _file(voice)).write_bytes(npy_bytes(voice.sound))
    codes = StoredCodes(voice.fingerprint, _file(voice), voice.loudness)
    stored = StoredVoice(SCHEMA, voice.transcript, None if voice.recording is None else RECORDING, (codes,))
    (folder / VOICE_JSON).write_text(stored.to_json(), encoding="utf-8")
    for path in (*folder.iterdir(), folder):
        sync(path)


def _file(voice: Voice) -> str:
    return CODES if voice.latents is None else LATENTS


def _load_recordings(folder: Path, tts: Encoder) -> Voice:
    """Return one voice of all recordings in a folder, with their codes and transcripts joined, or of one after the other."""
    from ..audio.files import read_audio

    name, paths = canonical(folder.name), recordings(folder)
    if tts.bundle.manifest.codec.channels is None:
        return joined([Voice.from_audio(tts, path, read_text(path.with_suffix(".lab")), name=name) for path in paths], tts)
    return replace(Voice.from_audio(tts, in_turn([read_audio(path) for path in paths], PAUSE_S), name=name), recording=None)
