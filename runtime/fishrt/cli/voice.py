"""`fishrt voice`: the user's own voices, and those that come with a bundle."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click

from ..bundle import Bundle
from ..errors import BundleError
from ..prepared import prepared_path
from ..voices import Voice
from .base import (
    bundle_option,
    engine_options,
    find_voice,
    json_option,
    load_bundle,
    load_tts,
    quiet_option,
    user_store,
    voice_dir_option,
)
from .commands import print_json
from .progress import Reporter
from .streams import emit, say


@click.group(short_help="Store, list, show and remove voices.")
def voice() -> None:
    """Keep voices: what somebody says in a recording, and how."""


@voice.command()
@click.argument("name")
@click.option("--audio", required=True, type=click.Path(path_type=Path), help="Recording of one speaker; 10 to 30 s are best.")
@click.option("--text", required=True, help="What is said in it, word for word.")
@click.option("--force", is_flag=True, help="Replace a voice of this name.")
@voice_dir_option
@engine_options
@quiet_option
@json_option
def add(
    name: str,
    audio: Path,
    text: str,
    force: bool,
    voice_dir: Path | None,
    bundle: Path | None,
    provider: str,
    threads: int | None,
    quiet: bool,
    as_json: bool,
) -> None:
    """Store a recording as voice NAME (letters, digits, - _ and spaces), encoded with the bundle's codec."""
    from ..audio import read_audio

    store = user_store(voice_dir)
    store.check_free(name, force=force)
    recording = read_audio(audio)
    tts = load_tts(bundle, provider, threads)
    made = Voice.from_audio(tts, recording, text, name=name)
    folder = store.add(made, force=force)
    if as_json:
        print_json({"command": "voice add", "folder": str(folder), **_describe(made, tts.bundle)})
    else:
        Reporter(quiet=quiet).done(f"{folder}: {made.codes.shape[1]:,} frames")


@voice.command()
@click.argument("name")
@voice_dir_option
@engine_options
@quiet_option
@json_option
def prepare(
    name: str, voice_dir: Path | None, bundle: Path | None, provider: str, threads: int | None, quiet: bool, as_json: bool
) -> None:
    """Keep beside your voice NAME what the bundle's language model makes of it: speech with it then starts sooner."""
    store = user_store(voice_dir)
    made = store.load(name)
    tts = load_tts(bundle, provider, threads)
    tts.prepare(made, store.folder / name)
    path = prepared_path(store.folder / name, tts.bundle.manifest.identity("slow_ar"))
    if as_json:
        print_json({"command": "voice prepare", "file": str(path), "bytes": path.stat().st_size})
    else:
        Reporter(quiet=quiet).done(f"{path}: {path.stat().st_size / 1e6:.1f} MB")


@voice.command(name="list")
@voice_dir_option
@bundle_option
@json_option
def list_voices(voice_dir: Path | None, bundle: Path | None, as_json: bool) -> None:
    """List your voices, and those that the bundle brings."""
    store = user_store(voice_dir)
    loaded = _bundle_if_any(bundle)
    built_in = loaded.manifest.voices if loaded else None
    rows = [{"name": name, "from": "user"} for name in store.list()]
    rows += [{"name": name, "from": "bundle"} for name in (built_in.names if built_in else ())]
    if as_json:
        print_json(
            {
                "command": "voice list",
                "folder": str(store),
                "voices": rows,
                "default": built_in.default if built_in else None,
            }
        )
        return
    for row in rows:
        default = "  (default)" if built_in and row == {"name": built_in.default, "from": "bundle"} else ""
        emit(f"{row['name']}\t{row['from']}{default}")
    if not rows:
        say(f"no voices in {store}")


@voice.command()
@click.argument("name")
@voice_dir_option
@bundle_option
@json_option
def show(name: str, voice_dir: Path | None, bundle: Path | None, as_json: bool) -> None:
    """Show what is known of voice NAME; yours goes before the bundle's of the same name."""
    loaded = _bundle_if_any(bundle)
    store = find_voice(name, user_store(voice_dir), loaded)
    # A recording has no codes yet; without a bundle `load` says so.
    tts = load_tts(bundle, "auto", None) if loaded and store.is_recording(name) else None
    details = _describe(store.load(name, tts), loaded)
    if as_json:
        print_json({"command": "voice show", "folder": str(store.folder / name), **details})
    else:
        for key, value in {"folder": store.folder / name, **details}.items():
            emit(f"{key + ':':13}{value}")


@voice.command()
@click.argument("name")
@voice_dir_option
@json_option
def remove(name: str, voice_dir: Path | None, as_json: bool) -> None:
    """Delete your voice NAME. Folders that fishrt did not make are refused."""
    store = user_store(voice_dir)
    store.remove(name)
    if as_json:
        print_json({"command": "voice remove", "name": name})
    else:
        say(f"removed {name} from {store.folder}")


def _bundle_if_any(path: Path | None) -> Bundle | None:
    """The user's own voices can be looked at where no bundle is embedded; a bundle that was asked for must be there."""
    try:
        return load_bundle(path)
    except BundleError:
        if path is not None:
            raise
        return None


def _describe(made: Voice, bundle: Bundle | None) -> dict[str, Any]:
    codebooks, frames = made.codes.shape
    details: dict[str, Any] = {"name": made.name, "codebooks": codebooks, "frames": frames}
    same_codec = bundle is not None and made.fingerprint == bundle.manifest.codec.fingerprint
    if bundle is not None and same_codec:
        details["seconds"] = round(frames / bundle.manifest.codec.frame_rate, 2)
    details["codec"] = made.fingerprint or "unknown"
    if bundle is not None:
        details["this_bundle"] = (
            "made with its codec" if same_codec else "made with another codec" if made.fingerprint else "unknown"
        )
    return {**details, "transcript": made.transcript}
