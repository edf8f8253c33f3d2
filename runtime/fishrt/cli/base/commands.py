"""The command `fishrt` as a whole: options that all commands have, results, errors as lines and exit statuses, its own help."""

from __future__ import annotations

import contextlib
import itertools
import json
import logging
import signal
import sys
import threading
import traceback
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import click
from click.shell_completion import get_completion_class

from ...errors import FishrtError
from ...version import __version__
from .streams import emit, logging_to, say

EXIT_STATUSES = (
    "Exit status: 0 done; 2 a mistake that you can mend: the lines `error:` and `hint:` say how; 1 a fault of fishrt, nobody "
    "reads its output any more, or some rows of a job have errors; 130 interrupted."
)
_Callback = Callable[[click.Context, click.Parameter, bool], bool | None]


@dataclass
class Session:
    """One call of the program."""

    command: str = ""
    """Words of the command, such as "voice add"; empty if no word is a command."""
    json: Callable[[str], None] | None = None
    """Writes the JSON object; None without --json."""
    debug: bool = False
    verbose: bool = False
    quiet: bool = False
    warnings: list[str] = field(default_factory=list)

    @property
    def silent(self) -> bool:
        """Whether standard error gets only warnings and errors."""
        return self.quiet or self.json is not None

    def warn(self, text: str) -> None:
        """Print a warning, each text once."""
        if text not in self.warnings:
            self.warnings.append(text)
            say(f"warning: {text}")

    def finish(self, ok: bool, data: dict[str, Any]) -> None:
        """Print the JSON object, with --json. It is ASCII: no encoding of an output and no path can break it."""
        if self.json:
            frame = {"command": self.command, "ok": ok, "warnings": self.warnings}
            self.json(json.dumps(frame | data | frame))  # the frame's keys are first, and its values count


class IncompleteError(FishrtError):
    """A part of the work is done; the rest failed."""

    def __init__(self, message: str, hint: str | None, data: dict[str, Any], status: int = 2) -> None:
        """Make the error. data: entries of the JSON object about the finished part. status: of the exit."""
        super().__init__(message, hint=hint)
        self.data, self.status = data, status


class Interrupted(Exception):  # noqa: N818  # no fault
    """The user interrupted the work."""

    def __init__(self, message: str, data: dict[str, Any] | None = None) -> None:
        """Make it. data: as of IncompleteError."""
        super().__init__(message)
        self.data = data or {}


class Commands(click.Group):
    """The group of all commands, in the order in which they were added."""

    def __init__(self, *args: Any, **options: Any) -> None:
        super().__init__(*args, **options)
        self.params += [_flag("-V", "--version", _version, "Show the version."), *_common()]

    def add_command(self, cmd: click.Command, name: str | None = None) -> None:
        """Add a command, and the common options to it and to its subcommands."""
        super().add_command(cmd, name)
        for command in (cmd, *(cmd.commands.values() if isinstance(cmd, click.Group) else ())):
            command.params += _common()

    def list_commands(self, ctx: click.Context) -> list[str]:
        """Return the names in the order of the help."""
        return list(self.commands)

    def main(self, *args: Any, **options: Any) -> Any:
        """Run the command line and end the process: see EXIT_STATUSES."""
        words = options.get("args", args[0] if args else None)
        session = self._session(list(sys.argv[1:] if words is None else words))
        try:
            with logging_to(_Printer(session), logging.DEBUG), _interruptible():
                status = super().main(*args, **{**options, "standalone_mode": False, "obj": session})
        except (KeyboardInterrupt, click.Abort):  # before or after the command itself
            status = _fail(session, Interrupted("interrupted"))
        except Exception as error:
            if session.debug:
                traceback.print_exc()
            status = _fail(session, error)
        sys.exit(status or 0)

    def invoke(self, ctx: click.Context) -> Any:
        """Run the command."""
        try:
            return super().invoke(ctx)
        except KeyboardInterrupt as error:
            raise Interrupted("interrupted") from error

    def _session(self, words: list[str]) -> Session:
        """Return a session with the command and --json, which errors of the parsing need."""
        command: click.Command = self
        names: list[str] = []
        for word in words:
            if isinstance(command, click.Group) and word in command.commands:
                command = command.commands[word]
                names.append(word)
        # Behind "--" it is text.
        as_json = "--json" in itertools.takewhile(lambda word: word != "--", words)
        return Session(" ".join(names), emit if as_json else None)


@contextlib.contextmanager
def _interruptible() -> Iterator[None]:
    """Let the signals that end a process interrupt the block, as Ctrl-C does, so that no partial file stays behind."""
    found = {number: signal.getsignal(number) for name in ("SIGTERM", "SIGHUP") if (number := getattr(signal, name, None))}
    mine = [number for number, handler in found.items() if handler == signal.SIG_DFL]  # nohup ignores one
    if threading.current_thread() is not threading.main_thread():
        mine = []
    for number in mine:
        signal.signal(number, signal.default_int_handler)
    try:
        yield
    finally:
        for number in mine:
            signal.signal(number, signal.SIG_DFL)


def _fail(session: Session, error: Exception) -> int:
    """Print an error, and return the exit status."""
    status, hint, message = 2, None, str(error)
    if isinstance(error, _HELP):
        say(error.format_message())
        return status
    if isinstance(error, FishrtError):
        hint = error.hint
        status = error.status if isinstance(error, IncompleteError) else status
    elif isinstance(error, click.ClickException):
        message = error.format_message()
        hint = f"{error.ctx.command_path if isinstance(error, click.UsageError) and error.ctx else 'fishrt'} --help"
    elif isinstance(error, Interrupted):
        status = 130
    else:
        status, message = 1, f"fishrt has a fault: {type(error).__name__}: {error}"
        hint = None if session.debug else "run it again with --debug, and report the traceback"
    say(f"error: {message}" if status != 130 else message)
    if hint:
        say(f"hint: {hint}")
    with contextlib.suppress(FishrtError, BrokenPipeError):  # the error may be one of standard output
        done = error.data if isinstance(error, IncompleteError | Interrupted) else {}
        session.finish(False, {"error": {"kind": type(error).__name__, "message": message, "hint": hint}, **done})
    return status


_HELP: Any = getattr(click.exceptions, "NoArgsIsHelpError", ())
"""The exception of click 8.2 and later that shows the help of a group without a command."""


_OPTIMISING = "fishrt_engines.ort.session"
"""The logger that explains why the first start of a bundle takes longer."""


class _Printer(logging.Handler):
    """A log handler that prints warnings, with --verbose also other records."""

    def __init__(self, session: Session) -> None:
        super().__init__()
        self._session = session

    def emit(self, record: logging.LogRecord) -> None:
        if record.levelno >= logging.WARNING:
            self._session.warn(record.getMessage())
        elif self._session.verbose:
            say(f"{record.name}: {record.getMessage()}")
        elif record.name == _OPTIMISING and not self._session.quiet:
            say(record.getMessage())


def session() -> Session:
    """Return the session of the command that runs."""
    return click.get_current_context().ensure_object(Session)


def warn(text: str) -> None:
    """Print a warning, each text once, and add it to the JSON object."""
    session().warn(text)


def print_json(data: dict[str, Any]) -> None:
    """Print the JSON object of a command that succeeded, with --json."""
    session().finish(True, data)


def finish(data: dict[str, Any], *, printed: str = "", said: str = "") -> None:
    """End a command that succeeded: print the JSON object with --json, or else the result as text.

    printed: text for standard output. said: text for standard error, which --quiet drops.
    """
    if printed and not session().json:
        emit(printed)
    if said and not session().silent:
        say(said)
    print_json(data)


def wrote(output: str) -> str:
    """Return what the writing of a result is called, before it is written: "Wrote a.wav", or "Replaced a.wav" if there is one."""
    if output == "-":
        return "Wrote to standard output"
    return f"{'Replaced' if Path(output).is_file() else 'Wrote'} {output}"


def json_to_stderr() -> None:
    """Print the JSON object on standard error: the result itself goes to standard output."""
    if session().json:
        session().json = say


def _common() -> list[click.Parameter]:
    return [
        _flag("-h", "--help", _help, "Show this help."),
        _flag("-v", "--verbose", remember("verbose"), "Show on standard error what is chosen, cached and measured."),
        _flag("--debug", "--debug", remember("debug"), "Print the traceback of an error."),
    ]


def remember(name: str) -> _Callback:
    """Return the callback of a flag that sets a field of the session."""

    def callback(ctx: click.Context, _: click.Parameter, value: bool) -> bool:
        if value:
            setattr(ctx.ensure_object(Session), name, True)
        return value

    return callback


def _flag(short: str, name: str, callback: _Callback, text: str) -> click.Option:
    return click.Option(
        list(dict.fromkeys((short, name))), is_flag=True, expose_value=False, is_eager=True, callback=callback, help=text
    )


def _help(ctx: click.Context, _: click.Parameter, value: bool) -> None:
    if value and not ctx.resilient_parsing:
        emit(ctx.get_help())
        ctx.exit()


def _version(ctx: click.Context, _: click.Parameter, value: bool) -> None:
    if value and not ctx.resilient_parsing:
        emit(f"fishrt {__version__}")
        ctx.exit()


@click.command(name="help", short_help="Show the help of a command.")
@click.argument("words", nargs=-1, metavar="[COMMAND]…")
@click.pass_context
def show_help(ctx: click.Context, words: tuple[str, ...]) -> None:
    """Show the help of COMMAND, such as `fishrt help voice add`."""
    found = ctx.find_root()
    for word in words:
        command = found.command.get_command(found, word) if isinstance(found.command, click.Group) else None
        if command is None:
            raise click.UsageError(f"there is no command {' '.join(words)!r}", ctx.find_root())
        found = click.Context(command, parent=found, info_name=word)
    emit(found.get_help())


@click.command(short_help="Print a script that completes commands and options in a shell.")
@click.argument("shell", type=click.Choice(["bash", "zsh", "fish"]))
@click.pass_context
def completion(ctx: click.Context, shell: str) -> None:
    """Print the script that lets SHELL complete commands and options.

    \b
    bash:  eval "$(fishrt completion bash)"       in ~/.bashrc
    zsh:   eval "$(fishrt completion zsh)"        in ~/.zshrc, after compinit
    fish:  fishrt completion fish | source        in ~/.config/fish/config.fish
    """
    kind = get_completion_class(shell)
    assert kind is not None, shell
    emit(kind(ctx.find_root().command, {}, "fishrt", "_FISHRT_COMPLETE").source())
