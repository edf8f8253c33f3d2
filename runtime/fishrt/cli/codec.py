"""`fishrt codec`: audio ↔ codes, as `.npy` files that upstream's tools read and write too."""

from __future__ import annotations

import io
from pathlib import Path

import click
import numpy as np

from ..voices import read_codes
from .base import check_target, debug_option, engine_options, json_option, load_tts, print_json, write_bytes


@click.group()
def codec() -> None:
    """Turn audio into codes and codes into audio."""


@codec.command()
@click.argument("audio", type=click.Path(path_type=Path))
@click.option(
    "-o", "--output", type=click.Path(path_type=Path), default="codes.npy", show_default=True, help="The .npy file to write."
)
@engine_options
@json_option
@debug_option
def encode(audio: Path, output: Path, bundle: Path | None, provider: str, threads: int | None, as_json: bool) -> None:
    """Encode AUDIO (wav, flac, ogg, mp3; any rate, channels averaged) to codes: int64 (codebooks, frames)."""
    from ..audio import read_audio

    check_target(output)
    pcm, rate = read_audio(audio)
    codes = load_tts(bundle, provider, threads).encode(pcm, rate)
    buffer = io.BytesIO()
    np.save(buffer, codes.astype(np.int64), allow_pickle=False)
    write_bytes(output, buffer.getvalue())
    if as_json:
        print_json({"command": "codec encode", "output": str(output), "codebooks": codes.shape[0], "frames": codes.shape[1]})
    else:
        click.echo(f"{output}: {codes.shape[0]} codebooks, {codes.shape[1]:,} frames", err=True)


@codec.command()
@click.argument("codes", type=click.Path(path_type=Path))
@click.option(
    "-o",
    "--output",
    default="speech.wav",
    show_default=True,
    help="Audio file to write: .wav, .flac, .ogg, .mp3; - is wav on standard output.",
)
@engine_options
@json_option
@debug_option
def decode(codes: Path, output: str, bundle: Path | None, provider: str, threads: int | None, as_json: bool) -> None:
    """Decode CODES, an .npy file of integers (codebooks, frames), to audio."""
    from ..audio import check_writable, write_audio
    from .base import json_to_stderr

    if output == "-":
        json_to_stderr()
    else:
        check_writable(Path(output))
    stored = read_codes(codes)
    tts = load_tts(bundle, provider, threads)
    pcm = tts.decode(stored)
    rate = tts.bundle.manifest.codec.sample_rate
    write_audio(output, pcm, rate)
    seconds = len(pcm) / rate
    if as_json:
        print_json({"command": "codec decode", "output": output, "sample_rate": rate, "audio_s": seconds})
    else:
        click.echo(f"{output}: {seconds:.2f} s at {rate:,} Hz", err=True)
