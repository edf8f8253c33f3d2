"""What all commands share: how errors end them, how they find a bundle and load it, how they report."""

from __future__ import annotations

import json
import os
import secrets
import sys
import time
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import click

from ..bundle import Bundle
from ..errors import FishrtError
from ..voices import VoiceStore, user_folder

if TYPE_CHECKING:
    from ..tts import TTS

F = TypeVar("F", bound=Callable[..., Any])
_DEBUG, _JSON = "fishrt.debug", "fishrt.json"


class Commands(click.Group):
    """The group that turns errors into lines and exit statuses."""

    def invoke(self, ctx: click.Context) -> Any:
        """Runs the command."""
        try:
            return super().invoke(ctx)
        except FishrtError as error:
            if ctx.meta.get(_DEBUG):
                traceback.print_exc()
            click.echo(f"error: {error}", err=True)
            if error.hint:
                click.echo(f"hint: {error.hint}", err=True)
            if stream := ctx.meta.get(_JSON):
                details = {"kind": type(error).__name__, "message": str(error), "hint": error.hint}
                click.echo(json.dumps({"ok": False, "error": details}, ensure_ascii=False), file=stream)
            ctx.exit(2)
        except KeyboardInterrupt:
            if ctx.meta.get(_DEBUG):
                traceback.print_exc()
            click.echo("interrupted", err=True)
            ctx.exit(130)


def _remember_debug(ctx: click.Context, _: click.Parameter, value: bool) -> None:
    if value:
        ctx.meta[_DEBUG] = True


def _remember_json(ctx: click.Context, _: click.Parameter, value: bool) -> bool:
    if value:
        ctx.meta[_JSON] = sys.stdout
    return value


debug_option = click.option(
    "--debug", is_flag=True, expose_value=False, is_eager=True, callback=_remember_debug, help="Print the traceback of an error."
)
json_option = click.option(
    "--json",
    "as_json",
    is_flag=True,
    is_eager=True,
    callback=_remember_json,
    help="Print one JSON object on standard output at the end.",
)
quiet_option = click.option("-q", "--quiet", is_flag=True, help="No progress on standard error.")
bundle_option = click.option(
    "--bundle",
    type=click.Path(path_type=Path),
    metavar="DIR",
    help="The bundle, as `fishrt export` wrote it.  [default: the embedded voice]",
)
voice_dir_option = click.option(
    "--voice-dir",
    type=click.Path(path_type=Path),
    metavar="DIR",
    help="Folder of your voices.  [default: $FISHRT_VOICE_DIR, else fishrt/voices in $XDG_DATA_HOME or ~/.local/share]",
)


def engine_options(command: F) -> F:
    """--bundle, --provider and --threads, for commands that run graphs."""
    threads = click.option(
        "--threads", type=click.IntRange(min=1), metavar="N", help="CPU threads.  [default: the physical cores]"
    )
    provider = click.option(
        "--provider", default="auto", show_default=True, metavar="NAME", help="What runs the graphs: auto, cpu, …"
    )
    return bundle_option(provider(threads(command)))


def load_tts(bundle: Path | None, provider: str, threads: int | None) -> TTS:
    """The speaker of a bundle; None is the embedded one."""
    from ..tts import TTS

    return TTS.load(bundle, provider=provider, threads=threads)


def load_bundle(path: Path | None) -> Bundle:
    """The manifest of a bundle, without its engines; None is the embedded one. Raises BundleError."""
    from ..tts import embedded_bundle

    return Bundle.load(embedded_bundle() if path is None else path)


def user_store(voice_dir: Path | None) -> VoiceStore:
    """The user's own voices."""
    return VoiceStore(user_folder() if voice_dir is None else voice_dir)


def built_in_store(bundle: Bundle) -> VoiceStore:
    """The voices that a bundle brings."""
    return VoiceStore(bundle.path / "voices")


def json_to_stderr() -> None:
    """The result itself goes to standard output, so the JSON object cannot."""
    ctx = click.get_current_context()
    if _JSON in ctx.meta:
        ctx.meta[_JSON] = sys.stderr


def print_json(data: dict[str, Any]) -> None:
    """The one JSON object of a command that succeeded."""
    stream = click.get_current_context().meta.get(_JSON, sys.stdout)
    click.echo(json.dumps({"ok": True, **data}, ensure_ascii=False), file=stream)


def check_target(path: Path) -> None:
    """Raises FishrtError for a file that could not be written: call it before the long work."""
    if path.is_dir():
        raise FishrtError(f"cannot write {path}: it is a folder")
    folder = path.resolve().parent
    if not folder.is_dir():
        raise FishrtError(f"cannot write {path}: there is no folder {folder}", hint="create the folder first")
    if not os.access(folder, os.W_OK):
        raise FishrtError(f"cannot write {path}: the folder {folder} cannot be written")


def write_bytes(path: Path, data: bytes) -> None:
    """A whole file or none. Raises FishrtError."""
    target = path.resolve()
    aside = target.with_name(f".{secrets.token_hex(8)}.part")
    try:
        try:
            aside.write_bytes(data)
            aside.replace(target)
        finally:
            aside.unlink(missing_ok=True)
    except OSError as error:
        raise FishrtError(f"cannot write {path}: {error.strerror or error}") from None


def bar(part: float) -> str:
    """A bar of progress for a part between 0 and 1."""
    return f"[{'#' * round(part * 20):<20}] {part:4.0%}"


class Reporter:
    """One line of progress on standard error: rewritten in place on a terminal, else a new one every few seconds."""

    INTERVAL_S = 5.0

    def __init__(self, *, quiet: bool) -> None:
        self._quiet = quiet
        self._terminal = sys.stderr.isatty()
        self._shown_at = time.monotonic()
        self._open = False

    def show(self, text: str) -> None:
        """Shows the present state."""
        now = time.monotonic()
        if self._quiet or (now - self._shown_at < (0.1 if self._terminal else self.INTERVAL_S)):
            return
        self._shown_at = now
        self._open = self._terminal
        click.echo(f"\r\x1b[K{text}" if self._terminal else text, err=True, nl=not self._terminal)

    def done(self, text: str) -> None:
        """Shows what came out of it."""
        if not self._quiet:
            click.echo(f"\r\x1b[K{text}" if self._open else text, err=True)
        self._open = False
