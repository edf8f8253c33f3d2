"""`fishrt speak`: text in, audio out."""

from __future__ import annotations

import dataclasses
import secrets
from collections.abc import Callable, Iterator
from contextlib import ExitStack, closing
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click
import numpy as np

from ..audio.output import check_folder, check_place, make_folder, write_whole
from ..bundle.features import LanguageModel
from ..errors import FishrtError, PromptError, UnfinishedError
from ..text.split import check_text
from ..voices.voice import Voice, npy_bytes
from .base.commands import IncompleteError, finish, json_to_stderr, session, warn, wrote
from .base.denoising import SpeakingCommand, denoising_options
from .base.jobs import Notes
from .base.options import (
    EngineOptions,
    Number,
    Whole,
    engine_options,
    format_option,
    load_bundle,
    new_reporter,
    output_options,
    voice_dir_option,
)
from .base.progress import share_of_pieces
from .base.requests import max_frames_option, sampling_options, speed_option, system_option, voices_option
from .base.streams import say
from .base.text import read_text

if TYPE_CHECKING:
    from ..arrays import Pcm
    from ..request import VoiceLike
    from ..speaking.stream import SpeechStream
    from ..speech import AudioChunk, Progress, SpeechInfo
    from ..tts import TTS


@click.command(cls=SpeakingCommand, short_help="Speak a text.")
@click.argument("words", metavar="[TEXT]…", nargs=-1)
@click.option("-f", "--file", type=click.Path(path_type=Path), help="Read the text from a UTF-8 file; - is standard input.")
@click.option(
    "--lines",
    is_flag=True,
    help="Speak each line into a separate file: with `-o DIR`, line 7 becomes DIR/0007.wav (see --format). A line that "
    "cannot be spoken does not stop the others.",
)
@click.option(
    "-o",
    "--output",
    metavar="FILE",
    help="The audio file to write or replace: .wav, .flac, .ogg (Vorbis), .opus, .mp3, .aac, or .pcm (16-bit little-endian "
    "samples without a header). Its folder must exist. - is standard output, and --json then goes to standard error.  "
    "[default: speech.wav, replaced if it exists; none with --play]",
)
@format_option
@click.option(
    "--stream",
    is_flag=True,
    help="Write the audio while it is made: `-o - | aplay`, or `-o - | ffplay -nodisp -autoexit -`. Its wav header "
    "on standard output states no length; a file appears when it is complete. Formats other than wav and pcm need: "
    'pip install "fishrt[server]".',
)
@click.option(
    "--codes",
    type=click.Path(path_type=Path),
    metavar="FILE",
    help="Write the codes of the speech, an .npy file, instead of audio, for `fishrt codec decode`. The codec is not loaded.",
)
@click.option(
    "--samples",
    type=Whole(min=1),
    metavar="N",
    help="With --codes: draw N speeches, with seeds that follow each other, into FILE_0.npy, FILE_1.npy, …",
)
@click.option(
    "--play",
    is_flag=True,
    help='Play the speech on the default output device while it is made. Needs: pip install "fishrt[play]".',
)
@voices_option
@voice_dir_option
@click.option(
    "--reference",
    "references",
    multiple=True,
    type=click.Path(path_type=Path),
    metavar="FILE",
    help='A recording to imitate (wav, flac, ogg, mp3; m4a and others need: pip install "fishrt[server]") or its codes (.npy), '
    "each with a --reference-text for a language model. Speakers are counted over --voice first.",
)
@click.option(
    "--reference-text",
    "reference_texts",
    multiple=True,
    metavar="TEXT",
    help="The words of the --reference, exactly as spoken. A diffusion model needs none.",
)
@sampling_options
@click.option(
    "--seed",
    type=Whole(min=0),
    metavar="N",
    help="Seed of the random numbers: the same seed gives the same speech.  [default: a new one, which is printed]",
)
@click.option(
    "--max-seconds",
    type=Number(min=0, min_open=True),
    metavar="S",
    help="Stop each piece of a long text after S seconds of speech.  [default: the limit of the model]",
)
@max_frames_option
@system_option
@click.option(
    "--volume",
    type=Number(min=0.01, max=10),
    default=1.0,
    show_default=True,
    metavar="FACTOR",
    help="Multiply all samples; 0.5 halves the amplitude (6 dB less).",
)
@speed_option
@click.option("--upstream-compat", is_flag=True, help="Reproduce the original implementation exactly, including its bugs.")
@denoising_options
@engine_options
@output_options
def speak(
    words: tuple[str, ...],
    file: Path | None,
    lines: bool,
    output: str | None,
    format: str | None,
    stream: bool,
    codes: Path | None,
    samples: int | None,
    play: bool,
    names: tuple[str, ...],
    voice_dir: Path | None,
    references: tuple[Path, ...],
    reference_texts: tuple[str, ...],
    max_seconds: float | None,
    max_frames: int | None,
    engine: EngineOptions,
    **request: Any,
) -> None:
    """Speak TEXT, a file, or standard input.

    Several words are joined: quotes are needed only for characters that the shell treats specially. A long text is spoken piece
    by piece.

    <|speaker:0|>, <|speaker:1|>, … in the text begin the turns of the voices given by --voice and --reference, counted in that
    order, if the model supports turns; for other models, all voices are recordings of one speaker. [Tags] such as [laughing] work
    with models that were trained on them.
    """
    from ..speaking.stream import without_warnings

    if len(references) != len(reference_texts):
        if reference_texts or isinstance(load_bundle(engine.bundle).manifest.model, LanguageModel):
            raise click.UsageError(
                f"{len(references)} --reference, but {len(reference_texts)} --reference-text: each needs the other"
            )
        reference_texts = ("",) * len(references)
    if max_seconds is not None and max_frames is not None:
        raise click.UsageError("--max-seconds and --max-frames are the same limit: give one of them")
    if codes is not None:
        if output or format or lines or stream or play or (request["volume"], request["speed"]) != (1, 1):
            raise click.UsageError("--codes writes codes, not audio: --output, --volume and the like are for audio")
        drawn = _code_files(codes, samples)
    elif samples is not None:
        raise click.UsageError("--samples is for --codes")
    elif lines:
        if output in (None, "-") or stream or play:
            raise click.UsageError("--lines writes files into a folder: give -o DIR, and neither --stream nor --play")
    elif output is None and not (play and not stream and format is None):
        output = f"speech.{format or 'wav'}"
    target = _Target(output, format, stream, play, lines)
    if output == "-":
        json_to_stderr()
    target.check()
    text = read_text(words, file)
    texts = _lines(text) if lines else {}
    if not texts:
        check_text(text)
    tts = engine.load(voice_dir)
    if max_seconds is not None:
        codec = tts.bundle.manifest.codec
        max_frames = min(max(1, int(max_seconds * codec.frame_rate)), codec.max_frames)
    voices: list[VoiceLike] = [*names]
    voices += [Voice.from_file(tts, path, said) for path, said in zip(references, reference_texts, strict=True)]
    request |= {"voice": voices or None, "max_frames": max_frames}
    if lines:
        _speak_lines(tts, texts, target, request)
        return
    reporter, share = new_reporter(), share_of_pieces()

    def show(progress: Progress) -> None:
        piece = f"piece {progress.piece + 1} of {progress.pieces}, " if progress.pieces > 1 else ""
        part = share(progress.piece, progress.pieces, progress.frames)
        reporter.show(f"{piece}{progress.audio_s:.1f} s of speech", part)

    if codes is not None:
        _draw(tts, text, drawn, {**request, "progress": show})
        return
    done = target.done
    with without_warnings():
        info = target.speak(tts, text, {**request, "progress": show})
    for warning in info.warnings:
        warn(warning)
    reporter.clear()
    finish({"output": output, "sample_rate": tts.sample_rate, **dataclasses.asdict(info)}, said=f"{done} ({_summary(info)})")


@dataclasses.dataclass(frozen=True)
class _Target:
    """The target of the speech: a file, standard output or the sound card; or a folder with a file for each line."""

    output: str | None
    """--output; None: nothing is written."""
    format: str | None
    stream: bool
    play: bool
    lines: bool

    def check(self) -> None:
        """Check the target before long work. Raises AudioError for a bad format, OutputError for a place or player that fails."""
        from ..audio.encode import check_growing, check_writable
        from ..audio.formats import audio_format
        from ..audio.play import check_player

        if self.play:
            check_player()
        if self.output is None:
            return
        if self.lines:
            audio_format("-", self.format)
            check_folder(Path(self.output))
        else:
            (check_growing if self.stream else check_writable)(self.output, self.format)

    @property
    def done(self) -> str:
        """The message after a speech that begins now."""
        if self.output is None:
            return "Played"
        said = wrote(self.output)
        return f"Played and {said[0].lower()}{said[1:]}" if self.play else said

    def speak(self, tts: TTS, text: str, request: dict[str, Any]) -> SpeechInfo:
        """Speak a text to the target. The request ends when nobody reads the audio any more."""
        from ..audio.encode import growing_audio, write_audio
        from ..audio.play import playing

        if not self.stream and not self.play:
            try:
                speech = tts.speak(text, **request)
            except UnfinishedError as error:
                write_audio(str(self.output), error.speech.pcm, error.speech.sample_rate, self.format)
                self._warn_of_rest(error.speech.duration_s)
                raise
            write_audio(str(self.output), speech.pcm, speech.sample_rate, self.format)
            return speech.info
        faults: list[FishrtError] = []
        whole: list[Pcm] = []
        writers: list[Callable[[Pcm], None]] = []
        with closing(tts.stream(text, **request)) as chunks, ExitStack() as stack:
            for warning in chunks.warnings:
                warn(warning)
            if self.stream:
                writers.append(stack.enter_context(growing_audio(str(self.output), tts.sample_rate, self.format)).write)
            elif self.output is not None:
                writers.append(whole.append)
            if self.play:
                writers.append(stack.enter_context(playing(tts.sample_rate, written=bool(writers))))
            for chunk in _until(chunks, faults):
                for write in writers:
                    write(chunk.pcm)
            if not faults:
                chunks.info.check_spoken()
        if whole:
            write_audio(str(self.output), np.concatenate(whole), tts.sample_rate, self.format)
        if faults:
            self._warn_of_rest(chunks.info.audio_s)
            raise faults[0]
        return chunks.info

    def _warn_of_rest(self, seconds: float) -> None:
        """Warn that the output holds only the speech before an error, of so many seconds."""
        if self.output is not None:
            warn(f"{self.output} holds the {seconds:.1f} s that were spoken before the error")


def _until(chunks: SpeechStream, faults: list[FishrtError]) -> Iterator[AudioChunk]:
    """Yield the chunks; an error after some speech ends them and is added to `faults`, so that the speech is kept."""
    try:
        yield from chunks
    except FishrtError as error:
        if not chunks.info.audio_s:
            raise
        faults.append(error)


def _speak_lines(tts: TTS, texts: dict[int, str], target: _Target, request: dict[str, Any]) -> None:
    """Speak each line into a separate file. Raises IncompleteError at the end if some lines could not be spoken."""
    from ..speaking.stream import without_warnings

    folder, suffix, reporter = Path(str(target.output)), target.format or "wav", new_reporter()
    make_folder(folder)
    entries: list[dict[str, Any]] = []
    notes = Notes()

    def result() -> dict[str, Any]:
        return {"output": str(folder), "sample_rate": tts.sample_rate, "files": entries}

    for done, (number, text) in enumerate(texts.items()):
        reporter.show(f"line {number}", done / len(texts))
        path = str(folder / f"{number:04}.{suffix}")
        try:
            check_text(text)
            with without_warnings():
                info = dataclasses.replace(target, output=path, lines=False).speak(tts, text, request)
        except FishrtError as error:
            if type(error) not in (FishrtError, PromptError, UnfinishedError):  # every line would have it
                raise IncompleteError(f"line {number}: {error}", error.hint, result()) from error
            notes.add(f"line {number} was not spoken{' to its end' if isinstance(error, UnfinishedError) else ''}: {error}")
            entries.append({"line": number, "output": None, "error": str(error)})
            continue
        for warning in info.warnings:
            notes.add(f"line {number}: {warning}")
        entries.append({"line": number, "output": path, **dataclasses.asdict(info)})
    notes.end("--json lists them all")
    spoken = [entry for entry in entries if entry["output"]]
    reporter.done(
        f"Wrote {len(spoken):,} of {len(texts):,} lines to {folder} ({sum(entry['audio_s'] for entry in spoken):.1f} s of speech)"
    )
    if failed := len(texts) - len(spoken):
        raise IncompleteError(f"{failed:,} of {len(texts):,} lines were not spoken", "the warnings say why", result())
    finish(result())


def _code_files(path: Path, samples: int | None) -> list[str]:
    """Return the files for the codes of so many speeches; None: of one. Raises FishrtError for a place that cannot be written."""
    if path.suffix.lower() != ".npy":
        raise FishrtError(f"cannot write {path}: codes are written as .npy", hint="name a file that ends in .npy")
    check_place(path)
    return [str(path)] if samples is None else [str(path.with_stem(f"{path.stem}_{n}")) for n in range(samples)]


def _draw(tts: TTS, text: str, paths: list[str], request: dict[str, Any]) -> None:
    """Draw a speech for each file, and write its codes or latents."""
    from ..speaking.stream import without_warnings

    first = secrets.randbits(32) if request["seed"] is None else request["seed"]
    entries: list[dict[str, Any]] = []
    for seed, path in enumerate(paths, first):
        done = wrote(path)
        with without_warnings():
            speech = tts.draw(text, **{**request, "seed": seed})
        for warning in speech.info.warnings:
            warn(warning)
        write_whole(path, npy_bytes(speech.codes if speech.latents is None else speech.latents))
        info, seconds = dataclasses.asdict(speech.info), speech.info.frames / tts.bundle.manifest.codec.frame_rate
        entries.append({"output": path, **info, "audio_s": seconds})
        if not session().silent:
            say(f"{done} ({speech.info.frames:,} frames, {seconds:.1f} s, seed {seed})")
    finish({"files": entries})


def _summary(info: SpeechInfo) -> str:
    voices = f"voice{'s' if len(info.voices) > 1 else ''} {', '.join(info.voices)}" if info.voices else "no voice"
    speed = f"{1 / info.rtf:.1f} × faster" if info.rtf and info.rtf < 1 else f"{info.rtf or 0:.1f} × slower"
    return f"{info.audio_s:.1f} s, {voices}, seed {info.seed}" + (f", {speed} than real time" if info.rtf else "")


def _lines(text: str) -> dict[int, str]:
    """Return the lines that are not empty by their numbers, from 1, as an editor counts them."""
    return {number: line.strip() for number, line in enumerate(text.split("\n"), 1) if line.strip()}
