"""Voices: the codes of a recording and its transcript, or its latents, from which the model speaks in the same voice."""

from __future__ import annotations

import io
import logging
import shlex
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Protocol

import numpy as np

from ..arrays import Floats, Ints, Pcm, Sound
from ..bundle.diffusion import Diffusion
from ..bundle.features import LanguageModel
from ..bundle.folder import Bundle, embedded_bundle
from ..bundle.manifest import Manifest
from ..codec import apart, check_entries, check_integers, check_latents
from ..codec import joined as joined_frames
from ..errors import ArgumentError, FishrtError, VoiceError
from ..text.split import check_unicode, speakable
from .loudness import Loudness
from .recordings import check_recording, doubts, most_seconds

log = logging.getLogger(__name__)


class Encoder(Protocol):
    """An encoder of recordings to codes or latents: a TTS."""

    @property
    def bundle(self) -> Bundle:
        """The bundle whose codec encodes."""
        ...

    def encode(self, pcm: Pcm, rate: int) -> Sound:
        """Encode pcm float32 [samples] at `rate` Hz to codes int64 [num_codebooks, frames], or latents."""
        ...

    def loudness(self, sound: Sound) -> Loudness | None:
        """Return the loudness of decoded codes, int64 [num_codebooks, frames], or latents; None for silence."""
        ...

    def check_transcript(self, text: str, what: str) -> None:
        """Check that the model can read a transcript; `what` names it. Raises PromptError otherwise."""
        ...


@dataclass(frozen=True, slots=True, eq=False)
class Voice:
    """A reusable reference: the model continues in its voice.

    Attributes:
        name: name of the voice.
        codes: int64 [num_codebooks, frames]; of no codebooks if it has latents.
        transcript: words of the recording. Diffusion models need none.
        fingerprint: fingerprint of the codec that made the codes; None if another project's layout does not say it.
        loudness: loudness of the decoded codes; None: not measured, or silent.
        recording: pcm float32 [samples] from which the codes were made, and its rate in Hz.
        latents: float32 [frames, channels], for a diffusion model; None: it has codes.
    """

    name: str
    codes: Ints = field(repr=False)
    transcript: str
    fingerprint: str | None
    loudness: Loudness | None = None
    recording: tuple[Pcm, int] | None = field(default=None, repr=False)
    latents: Floats | None = field(default=None, repr=False)

    @classmethod
    def of(cls, name: str, sound: Sound, transcript: str, fingerprint: str | None, loudness: Loudness | None = None) -> Voice:
        """Return a voice of codes, or of latents."""
        codes, latents = apart(sound)
        return cls(name, codes, transcript, fingerprint, loudness, latents=latents)

    @property
    def sound(self) -> Sound:
        """Its codes, or its latents."""
        return self.codes if self.latents is None else self.latents

    @classmethod
    def from_audio(cls, tts: Encoder, audio: str | Path | tuple[Pcm, int], transcript: str = "", *, name: str = "voice") -> Voice:
        """Make a voice from a recording: a file, or (pcm float32 [samples] mono −1..1, rate in Hz).

        A few seconds are enough; `voice_seconds` of the model in the bundle's manifest gives the best length. A diffusion model
        needs no transcript. Doubts about the recording are logged as warnings.
        Raises AudioError for a recording that cannot be read, is no such array or rate, has samples that are not numbers or far
        outside −1..1, is shorter than 0.2 s or is longer than the model takes; VoiceError for silence, or a transcript with
        nothing to speak; PromptError for a transcript that the model cannot read; ArgumentError for audio of another type.
        """
        from ..audio.files import read_audio

        if not isinstance(audio, (str, Path, tuple)):
            raise ArgumentError(f"audio is a {type(audio).__name__}", hint="give a file, or samples with their rate: (pcm, rate)")
        check_words(tts, transcript, name)
        manifest = tts.bundle.manifest
        model, codec = manifest.model, manifest.codec
        what = f"the recording of voice {name!r}" if isinstance(audio, tuple) else str(audio)
        pcm, rate = audio if isinstance(audio, tuple) else read_audio(audio, max_seconds=most_seconds(model, codec))
        check_recording(pcm, rate, model, codec, what)
        for doubt in doubts(pcm, rate, transcript, model):
            log.warning("%s %s", what, doubt)
        voice = cls.of(name, tts.encode(pcm, rate), transcript.strip(), codec.fingerprint)
        voice = replace(voice, recording=(pcm, int(rate)))
        voice.check(tts.bundle)
        return replace(voice, loudness=tts.loudness(voice.sound))

    @classmethod
    def from_file(cls, tts: Encoder, path: Path, transcript: str = "") -> Voice:
        """Make a voice from a recording as `from_audio`, or from its codes or latents in an .npy file. Raises VoiceError, too."""
        if path.suffix.lower() == ".npy":
            return cls.of(str(path), read_codes(path, latents=True), transcript, None)
        return cls.from_audio(tts, path, transcript, name=path.name)

    def check(self, bundle: Bundle | Manifest) -> None:
        """Check that a bundle can speak in this voice: transcript, codec, range of codes. Raises VoiceError otherwise."""
        manifest = bundle.manifest if isinstance(bundle, Bundle) else bundle
        codec = manifest.codec
        _check_transcript(self.transcript, self.name, manifest)
        again = f"add its recording with this bundle: {_add_command(self.name, bundle)}"
        if self.fingerprint not in (None, codec.fingerprint):
            raise VoiceError(
                f"voice {self.name!r} was made with the codec {self.fingerprint:.12}…; this bundle's is {codec.fingerprint:.12}…",
                hint=f"only codes of it are kept: {again}",
            )
        if isinstance(manifest.model, Diffusion):
            what = f"the {'codes' if self.latents is None else 'latents'} of voice {self.name!r}"
            check_latents(self.sound, codec, what, manifest.model.max_voice_frames, hint=again)
            return
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
    sound = joined_frames([voice.sound for voice in voices])
    transcript = "\n".join(voice.transcript for voice in voices)
    return Voice.of(voices[0].name, sound, transcript, voices[0].fingerprint, tts.loudness(sound))


def read_codes(path: Path, *, latents: bool = False) -> Sound:
    """Read codes int64 [num_codebooks, frames] from an .npy file of any integer type; a leading dimension of 1 is dropped.

    latents: float32 [frames, channels] are taken, too.
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
    if latents and stored.dtype == np.float32 and stored.ndim == 2:
        return np.array(stored)
    if stored.dtype.kind not in "iu" or len(shape[-2:]) < 2 or shape[:-2] not in ([], [1]):
        raise VoiceError(
            f"{path} is not an array of codes: integers [codebooks, frames] are expected, found {stored.dtype} {shape}", hint=hint
        )
    codes = np.array(stored.reshape(shape[-2:]), dtype=np.int64)
    if not codes.size or codes.min() < 0:
        raise VoiceError(f"{path} holds " + ("codes below 0" if codes.size else "no codes"))
    return codes


def npy_bytes(sound: Sound) -> bytes:
    """Return an .npy file of codes or latents."""
    buffer = io.BytesIO()
    np.save(buffer, sound, allow_pickle=False)
    return buffer.getvalue()


def _add_command(name: str, bundle: Bundle | Manifest) -> str:
    embedded = not isinstance(bundle, Bundle) or bundle.path == _embedded_path()
    where = "" if embedded else f" --bundle {shlex.quote(str(bundle.path))}"  # type: ignore[union-attr]
    return f"fishrt voice add {shlex.quote(name)}{where} --force --audio FILE{words_option(bundle)}"


def words_option(bundle: Bundle | Manifest | None) -> str:
    """Return the option of `fishrt voice add` for the words of a recording; nothing if the bundle's model needs none."""
    manifest = bundle.manifest if isinstance(bundle, Bundle) else bundle
    return "" if manifest is not None and isinstance(manifest.model, Diffusion) else " --text TEXT"


def _embedded_path() -> Path | None:
    try:
        return embedded_bundle()
    except FishrtError:
        return None


def check_words(tts: Encoder, transcript: str, name: str) -> None:
    """Check that the model can read the transcript of a voice, if it needs one.

    Raises VoiceError if nothing can be spoken, PromptError.
    """
    _check_transcript(transcript, name, tts.bundle.manifest)
    tts.check_transcript(transcript, f"the transcript of voice {name!r}")


def _check_transcript(transcript: str, name: str, manifest: Manifest) -> None:
    check_unicode(transcript, f"the transcript of voice {name!r}")
    if isinstance(manifest.model, LanguageModel) and not speakable(transcript):
        why = "its transcript has neither a letter nor a digit" if transcript.strip() else "it has no transcript"
        raise VoiceError(f"voice {name!r} cannot be used: {why}", hint="give the words that are spoken in the recording")
