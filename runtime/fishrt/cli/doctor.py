"""`fishrt doctor`: the capabilities of this machine."""

from __future__ import annotations

import dataclasses
import importlib.metadata
import importlib.util
from typing import Any

import click

from ..errors import BundleError
from ..progress import size
from ..voices.store import user_folder
from .base.commands import finish
from .base.options import CPU_TORCH, json_output, load_bundle


@click.command(short_help="Show what this machine can do.")
@json_output
def doctor() -> None:
    """Show what this machine can do: CPU, memory, NVIDIA devices, versions, audio formats and the embedded voice.

    It lists the execution providers that can run here, what the others lack, and which one `auto` takes.
    """
    from fishrt_engines.doctor import examine

    found = examine()
    rest = {
        "voices": str(user_folder() or "no folder: this user has no home, and FISHRT_VOICE_DIR is not set"),
        "audio formats": _audio_formats(),
        "torch for export": _torch(),
        "embedded voice": _embedded(),
    }
    finish(
        dataclasses.asdict(found) | {name.replace(" ", "_"): text for name, text in rest.items()},
        printed="\n".join([*found.lines(), *(f"{name}: {text}" for name, text in rest.items())]),
    )


def _audio_formats() -> str:
    try:
        import soundfile
    except (ImportError, OSError) as error:
        return f"soundfile cannot be loaded: {error}"
    from ..audio.formats import FORMATS

    pyav = importlib.util.find_spec("av") is not None
    known: dict[str, Any] = soundfile.available_formats()
    read = ", ".join(name for name in ("WAV", "FLAC", "OGG", "MP3", "AIFF", "AU", "CAF") if name in known)
    written = ", ".join(name for name, kind in FORMATS.items() if (kind.container in known if kind.container else pyav))
    read += ", M4A, WebM" if pyav else ""
    return f"reads {read}, and others; writes {written} (libsndfile {soundfile.__libsndfile_version__})"


def _torch() -> str:
    if importlib.util.find_spec("torch") is None:
        return f'not installed (to export, {CPU_TORCH}; then pip install "fishrt[export]"; speaking does not need it)'
    return importlib.metadata.version("torch")


def _embedded() -> str:
    try:
        bundle = load_bundle(None)
        bundle.verify()
    except BundleError as error:
        return f"not usable: {error}"
    return f"ok, {bundle.manifest.name}, {size(bundle.manifest.total_bytes)}"
