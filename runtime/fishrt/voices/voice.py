"""Voices: the codes of a recording and its transcript, from which the model continues in the same voice."""

from __future__ import annotations

import io
import logging
import shlex
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Protocol

import numpy as np

from ..arrays import Ints, Pcm
from ..bundle.folder import Bundle, embedded_bundle
from ..bundle.manifest import Manifest
from ..codec import check_entries, check_integers
from ..errors import ArgumentError, FishrtError, VoiceError
from ..text.split import check_unicode, speakable
from .loudness import Loudness
from .recordings import check_recording, doubts, most_seconds

log = logging.getLogger(__name__)


class Encoder(Protocol):
    """An encoder of recordings to codes: a TTS."""

    @property
    def bundle(self) -> Bundle:
        """The bundle whose codec encodes."""
        ...

    def encode(self, pcm: Pcm, rate: int) -> Ints:
        """Encode pcm float32 [samples] at `rate` Hz to codes int64 [num_codebooks, frames]."""
        ...

    def loudness(self, codes: Ints) -> Loudness | None:
        """Return the loudness of decoded codes, int64 [num_codebooks, frames]; None for silence."""
        ...

    def check_transcript(self, text: str, what: str) -> None:
        """Check that the model can read a transcript; `what` names it. Raises PromptError otherwise."""
        ...


@dataclass(frozen=True, slots=True, eq=False)
class Voice:
    """A reusable reference: the model continues in its voice.

    Attributes:
        name: name of the voice.
        codes: int64 [num_codebooks, frames].
        transcript: words of the recording.
        fingerprint: fingerprint of the codec that made the codes; None if another project's layout does not say it.
        loudness: loudness of the decoded codes; None: not measured, or silent.
        recording: pcm float32 [samples] from which the codes were made, and its rate in Hz.
    """

    name: str
    codes: Ints = field(repr=False)
    transcript: str
    fingerprint: str | None
    loudness: Loudness | None = None
    recording: tuple[Pcm, int] | None = field(default=None, repr=False)

    @classmethod
    def from_audio(cls, tts: Encoder, audio: str | Path | tuple[Pcm, int], transcript: str, *, name: str = "voice") -> Voice:
        """Make a voice from a recording: a file, or (pcm float32 [samples] mono −1..1, rate in Hz).

        A few seconds are enough; `LanguageModel.voice_seconds` of the bundle's manifest gives the best length. Doubts about the
        recording are logged as warnings.
        Raises AudioError for a recording that cannot be read, is no such array or rate, has samples that are not numbers or far
        outside −1..1, is shorter than 0.2 s or is longer than the model takes; VoiceError for silence, or a transcript with
        nothing to speak; PromptError for a transcript that the model cannot read; ArgumentError for audio of another type.
        """
        from ..audio.files import read_audio

        if not isinstance(audio, (str, Path, tuple)):
            raise ArgumentError(f"audio is a {type(audio).__name__}", hint="give a file, or samples with their rate: (pcm, rate)")
        check_words(tts, transcript, name)
        manifest = tts.bundle.manifest
        lm, codec = manifest.language_model, manifest.codec
        what = f"the recording of voice {name!r}" if isinstance(audio, tuple) else str(audio)
        pcm, rate = audio if isinstance(audio, tuple) else read_audio(audio, max_seconds=most_seconds(lm, codec))
        check_recording(pcm, rate, lm, codec, what)
        for doubt in doubts(pcm, rate, transcript, lm):
            log.warning("%s %s", what, doubt)
        codes = np.asarray(tts.encode(pcm, rate), dtype=np.int64)
        voice = cls(name, codes, transcript.strip(), codec.fingerprint, recording=(pcm, int(rate)))
        voice.check(tts.bundle)
        return replace(voice, loudness=tts.loudness(codes))

    def check(self, bundle: Bundle | Manifest) -> None:
        """Check that a bundle can speak in this voice: transcript, codec, range of codes. Raises VoiceError otherwise."""
        codec = (bundle.manifest if isinstance(bundle, Bundle) else bundle).codec
        _check_transcript(self.transcript, self.name)
        again = f"add its recording with this bundle: {_add_command(self.name, bundle)}"
        if self.fingerprint not in (None, codec.fingerprint):
            raise VoiceError(
                f"voice {self.name!r} was made with the codec {self.fingerprint:.12}…; this bundle's is {codec.fingerprint:.12}…",
                hint=f"only codes of it are kept: {again}",
            )
        check_integers(self.codes, f"voice {self.name!r}")
        sizes = codec.codebook_sizes
        if self.codes.ndim != 2 or self.codes.shape[0] != len(sizes) or not self.codes.shape[1]:
            raise VoiceError(
                f"voice {self.name!r} has codes of shape {list(self.codes.shape)}; this bundle needs "
                f"[{len(sizes)} codebooks, at least 1 frame]",
                hint=again,
            )
        check_entries(self.codes, sizes, f"the codes of voice {self.name!r}")


def joined(voices: Sequence[Voice], tts: Encoder) -> Voice:
    """Return one voice of several, which were made with the same codec, with their codes and transcripts joined."""
    if len(voices) == 1:
        return voices[0]
    codes = np.concatenate([voice.codes for voice in voices], axis=1)
    transcript = "\n".join(voice.transcript for voice in voices)
    return Voice(voices[0].name, codes, transcript, voices[0].fingerprint, tts.loudness(codes))


def read_codes(path: Path) -> Ints:
    """Read codes int64 [num_codebooks, frames] from an .npy file of any integer type; a leading dimension of 1 is dropped.

    Raises VoiceError for a file that is not such an array, or holds negative or no codes.
    """
    hint = "give an .npy file as `fishrt codec encode` writes"
    try:
        with path.open("rb") as file:
            magic = file.read(12)
        if magic[:6] != b"\x93NUMPY":
            audio = magic[:4] in (b"RIFF", b"fLaC", b"OggS", b"FORM", b"RF64") or magic[:3] == b"ID3" or magic[:1] == b"\xff"
            raise VoiceError(
                f"{path} is {'audio' if audio else 'no .npy array'}, not codes",
                hint="`fishrt codec encode` makes codes of audio" if audio else hint,
            )
        stored = np.load(path, mmap_mode="r", allow_pickle=False)  # mapped: a false size in the header costs no memory
    except OSError as error:
        raise VoiceError(f"the codes {path} cannot be read: {error.strerror or error}") from None
    except VoiceError:
        raise
    except Exception:  # numpy evaluates a damaged header as Python, and raises whatever that raises
        raise VoiceError(f"{path} is not an array of codes: it is damaged, or holds Python objects", hint=hint) from None
    shape = list(stored.shape)
    if stored.dtype.kind not in "iu" or len(shape[-2:]) < 2 or shape[:-2] not in ([], [1]):
        raise VoiceError(
            f"{path} is not an array of codes: integers [codebooks, frames] are expected, found {stored.dtype} {shape}", hint=hint
        )
    codes = np.array(stored.reshape(shape[-2:]), dtype=np.int64)
    if not codes.size or codes.min() < 0:
        raise VoiceError(f"{path} holds " + ("codes below 0" if codes.size else "no codes"))
    return codes


def npy_bytes(codes: Ints) -> bytes:
    """Return an .npy file of codes."""
    buffer = io.BytesIO()
    np.save(buffer, codes, allow_pickle=False)
    return buffer.getvalue()


def _add_command(name: str, bundle: Bundle | Manifest) -> str:
    embedded = not isinstance(bundle, Bundle) or bundle.path == _embedded_path()
    where = "" if embedded else f" --bundle {shlex.quote(str(bundle.path))}"  # type: ignore[union-attr]
    return f"fishrt voice add {shlex.quote(name)}{where} --force --audio FILE --text TEXT"


def _embedded_path() -> Path | None:
    try:
        return embedded_bundle()
    except FishrtError:
        return None


def check_words(tts: Encoder, transcript: str, name: str) -> None:
    """Check that the model can read the transcript of a voice. Raises VoiceError if nothing can be spoken, PromptError."""
    _check_transcript(transcript, name)
    tts.check_transcript(transcript, f"the transcript of voice {name!r}")


def _check_transcript(transcript: str, name: str) -> None:
    check_unicode(transcript, f"the transcript of voice {name!r}")
    if not speakable(transcript):
        why = "its transcript has neither a letter nor a digit" if transcript.strip() else "it has no transcript"
        raise VoiceError(f"voice {name!r} cannot be used: {why}", hint="give the words that are spoken in the recording")
