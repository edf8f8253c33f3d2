"""Shared parts of commands: option types, options, and the loading of bundles and voices."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from ...bundle.fetched import bundle_folder
from ...bundle.folder import Bundle, embedded_bundle
from ...errors import FishrtError
from ...hub.repository import is_reference
from ...voices.store import VoiceStore, user_folder
from .commands import remember, session
from .progress import Reporter

if TYPE_CHECKING:
    from ...tts import TTS

CPU_TORCH = "install the CPU build of torch as https://pytorch.org/get-started/locally/ shows"
"""Installs torch without gigabytes of CUDA libraries, which an export does not use."""
Command = Callable[..., Any]


@contextmanager
def needs_onnx(what: str) -> Iterator[None]:
    """Import parts of the exporter that need no torch. Raises FishrtError, which names `what`, if one is missing."""
    try:
        yield
    except ImportError as error:
        if (error.name or "").split(".")[0] not in ("onnx", "onnx_ir", "onnxscript"):
            raise
        raise FishrtError(f"{what} needs {error.name}, which is not installed", hint="pip install onnx onnxscript") from None


class Whole(click.IntRange):
    """A whole number in a range."""

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> Any:
        """Return the number; fail for text that is not a whole number."""
        try:
            int(value)
        except ValueError:
            self.fail(f"{value!r} is not a whole number.", param, ctx)
        return super().convert(value, param, ctx)


class Number(click.FloatRange):
    """A finite number in a range."""

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> Any:
        """Return the number; fail for text that is not a finite number."""
        try:
            finite = math.isfinite(float(value))
        except ValueError:
            finite = False
        if not finite:
            self.fail(f"{value!r} is not a number.", param, ctx)
        return super().convert(value, param, ctx)


json_option = click.option(
    "--json",
    "as_json",
    is_flag=True,
    help="Print one JSON object on standard output at the end; see docs/json.md.",
)
quiet_option = click.option(
    "-q",
    "--quiet",
    is_flag=True,
    callback=remember("quiet"),
    help="No progress on standard error, only warnings and errors.",
)
bundle_option = click.option(
    "--bundle",
    type=click.Path(path_type=Path),
    metavar="BUNDLE",
    help="The folder that `fishrt export` wrote, or hf:OWNER/NAME[@REVISION] of the Hugging Face Hub, which is downloaded once.  "
    "[default: the embedded voice]",
)
format_option = click.option(
    "--format",
    metavar="NAME",
    help="Audio format, where no ending of a file names it: wav, flac, ogg, opus, mp3, aac or pcm. Opus has rates of 8, 12, 16, "
    "24 and 48 kHz: speech at 44.1 kHz is resampled to 48 kHz. aac needs: pip install "
    '"fishrt[server]".  [default: by the ending, else wav]',
)
threads_option = click.option(
    "--threads",
    type=Whole(min=1),
    metavar="N",
    help="CPU threads, at most the logical CPUs.  [default: the physical cores]",
)
voice_dir_option = click.option(
    "--voice-dir",
    type=click.Path(path_type=Path),
    metavar="DIR",
    help="Folder of your voices.  [default: $FISHRT_VOICE_DIR, else fishrt/voices in $XDG_DATA_HOME or ~/.local/share]",
)


def json_output(command: Command) -> Command:
    """Add --json to a command that ends with `commands.finish`."""

    @functools.wraps(command)
    def without(*args: Any, as_json: bool, **rest: Any) -> Any:
        return command(*args, **rest)

    return json_option(without)


def output_options(command: Command) -> Command:
    """Add --quiet and --json to a command that ends with `commands.finish`."""

    @functools.wraps(command)
    def without(*args: Any, quiet: bool, **rest: Any) -> Any:
        return command(*args, **rest)

    return quiet_option(json_output(without))


def new_reporter() -> Reporter:
    """Return a reporter that is silent with --quiet and --json."""
    return Reporter(quiet=session().silent)


@dataclass(frozen=True, slots=True)
class EngineOptions:
    """The values of --bundle, --provider and --threads."""

    bundle: Path | None
    """None: the embedded bundle."""
    provider: str
    threads: int | None

    def load(self, voice_dir: Path | None = None) -> TTS:
        """Return the TTS. voice_dir: see `user_store`."""
        from ...tts import TTS

        return TTS.load(_located(self.bundle), provider=self.provider, threads=self.threads, voices=voice_dir)


def engine_options(command: Command) -> Command:
    """Add --bundle, --provider and --threads to a command that runs graphs; it gets them as `engine`."""

    @functools.wraps(command)
    def collected(*args: Any, bundle: Path | None, provider: str, threads: int | None, **rest: Any) -> Any:
        return command(*args, engine=EngineOptions(bundle, provider, threads), **rest)

    provider = click.option(
        "--provider",
        default="auto",
        show_default=True,
        metavar="NAME",
        help="Execution provider that runs the graphs: cpu; cuda (NVIDIA GPU, by ONNX Runtime); tensorrt (NVIDIA GPU, with the "
        "plans of `fishrt build-trt`); coreml (macOS: the codec of a bundle with static graphs, and the rest on the CPU); auto: "
        "cuda where it works, else cpu. `fishrt doctor` shows which ones work here.",
    )
    return bundle_option(provider(threads_option(collected)))


def load_bundle(path: Path | None) -> Bundle:
    """Return a bundle; None is the embedded one. Raises BundleError, and HubError for a download."""
    return Bundle.load(_located(path) or embedded_bundle())


def _located(path: Path | None) -> Path | None:
    """Return the folder of a bundle, downloaded from the hub with progress if needed. None stays None."""
    if path is None or not is_reference(path):
        return path
    reporter = new_reporter()
    try:
        return bundle_folder(path, reporter.show)
    finally:
        reporter.clear()


def user_store(voice_dir: Path | None) -> VoiceStore:
    """Return the store of the user's voices; None is the default folder."""
    return VoiceStore(user_folder() if voice_dir is None else voice_dir)
