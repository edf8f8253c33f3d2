"""`fishrt codec`: audio ↔ codes, in the `.npy` files of the original tools."""

from __future__ import annotations

from pathlib import Path

import click

from ..audio.output import check_folder, check_place, write_whole
from ..codec import apart
from ..errors import FishrtError
from ..voices.voice import npy_bytes, read_codes
from .base.commands import finish, json_to_stderr, wrote
from .base.jobs import carry_out
from .base.options import EngineOptions, engine_options, format_option, json_output, output_options


@click.group(short_help="Turn audio into codes, and codes into audio.")
def codec() -> None:
    """Turn audio into codes, the integers that a language model draws, and codes into audio."""


@codec.command(short_help="Encode audio to codes.")
@click.argument("audio", type=click.Path(path_type=Path))
@click.argument("out", required=False, type=click.Path(path_type=Path))
@click.option("-o", "--output", help="The .npy file to write or replace; - is standard output.  [default: codes.npy]")
@engine_options
@output_options
def encode(audio: Path, out: Path | None, output: str | None, engine: EngineOptions) -> None:
    """Encode AUDIO (wav, flac, ogg, mp3, …; - is standard input) to codes: int64 (codebooks, frames).

    With the bundle of a diffusion model, to the latents of a voice: float32 (frames, channels).

    AUDIO may have any sample rate; its channels are averaged.

    If AUDIO is a folder, all recordings in it are encoded into the same tree of .npy files in the folder OUT, which may be AUDIO
    itself. Transcripts (.lab) are copied. The command can be ended at any time, and goes on; docs/render.md says more.
    """
    from ..audio.files import read_audio

    if audio.is_dir():
        _encode_folder(audio, out, output, engine)
        return
    if out is not None:
        raise click.UsageError("OUT is for a folder of recordings: name the file with -o")
    output = "codes.npy" if output is None else output
    if output == "-":
        json_to_stderr()
    elif Path(output).suffix.lower() != ".npy":
        raise FishrtError(f"cannot write {output}: codes are written as .npy", hint="name a file that ends in .npy")
    check_place(output)
    pcm, rate = read_audio(audio)
    sound, said = engine.load().encode(pcm, rate), wrote(output)
    write_whole(output, npy_bytes(sound))
    codes, latents = apart(sound)
    kind, count = ("codebooks", len(codes)) if latents is None else ("channels", latents.shape[1])
    frames = codes.shape[1]
    finish({"output": output, kind: count, "frames": frames}, said=f"{said} ({count} {kind}, {frames:,} frames)")


def _encode_folder(folder: Path, out: Path | None, output: str | None, engine: EngineOptions) -> None:
    from ..bulk.recordings import encode_folder

    if out is None or output is not None:
        raise click.UsageError(f"{folder} is a folder: give OUT, the folder for its codes, and no -o")
    check_folder(out)
    tts = engine.load()
    carry_out(out, "errors.jsonl", lambda tell, stop: encode_folder(tts, folder, out, tell=tell, stop=stop))


@codec.command(short_help="Decode codes to audio.")
@click.argument("codes", type=click.Path(path_type=Path))
@click.option(
    "-o",
    "--output",
    default="speech.wav",
    show_default=True,
    help="The audio file to write or replace: .wav, .flac, .ogg, .opus, .mp3, .aac or .pcm; - is standard output.",
)
@format_option
@engine_options
@json_output
def decode(codes: Path, output: str, format: str | None, engine: EngineOptions) -> None:
    """Decode CODES, an .npy file of integers (codebooks, frames), or of latents, to audio."""
    from ..audio.encode import check_writable, write_audio

    if output == "-":
        json_to_stderr()
    check_writable(output, format)
    stored = read_codes(codes, latents=True)
    tts = engine.load()
    pcm = tts.decode(stored)
    rate, said = tts.bundle.manifest.codec.sample_rate, wrote(output)
    write_audio(output, pcm, rate, format)
    seconds = len(pcm) / rate
    finish({"output": output, "sample_rate": rate, "audio_s": seconds}, said=f"{said} ({seconds:.1f} s)")
