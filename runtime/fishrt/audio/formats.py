"""The audio formats that can be written: their names, sample rates and bit rates."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from ..errors import AudioError
from .pyav import pyav

AUTOMATIC = -1000
"""The bit rate that leaves it to the encoder of Opus, as clients of Fish Audio write it."""


@dataclass(frozen=True, slots=True)
class Format:
    """A kind of audio file, or of a stream of audio."""

    suffixes: tuple[str, ...]
    content_type: str
    container: str = ""
    """libsndfile's name of the file format; empty: PyAV writes whole files, too."""
    encoding: str = ""
    """libsndfile's name of the sample encoding."""
    rates: tuple[int, ...] = ()
    """Sample rates in Hz that the format can hold, ascending; empty: any."""
    stream_rates: tuple[int, ...] | None = None
    """Sample rates in Hz of a stream, if other than those of files."""
    kbits: tuple[int, ...] | range = ()
    """Bit rates in kbit/s that can be asked for, ascending."""


_LAYER_III = (8000, 11025, 12000, 16000, 22050, 24000, 32000, 44100, 48000)
_LAYER_III_KBITS = (32, 40, 48, 56, 64, 80, 96, 112, 128, 160, 192, 224, 256, 320)
_AAC = (8000, 11025, 12000, 16000, 22050, 24000, 32000, 44100, 48000, 64000, 88200, 96000)

FORMATS = {
    "wav": Format((".wav",), "audio/wav", "WAV", "PCM_16"),
    "flac": Format((".flac",), "audio/flac", "FLAC", "PCM_16"),
    "ogg": Format((".ogg",), "audio/ogg", "OGG", "VORBIS"),
    "opus": Format((".opus",), "audio/ogg", "OGG", "OPUS", (8000, 12000, 16000, 24000, 48000), (48000,), range(6, 257)),
    "mp3": Format((".mp3",), "audio/mpeg", "MP3", "MPEG_LAYER_III", _LAYER_III, kbits=_LAYER_III_KBITS),
    "aac": Format((".aac",), "audio/aac", rates=_AAC),
    "pcm": Format((".pcm", ".raw"), "audio/pcm", "RAW", "PCM_16"),
}
"""Name → format. pcm is 16-bit little-endian samples without a header, aac is AAC-LC in ADTS."""

_BY_SUFFIX = {suffix: name for name, kind in FORMATS.items() for suffix in kind.suffixes}


def audio_format(path: str | Path, format: str | None = None) -> str:
    """Return the name of the format for a file: `format`, else that of the file's ending; wav for standard output, "-".

    Raises AudioError for an unknown name or ending, for two that disagree, and for a format that needs PyAV without it.
    """
    if format is not None and format not in FORMATS:
        raise AudioError(f"unknown format {format!r}", hint=f"known are {', '.join(FORMATS)}")
    name = format or "wav"
    if str(path) != "-":
        ending = Path(path).suffix
        of_ending = _BY_SUFFIX.get(ending.lower())
        if format is None and of_ending is None:
            why = f"unknown format {ending!r}" if ending else "its name has no ending, which would name the format"
            raise AudioError(f"cannot write {path}: {why}", hint=f"end the name in {', '.join(_BY_SUFFIX)}, or give the format")
        if format is not None and of_ending not in (format, None):
            raise AudioError(
                f"cannot write {path}: its ending says {of_ending}, and {format} is asked for", hint="change one of them"
            )
        name = format or of_ending or "wav"
    if not FORMATS[name].container:
        pyav(f"the format {name}")
    return name


def next_rate(rates: tuple[int, ...], rate: int) -> int:
    """Return the lowest of the rates that is not below `rate`, else the highest; `rate` if there are none."""
    return next((held for held in rates if held >= rate), rates[-1]) if rates else rate


def bit_rate(format: str, asked: int | None) -> int | None:
    """Return a bit rate in kbit/s or, from 1,000, in bit/s as kbit/s; None: none is asked for, or Opus' own choice.

    Raises AudioError for a bit rate that the format does not have.
    """
    kbits = FORMATS[format].kbits
    if asked is None or (asked == AUTOMATIC and format == "opus"):
        return None
    if not kbits:
        raise AudioError(f"{format} has no bit rate to choose, and {asked:,} is asked for")
    kbit = asked / 1000 if asked >= 1000 else asked
    if kbit not in kbits:
        possible = f"{kbits[0]} to {kbits[-1]}" if isinstance(kbits, range) else ", ".join(map(str, kbits))
        raise AudioError(f"{format} cannot have a bit rate of {kbit:,.10g} kbit/s", hint=f"possible are {possible}")
    return int(kbit)
