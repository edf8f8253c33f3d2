"""`fishrt serve`: an HTTP server that speaks."""

from __future__ import annotations

import os
from contextlib import closing, nullcontext, suppress
from pathlib import Path
from typing import Any

import click

from ..errors import FishrtError
from .base.options import EngineOptions, Number, Whole, engine_options, quiet_option, voice_dir_option
from .base.server_log import Log, logging_server
from .base.streams import emit


@click.command(
    short_help="Serve speech over HTTP.",
    context_settings={"auto_envvar_prefix": "FISHRT"},
    epilog="Each option is also an environment variable: --max-queue is FISHRT_MAX_QUEUE, and so on. An option counts more.",
)
@click.option(
    "--host", default="127.0.0.1", show_default=True, metavar="ADDRESS", help="Address to listen on; 0.0.0.0 is every one."
)
@click.option(
    "--port", type=Whole(min=0, max=65535), default=8080, show_default=True, metavar="N", help="TCP port; 0 takes a free one."
)
@voice_dir_option
@click.option(
    "--api-key",
    metavar="KEY",
    help="The key that clients must send. Other users of the machine see it in the list of processes: set $FISHRT_API_KEY "
    "instead, or use --api-key-file.  [default: everybody may use the server]",
)
@click.option("--api-key-file", type=click.Path(path_type=Path), metavar="FILE", help="A file with the key in its first line.")
@click.option(
    "--max-queue", type=Whole(min=0), default=64, show_default=True, metavar="N", help="Requests that may wait; more are refused."
)
@click.option(
    "--max-wait",
    type=Number(min=0, min_open=True),
    metavar="S",
    help="Seconds that a request may wait for its turn.  [default: any number]",
)
@click.option(
    "--max-active", type=Whole(min=1), default=8, show_default=True, metavar="N", help="Requests that speak at the same time."
)
@click.option(
    "--max-text-length",
    type=Whole(min=0),
    default=50_000,
    show_default=True,
    metavar="N",
    help="Most characters of a text; 0: any number.",
)
@click.option(
    "--cors-origin",
    "cors_origins",
    multiple=True,
    envvar="FISHRT_CORS_ORIGIN",
    metavar="ORIGIN",
    help="Origin of web pages that may use it, and address by which it may be asked through a proxy, such as "
    'https://example.com; "*" is every one.  [default: only its page]',
)
@click.option("--strict-voices", is_flag=True, help="OpenAI's names of voices (alloy, …) are unknown.")
@click.option(
    "--pcm-rate",
    type=Whole(min=4000, max=192_000),
    metavar="HZ",
    help="Sample rate of raw samples if a request names none.  [default: the model's; 24000 for OpenAI's models]",
)
@click.option(
    "--media-dir",
    type=click.Path(path_type=Path),
    metavar="DIR",
    help="Folder of recordings that requests may name.  [default: none]",
)
@click.option("--allow-url-refs", is_flag=True, help="Requests may name recordings by public URLs, which the server fetches.")
@click.option(
    "--wyoming-port", type=Whole(min=0, max=65535), metavar="N", help="TCP port of the Wyoming protocol.  [default: none]"
)
@click.option("--log-json", is_flag=True, help="Log JSON objects, one a line.")
@engine_options
@quiet_option
def serve(
    engine: EngineOptions,
    voice_dir: Path | None,
    api_key: str | None,
    api_key_file: Path | None,
    log_json: bool,
    quiet: bool,
    **options: Any,
) -> None:
    """Serve speech over HTTP, to clients of OpenAI's API and of the Fish Speech family, until SIGTERM or Ctrl-C.

    \b
    Speak with the embedded voice:
      fishrt serve
      curl http://127.0.0.1:8080/v1/audio/speech --json '{"input": "Good morning."}' -o hello.mp3
    """
    try:
        from ..server.run import address, listen, page_address, serve
        from ..server.settings import Settings
    except ImportError as error:
        hint = 'pip install "fishrt[server]"'
        raise FishrtError(f"the server needs {error.name}, which is not installed", hint=hint) from None
    if options["media_dir"] is not None and not options["media_dir"].is_dir():
        raise FishrtError(f"--media-dir: there is no folder {options['media_dir']}", hint="make it, or name another")
    if voice_dir is not None and voice_dir.exists() and not voice_dir.is_dir():
        raise FishrtError(f"--voice-dir: {voice_dir} is no folder", hint="name a folder; it need not exist yet")
    settings = Settings(api_key=_key(api_key, api_key_file), **options)
    port = settings.wyoming_port
    with (
        logging_server(Log(log_json)),
        closing(listen(settings.host, settings.port)) as sock,
        nullcontext() if port is None else closing(listen(settings.host, port, "--wyoming-port")) as wyoming,
        suppress(KeyboardInterrupt),  # a signal while the bundle is opened ends the server as later ones do
    ):
        tts = engine.load(voice_dir)
        _ = tts.voices  # a folder that cannot be read is an error now
        emit(f"fishrt serves {tts.bundle.manifest.name} on {address(sock)}")
        emit(f"To try it: {page_address(sock)}, {'without a key' if settings.api_key is None else 'with the key'}")
        if wyoming is not None:
            emit(f"Wyoming: {address(wyoming, 'tcp')}")
        serve(tts, settings, sock, wyoming)


def _key(given: str | None, file: Path | None) -> str | None:
    """Return the key. An empty one is an error: it would leave the server open, against what its owner means."""
    given = os.environ.get("FISHRT_API_KEY") if given is None else given
    if given is not None and file is not None:
        raise click.UsageError("--api-key and --api-key-file (or their variables) are the same: give one of them")
    if file is not None:
        try:
            given = "".join(file.read_text(encoding="utf-8").splitlines()[:1])
        except OSError as error:
            raise FishrtError(f"--api-key-file {file} cannot be read: {error.strerror}") from None
        except UnicodeDecodeError:
            raise FishrtError(f"--api-key-file {file} cannot be read: it is no UTF-8 text") from None
    if given is not None and not given.strip():
        raise FishrtError("the API key is empty", hint="give a key, or none: unset FISHRT_API_KEY and leave out --api-key")
    return given and given.strip()
