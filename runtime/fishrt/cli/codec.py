"""`fishrt codec`: audio ↔ codes, in the `.npy` files of the original tools."""

from __future__ import annotations

from pathlib import Path

import click

from ..audio.output import check_place, write_whole
from ..errors import FishrtError
from ..voices.voice import npy_bytes, read_codes
from .base import engine_options, format_option, json_option, load_tts
from .commands import json_to_stderr, print_json
from .streams import say


@click.group(short_help="Turn audio into codes, and codes into audio.")
def codec() -> None:
    """Turn audio into codes, the integers that a language model draws, and codes into audio."""


@codec.command(short_help="Encode audio to codes.")
@click.argument("audio", type=click.Path(path_type=Path))
@click.option(
    "-o", "--output", default="codes.npy", show_default=True, help="The .npy file to write or replace; - is standard output."
)
@engine_options
@json_option
def encode(audio: Path, output: str, bundle: Path | None, provider: str, threads: int | None, as_json: bool) -> None:
    """Encode AUDIO (wav, flac, ogg, mp3, …; - is standard input) to codes: int64 (codebooks, frames).

    AUDIO may have any sample rate; its channels are averaged.
    """
    from ..audio.files import read_audio

    if output == "-":
        json_to_stderr()
        check_place(output)
    elif Path(output).suffix.lower() != ".npy":
        raise FishrtError(f"cannot write {output}: codes are written as .npy", hint="name a file that ends in .npy")
    else:
        check_place(Path(output))
    pcm, rate = read_audio(audio)
    codes = load_tts(bundle, provider, threads).encode(pcm, rate)
    write_whole(output, npy_bytes(codes))
    if not as_json:
        say(f"Wrote {_place(output)} ({codes.shape[0]} codebooks, {codes.shape[1]:,} frames)")
    print_json({"output": output, "codebooks": codes.shape[0], "frames": codes.shape[1]})


@codec.command(short_help="Decode codes to audio.")
@click.argument("codes", type=click.Path(path_type=Path))
@click.option(
    "-o",
    "--output",
    default="speech.wav",
    show_default=True,
    help="The audio file to write or replace: .wav, .flac, .ogg, .opus, .mp3 or .pcm; - is standard output.",
)
@format_option
@engine_options
@json_option
def decode(
    codes: Path, output: str, format: str | None, bundle: Path | None, provider: str, threads: int | None, as_json: bool
) -> None:
    """Decode CODES, an .npy file of integers (codebooks, frames), to audio."""
    from ..audio.encode import check_writable, write_audio

    if output == "-":
        json_to_stderr()
    check_writable(output, format)
    stored = read_codes(codes)
    tts = load_tts(bundle, provider, threads)
    pcm = tts.decode(stored)
    rate = tts.bundle.manifest.codec.sample_rate
    write_audio(output, pcm, rate, format)
    seconds = len(pcm) / rate
    if not as_json:
        say(f"Wrote {_place(output)} ({seconds:.1f} s)")
    print_json({"output": output, "sample_rate": rate, "audio_s": seconds})


def _place(output: str) -> str:
    return "to standard output" if output == "-" else output
