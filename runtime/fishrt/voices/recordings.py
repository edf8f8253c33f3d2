"""Checks of a voice's recording: errors for a useless one, doubts about a poor one."""

from __future__ import annotations

import unicodedata
from collections.abc import Iterator, Sequence

import numpy as np

from ..arrays import Pcm
from ..audio.resample import resample
from ..bundle.features import Codec, LanguageModel
from ..bundle.manifest import AnyModel
from ..errors import AudioError, VoiceError
from ..text.reading import unread
from .loudness import measure

MIN_SECONDS = 0.2
SILENCE = 1e-3
"""A recording whose largest sample is below this (−60 dB of full scale) holds no voice."""

PAUSE_S = 1.0
"""Seconds of silence between the recordings of one voice, where a model takes them as one."""
_SHORT = 3.0
"""Seconds from which a recording is long enough for any model, although more may be better."""
_QUIET_LUFS = -42.0
_CLIPPED_LEVEL, _CLIPPED_PART = 0.98, 0.01
"""A recording is clipped if this part of its samples is above this fraction of the largest; speech has a tenth as many."""
_SLOWEST, _FASTEST = 3.0, 35.0
"""Letters per second. Speech has about 8 to 20."""
_LETTERS = {"CJK": 3.0, "HIRAGANA": 2.0, "KATAKANA": 2.0, "HANGUL": 3.0}
"""Letters that one character stands for, for scripts of syllables, by the start of the characters' Unicode names."""
_DIGIT_LETTERS = 4.0
_NOISE_FLATNESS = 0.6
"""Geometric ÷ arithmetic mean of the power spectrum: white noise has more than 0.9, speech less than 0.2."""
_NOISE_WINDOW = 512


def in_turn(recordings: Sequence[tuple[Pcm, int]], pause_s: float) -> tuple[Pcm, int]:
    """Return recordings, each `limited` pcm float32 [samples] and its rate in Hz, one after the other, with silence between."""
    rate = recordings[0][1]
    silence, parts = np.zeros(round(pause_s * rate), np.float32), list[Pcm]()
    for pcm, other in recordings:
        parts += [silence, resample(limited(pcm), other, rate)]
    return np.concatenate(parts[1:]), rate


def limited(pcm: Pcm) -> Pcm:
    """Return a recording, made softer if it is louder than full scale."""
    peak: np.float32 = np.abs(pcm).max(initial=1.0)
    return pcm / peak


def most_seconds(model: AnyModel, codec: Codec) -> float:
    """Return the length of the longest recording that codec and model take."""
    frames = min(codec.max_frames, model.max_prompt) if isinstance(model, LanguageModel) else model.max_voice_frames
    return frames / codec.frame_rate


def check_recording(pcm: Pcm, rate: int, model: AnyModel, codec: Codec, what: str) -> None:
    """Check that a recording can be a voice. Raises AudioError, and VoiceError for silence."""
    from ..audio.files import check_pcm

    check_pcm(pcm, rate, what)
    seconds, most = len(pcm) / rate, most_seconds(model, codec)
    if not MIN_SECONDS <= seconds <= most:
        raise AudioError(
            f"{what} is too {'short' if seconds < MIN_SECONDS else 'long'}: {seconds:.2f} s; "
            f"a voice takes {MIN_SECONDS} s to {most:.1f} s",
            hint=f"use clean speech of one speaker; {best_length(model)} is best",
        )
    if np.abs(pcm).max() < SILENCE:
        raise VoiceError(f"{what} is silent", hint="check that the right file or channel was recorded")


def best_length(model: AnyModel) -> str:
    """Return the length of recording that suits a model best, in words."""
    least, most = model.voice_seconds
    return f"{least:g} to {most:g} s"


def doubts(pcm: Pcm, rate: int, transcript: str, model: AnyModel) -> Iterator[str]:
    """Yield reasons why a recording, pcm float32 [samples] as `check_recording` takes it, may make a poor voice.

    transcript: for a model that needs none, it is not looked at.
    """
    seconds, sizes = len(pcm) / rate, np.abs(pcm)
    least, most = model.voice_seconds
    if not min(_SHORT, least) <= seconds <= most:
        yield f"is {seconds:.1f} s long; {best_length(model)} is best for this model"
    if np.mean(sizes > _CLIPPED_LEVEL * sizes.max()) > _CLIPPED_PART:
        yield "is clipped: its peaks are cut off; record it with less gain"
    loudness = measure(pcm, rate)
    if loudness and loudness.lufs < _QUIET_LUFS:
        yield f"is very quiet ({loudness.lufs:.0f} LUFS); record it with more gain"
    if _flatness(pcm) > _NOISE_FLATNESS:
        yield "sounds like noise"
    if not isinstance(model, LanguageModel):
        return
    if not _SLOWEST <= sum(map(_letters, transcript)) / seconds <= _FASTEST:
        letters = sum(char.isalnum() for char in transcript)
        yield f"has {seconds:.1f} s for {letters:,} letters of transcript; is every word of it there, and no other?"
    if model.reads is not None and (found := unread(transcript, model.reads)):
        kinds = " and ".join(each.partition(" ")[0] for each in found)  # without its words: doubts go into logs
        yield f"has {kinds} in its transcript that this model does not read well"


def _letters(char: str) -> float:
    kind = unicodedata.category(char)
    if kind[0] != "L":
        return _DIGIT_LETTERS if kind == "Nd" else 0.0
    name = unicodedata.name(char, "")
    return next((count for script, count in _LETTERS.items() if name.startswith(script)), 1.0)


def _flatness(pcm: Pcm) -> float:
    """Return the flatness of the mean power spectrum without its lowest part; 0 for less than a window."""
    windows = pcm[: len(pcm) // _NOISE_WINDOW * _NOISE_WINDOW].reshape(-1, _NOISE_WINDOW)
    if not len(windows):
        return 0.0
    power = np.square(np.abs(np.fft.rfft(windows * np.hanning(_NOISE_WINDOW), axis=1))).mean(axis=0)[4:-4]
    return float(np.exp(np.log(power + 1e-20).mean()) / (power.mean() + 1e-20))
