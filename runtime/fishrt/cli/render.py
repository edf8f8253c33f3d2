"""`fishrt render`: every line of a file becomes a file of speech."""

from __future__ import annotations

import sys
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from ..audio.output import check_folder
from ..errors import ArgumentError, FishrtError
from ..jobs.folder import Shard
from .base.denoising import SpeakingCommand, denoising_options
from .base.jobs import carry_out
from .base.options import EngineOptions, Whole, engine_options, output_options, voice_dir_option
from .base.requests import max_frames_option, sampling_options, speed_option, system_option, voices_option

if TYPE_CHECKING:
    from ..bulk.render import Speaker
    from ..jobs.engine import Work
    from ..tts import TTS

_HERE = "here"
"""Value of --ray without an address."""


def _shard(_ctx: click.Context, _param: click.Parameter, text: str | None) -> Shard | None:
    try:
        return None if text is None else Shard.of(text)
    except ArgumentError as error:
        raise click.BadParameter(f"{error}; {error.hint}") from None


@click.command(cls=SpeakingCommand, short_help="Speak every line of a file into files.")
@click.argument("job", type=click.Path(path_type=Path))
@click.argument("out", type=click.Path(path_type=Path))
@click.option(
    "--input-format",
    "kind",
    type=click.Choice(["jsonl", "csv", "text"]),
    help="Lines of JSON objects; a table with the same fields as columns; or lines of text.  [default: by the ending .csv or "
    ".txt, else jsonl]",
)
@click.option(
    "--format",
    type=click.Choice(["wav", "flac", "ogg", "mp3"]),
    default="wav",
    show_default=True,
    help="Format of rows that name none.",
)
@voices_option
@voice_dir_option
@sampling_options
@max_frames_option
@system_option
@speed_option
@click.option(
    "--batch",
    type=Whole(min=1),
    metavar="N",
    help="Speak N rows together. More are faster, and may change the last bits of a row.  [default: 8 for a bundle in int8-rows "
    "on a CPU, which gives the same in any batch; else 1]",
)
@click.option(
    "--shard", callback=_shard, metavar="I/N", help="Only the I-th of N parts of the rows, beside other runs in the same OUT."
)
@click.option("--limit", type=Whole(min=1), metavar="N", help="Speak at most N rows now, and leave the others for later.")
@click.option(
    "--ray",
    is_flag=False,
    flag_value=_HERE,
    metavar="[ADDRESS]",
    help="Speak rows in processes of Ray: of the cluster at ADDRESS, or of one that is started for the run. Needs: pip "
    'install "fishrt[ray]".',
)
@click.option("--workers", type=Whole(min=1), metavar="N", help="Processes of --ray.  [default: 1]")
@denoising_options
@engine_options
@output_options
def render(
    job: Path,
    out: Path,
    kind: Any,
    format: str,
    names: tuple[str, ...],
    voice_dir: Path | None,
    batch: int | None,
    shard: Shard | None,
    limit: int | None,
    ray: str | None,
    workers: int | None,
    engine: EngineOptions,
    **usual: Any,
) -> None:
    """Speak every line of JOB (- is standard input) into a file of the folder OUT, which goes on where it was ended.

    A line is a JSON object: {"id": "a1", "text": "Good morning.", "voice": "awb"}. docs/render.md lists all fields. The options
    are for lines that do not say otherwise. What is done is not done again; changed lines are. Bad lines do not stop the others:
    OUT/errors.jsonl has them, and the exit status is then 1.
    """
    from ..bulk.render import render as speak_rows
    from ..bulk.rows import input_format
    from ..request import Request
    from ..speaking.stream import without_warnings

    if workers and not ray:
        raise ArgumentError("--workers is for --ray", hint="add --ray, or speak with --batch in this process")
    check_folder(out)
    data = _read(job)
    tts = engine.load(voice_dir)
    defaults = Request("", list(names) or None, **usual)

    with without_warnings():
        carry_out(
            out,
            f"errors-{shard}.jsonl" if shard else "errors.jsonl",
            lambda tell, stop: speak_rows(
                *(tts, data, out),
                kind=kind or input_format(job),
                base=job.parent.absolute(),
                defaults=defaults,
                format=format,
                batch=batch,
                shard=shard,
                limit=limit,
                spread=_spread(ray, workers or 1, engine, tts, voice_dir) if ray else None,
                tell=tell,
                stop=stop,
            ),
        )


def _spread(address: str, workers: int, engine: EngineOptions, tts: TTS, voice_dir: Path | None) -> Callable[[int], Work]:
    """Return what speaks rows on Ray, given the batch: each worker has the same bundle, at the same place."""
    from fishrt_engines.machine import usable_threads

    from ..scale.actors import on_ray

    threads = engine.threads or (max(1, usable_threads(None) // workers) if address == _HERE else 1)
    bundle = None if engine.bundle is None else tts.bundle.path.absolute()
    there = replace(engine, bundle=bundle, provider=tts.provider, threads=threads)
    voices = None if voice_dir is None else voice_dir.absolute()
    return lambda batch: on_ray(
        *(partial(_speaker, there, voices, batch), workers),
        batch=batch,
        threads=threads,
        address=None if address == _HERE else address,
    )


def _speaker(engine: EngineOptions, voice_dir: Path | None, batch: int) -> Speaker:
    from ..bulk.render import Speaker

    return Speaker(engine.load(voice_dir), batch)


def _read(job: Path) -> bytes:
    if str(job) == "-":
        if sys.stdin is None:
            raise FishrtError("standard input is closed", hint="give a file")
        return sys.stdin.buffer.read()
    try:
        return job.read_bytes()
    except OSError as error:
        raise FishrtError(f"{job} cannot be read: {error.strerror}") from None
