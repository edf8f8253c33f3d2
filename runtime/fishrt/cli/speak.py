"""`fishrt speak`: text in, audio out."""

from __future__ import annotations

import dataclasses
import sys
from contextlib import closing
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from ..errors import FishrtError, PromptError
from ..text import check_text
from ..voices import Voice, read_codes
from .base import (
    Number,
    Whole,
    engine_options,
    json_option,
    load_tts,
    quiet_option,
    voice_dir_option,
)
from .commands import json_to_stderr, print_json, warn
from .progress import Reporter

if TYPE_CHECKING:
    from ..speech import Progress, SpeechInfo, SpeechStream
    from ..tts import TTS, VoiceLike


@click.command(short_help="Speak a text.")
@click.argument("text", required=False)
@click.option("-f", "--file", type=click.Path(path_type=Path), help="Read the text from a UTF-8 file; - is standard input.")
@click.option(
    "-o",
    "--output",
    default="speech.wav",
    show_default=True,
    help="File to write or replace, .wav, .flac, .ogg or .mp3; - writes wav to standard output (and --json to standard error).",
)
@click.option(
    "--stream",
    is_flag=True,
    help="Write wav while it is made: `-o - | aplay`, or `-o - | ffplay -nodisp -autoexit -`. On standard output its header then "
    "tells no length; a file appears when it is complete.",
)
@click.option(
    "--voice", "names", multiple=True, metavar="NAME", help="A voice of yours or of the bundle; again for speakers 1, 2, …"
)
@voice_dir_option
@click.option(
    "--reference",
    "references",
    multiple=True,
    type=click.Path(path_type=Path),
    metavar="FILE",
    help="Recording to imitate (wav, flac, ogg, mp3; - is standard input) or its codes (.npy); each needs a --reference-text. "
    "Counted after --voice.",
)
@click.option(
    "--reference-text", "reference_texts", multiple=True, metavar="TEXT", help="What is said in the --reference, word for word."
)
@click.option(
    "--temperature",
    type=Number(),
    metavar="T",
    help="Sampling temperature, at least 0 and below 2: lower is steadier, 0 is greedy.  [default: the bundle's]",
)
@click.option(
    "--top-p",
    type=Number(),
    metavar="P",
    help="Nucleus sampling, above 0 and at most 1: keep the smallest set of tokens whose probabilities add up to P.  "
    "[default: the bundle's]",
)
@click.option(
    "--top-k",
    type=Whole(),
    metavar="K",
    help="Top-k sampling, at least 1: keep the K most probable tokens.  [default: the bundle's]",
)
@click.option(
    "--repetition-penalty",
    type=Number(),
    metavar="R",
    help="Make tokens that were just drawn less probable, by a factor above 0 and below 2; 1: no change. Some models lack it.  "
    "[default: the bundle's]",
)
@click.option(
    "--seed", type=Whole(min=0), metavar="N", help="The same seed gives the same speech.  [default: a new one, reported]"
)
@click.option(
    "--max-frames",
    type=Whole(min=1),
    metavar="N",
    help="Stop each piece of text after so many frames.  [default: what fits]",
)
@click.option("--system", metavar="TEXT", help="System text in place of the usual instruction, if the model takes one.")
@click.option(
    "--volume",
    type=Number(min=0.01, max=10),
    default=1.0,
    show_default=True,
    metavar="FACTOR",
    help="Multiply all samples, 0.01 to 10; 0.5 halves the amplitude (6 dB).",
)
@click.option("--upstream-compat", is_flag=True, help="The original implementation's behaviour to the letter, its bugs included.")
@engine_options
@quiet_option
@json_option
def speak(
    text: str | None,
    file: Path | None,
    output: str,
    stream: bool,
    names: tuple[str, ...],
    voice_dir: Path | None,
    references: tuple[Path, ...],
    reference_texts: tuple[str, ...],
    temperature: float | None,
    top_p: float | None,
    top_k: int | None,
    repetition_penalty: float | None,
    seed: int | None,
    max_frames: int | None,
    system: str | None,
    volume: float,
    upstream_compat: bool,
    bundle: Path | None,
    provider: str,
    threads: int | None,
    quiet: bool,
    as_json: bool,
) -> None:
    """Speak TEXT, or a file, or standard input.

    <|speaker:0|>, <|speaker:1|>, … in the text begin the turns of the voices given by --voice and --reference, counted in that
    order, if the model knows turns; else all are recordings of one speaker. [Tags] such as [laughing] reach models that
    know them. Long text is spoken piece by piece.

    Progress on standard error shows frames, seconds of speech, and the RTF: compute seconds per second of speech.
    """
    from ..encode import check_writable, write_audio
    from ..sampling import Sampling
    from ..wav import check_growing_wav

    if output == "-":
        json_to_stderr()
    if len(references) != len(reference_texts):
        raise click.UsageError(
            f"{len(references)} --reference, but {len(reference_texts)} --reference-text: each needs the other"
        )
    (check_growing_wav if stream else check_writable)(output)
    content = _read_text(text, file)
    check_text(content)
    tts = load_tts(bundle, provider, threads, voice_dir)
    voices: list[VoiceLike] = [*names]
    voices += [_reference(path, said, tts) for path, said in zip(references, reference_texts, strict=True)]
    reporter = Reporter(quiet=quiet or as_json)
    request: dict[str, Any] = {
        "voice": voices or None,
        "sampling": Sampling(temperature, top_p, top_k, repetition_penalty),
        "seed": seed,
        "max_frames": max_frames,
        "system": system,
        "volume": volume,
        "upstream_compat": upstream_compat,
        "progress": lambda p: reporter.show(_progress_line(p)),
    }
    if stream:
        rate, info = tts.sample_rate, _write_as_it_comes(output, tts.stream(content, **request), tts.sample_rate)
    else:
        speech = tts.speak(content, **request)
        rate, info = speech.sample_rate, speech.info
        write_audio(output, speech.pcm, rate)
    target = "standard output" if output == "-" else output
    reporter.done(
        f"{target}: {info.frames:,} frames, {info.audio_s:.2f} s, RTF {info.rtf or 0:.2f}, "
        f"stopped by {', '.join(dict.fromkeys(info.stop_reasons))}, seed {info.seed}"
    )
    for warning in info.warnings:
        warn(warning)
    if as_json:
        result = {"command": "speak", "output": output, "sample_rate": rate}
        described = dataclasses.asdict(info)
        del described["warnings"]  # the session has them
        print_json({**result, **described})


def _write_as_it_comes(output: str, chunks: SpeechStream, rate: int) -> SpeechInfo:
    """Ends the request, too, when nobody takes the audio any more."""
    from ..wav import growing_wav

    with closing(chunks), growing_wav(output, rate) as file:
        for chunk in chunks:
            file.write(chunk.pcm)
        chunks.info.check_spoken()
    return chunks.info


def _progress_line(progress: Progress) -> str:
    piece = f"piece {progress.piece + 1} of {progress.pieces}: " if progress.pieces > 1 else ""
    rtf = f", RTF {progress.elapsed_s / progress.audio_s:.2f}" if progress.audio_s else ""
    return f"{piece}{progress.frames:,} frames, {progress.audio_s:.1f} s{rtf}"


def _read_text(text: str | None, file: Path | None) -> str:
    if text is not None and file is not None:
        raise click.UsageError("give TEXT or --file, not both")
    if text is not None and text != "-":
        return text
    source = "standard input"
    if file is not None and str(file) != "-":
        source = str(file)
        try:
            data = file.read_bytes()
        except OSError as error:
            raise FishrtError(f"{file} cannot be read: {error.strerror}") from None
    else:
        if sys.stdin is None or (text is None and file is None and sys.stdin.isatty()):
            raise click.UsageError("there is no text: give it as TEXT, with --file, or on standard input")
        data = sys.stdin.buffer.read()
    try:
        return data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise PromptError(f"{source} is not UTF-8: {error.reason} at byte {error.start}", hint="convert it to UTF-8") from None


def _reference(path: Path, transcript: str, tts: TTS) -> Voice:
    if path.suffix.lower() == ".npy":
        return Voice(str(path), read_codes(path), transcript, None)
    return Voice.from_audio(tts, path, transcript, name=path.name)
