"""What all commands share: how errors end them, how they find a bundle and load it, how they report."""

from __future__ import annotations

import contextlib
import itertools
import json
import logging
import sys
import time
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any, TextIO, TypeVar

import click

from ..bundle import Bundle, embedded_bundle
from ..errors import FishrtError, VoiceError
from ..voices import VoiceStore, user_folder

if TYPE_CHECKING:
    from ..tts import TTS

F = TypeVar("F", bound=Callable[..., Any])
_DEBUG, _JSON = "fishrt.debug", "fishrt.json"


class Commands(click.Group):
    """The group that turns errors into lines and exit statuses."""

    def make_context(
        self, info_name: str | None, args: list[str], parent: click.Context | None = None, **extra: Any
    ) -> click.Context:
        """Parses what stands before the name of the command."""
        # Looked for before the parsing, which may be what fails; behind "--" it is text.
        stream = sys.stdout if "--json" in itertools.takewhile(lambda word: word != "--", args) else None
        try:
            ctx = super().make_context(info_name, args, parent, **extra)
        except click.UsageError as error:
            if isinstance(error, _HELP):
                raise
            _report(error, stream)
            raise click.exceptions.Exit(2) from None
        ctx.meta[_JSON] = stream
        return ctx

    def invoke(self, ctx: click.Context) -> Any:
        """Runs the command."""
        try:
            return super().invoke(ctx)
        except (FishrtError, click.UsageError) as error:
            if isinstance(error, _HELP):
                raise
            if ctx.meta.get(_DEBUG):
                traceback.print_exc()
            _report(error, ctx.meta[_JSON])
            ctx.exit(2)
        except KeyboardInterrupt:
            if ctx.meta.get(_DEBUG):
                traceback.print_exc()
            say("interrupted")
            ctx.exit(130)


_HELP: Any = getattr(click.exceptions, "NoArgsIsHelpError", ())
"""What click raises, since 8.2, to show the help of a group that was given no command."""


def _report(error: FishrtError | click.UsageError, stream: TextIO | None) -> None:
    """The lines of an error, and its JSON object on `stream`."""
    if isinstance(error, click.UsageError):
        message, command = error.format_message(), error.ctx.command_path if error.ctx else "fishrt"
        hint: str | None = f"{command} --help"
    else:
        message, hint = str(error), error.hint
    say(f"error: {message}")
    if hint:
        say(f"hint: {hint}")
    if stream:
        details = {"kind": type(error).__name__, "message": message, "hint": hint}
        click.echo(json.dumps({"ok": False, "error": details}, ensure_ascii=False), file=stream)


def say(text: str, *, nl: bool = True) -> None:
    """A line on standard error. Nobody may be listening, which is no reason to stop the work."""
    with contextlib.suppress(OSError):
        click.echo(text, err=True, nl=nl)


def _remember_debug(ctx: click.Context, _: click.Parameter, value: bool) -> None:
    if value:
        ctx.meta[_DEBUG] = True


debug_option = click.option(
    "--debug", is_flag=True, expose_value=False, is_eager=True, callback=_remember_debug, help="Print the traceback of an error."
)
json_option = click.option(
    "--json",
    "as_json",
    is_flag=True,
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
        "--provider",
        default="auto",
        show_default=True,
        metavar="NAME",
        help="What runs the graphs: cpu, cuda (NVIDIA, ONNX Runtime), tensorrt (NVIDIA, plans of `fishrt build-trt`), coreml "
        "(macOS: the codec of a bundle with static graphs, the rest on cpu), or auto: cuda where it can be used, else cpu. "
        "`fishrt doctor` tells what this machine has.",
    )
    return bundle_option(provider(threads(command)))


def load_tts(bundle: Path | None, provider: str, threads: int | None) -> TTS:
    """The speaker of a bundle; None is the embedded one. Unless the command is quiet, it tells when graphs are optimised."""
    from ..tts import TTS

    told = logging.getLogger("fishrt_engines.ort_session")
    told.handlers = [] if click.get_current_context().params.get("quiet") else [_Told()]
    told.setLevel(logging.INFO)
    return TTS.load(bundle, provider=provider, threads=threads)


class _Told(logging.Handler):
    """Says what is logged."""

    def emit(self, record: logging.LogRecord) -> None:
        say(record.getMessage())


def load_bundle(path: Path | None) -> Bundle:
    """The manifest of a bundle, without its engines; None is the embedded one. Raises BundleError."""
    return Bundle.load(embedded_bundle() if path is None else path)


def user_store(voice_dir: Path | None) -> VoiceStore:
    """The user's own voices."""
    return VoiceStore(user_folder() if voice_dir is None else voice_dir)


def find_voice(name: str, own: VoiceStore, bundle: Bundle | None) -> VoiceStore:
    """The store that has the voice: the user's before the bundle's. Raises VoiceError."""
    built_in = bundle.manifest.voices.names if bundle and bundle.manifest.voices else ()
    try:
        names = own.list()
    except VoiceError as error:
        if name not in built_in:
            raise
        say(f"warning: {error}")
        names = []
    if name in names:
        return own
    if bundle and name in built_in:
        return VoiceStore(bundle.path / "voices")
    raise VoiceError(
        f"there is no voice {name!r}; yours in {own}: {', '.join(names) or 'none'}; "
        f"the bundle's: {', '.join(built_in) or 'none'}",
        hint="fishrt voice add NAME --audio FILE --text TEXT",
    )


def json_to_stderr() -> None:
    """The result itself goes to standard output, so the JSON object cannot."""
    meta = click.get_current_context().meta
    if meta[_JSON]:
        meta[_JSON] = sys.stderr


def print_json(data: dict[str, Any]) -> None:
    """The one JSON object of a command that succeeded."""
    if stream := click.get_current_context().meta[_JSON]:
        click.echo(json.dumps({"ok": True, **data}, ensure_ascii=False), file=stream)


def bar(part: float) -> str:
    """A bar of progress for a part between 0 and 1."""
    return f"[{'#' * round(part * 20):<20}] {part:4.0%}"


class Reporter:
    """One line of progress on standard error: rewritten in place on a terminal, else a new one every few seconds."""

    INTERVAL_S = 5.0

    def __init__(self, *, quiet: bool) -> None:
        self._quiet = quiet
        self._terminal = sys.stderr is not None and sys.stderr.isatty()
        self._shown_at = time.monotonic()
        self._open = False

    def show(self, text: str) -> None:
        """Shows the present state."""
        now = time.monotonic()
        if self._quiet or (now - self._shown_at < (0.1 if self._terminal else self.INTERVAL_S)):
            return
        self._shown_at = now
        self._open = self._terminal
        say(f"\r\x1b[K{text}" if self._terminal else text, nl=not self._terminal)

    def done(self, text: str) -> None:
        """Shows what came out of it."""
        if not self._quiet:
            say(f"\r\x1b[K{text}" if self._open else text)
        self._open = False
