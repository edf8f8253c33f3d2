"""`fishrt voice`: the user's own voices, and those that come with a bundle."""

from __future__ import annotations

import shlex
from pathlib import Path
from typing import Any

import click

from ..bundle.folder import Bundle
from ..errors import BundleError, OutputError, VoiceError
from ..voices.store import bundle_voices, find_voice
from ..voices.voice import Voice, words_option
from .base.commands import finish, warn
from .base.options import (
    EngineOptions,
    bundle_option,
    engine_options,
    json_output,
    load_bundle,
    output_options,
    user_store,
    voice_dir_option,
)


@click.group(short_help="Store, list, show and remove voices.")
def voice() -> None:
    """Store, list, show and remove voices. A voice is a recording of one speaker with its exact transcript.

    Diffusion models need no transcript.
    """


@voice.command()
@click.argument("name")
@click.option(
    "--audio",
    required=True,
    type=click.Path(path_type=Path),
    help="Recording of one speaker (wav, flac, ogg, mp3, …): 10 to 30 s for the official models, 2 to 5 s for the embedded "
    "voice. - is standard input.",
)
@click.option("--text", help="The words of the recording, exactly as spoken. A language model needs them, a diffusion model not.")
@click.option("--force", is_flag=True, help="Replace your voice of this name.")
@voice_dir_option
@engine_options
@output_options
def add(name: str, audio: Path, text: str | None, force: bool, voice_dir: Path | None, engine: EngineOptions) -> None:
    """Store a recording as voice NAME.

    NAME has letters and digits of any script, - and _, and inside also spaces and dots.

    The recording is kept, so that bundles with other codecs can use the voice, too.
    """
    from ..audio.files import read_audio

    if text is None and words_option(load_bundle(engine.bundle)):
        raise click.UsageError("Missing option '--text': the words of the recording, which this bundle's model needs.")
    store = user_store(voice_dir)
    store.check_free(name, force=force)
    recording = read_audio(audio)
    tts = engine.load(voice_dir)
    made = Voice.from_audio(tts, recording, text or "", name=name)
    folder = store.add(made, force=force)
    if name in bundle_voices(tts.bundle):
        warn(f"the bundle has a voice {name!r}, too; yours is used")
    given = {"--voice-dir": voice_dir, "--bundle": engine.bundle}
    where = "".join(f" {option} {shlex.quote(str(path))}" for option, path in given.items() if path)
    finish(
        {"folder": str(folder), **_describe(made, tts.bundle, recorded=True)},
        said=f"Added voice {name} ({len(recording[0]) / recording[1]:.1f} s). "
        f'Try: fishrt speak --voice {shlex.quote(name)}{where} "Hello!"',
    )


@voice.command(short_help="Prepare a voice, so that speech with it starts sooner.")
@click.argument("name")
@voice_dir_option
@engine_options
@output_options
def prepare(name: str, voice_dir: Path | None, engine: EngineOptions) -> None:
    """Let the bundle's model read your voice NAME now, so that speech with it starts sooner.

    The result is kept in a file, in the voice's folder, or in .prepared/NAME for a voice that another program stored.
    """
    tts = engine.load(voice_dir)
    store = find_voice(name, user_store(voice_dir), tts.bundle)
    folder = store.prepared_folder(name)
    if folder is None:
        raise VoiceError(f"the voice {name!r} belongs to the bundle; only your own voices can be prepared")
    made = store.load(name, tts)
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise OutputError(f"cannot write {folder}: {error.strerror}") from None
    tts.prepare(made, folder)
    path = tts.prepared_path(folder)
    count = path.stat().st_size
    finish(
        {"file": str(path), "bytes": count},
        said=f"Prepared voice {name} for {tts.bundle.manifest.name}: {path} ({count / 1e6:.1f} MB)",
    )


@voice.command(name="list")
@voice_dir_option
@bundle_option
@json_output
def list_voices(voice_dir: Path | None, bundle: Path | None) -> None:
    """List your voices and those of the bundle."""
    store = user_store(voice_dir)
    loaded = _bundle_if_any(bundle)
    built_in = loaded.manifest.voices if loaded else None
    rows = [{"name": name, "from": "user"} for name in store.list()]
    rows += [{"name": name, "from": "bundle"} for name in bundle_voices(loaded)]
    left_out = store.left_out()
    for reason in left_out.values():
        warn(f"left out: {reason}")
    default = built_in.default if built_in else None
    lines = []
    for row in rows:
        notes = "  (default)" if row == {"name": default, "from": "bundle"} else ""
        notes += "  (yours is used)" if row["from"] == "bundle" and {**row, "from": "user"} in rows else ""
        lines.append(f"{row['name']}\t{row['from']}{notes}")
    finish(
        {"folder": str(store), "voices": rows, "default": default, "left_out": left_out},
        printed="\n".join(lines),
        said="" if rows else f"no voices in {store}",
    )


@voice.command()
@click.argument("name")
@voice_dir_option
@bundle_option
@json_output
def show(name: str, voice_dir: Path | None, bundle: Path | None) -> None:
    """Show the codec, the length and the transcript of voice NAME. Yours is shown if the bundle has one of that name, too."""
    loaded = _bundle_if_any(bundle)
    store = find_voice(name, user_store(voice_dir), loaded)
    # A recording of another program has no codes yet; without a bundle `load` says so.
    tts = EngineOptions(bundle, "auto", None).load() if loaded and store.needs_encoder(name) else None
    made = store.load(name, tts, fingerprint=loaded.manifest.codec.fingerprint if loaded else None)
    details = {"folder": str(store.place(name)), **_describe(made, loaded, recorded=store.is_recorded(name))}
    finish(details, printed="\n".join(f"{key + ':':13}{value}" for key, value in details.items()))


@voice.command()
@click.argument("name")
@voice_dir_option
@json_output
def remove(name: str, voice_dir: Path | None) -> None:
    """Delete your voice NAME. Folders that another program made are not deleted."""
    store = user_store(voice_dir)
    if not store.holds(name) and name in bundle_voices(_bundle_if_any(None)):
        raise VoiceError(f"the voice {name!r} belongs to the bundle and cannot be removed")
    store.remove(name)
    finish({"name": name}, said=f"Removed voice {name} from {store.folder}")


def _bundle_if_any(path: Path | None) -> Bundle | None:
    """Return a bundle; None if no path is given and no bundle is embedded: the user's voices can be shown without one."""
    try:
        return load_bundle(path)
    except BundleError:
        if path is not None:
            raise
        return None


def _describe(made: Voice, bundle: Bundle | None, *, recorded: bool) -> dict[str, Any]:
    codebooks, frames = made.codes.shape
    kind = {"codebooks": codebooks} if made.latents is None else {"channels": made.latents.shape[1]}
    details: dict[str, Any] = {"name": made.name, **kind, "frames": frames}
    same_codec = bundle is not None and made.fingerprint == bundle.manifest.codec.fingerprint
    if bundle is not None and same_codec:
        details["seconds"] = round(frames / bundle.manifest.codec.frame_rate, 2)
    details["codec"] = made.fingerprint or "unknown"
    details["recording"] = "kept: any codec can use it" if recorded else "none: only codes are kept"
    if bundle is not None:
        other = "its codec encodes the recording when it is first used" if recorded else "made with another codec: cannot be used"
        details["this_bundle"] = "made with its codec" if same_codec else other if made.fingerprint else "unknown"
    if made.loudness:
        details["loudness"] = f"{made.loudness.lufs:.1f} LUFS"
    return {**details, "transcript": made.transcript}
